"""From options to a checked data set: class folders, sentences, patients, pixels, splits."""

import hashlib
import itertools
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, all_of, listed, number, shorten
from data.cache import cache_dir_of, inspect_cached
from data.findings import by_danger, finding, quick_findings
from data.groups import groups_by_pattern, groups_from_file, groups_per_class, merge_groups
from data.images import MEMORY_FOR_IMAGES, Inspection, Squares, inspect_images
from data.loader import loading_processes, refuse_small_shared_memory
from data.names import Names
from data.scan import Files, ImageFolder, check_class_sizes, fingerprint, first_alike, nfc
from data.shards import scan_and_check
from data.splits import Split, check_folds, check_groups, hold_out, splits_record
from data.texts import class_sentences, read_texts
from evaluation.results import Predictions
from training.config import Config


@dataclass(frozen=True)
class DataSet:
    """Everything about the images that runs on one folder share.

    files, labels (N,), inspection, patients (N names, or None where unknown): training images first, then
    those of --val-dir. n_own: how many of them are of --data-dir. groups (N,): see `merge_groups`. left_out:
    each image that cannot be read, by its path (by its file where there is a --val-dir), and why; these are
    none of the N.
    """

    folder: ImageFolder
    val_folder: ImageFolder | None
    files: Files
    labels: np.ndarray
    inspection: Inspection
    patients: Sequence[str] | None
    groups: np.ndarray | None
    fingerprint: str
    left_out: Sequence[str] = ()

    @property
    def n_own(self) -> int:
        return len(self.folder.paths)

    @property
    def paths(self) -> Sequence[str]:
        """N, relative to --data-dir, or to --val-dir for its images."""
        if self.val_folder is None:
            return self.folder.paths
        return Names(itertools.chain(self.folder.paths, self.val_folder.paths))

    @property
    def squares(self) -> Squares | None:
        """The N images decoded, or None where there is no cache and they would not fit into memory."""
        return self.inspection.squares

    def images_per_class(self) -> dict[str, int]:
        """Of --data-dir."""
        counts = np.bincount(self.folder.labels, minlength=len(self.folder.classes)).tolist()
        return dict(zip(self.folder.classes, counts, strict=True))

    def predictions(
        self, indices: np.ndarray, probs: np.ndarray, folds: np.ndarray | None = None
    ) -> Predictions:
        """`probs` (n, C) of the images `indices` (n,), with what is known of them."""
        paths = self.paths
        return Predictions(
            self.folder.classes,
            tuple(paths[i] for i in indices),
            self.labels[indices],
            probs,
            folds,
            None if self.patients is None else self.groups[indices],
        )


def scan(config: Config, *checks: Callable[[], object]) -> tuple[ImageFolder, ImageFolder | None]:
    """The class folders of --data-dir and --val-dir, checked; both label by the first's classes. `checks`:
    see `scan_and_check`.
    """
    sources = {"--data-dir": config.data_dir} | ({"--val-dir": config.val_dir} if config.val_dir else {})
    folder, *others = scan_and_check(sources, *checks, cache_dir=config.cache_dir)
    check_sizes(config, folder)
    val_folder = None
    if config.val_dir:
        found = others[0]
        extra = [name for name in found.classes if name not in folder.classes]
        if extra:
            raise UserError(f"--val-dir {config.val_dir} has classes that --data-dir lacks: {listed(extra)}")
        index = np.array([folder.classes.index(name) for name in found.classes])
        absent = [name for name in folder.classes if name not in found.classes]
        notes = (*found.notes, *(f"--val-dir has no images of class {name!r}" for name in absent))
        val_folder = replace(found, classes=folder.classes, labels=index[found.labels], notes=notes)
    for note in (*folder.notes, *(val_folder.notes if val_folder else ())):
        print(f"note: {note}")
    return folder, val_folder


def check_sizes(config: Config, folder: ImageFolder) -> None:
    if config.use_cv and not (config.group_pattern or config.groups_file):  # folds are of patients then
        check_folds(folder.labels, None, config.n_splits, folder.classes)
    else:
        check_class_sizes(folder, 2 if config.val_dir is None else 1, "(one to train on, one to validate on)")


