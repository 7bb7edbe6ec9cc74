"""Batches are complete and even; an image depends on seed, epoch and index, never on who loads it."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.images import UnreadableImage
from data.loader import PRESETS, EpochBatches, ImageDataset, build_augmentation, build_loader

N, SIZE = 10, 24
PIXELS = np.random.RandomState(0).randint(0, 256, (N, SIZE, SIZE, 3)).astype(np.uint8)
LABELS = np.arange(N) % 3


def dataset_of(
    pixels: np.ndarray, preset: str = "standard", flip: bool = False, seed: int = 0
) -> ImageDataset:
    files = [Path("unused")] * len(pixels)
    return ImageDataset(files, np.zeros(len(pixels), int), pixels.shape[1], pixels, preset, flip, seed)


def draws(image: np.ndarray, preset: str, flip: bool = False, times: int = 60) -> np.ndarray:
    """The image as `times` epochs show it, (times, S, S, 3)."""
    dataset = dataset_of(image[None], preset, flip)
    return np.stack([dataset[epoch, 0][0].numpy().transpose(1, 2, 0) for epoch in range(times)])


# ---- batches


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 200), st.integers(2, 50), st.one_of(st.none(), st.integers(0, 2**32)), st.integers(0, 99)
)
def test_every_index_comes_once_in_even_batches(n, batch_size, seed, epoch):
    indices = np.arange(n) * 3 + 1
    batches = EpochBatches(indices, batch_size, seed)
    batches.epoch = epoch
    found = list(batches)
    assert sorted(index for batch in found for _, index in batch) == indices.tolist()
    assert {e for batch in found for e, _ in batch} == {epoch}
    sizes = [len(batch) for batch in found]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(batch_size, 2 + n % 2) and min(sizes) >= min(n, 2)  # never one image alone
    one_fewer = batch_size == 2 and n % 2 == 1 and n > 1
    assert len(batches) == len(found) == math.ceil(n / batch_size) - one_fewer


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        torch.manual_seed(order.calls)
        np.random.seed(order.calls)
        order.calls += 1
        batches = EpochBatches(np.arange(50), 8, seed)
        batches.epoch = epoch
        return [index for batch in batches for _, index in batch]

    order.calls = 0
    assert order(1, 3) == order(1, 3)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}) == 9
    assert order(None, 0) == order(None, 5) == list(range(50))


# ---- images


def test_an_item_is_channels_first_with_label_and_index():
    pixels = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    pixels[1, 2, 5] = (10, 20, 30)
    dataset = ImageDataset([Path("unused")] * 2, np.array([4, 7]), SIZE, pixels)
    image, label, index = dataset[0, 1]
    assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.uint8
    assert image[:, 2, 5].tolist() == [10, 20, 30] and int(image.sum()) == 60
    assert (label, index, len(dataset)) == (7, 1, 2)


def test_files_and_kept_pixels_give_the_same(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(N)]
    for file, pixels in zip(files, PIXELS, strict=True):
        Image.fromarray(pixels).save(file)
    for preset in PRESETS:
        read = ImageDataset(files, LABELS, SIZE, None, preset, True, 5)
        kept = ImageDataset(files, LABELS, SIZE, PIXELS, preset, True, 5)
        for i in range(N):
            assert torch.equal(read[2, i][0], kept[2, i][0])


def test_files_are_shown_whole_at_the_size_asked_for(tmp_path):
    Image.new("RGB", (50, 30), (9, 8, 7)).save(tmp_path / "x.png")
    image, _, _ = ImageDataset([tmp_path / "x.png"], np.array([0]), 16)[0, 0]
    assert image.shape == (3, 16, 16) and image.unique().tolist() == [7, 8, 9]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_goes_bad_later_is_named_and_never_replaced(tmp_path, num_workers):
    file = tmp_path / "gone bad.jpg"
    Image.fromarray(PIXELS[0]).save(file)
    file.write_bytes(file.read_bytes()[:-200])
    dataset = ImageDataset([file], np.array([0]), 16)
    loader = build_loader(dataset, EpochBatches(np.arange(1), 1, None), num_workers, False)
    with pytest.raises(UnreadableImage, match=r"gone bad\.jpg"):
        list(loader)


def test_the_image_depends_on_seed_epoch_and_index():
    dataset = dataset_of(np.repeat(PIXELS[:1], 4, axis=0))
    shown = {key: dataset[key][0] for key in [(0, 0), (0, 1), (1, 0), (1, 1), (7, 3)]}
    shown["seed"] = dataset_of(PIXELS[:1], seed=1)[0, 0][0]
    assert len({image.numpy().tobytes() for image in shown.values()}) == len(shown)
    assert all(torch.equal(dataset[key][0], shown[key]) for key in [(7, 3), (1, 0), (0, 0)])


@pytest.mark.parametrize("preset", PRESETS)
def test_no_random_stream_of_the_caller_is_read_or_moved(preset):
    dataset = dataset_of(PIXELS, preset, flip=True)
    shown = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        shown.append(torch.stack([dataset[3, i][0] for i in range(N)]))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]
    assert torch.equal(*shown)


def test_kept_pixels_are_never_changed():
    pixels = PIXELS.copy()
    dataset = dataset_of(pixels, "standard", flip=True)
    for i in range(N):
        dataset[0, i][0].fill_(0)
    assert np.array_equal(pixels, PIXELS)


# ---- presets


def test_none_is_identity():
    assert np.array_equal(draws(PIXELS[0], "none", flip=True, times=3), np.stack([PIXELS[0]] * 3))
    image = Image.fromarray(PIXELS[0])
    assert np.array_equal(np.asarray(build_augmentation("none", True)(image)), PIXELS[0])


def test_presets_differ():
    shown = [draws(PIXELS[0], preset).tobytes() for preset in PRESETS]
    assert len(set(shown)) == len(PRESETS)
    with pytest.raises(ValueError, match="strong"):
        build_augmentation("strong", False)


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


# ---- loader


def test_workers_do_not_change_the_images():
    dataset = ImageDataset([Path("unused")] * N, LABELS, SIZE, PIXELS, "standard", True, seed=3)
    expected = {(epoch, i): dataset[epoch, i][0] for epoch in (0, 1) for i in range(N)}
    for num_workers in (0, 1, 2):
        batches = EpochBatches(np.arange(N), 4, seed=3)
        loader = build_loader(dataset, batches, num_workers, pin_memory=False)
        assert len(loader) == 3
        for epoch in (0, 1):
            batches.epoch = epoch
            order = []
            for images, labels, indices in loader:
                assert images.dtype == torch.uint8 and images.shape[1:] == (3, SIZE, SIZE)
                assert labels.dtype == indices.dtype == torch.int64
                assert labels.tolist() == LABELS[indices].tolist()
                for image, i in zip(images, indices.tolist(), strict=True):
                    assert torch.equal(image, expected[epoch, i])
                order += indices.tolist()
            assert order == [i for batch in batches for _, i in batch]
