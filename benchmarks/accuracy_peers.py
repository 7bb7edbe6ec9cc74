"""What benchmarks.accuracy compares this program with, on the same folds, images, batches and augmentation.

softmax: the same backbone with a linear layer and cross-entropy, with timm's optimizer, schedule and loss.
logistic: features of the backbone as it starts, never trained, and scikit-learn's logistic regression.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floor import floor_of, table
from common.device import Hardware
from common.direct_file import DirectFile
from common.errors import RunFailed
from common.files import whole_file, write_json
from common.progress import progress
from data.augment import Augmentation
from data.loader import EpochBatches, ImageDataset, build_loader
from data.splits import Split, k_folds
from evaluation.metrics import classification_metrics
from models.clip import build_image_tower
from models.image_encoders import ImageTower
from training.config import Config
from training.cutmix import draw_box, opposite
from training.dataset import DataSet
from training.fit import duration
from training.optim import warmup_steps

UNFINISHED = "peer.pth"
STRENGTHS = tuple(float(c) for c in np.logspace(-5, 1, 7))  # of the logistic regression's C
INNER_FOLDS = 3
Own = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """options: the fields of Config that it heeds. own: options that only it has, and their defaults.

    train(config, own, data, split, hardware, folder, seed) gives the probabilities (n_val, C) of split.val in
    that order and leaves history.json in `folder`.
    """

    options: frozenset[str]
    own: Own
    train: Callable[[Config, Own, DataSet, Split, Hardware, Path, int], np.ndarray]


class Classifier(nn.Module):
    """(B, 3, S, S) uint8 or 0..255 float -> logits (B, C) float32."""

    def __init__(self, tower: ImageTower, n_classes: int):
        super().__init__()
        self.tower, self.head = tower, nn.Linear(tower.num_features, n_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower(images)).float()


def _images(data: DataSet, config: Config, hardware: Hardware) -> ImageDataset:
    return ImageDataset(data.files, data.labels, config.img_size, data.squares, hardware.device)


@torch.no_grad()
def outputs_of(
    network: nn.Module, images: ImageDataset, indices: np.ndarray, config: Config, hardware: Hardware
) -> np.ndarray:
    """What `network`, left in evaluation mode, gives for `images` at `indices` (n,): (n, ...) float64."""
    network.eval()
    batches = EpochBatches(indices, config.batch_size, None)
    found = []
    for batch, _, _ in build_loader(images, batches, 0):
        with hardware.autocast():
            found.append(network(batch.to(hardware.device)).double().cpu())
    return torch.cat(found).numpy()


def _optimizer(model: Classifier, config: Config) -> torch.optim.Optimizer:
    """timm's AdamW with this program's rates: layers without published weights learn new_lr_ratio as fast."""
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    exempt = model.tower.backbone
    exempt = exempt.no_weight_decay() if hasattr(exempt, "no_weight_decay") else ()
    exempt = [f"backbone.{name}" for name in exempt]
    new, groups = config.learning_rate * config.new_lr_ratio, []
    for part, peak in (
        (model.tower, config.learning_rate if model.tower.pretrained else new),
        (model.head, new),
    ):
        for group in param_groups_weight_decay(part, config.weight_decay, no_weight_decay_list=exempt):
            groups.append({**group, "lr": peak})
    return create_optimizer_v2(groups, opt="adamw", lr=new, weight_decay=config.weight_decay)


def train_softmax(
    config: Config, own: Own, data: DataSet, split: Split, hardware: Hardware, folder: Path, seed: int
) -> np.ndarray:
    """Goes on after the last whole epoch that a killed run left in `folder`."""
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.scheduler import CosineLRScheduler
    from timm.utils import dispatch_clip_grad

    torch.manual_seed(config.random_state)  # every fold starts from the same weights, as in this program
    tower = build_image_tower(config.image_encoder_name, config.image_weights, config.img_size)
    model = Classifier(tower, len(data.folder.classes))
    model.to(hardware.device, memory_format=torch.channels_last)
    torch.manual_seed(seed)
    batches = EpochBatches(split.train, config.batch_size, seed)
    every = _images(data, config, hardware)
    loader = build_loader(every, batches, 0)
    augment = Augmentation(config.augmentation, config.horizontal_flip, seed)
    optimizer = _optimizer(model, config)
    warmup = warmup_steps(config.warmup_epochs, config.epochs, len(batches))
    schedule = CosineLRScheduler(
        optimizer, config.epochs * len(batches) - warmup, warmup_t=warmup, warmup_lr_init=1e-6,
        warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    criterion = LabelSmoothingCrossEntropy(own["label_smoothing"])
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
    history: dict[str, list[float]] = {"train_loss": [], "val_acc": [], "epoch_seconds": []}
    probs, unfinished = None, folder / UNFINISHED
    if unfinished.exists():
        saved = torch.load(unfinished, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        history = saved["history"]
    begun, started = len(history["train_loss"]), time.monotonic()
    for epoch in range(begun, config.epochs):
        epoch_started, loss_sum = time.monotonic(), 0.0
        model.train()
        batches.epoch = epoch
        for i, (images, labels, indices) in enumerate(progress(loader, f"epoch {epoch + 1}")):
            schedule.step_update(epoch * len(batches) + i)
            images, labels = images.to(hardware.device), labels.to(hardware.device)
            images = augment(images, epoch, indices)
            box = draw_box(config.cutmix_prob, config.img_size, seed, epoch * len(batches) + i)
            if box:
                images = box.paste(images)
            with hardware.autocast():
                logits = model(images)
            loss = criterion(logits, labels)
            if box:
                loss = box.divided(loss, criterion(logits, labels[opposite(len(labels), None)]))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if config.grad_clip:
                dispatch_clip_grad(model.parameters(), config.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            loss_sum += loss.item() * len(labels)
        if not math.isfinite(loss_sum):
            raise RunFailed(f"the loss of epoch {epoch + 1} is not finite; lower learning_rate")
        probs = _softmax(outputs_of(model, every, split.val, config, hardware))
        history["train_loss"].append(loss_sum / len(split.train))
        history["val_acc"].append(100 * classification_metrics(probs, data.labels[split.val])["acc"])
        history["epoch_seconds"].append(time.monotonic() - epoch_started)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"rng": torch.get_rng_state(), "scaler": scaler.state_dict(), "history": history}
        with whole_file(unfinished) as new, DirectFile(new) as file:
            torch.save(state, file)
        left = (time.monotonic() - started) / (epoch + 1 - begun) * (config.epochs - epoch - 1)
        print(
            f"epoch {epoch + 1}/{config.epochs}  train loss {history['train_loss'][-1]:.4f}  "
            f"val acc {history['val_acc'][-1]:.2f} %  left {duration(left)}",
            flush=True,
        )
    if probs is None:  # killed between the last epoch and its end
        probs = _softmax(outputs_of(model, every, split.val, config, hardware))
    write_json(folder / "history.json", history)
    unfinished.unlink(missing_ok=True)
    return probs


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(dim=1).numpy()


def train_logistic(
    config: Config, own: Own, data: DataSet, split: Split, hardware: Hardware, folder: Path, seed: int
) -> np.ndarray:
    """C is the one of STRENGTHS with the least loss over INNER_FOLDS folds of the training images; images of
    one patient stay together there too. Features are standardised by the training images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    started = time.monotonic()
    torch.manual_seed(config.random_state)
    tower = build_image_tower(config.image_encoder_name, config.image_weights, config.img_size)
    tower.to(hardware.device, memory_format=torch.channels_last)
    every = _images(data, config, hardware)
    train, val = (outputs_of(tower, every, side, config, hardware) for side in (split.train, split.val))
    labels, classes = data.labels[split.train], data.folder.classes
    groups = None if data.groups is None else np.unique(data.groups[split.train], return_inverse=True)[1]
    inner = k_folds(labels, groups, INNER_FOLDS, config.random_state, classes)

    def fitted(strength: float, chosen: np.ndarray) -> Any:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=own["max_iter"]))
        return model.fit(train[chosen], labels[chosen])

    def loss(strength: float) -> float:
        return sum(
            log_loss(
                labels[part.val],
                fitted(strength, part.train).predict_proba(train[part.val]),
                labels=range(len(classes)),
            )
            for part in inner
        )

    losses = [loss(strength) for strength in progress(STRENGTHS, "choosing C")]
    best = STRENGTHS[int(np.argmin(losses))]
    probs = fitted(best, np.arange(len(labels))).predict_proba(val)
    accuracy = 100 * classification_metrics(probs, data.labels[split.val])["acc"]
    print(f"logistic regression, C {best:g}: val acc {accuracy:.2f} %", flush=True)
    seconds = time.monotonic() - started
    write_json(folder / "history.json", {"C": [best], "val_acc": [accuracy], "epoch_seconds": [seconds]})
    return probs