def check_by_names(config: Config, folder: ImageFolder) -> None:
    """Raises UserError where the names of --data-dir's images show that they cannot be split, or that options
    do not tell their patients.
    """
    _, patients = all_of(partial(check_sizes, config, folder), partial(patients_of, config, folder, None))
    check_patients(config, folder, patients)


def check_patients(config: Config, folder: ImageFolder, patients: Sequence[str] | None) -> None:
    """Raises UserError where they are too few to split by. patients: see `patients_of`."""
    if patients is None or config.val_dir:
        return
    groups = first_alike(patients)
    if config.use_cv:
        check_folds(folder.labels, groups, config.n_splits, folder.classes)
    else:
        check_groups(groups_per_class(folder.labels, groups, len(folder.classes)), folder.classes, 2)


def sentences_of(
    config: Config, folder: ImageFolder, class_texts: Mapping[str, Any] | None
) -> dict[str, list[str]]:
    sentences, notes = sentences_and_notes(config, folder, class_texts)
    for note in notes:
        print(f"note: {note}")
    return sentences


def sentences_and_notes(
    config: Config, folder: ImageFolder, class_texts: Mapping[str, Any] | None = None
) -> tuple[dict[str, list[str]], list[str]]:
    """See `class_sentences`; --class-texts-file goes before `class_texts`, a dictionary from Python."""
    given = read_texts(Path(config.class_texts_file)) if config.class_texts_file else (class_texts,)
    return class_sentences(folder.classes, *given, template=config.text_template)


def patients_of(config: Config, folder: ImageFolder, val_folder: ImageFolder | None) -> list[str] | None:
    """The patient of each image, first those of `folder`; None where no option tells.

    Raises UserError when a patient has images in both folders.
    """

    def of(images: ImageFolder, beside: ImageFolder | None) -> list[str]:
        if config.group_pattern:
            return groups_by_pattern(images, config.group_pattern)
        return groups_from_file(images, Path(config.groups_file), beside)

    if not (config.group_pattern or config.groups_file):
        return None
    own, other = of(folder, val_folder), of(val_folder, folder) if val_folder else []
    both = sorted(set(own) & set(other))
    if both:
        raise UserError(
            f"{number(len(both), 'patient has', 'patients have')} images in --data-dir and in --val-dir, so "
            f"validation would be too good; move them to one side:\n{shorten(both)}"
        )
    return own + other


def inspection_of(config: Config, folders: Sequence[ImageFolder]) -> Inspection:
    """The images of `folders`, one folder after the other, from the cache or the files."""
    if config.use_cache:
        return inspect_cached(folders, config.img_size, cache_dir_of(config.cache_dir))
    return inspect_images(Files(folders), config.img_size)


