"""The training loop: what happens to a batch, an epoch, a run, in the order it happens."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.device import Hardware, keep_freed_memory
from common.errors import RunFailed, shorten
from common.files import write_json
from data.augment import Augmentation
from data.loader import EpochBatches
from evaluation.metrics import classification_metrics
from evaluation.predict import predict_probs
from models.clip import ClassSentences
from training.losses import contrastive_loss
from training.optim import lr_factor
from training.state import CheckpointWriter, TrainState

CHECK_EVERY_STEPS = 20  # a look at the loss makes a GPU wait, so it is not taken at every step


def train_one_epoch(
    state: TrainState,
    sentences: ClassSentences,
    loader: DataLoader,
    augment: Augmentation,
    hardware: Hardware,
    *,
    loss_kind: str,
    grad_clip: float,
    seed: int,
) -> dict[str, float]:
    """One pass over the training images, each through the image tower once. Means over images, accuracy
    over classes.

    Raises RunFailed naming the batch's files when the loss is not finite; what was saved before stays.
    """
    model, optimizer, device = state.model.train(), state.optimizer, hardware.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, image-to-text loss, correct images
    n_images = 0
    unchecked: list[tuple[torch.Tensor, torch.Tensor]] = []
    progress = tqdm(loader, desc=f"epoch {state.epoch + 1}", unit="batch", leave=False, disable=None)
    for images, labels, indices in progress:
        factor = lr_factor(state.step, state.total_steps, state.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images = augment(images, state.epoch, indices)  # (B, 3, S, S)
        with hardware.autocast():
            image_features = model.encode_image(images)  # (B, D)
            draw = torch.Generator().manual_seed(seed * 1_000_003 + state.step)
            text_features = sentences.features_for_step(draw)  # (C, D)
        logits = model.logit_scale.exp() * image_features @ text_features.T  # (B, C)
        loss, loss_image_to_text = contrastive_loss(loss_kind, logits, labels)

        optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if grad_clip and (device.type != "cpu" or norm > grad_clip):  # to look at it would make a GPU wait
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
        state.scaler.step(optimizer)
        state.scaler.update()
        model.clamp_logit_scale()
        state.step += 1

        with torch.no_grad():
            correct = (logits.argmax(dim=1) == labels).sum()
            sums += torch.stack(
                [loss.double() * len(labels), loss_image_to_text.double() * len(labels), correct.double()]
            )
        n_images += len(labels)
        # with float16 an infinite gradient is the scaler's business: it skips the step and scales less
        unchecked.append((loss.detach() if state.scaler.is_enabled() else loss.detach() + norm, indices))
        if len(unchecked) == CHECK_EVERY_STEPS:
            _check_finite(unchecked, loader)
    _check_finite(unchecked, loader)
    loss_mean, image_to_text_mean, accuracy = (sums / n_images).tolist()
    return {
        "train_loss": loss_mean,
        "train_loss_image_to_text": image_to_text_mean,
        "train_acc": 100 * accuracy,
    }


def _check_finite(unchecked: list[tuple[torch.Tensor, torch.Tensor]], loader: DataLoader) -> None:
    finite = torch.isfinite(torch.stack([loss for loss, _ in unchecked])).tolist() if unchecked else []
    if not all(finite):
        _, indices = unchecked[finite.index(False)]
        files = [str(loader.dataset.files[i]) for i in indices.tolist()]
        raise RunFailed(
            f"the loss or its gradient is not a finite number; the images of that batch:\n"
            f"{shorten(files, 64)}\n"
            "look at these images, lower --learning-rate, or train with --no-amp; earlier checkpoints are "
            "intact"
        )
    unchecked.clear()


def validate(
    state: TrainState, sentences: ClassSentences, loader: DataLoader, hardware: Hardware
) -> tuple[dict[str, float], np.ndarray, torch.Tensor]:
    """Validation metrics (percent, loss in nats), and the probabilities (N, C) and class features (C, D)
    behind them.
    """
    model = state.model.eval()
    with hardware.autocast():
        class_features = sentences.features()
    probs, labels = predict_probs(model, class_features, loader, hardware.autocast(), hardware.device)
    if not np.isfinite(probs).all():
        raise RunFailed(
            "the model's probabilities are not finite; lower --learning-rate or train with --no-amp"
        )
    metrics = classification_metrics(probs, labels)
    percent = {f"val_{key}": value * (1 if key == "loss" else 100) for key, value in metrics.items()}
    return percent, probs, class_features


def fit(
    state: TrainState,
    sentences: ClassSentences,
    train_loader: DataLoader,
    val_loader: DataLoader,
    augment: Augmentation,
    hardware: Hardware,
    *,
    output_dir: Path,
    facts: Mapping[str, Any],
    epochs: int,
    loss_kind: str,
    grad_clip: float,
    seed: int,
    save_best: bool,
) -> np.ndarray:
    """Train until `epochs` are done or early stopping says so, writing checkpoints and history after each
    epoch. Returns the last epoch's validation probabilities (n_val, C), in the order of `val_loader`.
    """
    batches = train_loader.batch_sampler
    assert isinstance(batches, EpochBatches)
    started, first, probs = time.monotonic(), state.epoch, None
    if state.epoch:  # the run may have been killed between its checkpoint and its history
        write_json(output_dir / "history.json", state.history)
    if hardware.device.type == "cpu":
        keep_freed_memory()
    with CheckpointWriter(output_dir) as writer:
        while state.epoch < epochs and not state.stopped_early:
            epoch_started = time.monotonic()
            batches.epoch = state.epoch
            row = train_one_epoch(
                state, sentences, train_loader, augment, hardware,
                loss_kind=loss_kind, grad_clip=grad_clip, seed=seed,
            )  # fmt: skip
            train_seconds = time.monotonic() - epoch_started
            metrics, probs, class_features = validate(state, sentences, val_loader, hardware)
            state.epoch += 1
            row |= metrics
            row["lr"] = max(group["lr"] for group in state.optimizer.param_groups)
            row["temperature"] = float(torch.exp(-state.model.logit_scale.detach()))
            row["epoch_seconds"] = time.monotonic() - epoch_started
            row["images_per_second"] = len(batches.indices) / train_seconds
            for key, values in state.history.items():
                values.append(row[key])

            value = row[state.early_stopping.monitor]
            is_best = state.early_stopping.is_better(value, state.best_value)
            if is_best:
                state.best_value, state.best_epoch = value, state.epoch
            state.stopped_early = state.early_stopping.update(value)

            now = {**facts, "class_features": class_features.cpu()}  # so that images need no text tower later
            writer.write(state.checkpoint(now), save_best and is_best)
            left = (time.monotonic() - started) / (state.epoch - first) * (epochs - state.epoch)
            print(epoch_line(state.epoch, epochs, row, is_best, left), flush=True)
    if state.stopped_early:
        print(
            f"stopped early: {state.early_stopping.monitor} has not improved by more than "
            f"{state.early_stopping.min_delta:g} for {state.early_stopping.epochs_without} epochs"
        )
    if probs is None:  # resumed when all epochs were done
        _, probs, _ = validate(state, sentences, val_loader, hardware)
    return probs


def epoch_line(epoch: int, epochs: int, row: Mapping[str, float], is_best: bool, seconds_left: float) -> str:
    return (
        f"epoch {epoch:{len(str(epochs))}d}/{epochs}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_acc']:5.2f} %  "
        f"val loss {row['val_loss']:.4f} acc {row['val_acc']:5.2f} % balanced "
        f"{row['val_balanced_acc']:5.2f} %  "
        f"lr {row['lr']:.2e}  {row['epoch_seconds']:.1f} s  {row['images_per_second']:.0f} img/s  "
        f"left {duration(seconds_left)}{'  best' if is_best else ''}"
    )


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {seconds:02d} s"
        if minutes
        else f"{seconds} s"
    )
