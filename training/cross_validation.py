"""k-fold cross-validation: every image predicted once, by the model that did not train on it."""

import contextlib
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.distributed import begun, is_main, of_the_first, wait_for_all
from common.errors import RunFailed, UserError
from common.files import MOST_OF_SPLITS, check_writable, read_json, write_json
from common.run_files import PREDICTIONS, PREVIOUS, fold_dir, saved_in
from data.findings import print_findings
from data.scan import nfc
from data.splits import Split, k_folds, missing_in_validation, splits_from_record
from evaluation.metrics import classification_metrics
from evaluation.results import headline, read_predictions, write_results
from training.begin import Ready, build_and_read, look
from training.build import n_parameters
from training.config import Config
from training.dataset import DataSet, findings_of, splits_record_of
from training.one_split import RunResult, refuse_few_images, train_on_split
from training.options import refuse_missing
from training.outputs import (
    continues,
    locked,
    prepare_output_folder,
    print_files,
    print_use,
    refuse_full_disk,
    run_record,
)
from training.resume import check_same_classes, check_same_data, check_same_sentences, read_to_resume
from training.state import keep_frozen_towers

METRICS = ("train_loss", "train_acc", "val_loss", "val_acc", "val_balanced_acc", "val_macro_f1")


@dataclass(frozen=True)
class Folds:
    """What the folds of a run share. initial: the weights that each starts from. frozen: checksums of the
    towers that none changes. begun_as: config.json.
    """

    splits: list[Split]
    initial: Mapping[str, torch.Tensor]
    frozen: Mapping[str, str]
    begun_as: bytes


def train_folds(config: Config, class_texts: Mapping[str, Any] | None = None) -> None:
    """Train all folds, or `config.fold` alone, going on where an earlier run of the same command stopped.

    Images are read once and weights once; each fold starts from the same initial weights with its own seed.
    The summary is written whenever all folds are there.
    """
    output_dir = Path(config.output_dir)
    missing, unwritable = partial(refuse_missing, config, weights=True), partial(check_writable, output_dir)
    found = look(config, class_texts, missing, unwritable)
    going_on = continues(output_dir, config, found.texts)
    ready = build_and_read(config, found)
    folds = begin_folds(config, ready, going_on)
    for number in range(1, len(folds.splits) + 1):
        if config.fold in (None, number):
            train_fold(config, ready, folds, number)
    if is_main():
        sum_up(output_dir, len(folds.splits), ready.data)


def begin_folds(config: Config, ready: Ready, going_on: bool) -> Folds:
    """Say what is odd about images and folds, and write what is of all folds into --output-dir."""
    output_dir, data, texts = Path(config.output_dir), ready.data, ready.sentences.texts
    splits_file = output_dir / "splits.json"
    if going_on and splits_file.exists():
        splits = stored_splits(splits_file, data)
    else:
        splits = k_folds(data.labels, data.groups, config.n_splits, config.random_state, data.folder.classes)

    for note in missing_in_validation(splits, data.labels, data.folder.classes):
        print(f"note: {note}")
    findings = findings_of(data, splits)
    print_findings(findings)
    refuse_full_disk(output_dir, ready.model, config)  # once more: decoded images may be on the same disk
    wait_for_all()  # the first process changes the folder, in which the others have looked
    initial, frozen, begun_as = copy.deepcopy(ready.model.state_dict()), {}, b""
    if is_main():
        with locked(output_dir, wait=True):  # jobs of other folds may be starting too
            before, going_on = going_on, continues(output_dir, config, texts)  # or have started since
            if going_on and not before and splits_file.exists():
                splits = stored_splits(splits_file, data)
            prepare_output_folder(output_dir, config.overwrite)
            if not going_on:  # first of all: it is what another fold's job, or a restart, knows the run by
                of_all_folds = dataclasses.replace(config, fold=None)
                record = run_record(of_all_folds, data, texts, ready.hardware, n_parameters(ready.model))
                write_json(output_dir / "config.json", record)
            if not splits_file.exists():
                write_json(splits_file, splits_record_of(config, data, splits))
            write_json(output_dir / "data_check.json", {"findings": findings})
            frozen = keep_frozen_towers(output_dir, ready.model, {})
            begun()
            begun_as = (output_dir / "config.json").read_bytes()
    return Folds(splits, initial, frozen, begun_as)


def train_fold(config: Config, ready: Ready, folds: Folds, number: int) -> None:
    """Unless it is finished already; from its last checkpoint where it has one."""
    output_dir, data, split = Path(config.output_dir), ready.data, folds.splits[number - 1]
    folder = fold_dir(output_dir, number)
    with contextlib.ExitStack() as until_done:
        with locked(output_dir, wait=True):  # in which another run may replace what no fold's lock keeps
            until_done.enter_context(locked(folder))
            if is_main():
                refuse_replaced(output_dir, folds.begun_as)
        # which may have had to write the fold before, or to wait for the lock
        if of_the_first((folder / PREDICTIONS).exists()):
            print(f"fold {number} of {len(folds.splits)} is finished already")
            return
        print(f"\nfold {number} of {len(folds.splits)}")
        refuse_few_images(config, split)
        checkpoint, file = None, saved_in(folder)
        if file:
            checkpoint, file = read_to_resume(file, "the fold's")
            check_same_classes(checkpoint, f"the fold's {file}", data.folder.classes)
            check_same_sentences(checkpoint, f"the fold's {file}", ready.sentences.texts)
            check_same_data(checkpoint, data, split)
        ready.model.load_state_dict(folds.initial)
        result = train_on_split(
            config, ready, split, folder, checkpoint, {},
            resumed_from=file, frozen=folds.frozen, seed=config.random_state + number,
        )  # fmt: skip
        if not is_main():
            return
        write_json(folder / "result.json", fold_result(number, split, result))
        of_fold = np.full(len(split.val), number)
        (folder / PREVIOUS).unlink(missing_ok=True)  # it has done its work
        data.predictions(split.val, result.probs, of_fold).write(folder / PREDICTIONS)


