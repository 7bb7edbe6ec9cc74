"""Train a model on one split: the only one of a run, or a fold's."""

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.distributed import agree_on, begun, is_main, n_processes
from common.errors import UserError
from common.files import write_json
from data.augment import Augmentation
from data.loader import EpochBatches, ImageDataset, build_loader
from data.splits import Split
from evaluation.metrics import majority_baseline
from evaluation.tables import rounded
from training.begin import Ready
from training.build import build_state, compile_image_tower
from training.config import FIELDS, Config, flag_of
from training.dataset import DataSet, split_fingerprint
from training.fit import duration, fit
from training.losses import contrastive_loss
from training.outputs import FREE_ON_CONTINUE, remove_results
from training.resume import changed_on_resume, take_over
from training.state import TrainState, keep_frozen_towers
from training.step import Criterion, StepOptions


@dataclass(frozen=True)
class RunResult:
    """What is left of a run. probs (n_val, C): the last epoch's, of the images split.val in that order."""

    history: dict[str, list[float]]
    best_epoch: int
    stopped_early: bool
    probs: np.ndarray


def train_on_split(
    config: Config,
    ready: Ready,
    split: Split,
    output_dir: Path,
    checkpoint: Mapping[str, Any] | None,
    records: Mapping[str, Any],
    *,
    resumed_from: Path | None,
    frozen: Mapping[str, str] | None,
    seed: int,
) -> RunResult:
    """Train the model on one split, from `checkpoint`, read from `resumed_from`, where given. Its files go to
    `output_dir`; `frozen`: checksums of frozen towers that are kept elsewhere, for all folds.
    """
    hardware, device, model, data = ready.hardware, ready.hardware.device, ready.model, ready.data
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # nothing here draws from these two, but a timm model might
    random.seed(seed)
    classes = data.labels if config.use_weighted_sampling else None
    train_batches = EpochBatches(split.train, config.batch_size, seed, classes)
    state = build_state(config, hardware, model, len(train_batches))
    images = ImageDataset(data.files, data.labels, config.img_size, data.squares, device)
    train_loader = build_loader(images, train_batches, config.num_workers)
    val_batches = EpochBatches(split.val, config.batch_size, None)
    val_loader = build_loader(images, val_batches, config.num_workers)
    if checkpoint:
        state.restore(checkpoint, resumed_from)
        print(f"resuming {_where(state, config.epochs)}")
    refuse_disagreement(config, data, split, state, device)
    ready.sentences.prepare(device, center=checkpoint is None)
    if config.compile:
        compile_image_tower(model, config, train_batches.smallest(), hardware)

    majority, baseline = majority_baseline(data.labels[split.train], data.labels[split.val])
    print(
        f"training on {len(split.train)} images, validating on {len(split.val)}{_grouping(config)}; "
        f"always answering {data.folder.classes[majority]!r} would score {rounded(100 * baseline)} %"
    )
    facts = facts_of(config, ready, split, checkpoint)
    if is_main():
        if frozen is None:
            frozen = keep_frozen_towers(output_dir, model, checkpoint["frozen"] if checkpoint else {})
        facts["frozen"] = frozen
        if checkpoint:  # which all have read now
            take_over(config, resumed_from, output_dir)
        remove_results(output_dir)
        begun()
        for name, record in records.items():  # only now that nothing can be refused any more
            write_json(output_dir / name, record)
    shares = np.bincount(data.labels[split.train], minlength=len(data.folder.classes)) / len(split.train)
    probs = fit(
        state,
        ready.sentences,
        train_loader,
        val_loader,
        Augmentation(config.augmentation, config.horizontal_flip, seed),
        hardware,
        StepOptions(
            micro_batch_size=config.micro_batch_size,
            cutmix_prob=config.cutmix_prob,
            criterion=criterion_of(config, shares, device),
            grad_clip=config.grad_clip,
            max_nonfinite_steps=config.max_nonfinite_steps,
            seed=seed,
        ),
        output_dir=output_dir,
        facts=facts,
        epochs=config.epochs,
        chance_loss=chance_loss(config, shares),
        save_best=config.save_best,
        save_every_minutes=config.save_every_minutes,
    )
    result = RunResult(state.history, state.best_epoch, state.stopped_early, probs)
    print_summary(config, result, baseline)
    return result


def _where(state: TrainState, epochs: int) -> str:
    """From where a restored run goes on."""
    where = f"after epoch {state.epoch} of {epochs}"
    if steps := state.in_epoch.steps:
        where = f"in epoch {state.epoch + 1} of {epochs}, after {steps} of {state.steps_per_epoch} steps"
    if state.epoch >= epochs or state.stopped_early:
        where += ": it is trained to its end already, and its results are written anew"
    return where


def facts_of(
    config: Config, ready: Ready, split: Split, checkpoint: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What checkpoints hold beside the state."""
    model, data = ready.model, ready.data
    return {
        "config": dataclasses.asdict(config),
        "changed_on_resume": changed_on_resume(config, checkpoint),
        "classes": list(data.folder.classes),
        "class_texts": {name: list(own) for name, own in ready.sentences.texts.items()},
        "preprocessing": {"img_size": config.img_size, "resize": "whole image to a square, bicubic"},
        "pretrained": {
            "image": sorted(model.image_tower.pretrained),
            "text": sorted(model.text_tower.pretrained),
        },
        "dataset_fingerprint": data.fingerprint,
        "split_fingerprint": split_fingerprint(data, split),
        "image_keys": torch.from_numpy(data.inspection.keys()),
    }


def criterion_of(config: Config, shares: np.ndarray, device: torch.device) -> Criterion:
    """The loss; `shares` (C,): of the training images, each class's."""
    log_prior = None
    if config.logit_adjustment:
        log_prior = config.logit_adjustment_tau * torch.from_numpy(shares).log().float().to(device)
    return partial(contrastive_loss, config.loss, log_prior=log_prior)


def chance_loss(config: Config, shares: np.ndarray) -> float:
    """Of a model that knows how often training shows each class, and sees no images."""
    shown = shares[shares > 0]
    if config.use_weighted_sampling:
        shown = np.full(len(shown), 1 / len(shown))
    return float(-(shown * np.log(shown)).sum())


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
    facts = {flag_of(name): getattr(config, name) for name in FIELDS if name not in FREE_ON_CONTINUE} | {
        "images": data.fingerprint,
        "split": split.val.tobytes(),
        "steps trained": (state.epoch, state.in_epoch.steps),
        "device": device.type,
    }
    differing = [what for what, fact in facts.items() if not agree_on(repr(fact))]
    if differing:
        raise UserError(
            f"the processes of this run do not see the same {', '.join(differing)}: give all machines the "
            "same command, the same images, an --output-dir that they share, and a working GPU each, or none"
        )


def _grouping(config: Config) -> str:
    where = " of --val-dir" if config.val_dir else ""
    if config.group_pattern or config.groups_file:
        return f"{where} of other patients"
    how = "" if config.val_dir else "split by image; "
    return f"{where} ({how}if patients have several images, name them with --group-pattern or --groups-file)"


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