def read_images(
    config: Config,
    folder: ImageFolder,
    val_folder: ImageFolder | None,
    patients: Sequence[str] | None,
    at_least: int,
) -> DataSet:
    """Read every image once, those that the cache does not hold already. Raises UserError naming the
    unreadable ones, unless --skip-unreadable drops them and leaves every class of `folder` `at_least` images.
    """
    folders = [folder] + ([val_folder] if val_folder else [])
    files = Files(folders)
    if len(files) * 3 * config.img_size**2 > MEMORY_FOR_IMAGES:  # processes will fetch them
        workers = loading_processes(config.num_workers)
        refuse_small_shared_memory(workers, config.batch_size, config.img_size)
    started = time.monotonic()
    inspection = inspection_of(config, folders)
    bad, n_own = inspection.errors, len(folder.paths)
    named = files if val_folder else folder.paths  # two folders may have the same paths
    left_out = [f"{named[i]}: {why}" for i, why in bad.items()]
    if bad:
        listing = shorten([f"{files[i]}: {why}" for i, why in bad.items()], 50)
        if not config.skip_unreadable:
            source = shlex.quote(str(config.data_dir if min(bad) < n_own else config.val_dir))
            raise UserError(
                f"{len(bad)} of {len(files)} images cannot be read:\n{listing}\n"
                "mend or remove them, or leave them out with --skip-unreadable (python -m data.check "
                f"--data-dir {source} --output FILE.json names every one there)"
            )
        if patients is not None:
            patients = [p for i, p in enumerate(patients) if i not in bad]
        if val_folder:
            val_folder = val_folder.without({i - n_own for i in bad if i >= n_own})
            if not val_folder.paths:
                raise UserError(f"no image of --val-dir {config.val_dir} can be read:\n{listing}")
        folder = folder.without({i for i in bad if i < n_own})
        if not folder.paths:
            raise UserError(f"no image of --data-dir {config.data_dir} can be read:\n{listing}")
        check_class_sizes(
            folder, at_least, "that can be read (without --skip-unreadable the others are named)"
        )
        inspection, n_own = inspection.without(set(bad)), len(folder.paths)
        files = Files([folder] + ([val_folder] if val_folder else []))

    own, other = inspection.digests[:n_own], inspection.digests[n_own:]
    trained = {digest: i for i, digest in enumerate(own)} if val_folder else {}
    both = [(trained[digest], i) for i, digest in enumerate(other, n_own) if digest in trained]
    if both:
        copies = [f"{files[i]} = {files[j]}" for i, j in both]
        raise UserError(
            f"{number(len(both), 'picture of --val-dir is', 'pictures of --val-dir are')} in --data-dir too, "
            "pixel by pixel, so validation would be too good; remove the copies from one side:\n"
            f"{shorten(copies)}"
        )
    paths = itertools.chain(folder.paths, (f"/{path}" for path in val_folder.paths) if val_folder else ())
    labels = folder.labels if val_folder is None else np.concatenate([folder.labels, val_folder.labels])
    held = "read again every epoch"
    if inspection.squares is not None:
        held = "in the cache" if isinstance(inspection.squares.array, np.memmap) else "kept in memory"
    print(f"read {number(len(files), 'image', 'images')} in {time.monotonic() - started:.1f} s, {held}")
    return DataSet(
        folder, val_folder, files, labels, inspection, patients,
        merge_groups(inspection.digests, patients, paths),
        fingerprint(folder, own) + (fingerprint(val_folder, other) if val_folder else ""), left_out,
    )  # fmt: skip


def findings_of(data: DataSet, splits: Sequence[Split]) -> list[dict[str, Any]]:
    """What is wrong or odd with the images and how they are split, as far as one reading tells; without
    `splits`, in images that are not for training.
    """
    folder = data.folder
    if data.val_folder is not None:
        folder = ImageFolder(folder.root, folder.classes, data.paths, data.labels, ())
    found = quick_findings(
        folder, data.inspection, data.groups, data.patients, splits, for_training=bool(splits)
    )
    if data.left_out:
        unreadable = number(len(data.left_out), "unreadable image", "unreadable images")
        message = f"left out {unreadable} (--skip-unreadable); data_check.json names each"
        found.append(finding("warning", "unreadable", message, data.left_out, most=None))
    return by_danger(found)


def split_of(config: Config, data: DataSet) -> Split:
    if data.val_folder is not None:
        return Split(np.arange(data.n_own), np.arange(data.n_own, len(data.files)))
    return hold_out(
        data.folder.labels, data.groups, config.val_ratio, config.random_state, data.folder.classes
    )


def splits_record_of(config: Config, data: DataSet, splits: Sequence[Split]) -> dict[str, Any]:
    """Content of splits.json. Paths are relative to --data-dir, or to --val-dir for its images."""
    made_by = {"n_splits": config.n_splits} if config.use_cv else {"val_ratio": config.val_ratio}
    if data.val_folder is not None:
        made_by = {"val_dir": config.val_dir}
    grouped_by = config.group_pattern or config.groups_file
    return splits_record(
        splits, data.paths, random_state=config.random_state, **made_by, grouped_by=grouped_by,
        n_groups=None if data.patients is None else len(set(data.patients)),
        dataset_fingerprint=data.fingerprint,
    )  # fmt: skip


def split_fingerprint(data: DataSet, split: Split) -> str:
    """SHA-256 of the data and of which of its images validate; equal on every operating system."""
    found = hashlib.sha256(data.fingerprint.encode())
    for i in split.val[split.val < data.n_own]:
        found.update(f"\n{nfc(data.folder.paths[i])}".encode())
    return found.hexdigest()
