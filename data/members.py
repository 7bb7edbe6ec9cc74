"""Where images lie that have no files of their own: pieces of tar files (see data/shards.py)."""

import io
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file does: bytes; time of the last change of the content, of anything, in ns."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True)
class Member:
    """One image in a shard; what `data.images` asks of a Path it answers too.

    path: class/key.jpg. offset, size: bytes. stamp: the shard's size and times of change.
    """

    shard: Path
    path: str
    offset: int
    size: int
    stamp: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.shard}: {self.path}"

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    def stat(self) -> SimpleNamespace:
        _, changed, touched = self.stamp
        return SimpleNamespace(
            st_mode=stat.S_IFREG, st_size=self.size, st_mtime_ns=changed, st_ctime_ns=touched
        )

    def open(self, mode: str = "rb") -> io.BytesIO:
        with open(self.shard, mode) as file:
            if stamp_of(os.fstat(file.fileno())) != self.stamp:
                raise OSError(f"{self.shard.name} has changed since the run began")
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


@dataclass(frozen=True)
class Members:
    """Where N images lie: places (N, 3) int64 of shard, offset and size. stamps: of each shard."""

    shards: tuple[Path, ...]
    stamps: tuple[tuple[int, int, int], ...]
    places: np.ndarray

    def member(self, index: int, path: str) -> Member:
        shard, offset, size = self.places[index].tolist()
        return Member(self.shards[shard], path, offset, size, self.stamps[shard])

    def take(self, indices: np.ndarray) -> "Members":
        return replace(self, places=self.places[indices])
