"""Everything that changes during training, saved and loaded as one.

| field | on resume |
|---|---|
| model, optimizer, scaler | restored |
| epoch, steps done in it, history, best, early stopping | restored; training goes on with the next step |
| random states (Python, NumPy, torch, CUDA) | restored |
| order of samples, augmentation | functions of seed, epoch and index; nothing to restore |
| learning rate | a function of the step; follows a changed --epochs |
| options | the checkpoint's, where the command line does not say otherwise; the model's shape must match |
"""

import contextlib
import functools
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from common.device import free_memory
from common.distributed import n_processes
from common.errors import UserError, first_line
from common.files import whole_file, write_json
from common.run_files import BEST, LATEST, PREVIOUS
from evaluation.checkpoints import (
    FORMAT,
    NOT_FOR_USE,
    TOWERS,
    used_up,
    write_file,
    write_frozen_tower,
)
from models.clip import CLIPModel
from models.text_encoders import TrainedRows, trained_rows
from training.step import StepModel, step_model_of

HISTORY_KEYS = (
    "train_loss", "train_acc", "val_loss", "val_acc", "val_balanced_acc", "val_macro_f1",
    "train_loss_image_to_text", "lr", "temperature", "epoch_seconds", "images_per_second",
)  # fmt: skip
COPY_OF_GPU = 0.1  # of its free memory, for one copy of a run's state


@dataclass
class EarlyStopping:
    """Stops after `patience` epochs in a row without a change of more than `min_delta` over the reference."""

    monitor: str
    patience: int | None
    min_delta: float
    reference: float | None = None
    epochs_without: int = 0

    def is_better(self, value: float, than: float | None, margin: float = 0.0) -> bool:
        if than is None:
            return True
        return value < than - margin if self.monitor == "val_loss" else value > than + margin

    def update(self, value: float) -> bool:
        """Compare first, then move the reference. True: stop now."""
        if self.is_better(value, self.reference, self.min_delta):
            self.reference, self.epochs_without = value, 0
        else:
            self.epochs_without += 1
        return used_up(self.patience, self.epochs_without)


@dataclass
class InEpoch:
    """Of the epoch that is being trained: steps done, seconds they took, and sums over their images of loss,
    image-to-text loss, correct answers and 1 (4,) float64.
    """

    steps: int = 0
    seconds: float = 0.0
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))


