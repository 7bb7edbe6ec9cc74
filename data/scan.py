"""Find the class folders and their images."""

import errno
import hashlib
import heapq
import os
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.errors import UserError, listed, number, shorten
from data.members import Member, Members
from data.names import Names, all_but

FORMAT_OF_SUFFIX = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF",
    ".webp": "WEBP", ".dcm": "DICOM", ".dicom": "DICOM",
}  # fmt: skip
_PARTS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))  # of a data set
_LITTER = frozenset(("__macosx", "thumbs.db", "desktop.ini"))


@dataclass(frozen=True)
class ImageFolder:
    """N images in C class folders.

    classes: C names in NFC, sorted by code point. paths: N POSIX paths relative to root, sorted within a
    class (Names, as `scan_folder` makes them). labels: (N,) int64 indices into classes. notes: what was
    passed over, for the user to read. members: where the images lie, if not in files of their own (see
    data/members.py).
    """

    root: Path
    classes: tuple[str, ...]
    paths: Sequence[str]
    labels: np.ndarray
    notes: tuple[str, ...]
    members: Members | None = None

    def file(self, index: int) -> Path | Member:
        path = self.paths[index]
        return self.root / path if self.members is None else self.members.member(index, path)

    def files(self) -> "Files":
        return Files([self])

    def take(self, indices: np.ndarray) -> "ImageFolder":
        """The images of `indices` (n,), in that order."""
        paths, members = Names(self.paths[i] for i in indices), self.members and self.members.take(indices)
        return ImageFolder(self.root, self.classes, paths, self.labels[indices], self.notes, members)

    def without(self, dropped: set[int]) -> "ImageFolder":
        return self.take(all_but(dropped, len(self.paths)))


class Files(Sequence[Path | Member]):
    """The files of the images of `folders`, one folder after the other, each made when it is asked for."""

    def __init__(self, folders: Sequence[ImageFolder]):
        self.folders = folders

    def __len__(self) -> int:
        return sum(len(folder.paths) for folder in self.folders)

    def __getitem__(self, index: int | slice) -> Path | Member | list[Path | Member]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = index + len(self) if index < 0 else index
        for folder in self.folders:
            if 0 <= i < len(folder.paths):
                return folder.file(i)
            i -= len(folder.paths)
        raise IndexError(f"no file {index} of {len(self)}")

    def take(self, indices: np.ndarray) -> "Files":
        """Those of `indices` (n,), which ascend."""
        parts, start = [], 0
        for folder in self.folders:
            end = start + len(folder.paths)
            parts.append(folder.take(indices[(indices >= start) & (indices < end)] - start))
            start = end
        return Files(parts)


def nfc(text: str) -> str:
    """One spelling per name: macOS stores "é" as two code points, other systems as one."""
    return unicodedata.normalize("NFC", text)


def is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def has_dicom_magic(file: BinaryIO, start: int = 0) -> bool:
    """Whether what begins at `start` is a DICOM file, whatever its name."""
    file.seek(start + 128)
    return file.read(4) == b"DICM"


def leads_to(kind: Callable[[], bool]) -> bool:
    """Whether `kind`, is_dir or is_file of a directory entry, says so; a link to itself leads nowhere."""
    try:
        return kind()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _is_dicom(entry: os.DirEntry) -> bool:
    if not leads_to(entry.is_file):
        return False
    with open(entry.path, "rb") as file:
        return has_dicom_magic(file)


def _is_loose_dicom(entry: os.DirEntry) -> bool:
    with suppress(OSError):  # no run needs what lies beside the class folders
        return _is_dicom(entry)
    return False


def not_an_image(name: str, is_dicom: Callable[[], bool]) -> str:
    """ "" for a name of an image, else the suffix that says it is none. Asked of the content only where the
    name says nothing: scanners name DICOM files without a suffix, or by a UID such as 1.2.840.10008.7.
    """
    if name.lower() == "dicomdir":  # a list of images that is DICOM by its mark; as a folder it may hold some
        return "DICOMDIR"
    suffix = os.path.splitext(name)[1].lower()
    if suffix in FORMAT_OF_SUFFIX or (not suffix.strip(".0123456789") and is_dicom()):
        return ""
    return suffix or "no suffix"


