"""k-fold cross-validation: every image predicted once, by the model that did not train on it."""

import copy
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, shorten
from common.files import read_json, write_json
from data.scan import nfc
from data.splits import Split, k_folds
from evaluation.metrics import classification_metrics
from training.config import Config
from training.dataset import DataSet, patients_of, read_images, record_of, scan, sentences_of
from training.device import choose_hardware
from training.outputs import continues, prepare_output_folder, run_record, write_csv
from training.run import RunResult, build_model, tokenise, train_on_split
from training.state import read_checkpoint

METRICS = ("train_loss", "train_acc", "val_loss", "val_acc", "val_balanced_acc", "val_macro_f1")
PREDICTIONS = "predictions.csv"  # written last in a fold's folder: where it is, the fold is finished


def train_folds(config: Config, class_texts: Mapping[str, Any] | None = None) -> None:
    """Train all folds, or `config.fold` alone, going on where an earlier run of the same command stopped.

    Images are read once and weights once; each fold starts from the same initial weights with its own seed.
    The summary is written whenever all folds are there.
    """
    output_dir = Path(config.output_dir)
    hardware = choose_hardware(config.gpu_id, config.use_amp)
    folder, _ = scan(config)
    texts = sentences_of(config, folder, class_texts)
    patients = patients_of(config, folder)
    going_on = continues(output_dir, config, texts)

    print(f"device: {hardware.description}")
    model = build_model(config)
    sentences = tokenise(model, texts)
    initial = copy.deepcopy(model.state_dict())
    data = read_images(config, folder, None, patients)
    splits = k_folds(data.labels, data.groups, config.n_splits, config.random_state, data.folder.classes)

    prepare_output_folder(output_dir, config.overwrite)
    if not going_on:  # first of all: it is what another fold's job, or a restart, knows the run by
        write_json(output_dir / "config.json", run_record(config, data, texts, hardware))
    splits_file = output_dir / "splits.json"
    if splits_file.exists():
        splits = stored_splits(splits_file, data)
    else:
        write_json(splits_file, record_of(config, data, splits))

    for number, split in enumerate(splits, 1):
        if config.fold not in (None, number):
            continue
        fold_dir = output_dir / f"fold_{number}"
        if (fold_dir / PREDICTIONS).exists():
            print(f"fold {number} of {len(splits)} is finished already")
            continue
        print(f"\nfold {number} of {len(splits)}")
        latest = fold_dir / "checkpoint_latest.pth"
        checkpoint = read_checkpoint(latest, "the fold's checkpoint") if latest.exists() else None
        fold_dir.mkdir(exist_ok=True)
        model.load_state_dict(initial)
        result = train_on_split(
            config, hardware, model, data, split, sentences, fold_dir, checkpoint, {},
            seed=config.random_state + number,
        )  # fmt: skip
        write_json(fold_dir / "result.json", fold_result(number, split, result))
        _write_predictions(fold_dir / PREDICTIONS, data, split, number, result.probs)

    missing = [k for k in range(1, len(splits) + 1) if not (output_dir / f"fold_{k}" / PREDICTIONS).exists()]
    if missing:
        print(f"folds still to train before the summary: {', '.join(map(str, missing))}")
    else:
        print_cv_summary(summarise(output_dir, len(splits), data), output_dir)


def stored_splits(path: Path, data: DataSet) -> list[Split]:
    """The folds of an existing splits.json. Raises UserError naming the files that are new or gone since."""
    record = read_json(path, "the run's splits.json")
    index = {nfc(name): i for i, name in enumerate(data.folder.paths)}
    stored = {nfc(name) for fold in record["folds"] for name in fold["val"]}
    new, gone = sorted(index.keys() - stored), sorted(stored - index.keys())
    if new or gone:
        parts = [
            f"{len(names)} {word}:\n{shorten(names)}"
            for word, names in (("new", new), ("gone", gone))
            if names
        ]
        raise UserError(
            f"{path} does not fit the images of {data.folder.root} any more; "
            + "\n".join(parts)
            + "\nrestore the images, or start anew in another --output-dir (or with --overwrite)"
        )
    if record["dataset_fingerprint"] != data.fingerprint:
        raise UserError(
            f"images of {data.folder.root} have changed in content since {path} was written; restore them, "
            "or start a new cross-validation in another --output-dir (or with --overwrite)"
        )
    return [
        Split(*(np.array(sorted(index[nfc(name)] for name in fold[side])) for side in ("train", "val")))
        for fold in record["folds"]
    ]


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


def _write_predictions(path: Path, data: DataSet, split: Split, number: int, probs: np.ndarray) -> None:
    classes = data.folder.classes
    rows = [
        [data.folder.paths[i], classes[data.labels[i]], number, classes[p.argmax()], *map(repr, p.tolist())]
        for i, p in zip(split.val, probs, strict=True)
    ]
    write_csv(path, ["path", "label", "fold", "prediction", *(f"prob_{name}" for name in classes)], rows)


def mean_std(values: Sequence[float]) -> dict[str, float]:
    """Mean and both standard deviations: of the sample (n - 1), as papers print, of the population (n)."""
    return {
        "mean": float(np.mean(values)),
        "std_sample": float(np.std(values, ddof=1)),
        "std_population": float(np.std(values)),
    }


def summarise(output_dir: Path, n_splits: int, data: DataSet) -> dict[str, Any]:
    """Build cv_summary.json and oof_predictions.csv from the folds' folders; return the former's content."""
    folds, rows, header = [], [], []
    for number in range(1, n_splits + 1):
        fold_dir = output_dir / f"fold_{number}"
        folds.append(read_json(fold_dir / "result.json", "the fold's result"))
        with open(fold_dir / PREDICTIONS, encoding="utf-8-sig", newline="") as file:
            header, *own = csv.reader(file)
            rows += own
    position = {path: i for i, path in enumerate(data.folder.paths)}
    rows.sort(key=lambda row: position[row[0]])
    write_csv(output_dir / "oof_predictions.csv", header, rows)

    probs = np.array([[float(p) for p in row[4:]] for row in rows])
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
            "n_images": len(rows),
        },
        "note": "Accuracies and F1 in percent, losses in nats. The best epoch is chosen on the fold's own "
        "validation images, so best_* are optimistic; last_epoch and out_of_fold_last_epoch are not chosen.",
    }
    write_json(output_dir / "cv_summary.json", summary)
    return summary


def print_cv_summary(summary: Mapping[str, Any], output_dir: Path) -> None:
    print(f"\ncross-validation, {summary['n_splits']} folds, mean ± sample standard deviation")
    for title in ("last_epoch", "best_epoch"):
        cells = "  ".join(
            f"{key} {value['mean']:.4f} ± {value['std_sample']:.4f}" for key, value in summary[title].items()
        )
        print(f"  {title}: {cells}")
    best, oof = summary["best_val_acc"], summary["out_of_fold_last_epoch"]
    print(
        f"  best_val_acc {best['mean']:.2f} ± {best['std_sample']:.2f} (chosen on the images it is "
        "reported on)\n"
        f"  out of fold, last epoch, {oof['n_images']} images: accuracy {oof['acc']:.2f} %, "
        f"balanced {oof['balanced_acc']:.2f} %, macro-F1 {oof['macro_f1']:.2f} %\n"
        f"files in {output_dir}: cv_summary.json, oof_predictions.csv, splits.json, config.json, fold_1 ... "
        f"fold_{summary['n_splits']}"
    )
