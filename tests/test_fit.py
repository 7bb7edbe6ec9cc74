"""One training step, looked at from outside."""

import dataclasses
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from quick import quick_clip

from common.device import Hardware
from common.stopping import Requests
from data.augment import Augmentation
from data.images import Squares
from data.loader import EpochBatches, ImageDataset, build_loader
from models.clip import ClassSentences
from training.cutmix import draw_box
from training.fit import epoch_line, train_one_epoch
from training.losses import contrastive_loss
from training.state import HISTORY_KEYS, EarlyStopping, TrainState
from training.step import StepOptions


def one_step(
    pixels, labels, watch=lambda model: None, scaled=False, batch_size=8, texts=("one",), epoch=0,
    augmentation="none", **options,
):  # fmt: skip
    """The state after an epoch without learning rate, of one step with all images if they are no more
    than `batch_size`, and the epoch's row of the history.
    """
    torch.manual_seed(0)
    model = quick_clip()
    sentences = ClassSentences(model, {"a": list(texts), "b": ["two"]})
    sentences.prepare(torch.device("cpu"), center=True)
    images = ImageDataset([Path("unused")] * len(labels), labels, 32, Squares(pixels))
    batches = EpochBatches(np.arange(len(labels)), batch_size, 0)
    state = TrainState(
        model, torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler("cpu", enabled=scaled),
        EarlyStopping("val_acc", None, 0), len(batches), len(batches), 0, epoch,
    )  # fmt: skip
    for group in state.optimizer.param_groups:
        group["peak_lr"] = 0.0
    loader = build_loader(images, batches, 0)
    hardware = Hardware(torch.device("cpu"), torch.float32, "CPU")
    watch(model)
    plain = StepOptions(
        micro_batch_size=None, cutmix_prob=0.0, criterion=partial(contrastive_loss, "unicl"), grad_clip=0.0,
        max_nonfinite_steps=1, seed=0,
    )  # fmt: skip
    augment, options = Augmentation(augmentation, False, 0), dataclasses.replace(plain, **options)
    row = train_one_epoch(state, sentences, loader, augment, hardware, options, Requests(0), lambda: None)
    return state, row


def test_an_epochs_line_names_the_best_accuracy_so_far():
    history = {key: [0.5, 0.25] for key in HISTORY_KEYS} | {"val_acc": [75.0, 50.0]}
    line = epoch_line(history, 30, is_best=False, seconds_left=60)
    assert line.startswith("epoch  2/30  train loss 0.2500") and "acc 50.00 % (best 75.00 %)" in line


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_is_clipped_to_its_norm(scaled):
    pixels = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 3)).astype(np.uint8)

    def norm(grad_clip):
        """Of the gradient that AdamW took: after one step its first moment is a tenth of that."""
        state, _ = one_step(pixels, np.arange(8) % 2, scaled=scaled, grad_clip=grad_clip)
        moments = [own["exp_avg"].double() for own in state.optimizer.state.values()]
        return 10 * math.sqrt(sum(float(moment.square().sum()) for moment in moments))

    whole = norm(0)
    assert whole > 0.1
    assert norm(1e6) == pytest.approx(whole, rel=1e-5)
    assert norm(0.01) == pytest.approx(0.01, rel=1e-4)


def test_the_temperature_stays_at_a_hundredth_or_above():
    pixels = np.zeros((8, 32, 32, 3), np.uint8)
    state, _ = one_step(pixels, np.arange(8) % 2, lambda model: torch.nn.init.constant_(model.logit_scale, 9))
    assert state.model.logit_scale.item() == pytest.approx(math.log(100))


def test_each_epoch_augments_an_image_anew():
    def shown(epoch):
        images = []

        def watch(model):
            model.image_tower.register_forward_pre_hook(lambda _, given: images.append(given[0].clone()))

        one_step(pixels, np.arange(8) % 2, watch, epoch=epoch, augmentation="minimal")
        return images[0]

    pixels = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    assert torch.equal(shown(3), shown(3)) and not torch.equal(shown(3), shown(4))


def test_each_step_draws_sentences_anew():
    pixels, drawn = np.zeros((8, 32, 32, 3), np.uint8), []

    def watch(model):
        def seen(tower, _, tokens):
            drawn.append(tokens["input_ids"][0].tolist())

        model.text_tower.register_forward_pre_hook(seen, with_kwargs=True)

    one_step(pixels, np.arange(8) % 2, watch, batch_size=2, texts="0123456789")
    assert len(drawn) == 4 and len({tuple(sentence) for sentence in drawn}) > 1


def test_means_are_over_images_whatever_the_batches():
    """Of three and of four images, whose losses are here their numbers of images."""
    shown, right = [], []

    def criterion(logits, labels):
        shown.append(len(labels))
        right.append((logits.argmax(1) == labels).sum().item())
        return 0 * logits.sum() + len(labels), 0 * logits.sum() + 10 * len(labels)

    pixels = np.random.RandomState(0).randint(0, 256, (7, 32, 32, 3)).astype(np.uint8)
    _, row = one_step(pixels, np.array([0, 1, 0, 0, 1, 0, 1]), batch_size=4, criterion=criterion)
    assert sorted(shown) == [3, 4] and right[0] / shown[0] != right[1] / shown[1]
    expected = {"loss": 25 / 7, "loss_image_to_text": 250 / 7, "acc": 100 * sum(right) / 7}
    assert row == pytest.approx({f"train_{key}": value for key, value in expected.items()})


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_an_image_with_a_box_of_another_counts_for_both_their_classes(micro_batch_size):
    """Class 0 is black and class 1 is white, so that a picture's brightness is its share of class 1."""
    labels = np.array([0, 0, 1, 1, 0, 1, 1, 0])
    pixels = np.broadcast_to(255 * labels[:, None, None, None], (8, 32, 32, 3)).astype(np.uint8)
    brightness, calls = [], []

    def watch(model):
        encode = model.encode_image

        def seen(images):
            brightness.extend(images.float().mean(dim=(1, 2, 3)).tolist())
            return encode(images)

        model.encode_image = seen

    def criterion(logits, of_labels):
        calls.append((logits.detach().argmax(1), of_labels.tolist()))
        return contrastive_loss("unicl", logits, of_labels)

    _, row = one_step(
        pixels, labels, watch, criterion=criterion, cutmix_prob=1.0, micro_batch_size=micro_batch_size
    )
    kept = draw_box(1.0, 32, 0, 0).kept
    (predicted, own), (_, of_boxes) = calls
    assert 0.1 < kept < 0.9 and sorted(own) == sorted(labels) and own != of_boxes
    expected = 255 * (kept * np.array(own) + (1 - kept) * np.array(of_boxes))
    np.testing.assert_allclose(brightness[:8], expected, rtol=1e-5)
    right = [
        kept * (p == a) + (1 - kept) * (p == b) for p, a, b in zip(predicted, own, of_boxes, strict=True)
    ]
    assert row["train_acc"] == pytest.approx(100 * float(np.mean(right)))