def spelling(name: str) -> tuple[str, str]:
    """Sort key: by code point of the NFC form; two spellings of one name still have one order."""
    return nfc(name), name


def images_below(folder: Path, ignored: Counter[str]) -> list[str]:
    """Image paths below `folder`, relative to its parent. From directory entries alone: no stat per file.

    Each real folder is read once. Links wait until the folders are done and are then followed in sorted
    order, so that no file system decides by which way a folder is reached. A link to a folder above is not
    followed: it would bring in the images of other classes.
    """
    found: list[str] = []
    parent = Path(os.path.realpath(folder.parent))
    visited = {str(parent), *map(str, parent.parents)}
    todo, links = [(str(folder), folder.name)], []
    while todo or links:
        directory, prefix = todo.pop() if todo else heapq.heappop(links)
        target = os.path.realpath(directory)
        if target in visited:
            continue
        visited.add(target)
        with os.scandir(directory) as entries:
            for entry in entries:
                if is_litter(entry.name):
                    continue
                if leads_to(entry.is_dir):
                    below = (entry.path, f"{prefix}/{entry.name}")
                    if entry.is_symlink():
                        heapq.heappush(links, below)
                    else:
                        todo.append(below)
                    continue
                if kind := not_an_image(entry.name, partial(_is_dicom, entry)):
                    ignored[kind] += 1
                else:
                    found.append(f"{prefix}/{entry.name}")
    found.sort(key=spelling)
    return found


def passed_over(ignored: Counter[str]) -> list[str]:
    """A note on the files that are no images, counted by suffix; none where there are none."""
    if not ignored:
        return []
    kinds = ", ".join(f"{suffix} x {times}" for suffix, times in ignored.most_common(8))
    are = number(ignored.total(), "file that is no image is", "files that are no images are")
    return [f"{are} passed over ({kinds})"]


def refuse_no_folder(root: Path, option: str) -> None:
    if not root.is_dir():
        raise UserError(
            f"{option} {root} is not a folder; give the folder that holds one sub-folder per class"
        )


def scan_folder(root: Path, option: str = "--data-dir", at_least: int = 2) -> ImageFolder:
    """List the images of every class folder, in an order that no file system changes. Of shards see
    `data.shards`.

    Hidden entries and system litter are passed over; other files that are no images are counted in `notes`.
    Raises UserError when the folder is missing, is empty, or holds fewer than `at_least` (1 or 2) classes
    with images.
    """
    refuse_no_folder(root, option)
    try:
        with os.scandir(root) as entries:
            found = [(entry, leads_to(entry.is_dir)) for entry in entries if not is_litter(entry.name)]
        names = sorted((entry.name for entry, is_folder in found if is_folder), key=spelling)
        ignored = Counter(
            not_an_image(entry.name, partial(_is_loose_dicom, entry))
            for entry, is_folder in found
            if not is_folder
        )
        loose = ignored.pop("", 0)
        "\n".join(names).encode()
        paths, counts = Names(), {}
        for name in names:
            n_before = len(paths)
            paths.extend(images_below(root / name, ignored))
            counts[name] = len(paths) - n_before
    except PermissionError as error:
        raise UserError(f"{option}: no permission to read {error.filename}") from None
    except UnicodeEncodeError as error:
        raise not_utf8(f"{option} {root}", error) from None
    return folder_of_classes(root, option, at_least, counts, paths, loose, ignored)


def not_utf8(where: str, error: UnicodeEncodeError) -> UserError:
    line = error.object[: error.end].rsplit("\n", 1)[-1]
    return UserError(
        f"{where} has a name that is not UTF-8, such as {line!r}, perhaps unpacked from an archive made with "
        "another encoding; unpack it with the right one, or rename it"
    )


