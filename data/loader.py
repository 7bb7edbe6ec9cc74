"""Batches of uint8 images, from decoded squares or from the files."""

import math
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from common.device import free_memory
from common.distributed import n_processes, n_processes_here, rank, share
from common.errors import UserError
from common.stopping import stop_after_the_parent
from data.images import MEMORY_FOR_IMAGES, Squares, read_image, to_square
from data.pixels import UnreadableImage

SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps it
SHARE_OF_GPU = 0.1  # of its free memory, for decoded images
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ImageDataset(Dataset):
    """Gives (images (b, 3, size, size) uint8, labels (B,) int64, indices (B,) int64) for B indices.

    The b images are this process's share of the B (all of them where there is one process only). squares: the
    images decoded before, or None to read the files each time. device: what will compute; where that is a GPU
    with room for all squares, the b images lie there already. An index past the end begins again at the first
    image: N + i is image i shown once more.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: np.ndarray,
        size: int,
        squares: Squares | None = None,
        device: torch.device | None = None,
    ):
        self.files, self.labels, self.size, self.squares = files, labels, size, squares
        self.in_memory = squares is not None and squares.array.nbytes <= MEMORY_FOR_IMAGES
        for_gpu = device is not None and device.type == "cuda"
        on_gpu = for_gpu and self.in_memory and squares.array.nbytes <= SHARE_OF_GPU * free_memory(device)
        self.on_gpu = torch.tensor(squares.array, device=device) if on_gpu else None  # (M, S, S, 3)
        self.pin_memory = for_gpu and not on_gpu
        self.process, self.n_processes = rank(), n_processes()  # a worker process could not ask

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = torch.tensor(indices)
        indices = [i % len(self) for i in indices]
        own = indices[share(len(indices), self.process, self.n_processes)]
        if self.on_gpu is not None:
            rows = torch.from_numpy(self.squares.rows[own]).to(self.on_gpu.device, non_blocking=True)
            squares = self.on_gpu[rows]
        elif self.squares is not None:
            squares = torch.from_numpy(self.squares[own])
        else:
            squares = torch.zeros((len(own), self.size, self.size, 3), dtype=torch.uint8)
            for square, i in zip(squares.numpy(), own, strict=True):
                square[:] = self._read(i)
        images = squares.permute(0, 3, 1, 2)  # a view, channels last
        return images, torch.from_numpy(self.labels[indices]).long(), chosen  # (b, 3, S, S), (B,), (B,)

    def _read(self, index: int) -> np.ndarray:
        try:
            return to_square(read_image(self.files[index]), self.size)
        except UnreadableImage as error:  # it could be read when the run began: say which file it is
            raise UnreadableImage(f"{self.files[index]}: {error}") from None


class EpochBatches(Sampler[list[int]]):
    """Batches of indices: every index once per epoch, in sizes that differ by at most one.

    With `labels` (N,), of all images, an epoch is as long but holds every class of `indices` equally often,
    to one image: of a large class another part each time, and an image i of a small one several times, as i,
    N + i, 2 N + i, so that each time it is augmented differently.

    Even batches, because a batch of one image has no batch statistics and no negatives: where batches of 2
    meet an odd number of images, one holds 3.
    The order depends on `seed` and `epoch` alone; `start` batches of it are passed over.
    """

    def __init__(
        self, indices: np.ndarray, batch_size: int, seed: int | None, labels: np.ndarray | None = None
    ):
        self.indices, self.batch_size, self.seed, self.labels = indices, batch_size, seed, labels
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        n = len(self.indices)
        return max(1, min(math.ceil(n / self.batch_size), n // 2))

    def smallest(self) -> int:
        return len(self.indices) // len(self)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.indices
        if self.seed is not None:
            rng = np.random.default_rng([self.seed, self.epoch])
            order = rng.permutation(order if self.labels is None else self._balanced(rng))
        for batch in np.array_split(order, len(self))[self.start :]:
            yield batch.tolist()

    def _balanced(self, rng: np.random.Generator) -> np.ndarray:
        own = self.labels[self.indices]
        drawn = []
        classes = rng.permutation(np.unique(own))  # those that hold one image more than others take turns
        for i, label in enumerate(classes):
            of_class, share_of_class = self.indices[own == label], (len(own) + i) // len(classes)
            times = range(math.ceil(share_of_class / len(of_class)))
            shown = np.concatenate([rng.permutation(of_class) + len(self.labels) * k for k in times])
            drawn.append(shown[:share_of_class])
        return np.concatenate(drawn)


def build_loader(dataset: ImageDataset, batches: EpochBatches, num_workers: int) -> DataLoader:
    """A loader of `dataset`'s batches; `num_workers` processes where files must be read or squares fetched
    from disk, none where they only have to be gathered in memory.
    """
    workers = 0 if dataset.in_memory else loading_processes(num_workers)
    refuse_small_shared_memory(workers, batches.batch_size, dataset.size)
    return read_ahead(dataset, batches, workers, dataset.pin_memory, keep=True)


def read_ahead(
    dataset: Dataset, batches: Iterable[Sequence[Any]], workers: int, pin_memory: bool, keep: bool = False
) -> DataLoader:
    """What `dataset` gives for each of `batches`, prepared by `workers` processes: two each, ahead of time.
    With `keep` they wait for the next epoch.
    """
    # on Linux, processes that start at once and share what is loaded; elsewhere the platform decides
    context = multiprocessing.get_context("fork") if workers and sys.platform == "linux" else None
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=keep and workers > 0,
        worker_init_fn=stop_after_the_parent,
        multiprocessing_context=context,
        # its own: a new iterator would draw from the global stream, and dropout would differ after a resume
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def loading_processes(asked: int) -> int:
    """`asked`, but at most one per CPU core, which the processes of a run on this machine share."""
    return min(asked, max(1, (os.cpu_count() or 1) // n_processes_here()))


def refuse_small_shared_memory(workers: int, batch_size: int, *sizes: int) -> None:
    """Raises UserError when the batches that `workers` prepare have no room: the run would wait for ever.
    sizes: sides in pixels of the squares of each image.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    batch_bytes = 3 * math.ceil(batch_size / n_processes()) * sum(size**2 for size in sizes)
    needed = 2 * workers * n_processes_here() * batch_bytes  # each prepares two
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"{workers * n_processes_here()} processes that load images need {needed / 1e6:.0f} MB of shared "
            f"memory, and {SHARED_MEMORY} has {free / 1e6:.0f} MB free; lower --num-workers (0: no such "
            "processes) or --batch-size, or make it larger (in Docker: --shm-size)"
        )
