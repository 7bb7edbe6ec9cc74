"""Images decoded once: a file of resized squares that later runs map into memory instead of reading images.

One file for each data folder and image size: an array in NumPy's .npy format, (N, S, S, 3) uint8, then a
JSON record of which file each row was made from (by path, size, time of change), then the record's length in
8 bytes. It is written beside its name and renamed when it is whole, so runs may build it at the same time,
and a run that uses the one before keeps what it has mapped. It may be removed at any time.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL

from common.files import write_whole
from data.images import Facts, Inspection, Reading, Squares, inspect_images, read_all

# What makes a square besides the file itself: another way of making it must not find the old ones.
MADE_BY = f"whole image to a square, bicubic; 1; Pillow {PIL.__version__}"
FREE_DISK = 2**30  # stays free: the run has checkpoints to write
DEAD_AFTER = 3600  # seconds without a write: whoever built it was killed


def default_cache_dir() -> Path:
    """`train_clip` in the user's folder for caches ($XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "train_clip"


@dataclass(frozen=True)
class _Stored:
    """An open cache. rows: path -> row of the array and what is known of the file's content."""

    array: np.ndarray
    rows: dict[str, tuple[int, list[int], Reading]]


def inspect_cached(files: Sequence[Path], size: int, folder: Path, name: str) -> Inspection:
    """As `inspect_images`, with the squares in a file of `folder`: only new and changed files are decoded.

    name: tells data folders apart. Says what it does. Without room or right to write in `folder`, the squares
    are kept in memory, or the files read every epoch.
    """
    path = cache_file(folder, size, name)
    stored = _open(path, size)
    stamps = [_stamp(file) for file in files]
    known = [_known(stored, file, stamp) for file, stamp in zip(files, stamps, strict=True)]
    n_new = known.count(None)
    if n_new:
        problem = _no_room(path, len(files) * size * size * 3)
        if not problem:
            print(
                f"decoding {n_new} images into the cache {path} "
                f"({len(files) * size * size * 3 / 1e6:.0f} MB; --cache-dir puts it elsewhere, --no-cache "
                "does without)",
                flush=True,
            )
            try:
                readings = _build(path, files, stamps, known, stored, size)
            except OSError as error:
                problem = error.strerror or str(error)
        if problem:
            print(f"note: no cache in {folder}: {problem}")
            return inspect_images(files, size)
        stored = _open(path, size)
        if stored is None:
            print(f"note: the cache {path} went away while it was used")
            return inspect_images(files, size)
        rows = np.arange(len(files))
    else:
        readings = [reading for _, _, reading in known]
        rows = np.array([row for row, _, _ in known])
    return Inspection.of(readings, Squares(stored.array, rows))


def cache_file(folder: Path, size: int, name: str) -> Path:
    key = hashlib.sha256(f"{name}\n{size}\n{MADE_BY}".encode(errors="surrogatepass")).hexdigest()[:16]
    return folder / f"{key}_{size}px.npy"


def _stamp(file: Path) -> list[int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _known(
    stored: _Stored | None, file: Path, stamp: list[int] | None
) -> tuple[int, list[int], Reading] | None:
    entry = stored.rows.get(str(file.absolute())) if stored and stamp else None
    return entry if entry and entry[1] == stamp else None


def _no_room(path: Path, n_bytes: int) -> str:
    """Why the cache cannot be built, or "". Makes its folder."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # patients' images: for this user alone
        for left_over in path.parent.glob(f".{path.name}.*.tmp"):
            if time.time() - left_over.stat().st_mtime > DEAD_AFTER:
                left_over.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        return error.strerror or str(error)
    if free < n_bytes + FREE_DISK:
        return (
            f"it would take {n_bytes / 1e9:.1f} GB and leave {FREE_DISK / 1e9:.0f} GB, and {free / 1e9:.1f} "
            "GB are free; --cache-dir puts it on another disk"
        )
    return ""


def _build(
    path: Path,
    files: Sequence[Path],
    stamps: Sequence[list[int] | None],
    known: Sequence[tuple[int, list[int], Reading] | None],
    stored: _Stored | None,
    size: int,
) -> list[Reading]:
    """Write the file of all `files`, a row each, black where one cannot be read. Readings without squares."""
    readings: list[Reading] = []

    def all_readings() -> Iterator[Reading]:
        fresh = read_all([file for file, k in zip(files, known, strict=True) if k is None], size)
        for entry in known:
            yield next(fresh) if entry is None else replace(entry[2], square=stored.array[entry[0]])

    def write(file: BinaryIO) -> None:
        shape = (len(files), size, size, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for reading in all_readings():
            file.write(bytes(size * size * 3) if reading.square is None else reading.square.tobytes())
            readings.append(replace(reading, square=None))
        rows = {
            str(images.absolute()): [row, stamp, reading.digest, astuple(reading.facts)]
            for row, (images, stamp, reading) in enumerate(zip(files, stamps, readings, strict=True))
            if stamp and not reading.error
        }
        record = json.dumps(rows).encode()
        file.write(record + len(record).to_bytes(8, "little"))

    write_whole(path, write)
    return readings


def _open(path: Path, size: int) -> _Stored | None:
    """The cache in the file, or None where there is none that can be used."""
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("another version of the format")
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            if shape[1:] != (size, size, 3):
                raise ValueError("squares of another size")
            array = np.memmap(file, np.uint8, "r", file.tell(), shape)
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(8), "little")
            file.seek(-8 - length, os.SEEK_END)
            record = json.loads(file.read(length))
        rows = {
            name: (row, stamp, Reading(digest, facts=Facts(*facts)))
            for name, (row, stamp, digest, facts) in record.items()
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"note: the cache {path} is damaged ({type(error).__name__}) and is made anew")
        return None
    return _Stored(array, rows)