def folder_of_classes(
    root: Path,
    option: str,
    at_least: int,
    counts: Mapping[str, int],
    paths: Names,
    loose: int,
    ignored: Counter[str],
) -> ImageFolder:
    """What a scan found, checked. counts: of the images in `paths`, by class folder as it is spelled, sorted;
    loose: images in none; ignored: files that are no images, by suffix.
    """
    twice = [name for name, n in Counter(map(nfc, counts)).items() if n > 1]
    if twice:
        raise UserError(f"{option} {root} has two folders that both read {twice[0]!r}; rename or merge them")

    notes = []
    if loose:
        lie = number(loose, "image lies", "images lie")
        notes.append(f"{lie} beside the class folders of {root}, unused")
    empty = [name for name, n in counts.items() if not n]
    if empty:
        notes.append(f"folders without images are no classes: {listed(empty)}")
    notes += passed_over(ignored)
    alike = first_of_name(paths)
    again = np.flatnonzero(alike != np.arange(len(alike)))
    if len(again):
        have = number(len(again), "image has", "images have")
        notes.append(
            f"{have} the name of another in the folder but for the format ({paths[alike[again[0]]]} and "
            f"{paths[again[0]]}): a split keeps them on one side, but they count twice; remove one if both "
            "show the same"
        )

    used = [name for name, n in counts.items() if n]
    # to evaluate on, one class is enough, whatever it is called
    if used and max(len(used), at_least) > 1 and all(name.lower() in _PARTS for name in used):
        part = {name[:3].lower(): name for name in used}
        one = f"one, such as {option} {shlex.quote(str(root / part.get('tra', used[0])))}"
        if option == "--data-dir" and {"tra", "val"} <= part.keys():
            one += f"; for training with --val-dir {shlex.quote(str(root / part['val']))}"
        raise UserError(
            f"{option} {root} holds {', '.join(used)}: parts of a data set and no classes; give {one}"
        )
    if len(used) < at_least:
        have = f"only {used[0]!r}" if used else "none"
        one_class = " (its images lie loose in it; if it is the folder of one class, give the one above)"
        hint = one_class if loose and not used else ""
        if not used and any(root.glob("*.tar")):
            hint = " (tar shards are read where no folder lies beside them)"
        wanted = "two class folders" if at_least == 2 else "one class folder"
        raise UserError(
            f"{option} {root} needs at least {wanted} with images, found {have}{hint}; "
            f"images end in {', '.join(sorted(FORMAT_OF_SUFFIX))}"
        )
    labels = np.repeat(np.arange(len(used), dtype=np.int64), [counts[name] for name in used])
    return ImageFolder(root, tuple(nfc(name) for name in used), paths, labels, tuple(notes))


def check_class_sizes(folder: ImageFolder, at_least: int, why: str) -> None:
    """Raises UserError naming every class with fewer than `at_least` images."""
    counts = np.bincount(folder.labels, minlength=len(folder.classes))
    small = [f"{name}: {n}" for name, n in zip(folder.classes, counts, strict=True) if n < at_least]
    if small:
        raise UserError(
            f"every class needs at least {at_least} images {why}; too few in\n{shorten(small)}\n"
            "add images, or move the folder out of the data folder"
        )


def fingerprint(folder: ImageFolder, digests: np.ndarray) -> str:
    """SHA-256 over classes, relative paths and pixel digests (N,): equal data have the same everywhere."""
    found = hashlib.sha256("\n".join(folder.classes).encode())
    for path, digest in zip(folder.paths, digests, strict=True):
        found.update(f"\n{nfc(path)}\t{digest.decode()}".encode())
    return found.hexdigest()


def first_alike(keys: Sequence[str] | np.ndarray) -> np.ndarray:
    """(N,) of each key the index of the first that equals it."""
    if isinstance(keys, np.ndarray):  # many different ones would take more memory in a dictionary
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        return first[which]
    first_of: dict[str, int] = {}
    return np.fromiter((first_of.setdefault(key, i) for i, key in enumerate(keys)), np.int64, len(keys))


def first_of_name(paths: Iterable[str]) -> np.ndarray:
    """(N,) of each image the index of the first in its folder whose name differs in the format alone, such as
    Y92.jpg beside Y92.png.
    """

    def name(path: str) -> str:
        stem, _, suffix = path.rpartition(".")
        return stem if f".{suffix.lower()}" in FORMAT_OF_SUFFIX else path

    return first_alike(np.array([hash(name(path)) for path in paths], np.int64))  # less memory than names
