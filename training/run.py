"""One run from options to results: check, build, read, split, train, sum up."""

import dataclasses
import random
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.device import Hardware, choose_hardware
from common.distributed import agree_on, begun, first_here_first, is_main, n_processes, wait_for_all
from common.errors import UserError, all_of
from common.files import PREVIOUS, check_writable, write_json
from data.augment import Augmentation
from data.findings import print_findings
from data.loader import EpochBatches, ImageDataset, build_loader
from data.splits import Split
from evaluation.metrics import majority_baseline
from evaluation.results import headline, write_results
from models.clip import ClassSentences, CLIPModel
from training.build import (
    build_model,
    build_state,
    compile_image_tower,
    n_parameters,
    refuse_unfit,
    tokenise,
)
from training.config import FIELDS, PRESETS, Config, as_typed, named
from training.dataset import (
    DataSet,
    findings_of,
    patients_of,
    read_images,
    record_of,
    scan,
    sentences_of,
    split_fingerprint,
    split_of,
)
from training.fit import duration, fit
from training.losses import contrastive_loss
from training.options import refuse_missing
from training.outputs import (
    FREE_ON_CONTINUE,
    LOCK,
    locked,
    prepare_output_folder,
    print_files,
    refuse_full_disk,
    refuse_results,
    remove_results,
    resumes_in,
    run_record,
)
from training.resume import (
    changed_on_resume,
    check_same_classes,
    check_same_data,
    config_of_resumed_run,
    take_over,
)
from training.state import TrainState, keep_frozen_towers, read_to_resume
from training.step import StepOptions


@dataclass(frozen=True)
class RunResult:
    """What is left of a run. probs (n_val, C): the last epoch's, of the images split.val in that order."""

    history: dict[str, list[float]]
    best_epoch: int
    stopped_early: bool
    probs: np.ndarray


def run(config: Config, typed: Mapping[str, Any]) -> int:
    """Dispatch to the kind of run that is asked for. `typed`: the options given on the command line.

    Returns the exit code.
    """
    if n_processes() > 1 and config.multi_config and config.overwrite:
        raise UserError(
            "--overwrite with --multi-config and torchrun: should torchrun start it anew, finished entries "
            "could not be told from older ones; remove the folder instead"
        )
    if config.sync_batchnorm and n_processes() == 1:
        print("note: with one process --sync-batchnorm changes nothing")
    if config.multi_config:
        from training.multi_config import train_entries

        return train_entries(config, typed)
    train(config, typed)
    return 0


def train(config: Config, typed: Mapping[str, Any], class_texts: Mapping[str, Any] | None = None) -> None:
    """Train one configuration, on one split or on the folds of a cross-validation.

    `class_texts`: class name -> sentence or list of sentences, for callers from Python.
    """
    if config.use_cv:
        from training.cross_validation import train_folds

        train_folds(config, class_texts)
    else:
        train_single(config, typed, class_texts)


def refuse_for_processes(config: Config) -> None:
    """Raises UserError for options that so many processes cannot train with."""
    n = n_processes()
    problems = []
    if config.batch_size < n:
        problems.append(
            f"--batch-size {config.batch_size} is for all {n} processes together, and each needs an image; "
            "raise it, or start fewer processes"
        )
    elif config.cutmix_prob and config.batch_size < 2 * n:
        problems.append(
            f"{named('cutmix_prob', config)} pairs images within a process, and --batch-size "
            f"{config.batch_size} leaves some of the {n} with one image; raise it, or start fewer processes"
        )
    if config.compile and n > 1:
        problems.append(
            "--compile was never tried with several processes, of which each would compile; leave it out, or "
            "start one process"
        )
    if problems:
        raise UserError(*problems)


def say_what_options_do(config: Config) -> None:
    """What the preset sets, and of what is set twice."""
    if config.preset:
        by_it, given = [], []
        for name, value in PRESETS[config.preset].items():
            own = getattr(config, name)
            words = as_typed(name, own)
            if name == "logit_adjustment" and own and config.logit_adjustment_tau != 1:
                words += f" (with --logit-adjustment-tau {config.logit_adjustment_tau:g})"
            (by_it if own == value else given).append(words)
        instead = f"; given instead: {', '.join(given)}" if given else ""
        print(f"preset {config.preset} sets {', '.join(by_it) or 'nothing'}{instead}")
    if config.use_weighted_sampling and config.logit_adjustment:
        print(
            "note: --use-weighted-sampling and --logit-adjustment both make up for rare classes; together "
            "they do it twice, and frequent classes may be missed for it"
        )


