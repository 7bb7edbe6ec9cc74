"""One training step, looked at from outside."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common.device import Hardware
from common.stopping import Requests
from data.augment import Augmentation
from data.images import Squares
from data.loader import EpochBatches, ImageDataset, build_loader
from models.clip import ClassSentences, build_clip
from training.fit import train_one_epoch
from training.losses import contrastive_loss
from training.state import EarlyStopping, TrainState


@pytest.mark.parametrize(("grad_clip", "largest"), [(0.01, 0.01), (0, 1e9), (1e6, 1e9)])
def test_the_gradient_is_clipped_to_its_norm(grad_clip, largest):
    torch.manual_seed(0)
    model = build_clip(
        "resnet18", "bert-tiny-bytes", img_size=32, embed_dim=16, temperature=0.07, image_weights="none"
    )
    sentences = ClassSentences(model, {"a": ["one"], "b": ["two"]})
    sentences.prepare(torch.device("cpu"), center=True)
    pixels = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    images = ImageDataset([Path("unused")] * 8, np.arange(8) % 2, 32, Squares(pixels))
    state = TrainState(
        model, torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler(enabled=False),
        EarlyStopping("val_acc", None, 0), 1, 1, 0,
    )  # fmt: skip
    for group in state.optimizer.param_groups:
        group["peak_lr"] = 0.0
    loader = build_loader(images, EpochBatches(np.arange(8), 8, 0), 0, False)
    hardware = Hardware(torch.device("cpu"), torch.float32, "CPU")
    train_one_epoch(
        state, sentences, loader, Augmentation("none", False, 0), hardware, Requests(0), lambda: None,
        micro_batch_size=None, criterion=partial(contrastive_loss, "unicl"), grad_clip=grad_clip,
        max_nonfinite_steps=1, seed=0,
    )  # fmt: skip
    gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert norm <= largest * 1.0001 and norm > 0.0099
    assert (norm > 0.1) == (grad_clip != 0.01)