def sum_up(output_dir: Path, n_splits: int, data: DataSet) -> None:
    """Write and print the results of all folds; while folds are missing, name these."""
    missing = [k for k in range(1, n_splits + 1) if not (fold_dir(output_dir, k) / PREDICTIONS).exists()]
    if missing:
        print(f"folds not finished, before the summary: {', '.join(map(str, missing))}")
        return
    # it draws: imports that training can do without
    from evaluation.report import write_report

    with locked(output_dir, wait=True):  # jobs that end together each build it, one after the other
        summary, metrics = summarise(output_dir, n_splits, data)
        print_cv_summary(summary)
        print(f"  out of fold, last epoch, {metrics['n_images']} images: {headline(metrics)}")
        write_report(output_dir)
    print_files(output_dir)
    print_use(output_dir)


def refuse_replaced(output_dir: Path, begun_as: bytes) -> None:
    """Raises UserError unless the folder's config.json still is what this run began with."""
    config_file = output_dir / "config.json"
    if not config_file.exists() or config_file.read_bytes() != begun_as:
        raise UserError(
            f"--output-dir {output_dir} was cleared or taken by another run, after this one had begun there; "
            "give another folder"
        )


def stored_splits(path: Path, data: DataSet) -> list[Split]:
    """The folds of an existing splits.json. Raises UserError when they are not those of this run and data."""
    # the config.json beside it is this run's, or has just been compared with it
    n_splits = read_json(path.parent / "config.json", "the run's config.json")["n_splits"]
    record = read_json(path, "the run's splits.json", MOST_OF_SPLITS)
    return splits_from_record(record, path, data.folder, data.groups, data.fingerprint, n_splits)


def fold_result(number: int, split: Split, result: RunResult) -> dict[str, Any]:
    history = result.history
    last = len(history["val_acc"])

    def at(epoch: int) -> dict[str, float]:
        return {key: history[key][epoch - 1] for key in METRICS}

    return {
        "fold": number,
        "n_train": len(split.train),
        "n_val": len(split.val),
        "epochs": last,
        "stopped_early": result.stopped_early,
        "best_epoch": result.best_epoch,
        "last": at(last),
        "best": at(result.best_epoch),
        "best_val_acc": max(history["val_acc"]),
    }


def mean_std(values: Sequence[float]) -> dict[str, float]:
    """Mean and both standard deviations: of the sample (n - 1), as papers print, of the population (n)."""
    return {
        "mean": float(np.mean(values)),
        "std_sample": float(np.std(values, ddof=1)),
        "std_population": float(np.std(values)),
    }


def summarise(output_dir: Path, n_splits: int, data: DataSet) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build cv_summary.json, oof_predictions.csv and metrics.json from the folds' folders.

    Returns the content of the first and the last.
    """
    folders = [fold_dir(output_dir, number) for number in range(1, n_splits + 1)]
    folds = [read_json(folder / "result.json", "the fold's result") for folder in folders]
    parts = [read_predictions(folder / PREDICTIONS) for folder in folders]
    position = {nfc(path): i for i, path in enumerate(data.folder.paths)}
    indices = np.array([position[nfc(path)] for part in parts for path in part.paths])
    order = indices.argsort()
    if not np.array_equal(indices[order], np.arange(len(data.files))):
        raise RunFailed(
            f"the folds in {output_dir} do not predict each image once, so they are not of one split; train "
            "them anew in another --output-dir"
        )
    probs = np.concatenate([part.probs for part in parts])[order]
    of_fold = np.concatenate([part.folds for part in parts])[order]
    oof = data.predictions(indices[order], probs, of_fold)
    metrics = write_results(output_dir, oof, "oof_predictions.csv")
    summary = {
        "n_splits": n_splits,
        "classes": list(data.folder.classes),
        "folds": folds,
        "last_epoch": {key: mean_std([fold["last"][key] for fold in folds]) for key in METRICS},
        "best_epoch": {key: mean_std([fold["best"][key] for fold in folds]) for key in METRICS},
        "best_val_acc": mean_std([fold["best_val_acc"] for fold in folds]),
        "out_of_fold_last_epoch": {
            **{
                key: value * (1 if key == "loss" else 100)
                for key, value in classification_metrics(probs, data.labels).items()
            },
            "n_images": len(order),
        },
        "note": "Accuracies and F1 in percent, losses in nats. The best epoch is chosen on the fold's own "
        "validation images, so best_* are optimistic; last_epoch and out_of_fold_last_epoch are not chosen.",
    }
    write_json(output_dir / "cv_summary.json", summary)
    return summary, metrics


def print_cv_summary(summary: Mapping[str, Any]) -> None:
    print(f"\ncross-validation, {summary['n_splits']} folds, mean ± sample standard deviation")
    for title in ("last_epoch", "best_epoch"):
        cells = "  ".join(
            f"{key} {value['mean']:.4f} ± {value['std_sample']:.4f}"
            if key.endswith("loss")
            else f"{key} {value['mean']:.2f} ± {value['std_sample']:.2f} %"
            for key, value in summary[title].items()
        )
        print(f"  {title}: {cells}")
    best = summary["best_val_acc"]
    print(
        f"  best_val_acc {best['mean']:.2f} ± {best['std_sample']:.2f} % (chosen on the images it is "
        "reported on)"
    )
