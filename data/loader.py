"""Batches of uint8 images.

An image is a function of seed, epoch and index alone, whatever worker loads it.
"""

import math
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

import common.torchvision_compat  # noqa: F401  (before torchvision)
from data.images import UnreadableImage, read_image, to_square

PRESETS = ("none", "minimal", "standard")


def build_augmentation(preset: str, horizontal_flip: bool):
    """Random changes of a square PIL image that a radiograph could have shown by itself.

    none: nothing. minimal: small shifts. standard: rotation to 7 degrees, shifts, zoom, brightness and
    contrast. The latter two also mirror half of the images when `horizontal_flip`. Never a vertical flip,
    never a hue.
    """
    from torchvision.transforms import InterpolationMode, v2

    if preset not in PRESETS:
        raise ValueError(f"unknown augmentation {preset!r}")
    if preset == "none":
        return v2.Identity()
    steps = [v2.RandomHorizontalFlip(0.5)] if horizontal_flip else []
    bilinear = {"interpolation": InterpolationMode.BILINEAR}
    if preset == "minimal":
        steps.append(v2.RandomAffine(0, translate=(0.04, 0.04), **bilinear))
    else:
        steps.append(v2.RandomAffine(7, translate=(0.05, 0.05), scale=(0.95, 1.1), **bilinear))
        steps.append(v2.ColorJitter(brightness=0.1, contrast=0.1))
    return v2.Compose(steps)


class ImageDataset(Dataset):
    """Gives (image (3, size, size) uint8, label, index) for a key (epoch, index).

    pixels: (N, size, size, 3) uint8 decoded before, or None to read the files each time.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: np.ndarray,
        size: int,
        pixels: np.ndarray | None = None,
        augmentation: str = "none",
        horizontal_flip: bool = False,
        seed: int = 0,
    ):
        self.files, self.labels, self.size, self.pixels = files, labels, size, pixels
        self.augment = build_augmentation(augmentation, horizontal_flip) if augmentation != "none" else None
        self.seed = seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        epoch, index = key
        square = self.pixels[index] if self.pixels is not None else self._read(index)
        if self.augment is not None:
            seed = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0]
            with torch.random.fork_rng(devices=[]):  # the caller's own random stream stays untouched
                torch.default_generator.manual_seed(
                    int(seed)
                )  # the CPU's alone; manual_seed also sets CUDA's
                square = np.asarray(self.augment(Image.fromarray(square)))
        image = torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))  # (3, size, size)
        return image, int(self.labels[index]), index

    def _read(self, index: int) -> np.ndarray:
        try:
            return to_square(read_image(self.files[index]), self.size)
        except UnreadableImage as error:  # it could be read when the run began: say which file it is
            raise UnreadableImage(f"{self.files[index]}: {error}") from None


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys: every index once per epoch, in sizes that differ by at most one.

    Even batches, because a batch of one image has no batch statistics and no negatives: where batches of 2
    meet an odd number of images, one holds 3.
    The order depends on `seed` and `epoch` alone.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int | None):
        self.indices, self.batch_size, self.seed, self.epoch = indices, batch_size, seed, 0

    def __len__(self) -> int:
        n = len(self.indices)
        return max(1, min(math.ceil(n / self.batch_size), n // 2))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.indices
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        for batch in np.array_split(order, len(self)):
            yield [(self.epoch, int(i)) for i in batch]


def build_loader(
    dataset: ImageDataset, batches: EpochBatches, num_workers: int, pin_memory: bool
) -> DataLoader:
    """A loader of (images (B, 3, S, S) uint8, labels (B,) int64, indices (B,) int64)."""
    # Forked workers share the decoded images instead of copying them; elsewhere the platform decides.
    context = multiprocessing.get_context("fork") if num_workers and sys.platform == "linux" else None
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        multiprocessing_context=context,
        # its own: a new iterator would draw from the global stream, and dropout would differ after a resume
        generator=torch.Generator(),
    )
