"""Augmentation: limits of each preset, torchvision's per-image transforms as the reference, randomness that
depends on seed, epoch and index alone.
"""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from data.augment import PRESETS, Augmentation, change_colour, resample

N, SIZE = 10, 24
PIXELS = np.random.RandomState(0).randint(0, 256, (N, SIZE, SIZE, 3)).astype(np.uint8)


def batch_of(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (B, 3, S, S)


def draws(image: np.ndarray, preset: str, flip: bool = False, times: int = 60) -> np.ndarray:
    """The image as `times` epochs show it, (times, S, S, 3)."""
    augment, images = Augmentation(preset, flip, 0), batch_of(image[None])
    shown = [augment(images, epoch, [0])[0].permute(1, 2, 0).numpy() for epoch in range(times)]
    return np.stack(shown).round().astype(np.uint8)


# ---- randomness


def test_the_image_depends_on_seed_epoch_and_index_and_not_on_its_batch():
    same = batch_of(np.repeat(PIXELS[:1], 4, axis=0))
    augment = Augmentation("standard", True, 5)
    together = augment(same, 3, [0, 1, 2, 7])
    assert len({image.numpy().tobytes() for image in together}) == 4
    for i, index in enumerate([0, 1, 2, 7]):
        torch.testing.assert_close(augment(same[:1], 3, [index])[0], together[i], rtol=0, atol=1e-3)
    others = [augment(same[:1], 4, [0])[0], Augmentation("standard", True, 6)(same[:1], 3, [0])[0]]
    assert all((other - together[0]).abs().max() > 5 for other in others)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_random_stream_of_the_caller_is_read_or_moved(preset):
    shown = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        shown.append(Augmentation(preset, True, 0)(batch_of(PIXELS), 3, range(N)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]
    assert torch.equal(*shown)


@pytest.mark.parametrize("preset", ["minimal", "standard"])
def test_grey_images_are_one_channel_that_equals_each_of_three(preset):
    grey = batch_of(np.repeat(PIXELS[..., :1], 3, axis=3))
    augment = Augmentation(preset, True, 0)
    shown = augment(grey, 3, range(N))
    assert shown.shape == (N, 1, SIZE, SIZE)
    mixed = torch.cat([grey, batch_of(PIXELS[:1])])  # one image in colour gives all of them three
    in_colour = augment(mixed, 3, [*range(N), 0])[:N]
    torch.testing.assert_close(in_colour, shown.expand(-1, 3, -1, -1), rtol=0, atol=1e-3)
    for channel in range(3):
        almost = grey.clone()
        almost[3, channel, 5, 5] ^= 1
        assert augment(almost, 3, range(N)).shape == (N, 3, SIZE, SIZE)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_images_given_are_not_changed(preset):
    pixels = PIXELS.copy()
    Augmentation(preset, True, 0)(batch_of(pixels), 0, range(N))
    assert np.array_equal(pixels, PIXELS)


# ---- against torchvision, image by image


def smooth(size: int) -> np.ndarray:
    """Three channels of slow waves, so that half a pixel's difference in place is small in value."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(5 * x + 2 * y), np.cos(4 * x * y + 1), np.sin(3 * (x - y) ** 2 + y)]
    return np.rint(127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


@settings(max_examples=40, deadline=None)
@given(st.floats(-7, 7), st.integers(-4, 4), st.integers(-4, 4), st.floats(0.95, 1.1), st.booleans())
def test_one_resampling_equals_flip_then_affine(degrees, right, down, zoom, mirror):
    size = 64
    image = batch_of(smooth(size)[None])
    drawn = torch.tensor([[degrees, right, down, zoom, 1, 1, -1 if mirror else 1]])
    ours = resample(image, drawn)
    flipped = reference.horizontal_flip(image) if mirror else image
    theirs = reference.affine(
        flipped.float(), degrees, [right, down], zoom, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR
    )
    inside = (slice(None), slice(None), slice(14, -14), slice(14, -14))  # black comes in at the edges
    assert (ours - theirs)[inside].abs().max() < 0.5


def test_what_comes_in_from_outside_is_black():
    white = torch.full((1, 3, 40, 40), 255, dtype=torch.uint8)
    shifted = resample(white, torch.tensor([[0.0, 3, -2, 1, 1, 1, 1]]))[0, 0]
    expected = np.zeros((40, 40))
    expected[:-2, 3:] = 255  # to the right by 3, up by 2
    np.testing.assert_allclose(shifted, expected, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.9, 1.1), st.floats(0.9, 1.1), st.booleans())
def test_colour_equals_brightness_and_contrast_in_either_order(brightness, contrast, contrast_first):
    # far from white, so that little is clipped between the two steps; each channel of another mean
    image = batch_of(smooth(32)[None]).float() * torch.tensor([0.3, 1.0, 0.6]).view(3, 1, 1)
    ours = change_colour(image.clone(), torch.tensor([brightness]), torch.tensor([contrast]))
    steps = [(reference.adjust_brightness, brightness), (reference.adjust_contrast, contrast)]
    theirs = image / 255  # float images are 0..1 there
    for step, factor in reversed(steps) if contrast_first else steps:
        theirs = step(theirs, factor)
    assert (ours - 255 * theirs).abs().max() < 0.5


def test_colour_is_clipped():
    images = torch.tensor([0.0, 250.0]).view(1, 1, 1, 2).repeat(2, 3, 2, 1)
    brighter, darker = change_colour(images, torch.tensor([1.1, 1.0]), torch.tensor([1.0, 1.1]))
    assert brighter.unique().tolist() == [0, 255] and darker.unique().tolist() == [0, 255]


def test_drawn_values_fill_their_ranges_evenly():
    drawn = Augmentation("standard", True, 1).draw(0, range(4000), 200)
    limits = [(-7, 7), (-10, 10), (-10, 10), (0.95, 1.1), (0.9, 1.1), (0.9, 1.1), (-1, 1)]
    for values, (low, high) in zip(drawn.T, limits, strict=True):
        assert low <= values.min() and values.max() <= high
        # of a uniform variable: mean (a + b) / 2, standard deviation (b - a) / sqrt(12); 5 standard errors
        error = 5 * (high - low) / 2 / math.sqrt(4000)
        assert abs(values.mean() - (low + high) / 2) < error
    for values, (low, high) in zip(drawn[:, :6].T, limits[:6], strict=True):
        assert values.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.06)
    assert (drawn[:, 1:3] == drawn[:, 1:3].round()).all() and set(drawn[:, 6]) == {-1, 1}
    assert abs(np.corrcoef(drawn.T) - np.eye(7)).max() < 0.1  # nothing is drawn with another's number


def test_an_image_has_its_own_numbers_of_the_epochs_stream_wherever_it_stands():
    """Written out here, so that a run that an earlier program began goes on with the same numbers."""
    seed, epoch, indices = 5, 3, [7, 2, 9, 2, 0]
    uniform = np.random.Generator(np.random.PCG64([seed, epoch, 1])).random((10, 7))[indices]
    low, high = [-7, 0.95, 0.9, 0.9], [7, 1.1, 1.1, 1.1]  # degrees, zoom, brightness, contrast
    drawn = Augmentation("standard", True, seed).draw(epoch, indices, SIZE)
    expected = low + (np.array(high) - low) * uniform[:, [0, 3, 4, 5]]
    np.testing.assert_allclose(drawn[:, [0, 3, 4, 5]], expected, rtol=1e-12)
    np.testing.assert_array_equal(drawn[:, 6] == -1, uniform[:, 6] < 0.5)


def test_order_of_samples_and_augmentation_share_no_numbers():
    order = np.random.default_rng([3, 0]).random(7)  # as the sampler seeds its permutation
    drawn = Augmentation("standard", True, 3).draw(0, range(50), 100)
    assert not np.isclose(-7 + 14 * order[0], drawn[:, 0]).any()


# ---- presets


def test_none_is_identity():
    images = batch_of(PIXELS)
    assert torch.equal(Augmentation("none", True, 0)(images, 3, range(N)), images)


def test_presets_differ():
    shown = [draws(PIXELS[0], preset).tobytes() for preset in PRESETS]
    assert len(set(shown)) == len(PRESETS)
    with pytest.raises(ValueError, match="strong"):
        Augmentation("strong", False, 0)


def halves(vertical: bool) -> np.ndarray:
    """Left bright, right dark; or top bright, bottom dark."""
    image = np.full((40, 40, 3), 60, np.uint8)
    image[:, :20] = 220
    return image.transpose(1, 0, 2) if vertical else image


@pytest.mark.parametrize("preset", ["minimal", "standard"])
def test_mirroring_happens_when_asked_for_and_then_half_the_time(preset):
    def share_mirrored(flip: bool) -> float:
        shown = draws(halves(vertical=False), preset, flip, 200).astype(float)
        return float((shown[:, 10:30, 5:15].mean((1, 2, 3)) < shown[:, 10:30, 25:35].mean((1, 2, 3))).mean())

    assert share_mirrored(False) == 0
    assert 0.35 < share_mirrored(True) < 0.65


@pytest.mark.parametrize("preset", ["minimal", "standard"])
@pytest.mark.parametrize("flip", [False, True])
def test_nothing_is_ever_upside_down(preset, flip):
    shown = draws(halves(vertical=True), preset, flip, 200).astype(float)
    assert (shown[:, 5:15, 10:30].mean((1, 2, 3)) > shown[:, 25:35, 10:30].mean((1, 2, 3))).all()


def bar_measures(preset: str) -> np.ndarray:
    """Shift as a share of the side, degrees of rotation and growth in area of a bar, per draw."""
    size = 100
    image = np.zeros((size, size, 3), np.uint8)
    image[42:58, 30:70] = 200
    rows = []
    for shown in draws(image, preset, times=100):
        y, x = np.nonzero(shown[..., 0] > shown.max() / 2)
        spread = np.cov(x, y)
        angle = 0.5 * math.degrees(math.atan2(2 * spread[0, 1], spread[0, 0] - spread[1, 1]))
        shift = max(abs(x.mean() - 49.5), abs(y.mean() - 49.5)) / size
        rows.append((shift, abs(angle), len(x) / (16 * 40)))
    return np.array(rows)


def test_minimal_only_shifts():
    shift, angle, growth = bar_measures("minimal").T
    assert 0.02 < shift.max() <= 0.04 + 1e-6
    assert angle.max() < 1e-6 and (growth == 1).all()
    plain = draws(np.full((40, 40, 3), 100, np.uint8), "minimal")
    assert (plain[:, 5:35, 5:35] == 100).all()  # brightness stays


def test_standard_rotates_shifts_and_zooms_within_its_limits():
    shift, angle, growth = bar_measures("standard").T
    assert 0.04 < shift.max() <= 0.05 + 0.01
    assert 5 < angle.max() <= 7.5
    assert 0.95**2 * 0.93 <= growth.min() < 0.95 and 1.13 < growth.max() <= 1.1**2 * 1.07


def test_standard_changes_brightness_and_never_the_hue():
    shown = draws(np.full((40, 40, 3), (180, 60, 60), np.uint8), "standard").astype(int)
    red, green, blue = shown[:, 20, 20].T
    assert abs(green - blue).max() <= 1 and (red > green).all()
    assert 0.9 * 180 * 0.85 < red.min() < 170 and 190 < red.max() < 1.1 * 180 * 1.15


def test_mixed_precision_does_not_move_a_pixel():
    images = torch.nn.functional.interpolate(batch_of(PIXELS).float(), (192, 192)).byte()
    augment = Augmentation("standard", True, 0)
    exact = augment(images, 2, range(N))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, 2, range(N)), exact)
