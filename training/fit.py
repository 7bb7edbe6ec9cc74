"""The training loop: what happens to a batch, an epoch, a run, in the order it happens."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.device import Hardware, keep_freed_memory
from common.distributed import is_main, maximum, rank, wait_for_all
from common.errors import RunFailed
from common.files import write_json
from common.progress import progress
from common.stopping import Requests, Stoppable, Stopped
from data.augment import Augmentation
from data.loader import EpochBatches
from evaluation.metrics import classification_metrics
from evaluation.predict import predict_probs
from models.clip import ClassSentences
from training.cutmix import draw_box, opposite, with_boxes
from training.finite import FiniteSteps
from training.optim import gradient_norm, lr_factor
from training.state import CheckpointWriter, InEpoch, TrainState, send_statistics
from training.step import StepOptions, loss_and_gradients, parts_of

HINT_AFTER_EPOCHS = 5


def train_one_epoch(
    state: TrainState,
    sentences: ClassSentences,
    loader: DataLoader,
    augment: Augmentation,
    hardware: Hardware,
    options: StepOptions,
    requests: Requests,
    save: Callable[[], None],
) -> dict[str, float]:
    """One pass over the training images, or what is left of a pass that was begun before. Means over images,
    accuracy over classes; of an image with a box of another in it, both by their shares.

    Raises RunFailed naming the batch's files when as many steps in a row as `options` allow had a loss or
    gradient that is not finite; what was saved before stays. Raises Stopped, after saving, when `requests`
    ask for it.
    """
    model, optimizer, device, done = state.model.train(), state.optimizer, hardware.device, state.in_epoch
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    watch = FiniteSteps(state, loader.dataset.files, options.max_nonfinite_steps)
    done.sums = done.sums.to(device)
    started = time.monotonic() - done.seconds
    name, in_all = f"epoch {state.epoch + 1}", state.steps_per_epoch
    for images, labels, indices in progress(loader, name, initial=done.steps, total=in_all, unit="batch"):
        factor = lr_factor(state.step, state.total_steps, state.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

        # of several processes each has its share of the images, and all labels and indices (B,)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if rank():  # else all processes would drop the same units
            torch.manual_seed(options.seed + 1_000_003 * (state.total_steps * rank() + state.step))
        parts = parts_of(images, indices, options.micro_batch_size)
        views = [partial(augment, own, state.epoch, own_indices) for own, own_indices in parts]
        criterion = options.criterion
        box = draw_box(options.cutmix_prob, images.shape[-1], options.seed, state.step)
        if box:
            views = [box.pasted(view) for view in views]
            facing = opposite(len(labels), options.micro_batch_size)
            of_boxes = labels[facing.to(device, non_blocking=True)]
            criterion = with_boxes(criterion, box, of_boxes)
        texts = sentences.for_step(torch.Generator().manual_seed(options.seed * 1_000_003 + state.step))

        optimizer.zero_grad(set_to_none=True)
        loss, loss_image_to_text, logits = loss_and_gradients(
            state.step_model, views, texts, labels, criterion, state.scaler, hardware.autocast
        )
        state.scaler.unscale_(optimizer)
        norm = gradient_norm([p.grad for p in trained if p.grad is not None])
        if options.grad_clip:
            optimizer.grad_scale = (norm / options.grad_clip).clamp(min=1)  # a fused optimizer divides by it
        # with float16 an infinite gradient is the scaler's business: it skips the step and scales less
        finite = torch.isfinite(loss if state.scaler.is_enabled() else loss + norm)
        optimizer.found_inf = (~finite).float()  # a fused optimizer does nothing where it is 1
        watch.note(finite, indices)
        state.scaler.step(optimizer)
        state.scaler.update()
        model.clamp_logit_scale()

        predicted = logits.argmax(dim=1)
        correct = (predicted == labels).sum()
        if box:
            correct = box.divided(correct, (predicted == of_boxes).sum())
        n = torch.full_like(loss, len(labels), dtype=torch.float64)
        sums = torch.stack([loss * n, loss_image_to_text * n, correct.double(), n])
        done.sums += torch.where(finite, sums, 0)
        watch.check()
        state.step += 1
        done.steps += 1
        done.seconds = time.monotonic() - started
        if requests.to_save():
            watch.check(now=True)
            save()
            requests.end_if_asked()
    watch.check(now=True)
    *sums, n_images = done.sums.tolist()
    if not n_images:
        raise RunFailed("no step of this epoch had a finite loss and gradient; lower --learning-rate")
    return {
        "train_loss": sums[0] / n_images,
        "train_loss_image_to_text": sums[1] / n_images,
        "train_acc": 100 * sums[2] / n_images,
    }


def validate(
    state: TrainState, sentences: ClassSentences, loader: DataLoader, hardware: Hardware, requests: Requests
) -> tuple[dict[str, float], np.ndarray, torch.Tensor]:
    """Validation metrics (percent, loss in nats), and the probabilities (N, C) and class features (C, D)
    behind them.
    """
    model = state.model.eval()
    send_statistics(state.statistics())
    with hardware.autocast():
        class_features = sentences.features()
    probs, labels = predict_probs(
        model, class_features, Stoppable(loader, requests), hardware.autocast(), hardware.device
    )
    if not np.isfinite(probs).all():
        raise RunFailed(
            "the model's probabilities are not finite; lower --learning-rate or train with --no-amp"
        )
    metrics = classification_metrics(probs, labels)
    percent = {f"val_{key}": value * (1 if key == "loss" else 100) for key, value in metrics.items()}
    return percent, probs, class_features


@contextlib.contextmanager
def stopping_together() -> Iterator[None]:
    """torchrun ends all processes with the first that ends, and another may still be writing."""
    try:
        yield
    except Stopped:
        wait_for_all()
        raise


def fit(
    state: TrainState,
    sentences: ClassSentences,
    train_loader: DataLoader,
    val_loader: DataLoader,
    augment: Augmentation,
    hardware: Hardware,
    options: StepOptions,
    *,
    output_dir: Path,
    facts: Mapping[str, Any],
    epochs: int,
    chance_loss: float,
    save_best: bool,
    save_every_minutes: float,
) -> np.ndarray:
    """Train until `epochs` are done or early stopping says so, writing checkpoints and history after epochs
    (see CheckpointWriter) and every so many minutes. Returns the last epoch's validation probabilities
    (n_val, C), in the order of `val_loader`. `chance_loss`: of a model that knows how frequent classes are
    and sees no images.

    Raises Stopped, after saving, on SIGINT, SIGTERM and SIGHUP.
    """
    batches = train_loader.batch_sampler
    assert isinstance(batches, EpochBatches)
    first, probs = state.epoch, None
    if state.epoch and is_main():  # the run may have been killed between its checkpoint and its history
        write_json(output_dir / "history.json", state.history)
    if hardware.device.type == "cpu":
        keep_freed_memory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(stopping_together())
        # left last, so that no signal keeps the writer from writing what it holds
        requests = stack.enter_context(Requests(60 * save_every_minutes, maximum, is_main()))
        writer = None
        if is_main():
            writer = stack.enter_context(CheckpointWriter(output_dir, hardware.device, save_best))

        def save(class_features: torch.Tensor | None = None, is_best: bool = False) -> None:
            """`class_features`: of a validated epoch, so that images need no text tower later."""
            at_an_end = class_features is not None
            if requests.stop and not at_an_end:
                steps = f"step {state.in_epoch.steps} of {state.steps_per_epoch}"
                tqdm.write(f"stopping: saving after {steps} of epoch {state.epoch + 1}")
            if writer:
                features = class_features.cpu() if at_an_end else None
                take = partial(state.checkpoint, {**facts, "class_features": features})
                writer.write(take, is_best, now=not at_an_end)
            if not at_an_end:
                requests.saved()

        while state.epoch < epochs and not state.stopped_early:
            requests.end_if_asked()
            batches.epoch, batches.start = state.epoch, state.in_epoch.steps
            row = train_one_epoch(state, sentences, train_loader, augment, hardware, options, requests, save)
            validation_started = time.monotonic()
            try:
                metrics, probs, class_features = validate(state, sentences, val_loader, hardware, requests)
            except Stopped:
                save()
                raise
            row |= metrics
            row["lr"] = max(group["lr"] for group in state.optimizer.param_groups)
            row["temperature"] = float(torch.exp(-state.model.logit_scale.detach()))
            row["epoch_seconds"] = state.in_epoch.seconds + time.monotonic() - validation_started
            row["images_per_second"] = len(batches.indices) / state.in_epoch.seconds
            state.epoch, state.in_epoch = state.epoch + 1, InEpoch()
            for key, values in state.history.items():
                values.append(row[key])

            value = row[state.early_stopping.monitor]
            is_best = state.early_stopping.is_better(value, state.best_value)
            if is_best:
                state.best_value, state.best_epoch = value, state.epoch
            state.stopped_early = state.early_stopping.update(value)
            save(class_features, is_best)
            left = np.mean(state.history["epoch_seconds"][first:]) * (epochs - state.epoch)
            print(epoch_line(state.history, epochs, is_best, left), flush=True)
            if stuck_at_chance(state.history["train_loss_image_to_text"], chance_loss):
                print(CHANCE_HINT, flush=True)
        if probs is None:  # resumed when all epochs were done
            _, probs, class_features = validate(state, sentences, val_loader, hardware, requests)
            save(class_features)  # with the options by which it is finished
    if state.stopped_early:
        print(
            f"stopped early: {state.early_stopping.monitor} has not improved by more than "
            f"{state.early_stopping.min_delta:g} for {state.early_stopping.epochs_without} epochs"
        )
    return probs


CHANCE_HINT = (
    f"hint: for {HINT_AFTER_EPOCHS} epochs the loss has stayed at what a model scores that does not look at "
    "the images. Likely causes: --learning-rate too high (try a tenth) or too low (try ten times it), a "
    "frozen image encoder without published weights, class sentences that say nearly the same, images in the "
    "wrong class folders"
)


def stuck_at_chance(losses: Sequence[float], chance: float) -> bool:
    """True at the first epoch where for HINT_AFTER_EPOCHS the training losses (nats) have neither been 2 %
    below `chance` nor fallen by 2 %.
    """

    def stuck(window: Sequence[float]) -> bool:
        return len(window) == HINT_AFTER_EPOCHS and min(window) > 0.98 * max(chance, window[0])

    n = len(losses)
    return stuck(losses[-HINT_AFTER_EPOCHS:]) and not any(
        stuck(losses[i : i + HINT_AFTER_EPOCHS]) for i in range(n - HINT_AFTER_EPOCHS)
    )


def epoch_line(
    history: Mapping[str, Sequence[float]], epochs: int, is_best: bool, seconds_left: float
) -> str:
    """Of the last epoch in `history`."""
    row, epoch = {key: values[-1] for key, values in history.items()}, len(history["val_acc"])
    return (
        f"epoch {epoch:{len(str(epochs))}d}/{epochs}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_acc']:5.2f} %  "
        f"val loss {row['val_loss']:.4f} acc {row['val_acc']:5.2f} % (best {max(history['val_acc']):5.2f} %) "
        f"balanced {row['val_balanced_acc']:5.2f} % macro-F1 {row['val_macro_f1']:5.2f} %  "
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