@dataclass
class TrainState:
    """What a run holds between two steps. `epoch` counts whole epochs done, `step` all steps done, as they
    would be with this run's batch size. nonfinite_steps: the last so many steps were skipped.
    """

    model: CLIPModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    early_stopping: EarlyStopping
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    epoch: int = 0
    step: int = 0
    in_epoch: InEpoch = field(default_factory=InEpoch)
    nonfinite_steps: int = 0
    best_value: float | None = None
    best_epoch: int = 0
    stopped_early: bool = False
    history: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in HISTORY_KEYS})

    @functools.cached_property
    def step_model(self) -> StepModel:
        return step_model_of(self.model)

    def statistics(self) -> list[torch.Tensor]:
        """The running means and variances that training changes."""
        each = [one for norm in self.step_model.norms for one in (norm.running_mean, norm.running_var)]
        return [statistic for statistic in each if statistic is not None]

    def checkpoint(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """All of it at this moment, copied, so that training may go on while it is written: within a GPU that
        has ample room for it, else to the CPU, for which training waits.

        `facts`: what is not state (config, classes, sentences, ...).
        """
        frozen, rows = frozen_towers(self.model), trained_rows(self.model)
        now = {
            "format": FORMAT,
            **facts,
            "trained_tokens": rows.tokens if rows else None,
            "model": {
                name: value
                for name, value in self.model.state_dict().items()
                if name.split(".")[0] not in frozen
            },
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {
                "step": self.step,
                "total_steps": self.total_steps,
                "warmup_steps": self.warmup_steps,
            },
            "scaler": self.scaler.state_dict(),
            "rng": _random_states(),
            "epoch": self.epoch,
            "in_epoch": {
                "steps": self.in_epoch.steps,
                "steps_per_epoch": self.steps_per_epoch,
                "seconds": self.in_epoch.seconds,
                "sums": self.in_epoch.sums,
                "nonfinite_steps": self.nonfinite_steps,
            },
            "best": {"value": self.best_value, "epoch": self.best_epoch},
            "early_stopping": {
                "reference": self.early_stopping.reference,
                "epochs_without": self.early_stopping.epochs_without,
            },
            "history": self.history,
        }
        device = self.model.logit_scale.device
        if device.type == "cuda":
            # AdamW keeps two numbers for each that is trained
            n_bytes = sum(p.nbytes * (3 if p.requires_grad else 1) for p in self.model.parameters())
            if n_bytes <= COPY_OF_GPU * free_memory(device):
                return _with_each_tensor(now, lambda tensor: tensor.detach().clone())
        return _with_each_tensor(now, lambda tensor: tensor.detach().to("cpu", copy=True))

    def restore(self, checkpoint: Mapping[str, Any], path: Path | None) -> None:
        """Take over what `checkpoint` holds. Raises UserError when it does not fit the model."""
        try:
            begun = checkpoint["in_epoch"]
            self.model.load_state_dict(checkpoint["model"])
            rates = [
                {key: group[key] for key in ("peak_lr", "weight_decay")}
                for group in self.optimizer.param_groups
            ]
            self.optimizer.load_state_dict(
                _optimizer_of(checkpoint, trained_rows(self.model), self.optimizer)
            )
            for group, own in zip(self.optimizer.param_groups, rates, strict=True):
                group |= own  # the options may have changed; moments and step counts are the checkpoint's
            if checkpoint["scaler"]:  # empty where the run so far used no scaler
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.epoch = checkpoint["epoch"]
            self.in_epoch = InEpoch(begun["steps"], begun["seconds"], begun["sums"].clone())
            self.nonfinite_steps = begun["nonfinite_steps"]
            self.step = self.epoch * self.steps_per_epoch + self.in_epoch.steps
            self.best_value, self.best_epoch = checkpoint["best"]["value"], checkpoint["best"]["epoch"]
            stopping = checkpoint["early_stopping"]
            self.early_stopping.reference = stopping["reference"]
            self.early_stopping.epochs_without = stopping["epochs_without"]
            # an epoch that was begun is trained to its end first
            self.stopped_early = not begun["steps"] and used_up(
                self.early_stopping.patience, stopping["epochs_without"]
            )
            self.history = {key: list(values) for key, values in checkpoint["history"].items()}
            _restore_random_states(checkpoint["rng"])
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(
                f"--resume-from {path} does not fit this model or is incomplete: {first_line(error)}"
            ) from None


def _optimizer_of(
    checkpoint: Mapping[str, Any], rows: TrainedRows | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """AdamW's state in `checkpoint`, of a format before 5 without what belongs to tokens that no sentence
    has. Raises ValueError when it is of other tokens than `rows`.
    """
    saved, tokens = checkpoint["optimizer"], rows.tokens.tolist() if rows else None
    if checkpoint["format"] >= 5:
        before = checkpoint["trained_tokens"]
        if (None if before is None else before.tolist()) != tokens:
            raise ValueError("its sentences had other tokens (another tokenizer?); start a new run elsewhere")
        return saved
    if tokens is None:
        return saved
    parameters = [own for group in optimizer.param_groups for own in group["params"]]
    number = next(i for i, own in enumerate(parameters) if own is rows.rows)
    moments = {
        key: value[tokens] if value.shape == rows.weight.shape else value
        for key, value in saved["state"][number].items()
    }
    return {**saved, "state": {**saved["state"], number: moments}}


def _with_each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _with_each_tensor(own, change) for key, own in value.items()}
    return [_with_each_tensor(own, change) for own in value] if isinstance(value, list) else value


def send_statistics(statistics: Sequence[torch.Tensor]) -> None:
    """With several processes BatchNorm's running statistics are the first one's, which are those that are
    saved.
    """
    if n_processes() > 1:
        for statistic in statistics:
            dist.broadcast(statistic, 0)


def frozen_towers(model: CLIPModel) -> list[str]:
    return [name for name in TOWERS if getattr(model, name) in model.frozen]


def keep_frozen_towers(folder: Path, model: CLIPModel, known_as: Mapping[str, str]) -> dict[str, str]:
    """Write what does not change once into `folder`. Returns tower -> checksum, for checkpoints; `known_as`:
    the same in a checkpoint that comes along.
    """
    return {
        tower: write_frozen_tower(
            folder,
            tower,
            {
                f"{tower}.{name}": value.detach().cpu()
                for name, value in getattr(model, tower).state_dict().items()
            },
            known_as.get(tower),
        )
        for tower in frozen_towers(model)
    }


def write_checkpoint(folder: Path, checkpoint: Mapping[str, Any], best: Mapping[str, Any] | None) -> None:
    """checkpoint_latest.pth and history.json, and where there is a new `best`, checkpoint_best.pth, which an
    empty one removes. What was the latest stays as checkpoint_previous.pth.
    """
    if best:  # first: a run that is killed between the two does this epoch again
        write_file(folder / BEST, best)
    latest, new = folder / LATEST, folder / f".{LATEST}.{os.getpid()}.new.tmp"
    try:
        write_file(new, checkpoint)
        if latest.exists():
            with whole_file(folder / PREVIOUS) as second_name:
                try:
                    os.link(latest, second_name)
                except OSError:  # a file system without links
                    shutil.copyfile(latest, second_name)
        os.replace(new, latest)
        if best == {}:  # only now: a run that goes on from the one before has it still
            (folder / BEST).unlink(missing_ok=True)
    finally:
        new.unlink(missing_ok=True)
    write_json(folder / "history.json", checkpoint["history"])


class CheckpointWriter:
    """Writes files while training goes on: at once, or so seldom that writing takes at most LARGEST_SHARE of
    a core. What is not written yet is held, and written when the block is left, however it is left (but not
    what a GPU holds that has failed, nor what was let go for a copy that fails).

    What kept files from being written is raised at a later `write`, or at the end of the block.
    """

    LARGEST_SHARE = 0.005

    def __init__(self, folder: Path, device: torch.device, save_best: bool):
        self.folder, self.device, self.save_best = folder, device, save_best
        self._latest: Mapping[str, Any] | None = None
        self._best: Mapping[str, Any] | None = None
        self._pool, self._writing = ThreadPoolExecutor(1), Future()
        self._writing.set_result(0.0)
        self._begun = time.monotonic()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def write(self, take: Callable[[], Mapping[str, Any]], is_best: bool, now: bool) -> None:
        """What `take` copies of a run: without `now`, when the last one is written and the time it took is a
        small enough share.
        """
        self._latest = None  # what it replaces leaves it its memory: new memory costs ten times the copying
        if is_best:
            self._best = None
        taken = take()
        if is_best:
            kept = taken if self.save_best else {}
            self._best = {key: value for key, value in kept.items() if key not in NOT_FOR_USE}
        self._latest = taken  # last: nothing is written without it
        if now or self._is_due():
            self._write_held()

    def _is_due(self) -> bool:
        passed = time.monotonic() - self._begun
        return self._writing.done() and self._writing.result() <= self.LARGEST_SHARE * passed

    def _write_held(self) -> None:
        self._writing.result()
        self._begun = time.monotonic()
        self._writing = self._pool.submit(self._timed, self._latest, self._best)
        self._latest = self._best = None

    def _timed(self, latest: Mapping[str, Any], best: Mapping[str, Any] | None) -> float:
        """Seconds of a processor that writing took; waiting for the disk holds no training up."""
        with _beside_training(self.device):
            started = time.thread_time()  # only now: to wait for a GPU takes a processor's time too
            latest, best = (_with_each_tensor(own, torch.Tensor.cpu) for own in (latest, best))
        write_checkpoint(self.folder, latest, best)
        return time.thread_time() - started

    def __exit__(self, *error: object) -> None:
        with self._pool:
            if self._latest is not None:
                self._write_held()
        self._writing.result()


@contextlib.contextmanager
def _beside_training(device: torch.device) -> Iterator[None]:
    """In the block, which another thread runs, what a GPU holds is read without waiting for each step that
    training has queued there.
    """
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread begins with GPU 0, which leaving the stream would open
            torch.cuda.synchronize()  # until the copies that are to be read are made
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        yield


def _random_states() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        # a run on the CPU leaves GPUs alone: to ask one for its state takes memory there
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def _restore_random_states(states: Mapping[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_initialized() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])  # of the run's device, whichever number it has now
