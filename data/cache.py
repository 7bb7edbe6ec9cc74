"""Images decoded once: a file of resized squares that later runs map into memory instead of reading images.

One file for each data folder (or pair of them) and image size: an array in NumPy's .npy format, (N, S, S, 3)
uint8, then a record of which file each row was made from (by path, size and times of change) as further such
arrays, then the record's CRC-32 in 4 bytes. It is written beside its name and renamed when it is whole, so
runs may build it at the same time, and a run keeps what it has mapped when another replaces it (not on a
network file system, where jobs on several machines are better given a --cache-dir each). It may be removed at
any time.
"""

import hashlib
import io
import itertools
import json
import os
import re
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
from typing import BinaryIO

import numpy as np

from common.errors import first_line, number
from common.files import write_whole
from common.progress import progress
from data.images import Facts, Inspection, Reading, Squares, inspect_images, read_all
from data.members import Member, stamp_of
from data.names import Names
from data.scan import Files, ImageFolder

# What makes a square besides the file itself: another way of making it must not find the old ones.
MADE_BY = "whole image to a square, bicubic; 6; " + ", ".join(
    f"{name} {metadata.version(name)}" for name in ("pillow", "pydicom")
)
FREE_DISK = 2**30  # bytes that stay free: the run has checkpoints to write
DEAD_AFTER = 3600  # seconds without a write: whoever built it was killed
NONE = -1  # no row