def train_single(
    config: Config, typed: Mapping[str, Any], class_texts: Mapping[str, Any] | None = None
) -> RunResult:
    """Train one model on one split. Everything that can be refused is refused before the images are read."""
    checkpoint = None
    missing = partial(refuse_missing, config, weights=not config.resume_from)
    if config.resume_from:
        checkpoint, file = read_to_resume(Path(config.resume_from))
        config = dataclasses.replace(config, resume_from=str(file))
        config = config_of_resumed_run(config, checkpoint, typed)
    refuse_for_processes(config)
    say_what_options_do(config)
    output_dir = Path(config.output_dir)
    hardware = choose_hardware(config.gpu_id, config.use_amp)
    with first_here_first():  # the others find the shards fetched
        taken, unfit = partial(refuse_taken, output_dir, config), partial(refuse_unfit, config)
        folder, val_folder = scan(config, missing, taken, unfit)
    texts, patients = all_of(
        partial(sentences_of, config, folder, class_texts), partial(patients_of, config, folder, val_folder)
    )
    if checkpoint:
        check_same_classes(checkpoint, f"--resume-from {config.resume_from}", folder.classes, texts)

    print(f"device: {hardware.description}")
    model = build_model(config, hardware, checkpoint)
    refuse_full_disk(output_dir, model, config)
    sentences = tokenise(model, texts)
    with first_here_first():  # the others find the cache made
        data = read_images(config, folder, val_folder, patients, at_least=2 if val_folder is None else 1)
    split = split_of(config, data)
    refuse_few_images(config, split)
    if checkpoint:
        check_same_data(checkpoint, data, split)

    findings = findings_of(data, [split])
    print_findings(findings)

    refuse_full_disk(output_dir, model, config)  # once more: decoded images may be kept on the same disk
    wait_for_all()  # the first process changes the folder, in which the others have looked
    with locked(output_dir):
        if is_main():
            refuse_results(output_dir, config)  # another run may have used the folder while images were read
            # what was killed before its first checkpoint left nothing to go on from
            prepare_output_folder(output_dir, overwrite=not resumes_in(output_dir, config))
        records = {
            "config.json": {
                **run_record(config, data, texts, hardware, n_parameters(model)),
                "changed_on_resume": changed_on_resume(config, checkpoint),
            },
            "splits.json": record_of(config, data, [split]),
            "data_check.json": {"findings": findings},
        }
        result = train_on_split(
            config,
            hardware,
            model,
            data,
            split,
            sentences,
            output_dir,
            checkpoint,
            records,
            resumed_from=Path(config.resume_from) if config.resume_from else None,
            frozen=None,
            seed=config.random_state,
        )
        if not is_main():
            return result
        metrics = write_results(output_dir, data.predictions(split.val, result.probs), "predictions.csv")
        print(f"last epoch: {headline(metrics)}")
        # it draws: two seconds of imports that training can do without
        from evaluation.report import write_report

        (output_dir / PREVIOUS).unlink(missing_ok=True)  # it has done its work
        write_report(output_dir)  # last: where it is, the run is finished
        print_files(output_dir)
        print_use(output_dir)
    return result


def refuse_taken(output_dir: Path, config: Config) -> None:
    """Raises InUse, or as `refuse_results`: better now than after the images are read."""
    check_writable(output_dir)
    if (output_dir / LOCK).exists():
        with locked(output_dir):
            pass
    refuse_results(output_dir, config)


