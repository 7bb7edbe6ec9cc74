"""From options to a checked data set: class folders, sentences, patients, pixels, splits."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, shorten
from data.images import Inspection, inspect_images
from data.scan import (
    ImageFolder,
    check_class_sizes,
    fingerprint,
    groups_by_pattern,
    groups_from_file,
    merge_groups,
    nfc,
    scan_folder,
)
from data.splits import Split, hold_out, splits_record
from data.texts import class_sentences
from training.config import Config


@dataclass(frozen=True)
class DataSet:
    """Everything about the images that runs on one folder share.

    files, labels (N,), pixels (N, S, S, 3) uint8 or None: training images first, then those of --val-dir.
    n_own: how many of them are of --data-dir. groups (n_own,) or None.
    """

    folder: ImageFolder
    val_folder: ImageFolder | None
    files: list[Path]
    labels: np.ndarray
    pixels: np.ndarray | None
    groups: np.ndarray | None
    fingerprint: str

    @property
    def n_own(self) -> int:
        return len(self.folder.paths)


def scan(config: Config) -> tuple[ImageFolder, ImageFolder | None]:
    """The class folders of --data-dir and --val-dir, checked; both label by the first's classes."""
    folder = scan_folder(Path(config.data_dir))
    check_class_sizes(folder, 2 if config.val_dir is None else 1, "(one to train on, one to validate on)")
    val_folder = None
    if config.val_dir:
        found = scan_folder(Path(config.val_dir), "--val-dir")
        extra = [name for name in found.classes if name not in folder.classes]
        if extra:
            raise UserError(
                f"--val-dir {config.val_dir} has classes that --data-dir lacks: {', '.join(extra)}"
            )
        index = np.array([folder.classes.index(name) for name in found.classes])
        absent = [name for name in folder.classes if name not in found.classes]
        notes = (*found.notes, *(f"--val-dir has no images of class {name!r}" for name in absent))
        val_folder = ImageFolder(found.root, folder.classes, found.paths, index[found.labels], notes)
    for note in (*folder.notes, *(val_folder.notes if val_folder else ())):
        print(f"note: {note}")
    return folder, val_folder


def sentences_of(
    config: Config, folder: ImageFolder, class_texts: Mapping[str, Any] | None
) -> dict[str, list[str]]:
    texts_file = Path(config.class_texts_file) if config.class_texts_file else None
    sentences, notes = class_sentences(
        folder.classes, texts_file=texts_file, given=class_texts, template=config.text_template
    )
    for note in notes:
        print(f"note: {note}")
    return sentences


def patients_of(config: Config, folder: ImageFolder) -> list[str] | None:
    if config.group_pattern:
        return groups_by_pattern(folder, config.group_pattern)
    if config.groups_file:
        return groups_from_file(folder, Path(config.groups_file))
    return None


def read_images(
    config: Config, folder: ImageFolder, val_folder: ImageFolder | None, patients: Sequence[str] | None
) -> DataSet:
    """Read every image once. Raises UserError naming the unreadable ones, unless --skip-unreadable drops
    them.
    """
    files = folder.files() + (val_folder.files() if val_folder else [])
    started = time.monotonic()
    inspection = inspect_images(files, config.img_size)
    bad = inspection.errors
    if bad:
        listing = shorten([f"{files[i]}: {why}" for i, why in bad.items()], 50)
        if not config.skip_unreadable:
            raise UserError(
                f"{len(bad)} of {len(files)} images cannot be read:\n{listing}\n"
                "mend or remove them, or leave them out with --skip-unreadable"
            )
        print(f"note: left out {len(bad)} unreadable images:\n{listing}")
    n_own = len(folder.paths)
    if bad:
        if patients is not None:
            patients = [p for i, p in enumerate(patients) if i not in bad]
        if val_folder:
            val_folder = val_folder.without({i - n_own for i in bad if i >= n_own})
            if not val_folder.paths:
                raise UserError(f"no image of --val-dir {config.val_dir} can be read:\n{listing}")
        folder = folder.without({i for i in bad if i < n_own})
        check_class_sizes(folder, 2 if val_folder is None else 1, "that can be read")
        kept = [i for i in range(len(files)) if i not in bad]
        pixels = inspection.pixels[kept] if inspection.pixels is not None else None
        inspection = Inspection({}, [inspection.digests[i] for i in kept], pixels)
        files, n_own = [files[i] for i in kept], len(folder.paths)

    own, other = inspection.digests[:n_own], inspection.digests[n_own:]
    labels = folder.labels if val_folder is None else np.concatenate([folder.labels, val_folder.labels])
    _tell_duplicates(folder, own, other)
    held = "kept in memory" if inspection.pixels is not None else "read again every epoch"
    print(f"read {len(files)} images in {time.monotonic() - started:.1f} s, {held}")
    return DataSet(
        folder, val_folder, files, labels, inspection.pixels,
        merge_groups(own, patients),
        fingerprint(folder, own) + (fingerprint(val_folder, other) if val_folder else ""),
    )  # fmt: skip


def _tell_duplicates(folder: ImageFolder, digests: Sequence[str], val_digests: Sequence[str]) -> None:
    first: dict[str, int] = {}
    twins = [(first.setdefault(digest, i), i) for i, digest in enumerate(digests)]
    twins = [(a, b) for a, b in twins if a != b]
    across = [(a, b) for a, b in twins if folder.labels[a] != folder.labels[b]]
    if twins:
        print(f"note: {len(twins)} images repeat another pixel by pixel; they stay on one side of the split")
    if across:
        pairs = shorten([f"{folder.paths[a]} = {folder.paths[b]}" for a, b in across])
        print(f"warning: {len(across)} identical images lie in two classes:\n{pairs}")
    leaked = sum(digest in first for digest in val_digests)
    if leaked:
        print(
            f"warning: {leaked} images of --val-dir are also in --data-dir; the validation is too good by "
            "that"
        )


def split_of(config: Config, data: DataSet) -> Split:
    if data.val_folder is not None:
        return Split(np.arange(data.n_own), np.arange(data.n_own, len(data.files)))
    return hold_out(
        data.folder.labels, data.groups, config.val_ratio, config.random_state, data.folder.classes
    )


def record_of(config: Config, data: DataSet, splits: Sequence[Split]) -> dict[str, Any]:
    """Content of splits.json. Paths are relative to --data-dir, or to --val-dir for its images."""
    paths = [*data.folder.paths, *(data.val_folder.paths if data.val_folder else ())]
    made_by = {"n_splits": config.n_splits} if config.use_cv else {"val_ratio": config.val_ratio}
    if data.val_folder is not None:
        made_by = {"val_dir": config.val_dir}
    grouped_by = config.group_pattern or config.groups_file
    return splits_record(
        splits, paths, random_state=config.random_state, **made_by, grouped_by=grouped_by,
        n_groups=None if data.groups is None else int(data.groups.max()) + 1,
        dataset_fingerprint=data.fingerprint,
    )  # fmt: skip


def split_fingerprint(data: DataSet, split: Split) -> str:
    """SHA-256 of the data and of which of its images validate; equal on every operating system."""
    names = [nfc(data.folder.paths[i]) for i in split.val if i < data.n_own]
    return hashlib.sha256("\n".join([data.fingerprint, *names]).encode()).hexdigest()