def default_cache_dir() -> Path:
    """`train_clip` in the user's folder for caches ($XDG_CACHE_HOME, or ~/.cache)."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train_clip"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "train_clip"


def cache_dir_of(given: str | Path | None) -> Path:
    """The folder for caches: what --cache-dir gives, or the default."""
    return Path(given) if given else default_cache_dir()


@dataclass(frozen=True)
class _Stored:
    """An open cache of M images, none where there is no file.

    array (M, S, S, 3): the squares. keys: of the files they were made from; stamps (M, 3) int64: what those
    were then. crcs (M,) uint32: of the squares. found: what reading the files found, without squares.
    """

    array: np.ndarray
    keys: Names
    stamps: np.ndarray
    crcs: np.ndarray
    found: Inspection


def inspect_cached(folders: Sequence[ImageFolder], size: int, cache_dir: Path) -> Inspection:
    """As `inspect_images` for the files of `folders`, one after the other, with the squares in a file of
    `cache_dir`: only new and changed files are decoded, and those that could not be read.

    Says what it does. Without room or right to write there, the squares are kept in memory, or the files read
    every epoch.
    """
    files = Files(folders)
    keys = Names(f"{i}/{path}" for i, folder in enumerate(folders) for path in folder.paths)
    path = cache_file(cache_dir, size, [folder.root for folder in folders])
    stamps = _stamps(files)

    _remove_left_overs(cache_dir)
    try:
        stored = _open(path, size)
    except PermissionError:
        print(f"note: no cache in {cache_dir}: {path.name} belongs to another user; give another --cache-dir")
        return inspect_images(files, size)
    places = _places(stored, keys)
    rows = _fitting(stored, places, stamps)
    if n_damaged := _drop_damaged(stored, rows):
        print(f"note: {number(n_damaged, 'image', 'images')} damaged in the cache {path}, decoded anew")
    unread = np.array([i for i, row in enumerate(rows) if row in stored.found.errors], np.int64)
    # whatever kept them from being read may be over
    for i, reading in zip(unread, read_all(files.take(unread), None), strict=True):
        if not reading.error:
            rows[i] = NONE
    if (rows == NONE).any():
        others = _still_there(stored, folders, places)
        n_bytes = (len(files) + len(others)) * size * size * 3
        problem = _no_room(path, n_bytes)
        if not problem:
            print(
                f"decoding {number((rows == NONE).sum(), 'image', 'images')} into the cache {path} "
                f"({n_bytes / 1e6:.0f} MB in all; --cache-dir puts it elsewhere, --no-cache does without)",
                flush=True,
            )
            try:
                _build(path, files, keys, stamps, rows, others, stored, size)
                stored = _open(path, size)  # another run may have put its own there meanwhile
                rows = _fitting(stored, _places(stored, keys), stamps)
                problem = "another run changes it; try again" if (rows == NONE).any() else ""
            except OSError as error:
                problem = error.strerror or str(error)
        if problem:
            print(f"note: no cache in {cache_dir}: {problem}")
            return inspect_images(files, size)
    return replace(stored.found.take(rows), squares=Squares(stored.array, rows))


def _remove_left_overs(cache_dir: Path) -> None:
    """What runs that were killed have left unfinished, of these images or others."""
    with suppress(OSError):  # the folder is another user's
        for left_over in cache_dir.glob(".*px.npy.*.tmp"):
            with suppress(OSError):  # or the file is, or another run has just renamed it
                if time.time() - left_over.stat().st_mtime > DEAD_AFTER:
                    left_over.unlink()


def _whole(root: Path) -> str:
    """The same from every working folder: of a path the whole of it; an address or a command is no path."""
    return str(root) if re.match(r"pipe:|[a-zA-Z][\w+.-]+:/", str(root)) else str(root.resolve())


def cache_file(cache_dir: Path, size: int, roots: Sequence[Path]) -> Path:
    key = "\n".join([*(_whole(root) for root in roots), MADE_BY])
    return cache_dir / f"{hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()[:16]}_{size}px.npy"


def _places(stored: _Stored, keys: Names) -> np.ndarray:
    """(N,) the row of each file, whatever it was then; NONE where it has none."""
    if stored.keys == keys:  # as nearly always; a million keys in a dictionary take 200 MB
        return np.arange(len(keys))
    row_of = {key: row for row, key in enumerate(stored.keys)}
    return np.fromiter((row_of.get(key, NONE) for key in keys), np.int64, len(keys))


def _fitting(stored: _Stored, places: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """(N,) the row of each file that has not changed since, NONE for the others."""
    rows = places.copy()
    known = np.flatnonzero(places != NONE)
    changed = (stored.stamps[places[known]] != stamps[known]).any(axis=1)
    rows[known[changed]] = NONE
    return rows


def _drop_damaged(stored: _Stored, rows: np.ndarray) -> int:
    """Put NONE in place of rows whose squares are not what was written; how many there were."""

    def is_damaged(row: int) -> bool:
        return zlib.crc32(np.ascontiguousarray(stored.array[row])) != stored.crcs[row]

    known = np.flatnonzero(rows != NONE)
    damaged = np.zeros(len(known), bool)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, len(known), 1024)  # what waits in a pool takes a kilobyte each
        for start in progress(starts, "checking the cache", delay=1):
            part = slice(start, start + 1024)
            damaged[part] = list(pool.map(is_damaged, rows[known[part]]))
    rows[known[damaged]] = NONE
    return int(damaged.sum())


def _stamps(files: Sequence[Path | Member]) -> np.ndarray:
    """(N, 3) int64, `stamp_of` each; -1 where a file is not there."""
    stamps = np.full((len(files), 3), -1, np.int64)
    for stamp, file in zip(stamps, files, strict=True):
        with suppress(OSError):
            stamp[:] = stamp_of(file.stat())
    return stamps


def _still_there(stored: _Stored, folders: Sequence[ImageFolder], places: np.ndarray) -> np.ndarray:
    """Rows that this run does not need but another may: of files that are there as they were (of shards
    none).
    """
    others = np.setdiff1d(np.arange(len(stored.keys)), places)
    split = [stored.keys[row].split("/", 1) for row in others]
    now = _stamps([folders[int(number)].root / path for number, path in split])
    return others[(now == stored.stamps[others]).all(axis=1) & (now[:, 0] >= 0)]


def _no_room(path: Path, n_bytes: int) -> str:
    """Why the cache cannot be built, or "". Makes its folder."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
    files: Files,
    keys: Names,
    stamps: np.ndarray,
    rows: np.ndarray,
    others: np.ndarray,
    stored: _Stored,
    size: int,
) -> None:
    """Write the file: a row for each of `files`, black where one cannot be read, then the rows `others`."""
    if len(others):
        keys = Names(itertools.chain(keys, (stored.keys[row] for row in others)))
        stamps = np.concatenate([stamps, stored.stamps[others]])
    from_rows = np.concatenate([rows, others])
    crcs = np.zeros(len(keys), np.uint32)

    def readings(file: BinaryIO) -> Iterator[Reading]:
        """Each written as it passes."""
        new = read_all(files.take(np.flatnonzero(rows == NONE)), size)
        for i, row in enumerate(from_rows):
            reading = next(new) if row == NONE else stored.found.reading(row, stored.array[row])
            square = bytes(size * size * 3) if reading.square is None else reading.square.tobytes()
            file.write(square)
            crcs[i] = zlib.crc32(square)
            yield reading

    def write(file: BinaryIO) -> None:
        if os.chmod in os.supports_fd:
            os.chmod(file.fileno(), 0o600)  # patients' images: for this user alone
        shape = (len(keys), size, size, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        found = Inspection.of(readings(file), len(keys), None)
        record = _packed(keys, stamps, crcs, found)
        file.write(record)
        file.write(zlib.crc32(record).to_bytes(4, "little"))

    write_whole(path, write)


def _packed(keys: Names, stamps: np.ndarray, crcs: np.ndarray, found: Inspection) -> memoryview:
    """The record: arrays in the .npy format, one after the other; `_open` reads them back."""
    number = {facts: i for i, facts in enumerate(dict.fromkeys(found.facts))}
    words = {"errors": list(found.errors.items()), "facts": [f and astuple(f) for f in number]}
    arrays = (
        *keys.arrays(), stamps, crcs, found.digests, np.array([number[f] for f in found.facts], np.int32),
        np.frombuffer(json.dumps(words).encode(), np.uint8),
    )  # fmt: skip
    record = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(record, array, allow_pickle=False)
    return record.getbuffer()


def _open(path: Path, size: int) -> _Stored:
    """The cache in the file, empty where there is none that can be used. Raises PermissionError."""
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("another version of the format")
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            if shape[1:] != (size, size, 3):
                raise ValueError("squares of another size")
            start = file.tell()
            array = np.memmap(file, np.uint8, "r", start, shape)
            file.seek(start + array.nbytes)
            content = file.read()
        if zlib.crc32(memoryview(content)[:-4]) != int.from_bytes(content[-4:], "little"):
            raise ValueError("the record is damaged")
        packed = io.BytesIO(content)
        text, ends, stamps, crcs, digests, which, words = (
            np.lib.format.read_array(packed, allow_pickle=False) for _ in range(7)
        )
        words = json.loads(words.tobytes())
        facts = [entry and Facts(*entry) for entry in words["facts"]]
        found = Inspection(dict(words["errors"]), digests, None, [facts[i] for i in which])
        if not len(ends) == len(stamps) == len(crcs) == len(digests) == len(which) == shape[0]:
            raise ValueError("not every row has its file")
        return _Stored(array, Names.of(text, ends), stamps, crcs, found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError, LookupError) as error:
        print(f"note: the cache {path} is damaged ({first_line(error)}) and is made anew")
    none = np.zeros(0, np.int64)
    return _Stored(none, Names(), none.reshape(0, 3), none, Inspection.of((), 0, None))