def train_on_split(
    config: Config,
    hardware: Hardware,
    model: CLIPModel,
    data: DataSet,
    split: Split,
    sentences: ClassSentences,
    output_dir: Path,
    checkpoint: Mapping[str, Any] | None,
    records: Mapping[str, Any],
    *,
    resumed_from: Path | None,
    frozen: Mapping[str, str] | None,
    seed: int,
) -> RunResult:
    """Train `model` on one split, from `checkpoint`, read from `resumed_from`, where given. Its files go to
    `output_dir`; `frozen`: checksums of frozen towers that are kept elsewhere, for all folds.
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # nothing here draws from these two, but a timm model might
    random.seed(seed)
    classes = data.labels if config.use_weighted_sampling else None
    train_batches = EpochBatches(split.train, config.batch_size, seed, classes)
    state = build_state(config, hardware, model, len(train_batches))
    device = hardware.device
    images = ImageDataset(data.files, data.labels, config.img_size, data.squares, device)
    train_loader = build_loader(images, train_batches, config.num_workers)
    val_batches = EpochBatches(split.val, config.batch_size, None)
    val_loader = build_loader(images, val_batches, config.num_workers)
    if checkpoint:
        state.restore(checkpoint, resumed_from)
        where = f"after epoch {state.epoch} of {config.epochs}"
        if steps := state.in_epoch.steps:
            of_epoch = f"after {steps} of {state.steps_per_epoch} steps"
            where = f"in epoch {state.epoch + 1} of {config.epochs}, {of_epoch}"
        if state.epoch >= config.epochs or state.stopped_early:
            where += ": it is trained to its end already, and its results are written anew"
        print(f"resuming {where}")
    refuse_disagreement(config, data, split, state, device)
    sentences.prepare(device, center=checkpoint is None)
    if config.compile:
        compile_image_tower(model, config, train_batches.smallest(), hardware)

    majority, baseline = majority_baseline(data.labels[split.train], data.labels[split.val])
    print(
        f"training on {len(split.train)} images, validating on {len(split.val)}{_grouping(config)}; "
        f"always answering {data.folder.classes[majority]!r} would score {100 * baseline:.1f} %"
    )
    facts = {
        "config": dataclasses.asdict(config),
        "changed_on_resume": changed_on_resume(config, checkpoint),
        "classes": list(data.folder.classes),
        "class_texts": {name: list(own) for name, own in sentences.texts.items()},
        "preprocessing": {"img_size": config.img_size, "resize": "whole image to a square, bicubic"},
        "pretrained": {
            "image": sorted(model.image_tower.pretrained),
            "text": sorted(model.text_tower.pretrained),
        },
        "dataset_fingerprint": data.fingerprint,
        "split_fingerprint": split_fingerprint(data, split),
        "image_keys": torch.from_numpy(data.inspection.keys()),
    }
    if is_main():
        facts["frozen"] = keep_frozen_towers(output_dir, model) if frozen is None else frozen
        if checkpoint:  # which all have read now
            take_over(config, resumed_from, output_dir)
        remove_results(output_dir)
        begun()
        for name, record in records.items():  # only now that nothing can be refused any more
            write_json(output_dir / name, record)
    shares = np.bincount(data.labels[split.train], minlength=len(data.folder.classes)) / len(split.train)
    log_prior = None
    if config.logit_adjustment:
        log_prior = config.logit_adjustment_tau * torch.from_numpy(shares).log().float().to(device)
    if config.use_weighted_sampling:
        shares = (shares > 0) / np.count_nonzero(shares)
    probs = fit(
        state,
        sentences,
        train_loader,
        val_loader,
        Augmentation(config.augmentation, config.horizontal_flip, seed),
        hardware,
        StepOptions(
            micro_batch_size=config.micro_batch_size,
            cutmix_prob=config.cutmix_prob,
            criterion=partial(contrastive_loss, config.loss, log_prior=log_prior),
            grad_clip=config.grad_clip,
            max_nonfinite_steps=config.max_nonfinite_steps,
            seed=seed,
        ),
        output_dir=output_dir,
        facts=facts,
        epochs=config.epochs,
        chance_loss=float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum()),
        save_best=config.save_best,
        save_every_minutes=config.save_every_minutes,
    )
    result = RunResult(state.history, state.best_epoch, state.stopped_early, probs)
    print_summary(config, result, baseline)
    return result


def refuse_few_images(config: Config, split: Split) -> None:
    """Raises UserError when a step would leave a process without images."""
    smallest = EpochBatches(split.train, config.batch_size, None).smallest()
    if smallest < n_processes():
        raise UserError(
            f"a step has as few as {smallest} of the {len(split.train)} training images, and each of the "
            f"{n_processes()} processes needs one; raise --batch-size, or start fewer processes"
        )


def refuse_disagreement(
    config: Config, data: DataSet, split: Split, state: TrainState, device: torch.device
) -> None:
    """Raises UserError when the processes of the run would not train the same model."""
    options = {name: getattr(config, name) for name in FIELDS if name not in FREE_ON_CONTINUE}
    facts = (options, split_fingerprint(data, split), state.epoch, state.in_epoch.steps, device.type)
    if not agree_on(repr(facts)):
        raise UserError(
            "the processes of this run do not see the same: give all machines the same command, the same "
            "images, an --output-dir that they share, and a working GPU each, or none"
        )


def _grouping(config: Config) -> str:
    if config.val_dir:
        return " of --val-dir"
    if config.group_pattern or config.groups_file:
        return " of other patients"
    return (
        " (split by image; if patients have several images, name them with --group-pattern or --groups-file)"
    )


def print_summary(config: Config, result: RunResult, baseline: float) -> None:
    history, last = result.history, len(result.history["val_acc"])
    print(f"\ndone: {last} epoch{'s' * (last != 1)}, {duration(sum(history['epoch_seconds']))}")
    for title, epoch in (
        (f"last epoch ({last})", last),
        (f"best epoch ({result.best_epoch})", result.best_epoch),
    ):
        row = {key: values[epoch - 1] for key, values in history.items()}
        print(
            f"  {title:16s}  val accuracy {row['val_acc']:6.2f} %  balanced {row['val_balanced_acc']:6.2f} "
            "%  "
            f"macro-F1 {row['val_macro_f1']:6.2f} %  loss {row['val_loss']:.4f}"
        )
    print(f"  {'majority class':16s}  val accuracy {100 * baseline:6.2f} %")
    print(
        f"The best epoch was chosen by {config.early_stopping_monitor} on these same images, so its numbers "
        "are optimistic; the last epoch's are not chosen."
    )


def print_use(output_dir: Path) -> None:
    command = ["python", "predict_clip.py", "--checkpoint", str(output_dir)]
    print(f"to use the model: {shlex.join(command)} --input IMAGES --output FILE.csv")
