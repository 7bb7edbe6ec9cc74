"""Batches are complete and even; images come whole, whoever reads them."""

import collections
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data.loader as loader_module
from common.errors import UserError
from data.augment import Augmentation
from data.images import Squares
from data.loader import EpochBatches, ImageDataset, build_loader
from data.pixels import UnreadableImage
from training.config import Config
from training.failures import explain_failure

N, SIZE = 10, 24
PIXELS = np.random.RandomState(0).randint(0, 256, (N, SIZE, SIZE, 3)).astype(np.uint8)
LABELS = np.arange(N) % 3


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
    assert sorted(index for batch in found for index in batch) == indices.tolist()
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
        return [index for batch in batches for index in batch]

    order.calls = 0
    assert order(1, 3) == order(1, 3)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}) == 9
    assert order(None, 0) == order(None, 5) == list(range(50))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=150), st.integers(2, 40), st.integers(0, 99))
def test_every_class_comes_equally_often_and_its_images_as_evenly_as_can_be(labels, batch_size, epoch):
    everywhere = np.array(labels)
    n, indices = len(everywhere), np.arange(1, len(labels), 2)  # the training side
    batches = EpochBatches(indices, batch_size, 0, everywhere)
    batches.epoch = epoch
    shown = [index for batch in batches for index in batch]
    assert len(shown) == len(indices) and len(set(shown)) == len(shown)  # none twice under one number
    times = collections.Counter(index % n for index in shown)
    assert times.keys() <= set(indices.tolist())
    of_class = collections.Counter(labels[index % n] for index in shown)
    present = set(everywhere[indices])
    quotas = [of_class[label] for label in present]
    assert max(quotas) - min(quotas) <= 1 and sum(quotas) == len(indices)
    for label in present:
        counts = [times[i] for i in indices.tolist() if labels[i] == label]
        assert max(counts) - min(counts) <= 1
    for index in shown:
        assert index < n or index - n in shown  # the third showing comes after a second


def test_of_a_large_class_every_epoch_shows_another_part():
    labels = np.array([0] * 90 + [1] * 10)
    batches, seen = EpochBatches(np.arange(100), 20, 7, labels), []
    for batches.epoch in range(3):
        order = [index for batch in batches for index in batch]
        assert [index for batch in batches for index in batch] == order
        seen.append({index for index in order if index % 100 < 90})
    assert [len(part) for part in seen] == [50, 50, 50] and len(set.union(*seen)) > 70


def test_classes_take_turns_in_holding_an_image_more():
    labels, more = np.repeat([0, 1], [6, 5]), set()
    batches = EpochBatches(np.arange(11), 4, 0, labels)
    for batches.epoch in range(10):
        more.add(int(sum(labels[index % 11] for batch in batches for index in batch)))
    assert more == {5, 6}


def test_an_image_shown_again_keeps_its_pixels_and_label_and_is_augmented_differently():
    dataset = ImageDataset([Path("unused")] * N, LABELS, SIZE, Squares(PIXELS))
    images, labels, indices = dataset.__getitems__([4, N + 4, 3 * N + 4])
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert labels.tolist() == [LABELS[4]] * 3 and indices.tolist() == [4, N + 4, 3 * N + 4]
    first, second, third = Augmentation("standard", True, 0)(images, 0, indices)
    assert not torch.equal(first, second) and not torch.equal(second, third)


# ---- images


def test_a_batch_is_channels_first_with_labels_and_indices():
    pixels = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    pixels[1, 2, 5] = (10, 20, 30)
    dataset = ImageDataset([Path("unused")] * 3, np.array([4, 7, 9]), SIZE, Squares(pixels))
    images, labels, indices = dataset.__getitems__([1, 0])
    assert images.shape == (2, 3, SIZE, SIZE) and images.dtype == torch.uint8
    assert images[0, :, 2, 5].tolist() == [10, 20, 30] and int(images.sum()) == 60
    assert labels.tolist() == [7, 4] and indices.tolist() == [1, 0] and len(dataset) == 3
    assert labels.dtype == indices.dtype == torch.int64


