"""The images that `--input` stands for: one file, all below a folder, or those of a list."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import csv_rows, lines_of
from data.scan import images_below, passed_over

LIST_SUFFIXES = (".txt", ".csv")


@dataclass(frozen=True)
class ImageList:
    """N image files in the order of the input.

    names: as the user knows them: relative to a folder (POSIX), as a list writes them, or the file as typed.
    root: what a relative name is relative to. notes: what was passed over, for the user to read.
    """

    root: Path
    names: list[str]
    notes: tuple[str, ...] = ()


def list_images(source: Path) -> ImageList:
    """An image; a folder: every image below it, sorted; a .txt list: a path per line, blank lines ignored; a
    .csv list: its column path. Paths of a list are relative to the list's folder, or absolute.

    Whether the images exist and can be read is not looked at. Raises UserError when there are none.
    """
    if source.is_dir():
        return _of_folder(source)
    if ".tar" in source.suffixes:
        raise UserError(f"--input {source} is a tar file, which is read for training only; unpack it")
    if not source.exists():
        raise UserError(f"--input {source} does not exist; give an image, a folder, or a list (.txt, .csv)")
    if source.suffix.lower() not in LIST_SUFFIXES:
        if not source.is_file():
            raise UserError(f"--input {source} is a pipe or a device, no file; save a list as .txt or .csv")
        return ImageList(Path(), [str(source)])
    names = _of_csv(source) if source.suffix.lower() == ".csv" else _of_text(source)
    if not names:
        raise UserError(f"--input {source} names no image; write one path per line")
    return ImageList(source.parent, names)


def _of_folder(folder: Path) -> ImageList:
    ignored: Counter[str] = Counter()
    real = Path(os.path.realpath(folder))  # "." and links have no name of their own
    try:
        found = images_below(real, ignored)
    except PermissionError as error:
        raise UserError(f"--input: no permission to read {error.filename}") from None
    if not found:
        tars = "; tar files are read for training only: unpack them" if ignored[".tar"] else ""
        raise UserError(f"--input {folder} holds no images, nor do the folders below it{tars}")
    names = [name[len(real.name) + 1 :] for name in found]
    return ImageList(folder, names, tuple(passed_over(ignored)))


@contextlib.contextmanager
def _lines_of(source: Path) -> Iterator[Iterator[str]]:
    try:
        # newline="": U+2028 and the like are no ends of lines, and csv wants them untouched
        with open(source, encoding="utf-8-sig", newline="") as file:
            yield lines_of(file, f"--input {source}")
    except UnicodeDecodeError as error:
        raise UserError(f"--input {source} is not UTF-8 ({error}); save the list as UTF-8") from None
    except OSError as error:
        raise UserError(f"--input {source} cannot be read: {error.strerror}") from None


def _of_text(source: Path) -> list[str]:
    with _lines_of(source) as lines:
        return [line.strip() for line in lines if line.strip()]


def _of_csv(source: Path) -> list[str]:
    with _lines_of(source) as lines:
        return [name for _, (name,) in csv_rows(lines, ("path",), f"--input {source}")]
