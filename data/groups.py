"""Which images belong together: of one patient, or of one picture."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError, number, shorten
from common.files import csv_rows, lines_of
from data.scan import ImageFolder, first_alike, first_of_name, nfc


def patient_pattern(pattern: str) -> re.Pattern[str]:
    """Of --group-pattern. Raises UserError where it cannot tell a patient."""
    try:
        regex = re.compile(nfc(pattern))
    except re.error as error:
        raise UserError(f"--group-pattern '{pattern}' is not a regular expression: {error}") from None
    if regex.groups < 1:
        raise UserError(f"--group-pattern '{pattern}' needs a group in parentheses, such as '^(P\\d+)_'")
    return regex


def groups_by_pattern(folder: ImageFolder, pattern: str) -> list[str]:
    """The patient of each image: the first group of `pattern`, searched in the file name."""
    regex = patient_pattern(pattern)
    groups, missed = [], []
    of_name: dict[str, str] = {}
    for path in folder.paths:
        found = regex.search(nfc(path.rsplit("/", 1)[-1]))
        # An empty group would make one patient of all images that have none.
        if found is None or not found.group(1):
            missed.append(path)
        else:
            groups.append(of_name.setdefault(found.group(1), found.group(1)))  # images share the object
    if missed:
        n_images = len(folder.paths)
        raise UserError(
            f"--group-pattern '{pattern}' matches no patient in {len(missed)} of {n_images} file names:\n"
            + shorten(missed)
        )
    return groups


def groups_from_file(folder: ImageFolder, csv_path: Path, beside: ImageFolder | None = None) -> list[str]:
    """The patient of each image of `folder` from a CSV with columns `path` and `group`.

    A path is relative to the folder, or has the folder's name in front, as it must where `beside`, the other
    of --data-dir and --val-dir, has an image of the same path.
    """
    what = f"--groups-file {csv_path}"
    own, other = (nfc(os.path.basename(os.path.abspath(f.root))) for f in (folder, beside or folder))
    paths = [nfc(path).strip() for path in folder.paths]  # as cells are read
    shared = set(paths).intersection(nfc(path).strip() for path in beside.paths) if beside else set()
    group_of: dict[str, str] = {}
    of_name: dict[str, str] = {}
    try:
        with open(csv_path, encoding="utf-8-sig", newline="") as file:
            for line, (path, group) in csv_rows(lines_of(file, what), ("path", "group"), what):
                path, group = nfc(path.replace("\\", "/")).removeprefix("./"), nfc(group)
                group = of_name.setdefault(group, group)  # images of one patient share the object
                if group_of.setdefault(path, group) != group:
                    both = f"; of two images write {own}/{path} and {other}/{path}" if path in shared else ""
                    raise UserError(
                        f"{what}, line {line}: {path} is given two groups, {group_of[path]!r} and "
                        f"{group!r}{both}"
                    )
    except FileNotFoundError:
        raise UserError(f"{what} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{what} is a folder; give the CSV file") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f'{what} is not UTF-8 ({error}); save it as UTF-8, in Excel by "Save As" as "CSV UTF-8"'
        ) from None

    def key_of(path: str) -> str:
        """With the folder's name in front it may be another image's own path: only where it must be meant."""
        full = f"{own}/{path}"
        return full if full in group_of and (path in shared or path not in group_of) else path

    keys = list(map(key_of, paths))
    vague = [
        path
        for path, key in zip(paths, keys, strict=True)
        if path in shared and key in group_of and (own == other or key == path)
    ]
    if vague:
        first = vague[0]
        mend = f"write {own}/{first} and {other}/{first}"
        if own == other:
            mend = f"rename one of the folders, which both are called {own}, and write its name in front"
        raise UserError(
            f"{what} does not tell apart {number(len(vague), 'image', 'images')} of --data-dir from those of "
            f"the same path in --val-dir; {mend}:\n{shorten(vague)}"
        )
    missing = [path for path, key in zip(folder.paths, keys, strict=True) if key not in group_of]
    if missing:
        raise UserError(
            f"{what} names no group for {len(missing)} of {len(folder.paths)} images; "
            f"its paths are relative to {folder.root}, such as {folder.paths[0]}. Missing:\n"
            + shorten(missing)
        )
    return [group_of[key] for key in keys]


def merge_groups(
    digests: np.ndarray, patients: Sequence[str] | None, paths: Iterable[str]
) -> np.ndarray | None:
    """(N,) group index per image: images of one patient, with identical pixels, or of one name in two formats
    share a group.

    digests (N,): a hash of each image's pixels. Returns None when nothing is known that ties images together.
    """
    ties = [first_alike(digests), first_of_name(paths)]
    if patients is not None:
        ties.append(first_alike(patients))
    elif all((first == np.arange(len(first))).all() for first in ties):
        return None
    parent = list(range(len(digests)))

    def root_of(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for first in ties:
        for i in np.flatnonzero(first != np.arange(len(first))).tolist():
            parent[root_of(i)] = root_of(int(first[i]))
    return np.unique([root_of(i) for i in range(len(digests))], return_inverse=True)[1]


def groups_per_class(labels: np.ndarray, groups: np.ndarray | None, n_classes: int) -> np.ndarray:
    """(C,) how many different groups have images of each class; images where `groups` is None."""
    if groups is None:
        return np.bincount(labels, minlength=n_classes)
    return np.array([len(np.unique(groups[labels == c])) for c in range(n_classes)])
