"""Images decoded once: a file of resized squares that later runs map into memory instead of reading images.

One file for each data folder (or pair of them) and image size: an array in NumPy's .npy format, (N, S, S, 3)
uint8, then a JSON record of which file each row was made from (by path, size and times of change), then the
record's length in 8 bytes. It is written beside its name and renamed when it is whole, so runs may build it
at the same time, and a run keeps what it has mapped when another replaces it (not on a network file system,
where jobs on several machines are better given a --cache-dir each). It may be removed at any time.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from tqdm import tqdm

from common.files import write_whole
from data.images import Facts, Inspection, Reading, Squares, inspect_images, read_all
from data.scan import Files, ImageFolder

if TYPE_CHECKING:
    from data.shards import Member

# What makes a square besides the file itself: another way of making it must not find the old ones.
MADE_BY = "whole image to a square, bicubic; 2; " + ", ".join(
    f"{name} {metadata.version(name)}" for name in ("pillow", "pydicom")
)
FREE_DISK = 2**30  # bytes that stay free: the run has checkpoints to write
DEAD_AFTER = 3600  # seconds without a write: whoever built it was killed

Stamp = list[int]  # bytes, time of the last change of the content, of anything; both in ns


def default_cache_dir() -> Path:
    """`train_clip` in the user's folder for caches ($XDG_CACHE_HOME, or ~/.cache)."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train_clip"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "train_clip"


@dataclass(frozen=True)
class _Row:
    """What is known of one file: its row of the array, and what the file was when that was made."""

    number: int
    stamp: Stamp
    reading: Reading
    crc: int  # of the square


@dataclass(frozen=True)
class _Stored:
    """An open cache. rows: key of a file -> its row."""

    array: np.ndarray
    rows: dict[str, _Row]


def inspect_cached(folders: Sequence[ImageFolder], size: int, cache_dir: Path) -> Inspection:
    """As `inspect_images` for the files of `folders`, one after the other, with the squares in a file of
    `cache_dir`: only new and changed files are decoded, and those that could not be read.

    Says what it does. Without room or right to write there, the squares are kept in memory, or the files read
    every epoch.
    """
    files = Files(folders)
    keys = [f"{i}/{path}" for i, folder in enumerate(folders) for path in folder.paths]
    path = cache_file(cache_dir, size, [folder.root for folder in folders])
    stamps = [_stamp(file) for file in files]

    try:
        stored = _open(path, size)
    except PermissionError:
        print(f"note: no cache in {cache_dir}: {path.name} belongs to another user; give another --cache-dir")
        return inspect_images(files, size)
    rows = _rows_of(stored, keys, stamps)
    if n_damaged := _drop_damaged(stored, rows):
        print(f"note: {n_damaged} images in the cache {path} are damaged and are decoded anew")
    unread = [i for i, row in enumerate(rows) if row and row.reading.error]
    # whatever kept them from being read may be over
    for i, reading in zip(unread, read_all([files[i] for i in unread], None), strict=True):
        if not reading.error:
            rows[i] = None
    if None in rows:
        others = _still_there(stored, folders, set(keys))
        n_bytes = (len(files) + len(others)) * size * size * 3
        problem = _no_room(path, n_bytes)
        if not problem:
            print(
                f"decoding {rows.count(None)} images into the cache {path} ({n_bytes / 1e6:.0f} MB in all; "
                "--cache-dir puts it elsewhere, --no-cache does without)",
                flush=True,
            )
            try:
                _build(path, files, keys, stamps, rows, others, stored, size)
                stored = _open(path, size)  # another run may have put its own there meanwhile
                rows = _rows_of(stored, keys, stamps)
                problem = "another run changes it; try again" if None in rows else ""
            except OSError as error:
                problem = error.strerror or str(error)
        if problem:
            print(f"note: no cache in {cache_dir}: {problem}")
            return inspect_images(files, size)
    squares = Squares(stored.array, np.array([row.number for row in rows]))
    return Inspection.of((row.reading for row in rows), len(rows), squares)


def cache_file(cache_dir: Path, size: int, roots: Sequence[Path]) -> Path:
    key = "\n".join([*(str(root.resolve()) for root in roots), MADE_BY])
    return cache_dir / f"{hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()[:16]}_{size}px.npy"


