"""Boxes of another image: where they are drawn, what they show, how they count."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.cutmix import Box, draw_box, with_boxes
from training.losses import contrastive_loss

SIZE = 24


def test_a_box_shows_the_image_opposite_and_the_rest_stays():
    images = torch.randint(256, (3, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    before = images.clone()
    pasted = Box(slice(1, 5), slice(0, 7), 1 - 28 / SIZE**2).paste(images)
    expected = before.clone()
    for i in range(3):
        expected[i, :, 1:5, 0:7] = before[2 - i, :, 1:5, 0:7]
    assert torch.equal(pasted, expected) and torch.equal(images, before)


def test_boxes_are_drawn_as_cutmix_draws_them():
    """Yun et al. 2019, algorithm A1 with lambda uniform: sides sqrt(1 - lambda), a uniform centre, cut off
    where the image ends.
    """
    boxes = [draw_box(0.25, SIZE, 3, step) for step in range(8000)]
    drawn = [box for box in boxes if box]
    assert len(drawn) / len(boxes) == pytest.approx(0.25, abs=0.02)
    assert boxes == [draw_box(0.25, SIZE, 3, step) for step in range(8000)]
    assert [draw_box(0.25, SIZE, 4, step) for step in range(8000)] != boxes
    assert not any(draw_box(0, SIZE, 3, step) for step in range(100))
    assert all(draw_box(1, SIZE, 3, step) for step in range(100))
    for box in drawn:
        inside = np.zeros((SIZE, SIZE), bool)
        inside[box.rows, box.columns] = True
        assert box.kept == pytest.approx(1 - inside.mean())

    rng = np.random.default_rng(0)
    side, centre = SIZE * np.sqrt(rng.random(10**5)), rng.integers(SIZE, size=(2, 10**5))
    low, high = np.clip(centre - side / 2, 0, SIZE), np.clip(centre + side / 2, 0, SIZE)
    expected = 1 - (high - low).prod(axis=0) / SIZE**2
    kept = [box.kept for box in drawn]
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert np.quantile(kept, share) == pytest.approx(np.quantile(expected, share), abs=0.04)


@pytest.mark.parametrize("kind", ["ce", "unicl"])
def test_images_of_two_classes_have_the_gradient_of_divided_targets(kind):
    """CutMix, Yun et al. 2019, eq. 1: targets kept * y + (1 - kept) * y of the box; in the text half each
    sentence is over the batch's images as they are divided.
    """
    torch.manual_seed(1)
    logits, labels = torch.randn(7, 4, dtype=torch.float64) * 5, torch.tensor([0, 2, 2, 3, 2, 0, 3])
    of_boxes, own = labels.flip(0), logits.clone().requires_grad_()
    box = Box(slice(0, SIZE), slice(0, 7), 0.7)
    loss, over_classes = with_boxes(partial(contrastive_loss, kind), box, of_boxes)(own, labels)
    loss.backward()
    targets = 0.7 * F.one_hot(labels, 4).double() + 0.3 * F.one_hot(of_boxes, 4).double()
    reference = logits.clone().requires_grad_()
    of_classes = -(targets * reference.log_softmax(1)).sum(1).mean()
    of_batch = -(targets * reference.log_softmax(0)).sum() / 7
    ((of_classes + of_batch) / 2 if kind == "unicl" else of_classes).backward()
    assert over_classes.item() == pytest.approx(of_classes.item(), abs=1e-12)
    torch.testing.assert_close(own.grad, reference.grad, rtol=0, atol=1e-12)