_OF_IMAGES = {
    "image_encoder_name",
    "image_weights",
    "img_size",
    "batch_size",
    "use_amp",
    "gpu_id",
    "cache_dir",
}
_OF_TRAINING = {
    "epochs", "learning_rate", "new_lr_ratio", "weight_decay", "warmup_epochs", "grad_clip", "augmentation",
    "horizontal_flip", "cutmix_prob",
}  # fmt: skip
PEERS = {
    "softmax": Peer(frozenset(_OF_IMAGES | _OF_TRAINING), {"label_smoothing": 0.0}, train_softmax),
    "logistic": Peer(frozenset(_OF_IMAGES), {"max_iter": 2000}, train_logistic),
}


def size_of(encoder: str, img_size: int) -> dict[str, float]:
    """{"million_parameters", "gmac"} of an image encoder without its projection, for one image.

    Counted are convolutions, matrix products and attention, as written: half of PyTorch's count of FLOP.
    """
    tower = build_image_tower(encoder, "none", img_size).eval()
    # PyTorch counts no attention in its fused form on a CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, img_size, img_size))
    return {
        "million_parameters": sum(p.numel() for p in tower.parameters()) / 1e6,
        "gmac": counter.get_total_flops() / 2e9,
    }


def architecture_table(encoders: list[str], img_size: int, batch: int, hardware: Hardware) -> str:
    """Markdown: parameters, arithmetic and images/s of each encoder's tower alone."""
    rows = []
    for encoder in encoders:
        size, floor = size_of(encoder, img_size), floor_of(encoder, img_size, batch, hardware)
        rows.append(
            (
                encoder, f"{size['million_parameters']:.2f}", f"{size['gmac']:.3f}",
                f"{floor.train:.1f}", f"{floor.evaluate:.0f}",
            )
        )  # fmt: skip
    head = ("image encoder", "M parameters", "GMAC", "images/s, training", "images/s, forward")
    return table(head, rows)