def _rows_of(
    stored: _Stored | None, keys: Sequence[str], stamps: Sequence[Stamp | None]
) -> list[_Row | None]:
    """The row of each file that has not changed since, None for the others."""
    found = [stored.rows.get(key) if stored else None for key in keys]
    return [row if row and row.stamp == stamp else None for row, stamp in zip(found, stamps, strict=True)]


def _drop_damaged(stored: _Stored | None, rows: list[_Row | None]) -> int:
    """Put None in place of rows whose squares are not what was written; how many there were."""

    def is_damaged(row: _Row | None) -> bool:
        return row is not None and zlib.crc32(np.ascontiguousarray(stored.array[row.number])) != row.crc

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(is_damaged, rows)
        damaged = list(tqdm(found, "checking the cache", len(rows), leave=False, disable=None, delay=1))
    for i in np.flatnonzero(damaged):
        rows[i] = None
    return sum(damaged)


def _stamp(file: "Path | Member") -> Stamp | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _still_there(
    stored: _Stored | None, folders: Sequence[ImageFolder], wanted: set[str]
) -> dict[str, tuple[Stamp, _Row]]:
    """Rows that this run does not need but another may: of files that are there as they were."""
    kept = {}
    for key, row in stored.rows.items() if stored else ():
        number, path = key.split("/", 1)
        stamp = _stamp(folders[int(number)].root / path)  # of shards none is found
        if key not in wanted and stamp == row.stamp:
            kept[key] = (stamp, row)
    return kept


def _no_room(path: Path, n_bytes: int) -> str:
    """Why the cache cannot be built, or "". Makes its folder."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left_over in path.parent.glob(f".{path.name}.*.tmp"):
            with suppress(OSError):  # another run has just renamed it, or it is another user's
                if time.time() - left_over.stat().st_mtime > DEAD_AFTER:
                    left_over.unlink()
        if not os.access(path.parent, os.W_OK):
            return "it may not be written"
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        return error.strerror or str(error)
    if free < n_bytes + FREE_DISK:
        return (
            f"{free / 1e6:,.0f} MB are free, and it needs {n_bytes / 1e6:,.0f} MB beside the "
            f"{FREE_DISK / 1e6:,.0f} MB that are kept for the run's results; --cache-dir puts it elsewhere"
        )
    return ""


def _build(
    path: Path,
    files: Sequence[Path],
    keys: Sequence[str],
    stamps: Sequence[Stamp | None],
    rows: Sequence[_Row | None],
    others: dict[str, tuple[Stamp, _Row]],
    stored: _Stored | None,
    size: int,
) -> None:
    """Write the file: a row for each of `files`, black where one cannot be read, then the `others`."""
    record: dict[str, list] = {}

    def readings() -> Iterator[tuple[str, Stamp | None, Reading]]:
        new = read_all([file for file, row in zip(files, rows, strict=True) if row is None], size)
        for key, stamp, row in zip(keys, stamps, rows, strict=True):
            yield key, stamp, next(new) if row is None else _with_square(stored, row)
        for key, (stamp, row) in others.items():
            yield key, stamp, _with_square(stored, row)

    def write(file: BinaryIO) -> None:
        if os.chmod in os.supports_fd:
            os.chmod(file.fileno(), 0o600)  # patients' images: for this user alone
        shape = (len(files) + len(others), size, size, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for number, (key, stamp, reading) in enumerate(readings()):
            square = bytes(size * size * 3) if reading.square is None else reading.square.tobytes()
            file.write(square)
            facts = astuple(reading.facts) if reading.facts else None
            record[key] = [number, stamp, reading.digest, reading.error, facts, zlib.crc32(square)]
        text = json.dumps(record).encode()
        file.write(text + len(text).to_bytes(8, "little"))

    write_whole(path, write)


def _with_square(stored: _Stored, row: _Row) -> Reading:
    return row.reading if row.reading.error else replace(row.reading, square=stored.array[row.number])


def _open(path: Path, size: int) -> _Stored | None:
    """The cache in the file, or None where there is none that can be used. Raises PermissionError."""
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
            key: _Row(number, stamp, Reading(digest, error, Facts(*facts) if facts else None), crc)
            for key, (number, stamp, digest, error, facts, crc) in record.items()
        }
        if sorted(row.number for row in rows.values()) != list(range(shape[0])):
            raise ValueError("not every row has its file")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        print(f"note: the cache {path} is damaged ({type(error).__name__}) and is made anew")
        return None
    return _Stored(array, rows)