def test_rows_say_where_an_image_lies():
    squares = Squares(PIXELS, np.array([7, 2, 2, 5]))
    assert len(squares) == 4
    assert np.array_equal(squares[0], PIXELS[7]) and np.array_equal(squares[[3, 1]], PIXELS[[5, 2]])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_and_decoded_squares_give_the_same(tmp_path, num_workers):
    files = [tmp_path / f"{i}.png" for i in range(N)]
    for file, pixels in zip(files, PIXELS, strict=True):
        Image.fromarray(pixels).save(file)
    epochs = []
    for squares in (None, Squares(PIXELS)):
        batches = EpochBatches(np.arange(N), 4, seed=3)
        loader = build_loader(ImageDataset(files, LABELS, SIZE, squares), batches, num_workers)
        assert len(loader) == 3
        for epoch in (0, 1):
            batches.epoch = epoch
            epochs.append([torch.cat(part) for part in zip(*loader, strict=True)])
    (images, labels, indices), (_, _, next_indices) = epochs[:2]
    assert np.array_equal(images.numpy(), PIXELS[indices].transpose(0, 3, 1, 2))
    assert labels.tolist() == LABELS[indices].tolist() and indices.tolist() != next_indices.tolist()
    for read, kept in zip(epochs[:2], epochs[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(read, kept, strict=True))


def test_files_are_shown_whole_at_the_size_asked_for(tmp_path):
    Image.new("RGB", (50, 30), (9, 8, 7)).save(tmp_path / "x.png")
    images, _, _ = ImageDataset([tmp_path / "x.png"], np.array([0]), 16).__getitems__([0])
    assert images.shape == (1, 3, 16, 16) and images.unique().tolist() == [7, 8, 9]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_goes_bad_later_is_named_and_never_replaced(tmp_path, num_workers):
    file = tmp_path / "gone bad.jpg"
    Image.fromarray(PIXELS[0]).save(file)
    file.write_bytes(file.read_bytes()[:-200])
    dataset = ImageDataset([file], np.array([0]), 16)
    loader = build_loader(dataset, EpochBatches(np.arange(1), 1, None), num_workers)
    with pytest.raises(UnreadableImage, match=r"gone bad\.jpg"):
        list(loader)


def test_decoded_squares_are_never_changed():
    pixels = PIXELS.copy()
    dataset = ImageDataset([Path("unused")] * N, LABELS, SIZE, Squares(pixels))
    dataset.__getitems__([3, 4])[0].fill_(0)
    dataset.__getitems__([5])[0].fill_(0)
    assert np.array_equal(pixels, PIXELS)


def test_too_little_shared_memory_is_said_before_anything_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "SHARED_MEMORY", tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    dataset = ImageDataset([Path("unused")] * 10, np.zeros(10, np.int64), 224)
    for workers, batch in ((0, 1000), (2, 4), (5, 1)):  # 2 batches each of 150,528 bytes an image
        build_loader(dataset, EpochBatches(np.arange(10), batch, 0), workers)
    with pytest.raises(UserError, match=r"need 4 MB of shared memory, and .* has 3 MB free"):
        build_loader(dataset, EpochBatches(np.arange(10), 6, 0), 2)


@pytest.mark.gpu
def test_images_that_lie_on_the_gpu_are_those_in_memory():
    squares, batches = Squares(PIXELS, np.arange(N)[::-1]), EpochBatches(np.arange(N), 4, 1)
    files, devices = [Path("unused")] * N, [torch.device(name) for name in ("cuda", "cpu")]
    on_gpu, in_memory = (
        build_loader(ImageDataset(files, LABELS, SIZE, squares, device), batches, 0) for device in devices
    )
    for (ours, *more), (theirs, *same) in zip(on_gpu, in_memory, strict=True):
        assert ours.is_cuda and torch.equal(ours.cpu(), theirs)
        assert all(torch.equal(a, b) for a, b in zip(more, same, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are told apart by their parent")
def test_a_killed_worker_is_explained(monkeypatch):
    parent = os.getpid()

    def killed(self, indices):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ImageDataset, "__getitems__", killed)
    dataset = ImageDataset([Path("unused")] * 4, np.zeros(4, np.int64), 16)
    with pytest.raises(RuntimeError) as error:
        list(build_loader(dataset, EpochBatches(np.arange(4), 2, 0), 1))
    said = explain_failure(error.value, None)
    assert (
        "a process that loads images was killed" in said and "--num-workers" in said and "--shm-size" in said
    )


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "give --micro-batch-size"),
        ({"micro_batch_size": 8}, "lower --micro-batch-size"),
        ({"compile": True}, None),  # which excludes it
    ],
)
def test_the_advice_for_want_of_memory_can_be_followed(options, advice):
    said = explain_failure(torch.OutOfMemoryError("CUDA out of memory"), Config(**options))
    assert "lower --batch-size or --img-size" in said
    assert advice in said if advice else "--micro-batch-size" not in said


def test_other_mistakes_of_a_worker_are_not_explained_away():
    error = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nshape mismatch")
    assert explain_failure(error, None) is None
    full = RuntimeError("unable to write to file </torch_12_3>: No space left on device (28)")
    assert "ran out of shared memory" in explain_failure(full, None)
    assert "has ended (as head does" in explain_failure(BrokenPipeError(32, "Broken pipe"), None)
