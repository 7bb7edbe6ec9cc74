"""Which images train and which validate. Written once to splits.json, the same on every machine."""

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import UserError, shorten
from data.groups import groups_per_class
from data.names import Names
from data.scan import ImageFolder, nfc

ATTEMPTS = 20  # a division that leaves a class in one part is tried again, so often at most
ANEW = "or start anew in another --output-dir (or with --overwrite)"


@dataclass(frozen=True)
class Split:
    """Indices of the training and the validation images, both ascending."""

    train: np.ndarray
    val: np.ndarray


def _divide(labels: np.ndarray, groups: np.ndarray, shares: Sequence[int], random_state: int) -> np.ndarray:
    """(N,) the part of each image: groups stay whole, part f gets its share of each class.

    Every class lies in at least two parts where that was found to be possible. Images are known by their
    position, groups by their first image. Single-image groups of one class fill the parts to the nearest
    image; with equal shares the parts then differ by one image of a class at most.

    Not scikit-learn's StratifiedGroupKFold: its versions divide differently, and equal parts are all it
    knows. Whole numbers throughout and a random stream that NumPy has frozen make this the same everywhere.
    """
    _, first, of_image = np.unique(groups, return_index=True, return_inverse=True)
    of_image = first.argsort().argsort()[of_image]
    n_classes = int(labels.max()) + 1
    pairs, counts = np.unique(of_image * n_classes + labels, return_counts=True)
    mixes: list[list[tuple[int, int]]] = [[] for _ in first]  # of each group, the images of its classes
    for pair, n in zip(pairs.tolist(), counts.tolist(), strict=True):
        mixes[pair // n_classes].append((pair % n_classes, n))

    of_class = np.bincount(labels).tolist()
    weights = [10**18 // max(n, 1) ** 2 for n in of_class]  # deviations count relative to the class's size
    sizes = [sum(n * n * weights[c] for c, n in mix) for mix in mixes]
    random = np.random.RandomState(random_state)
    for attempt in range(ATTEMPTS):
        order = random.permutation(len(mixes)).tolist()
        if attempt == 0:  # what is hard to place comes first; the last and smallest even it out
            order.sort(key=lambda group: (-sizes[group], mixes[group]))
        parts = _fill(order, mixes, weights, shares)
        if _spread(parts, order, mixes, n_classes, len(shares)):
            break
    return np.array(parts)[of_image]


def _fill(
    order: Sequence[int],
    mixes: Sequence[Sequence[tuple[int, int]]],
    weights: Sequence[int],
    shares: Sequence[int],
) -> list[int]:
    """The part of each group, given one by one in `order` to where the sum over parts and classes of
    (held - target)² / share, relative to the class's size, then grows least; to the smaller part when equal.
    """
    whole = math.lcm(*shares)
    scale = [whole // share for share in shares]
    held = [[0] * len(weights) for _ in shares]
    total = [0] * len(shares)
    parts = [0] * len(mixes)

    def cost(part: int, mix: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
        # the targets drop out: whatever is added, their share of the cost is the same for every part
        own = held[part]
        added = sum(n * (n + 2 * own[c]) * weights[c] for c, n in mix)
        return added * scale[part], total[part] * scale[part], part

    for mix, alike in itertools.groupby(order, mixes.__getitem__):
        costs = [cost(part, mix) for part in range(len(shares))]
        heapq.heapify(costs)  # of groups alike, each changes the cost of its own part alone
        for group in alike:
            part = parts[group] = costs[0][-1]
            for c, n in mix:
                held[part][c] += n
                total[part] += n
            heapq.heapreplace(costs, cost(part, mix))
    return parts


def _spread(
    parts: list[int],
    order: Sequence[int],
    mixes: Sequence[Sequence[tuple[int, int]]],
    n_classes: int,
    n_parts: int,
) -> bool:
    """Move a group, the last in `order` that can go, of every class that lies in one part only.

    Changes `parts`. False when a class remains that no single move spreads.
    """
    n_groups = np.zeros((n_classes, n_parts), int)
    for part, mix in zip(parts, mixes, strict=True):
        for c, _ in mix:
            n_groups[c, part] += 1
    for c in np.flatnonzero(np.count_nonzero(n_groups, axis=1) == 1):
        if np.count_nonzero(n_groups[c]) > 1:  # spread meanwhile, by a group it shares with another class
            continue
        moves = (
            (group, [d for d, _ in mixes[group]], part)
            for group in reversed(order)
            if any(d == c for d, _ in mixes[group])
            for part in n_groups.sum(axis=0).argsort(kind="stable").tolist()
        )
        for group, own, part in moves:
            after = n_groups[own]
            after[:, parts[group]] -= 1
            after[:, part] += 1
            if (np.count_nonzero(after, axis=1) > 1).all():
                n_groups[own] = after
                parts[group] = part
                break
    return bool((np.count_nonzero(n_groups, axis=1) != 1).all())


def check_groups(n_groups: np.ndarray, classes: Sequence[str], at_least: int, or_else: str = "") -> None:
    few = [
        f"{name!r} has images of only {n} patient{'s' if n != 1 else ''}"
        for name, n in zip(classes, n_groups, strict=True)
        if n < at_least
    ]
    if few:
        raise UserError(
            f"to split by patient every class needs at least {at_least} patients (identical images count as "
            f"one): {'; '.join(few)}; add patients, or leave the class out{or_else}"
        )


def check_folds(labels: np.ndarray, groups: np.ndarray | None, n_splits: int, classes: Sequence[str]) -> None:
    """Raises UserError when a class has fewer images (groups, when grouped) than folds."""
    n_groups = groups_per_class(labels, groups, len(classes))
    fewer = f", or use --n-splits {min(n_groups)}" if min(n_groups) >= 2 else ""
    counts = np.bincount(labels, minlength=len(classes))
    small = [f"{classes[c]!r} has {n}" for c, n in enumerate(counts) if n < n_splits]
    if small:
        raise UserError(
            f"{n_splits} folds need at least {n_splits} images of every class: {'; '.join(small)}; "
            f"add images or leave the class out{fewer}"
        )
    check_groups(n_groups, classes, n_splits, fewer)


def k_folds(
    labels: np.ndarray, groups: np.ndarray | None, n_splits: int, random_state: int, classes: Sequence[str]
) -> list[Split]:
    """Stratified folds; with `groups` (N,) no group is on both sides of a fold. Every image validates once.

    Every fold trains on every class; see `missing_in_validation` for the other side. Raises UserError when a
    class has fewer images (groups, when grouped) than folds, or no folds were found that train on it.
    """
    check_folds(labels, groups, n_splits, classes)
    of_image = np.arange(len(labels)) if groups is None else groups
    fold_of = _divide(labels, of_image, [1] * n_splits, random_state)
    splits = [Split(np.flatnonzero(fold_of != k), np.flatnonzero(fold_of == k)) for k in range(n_splits)]
    untrained = _lacking(splits, "train", labels, classes)
    if untrained:
        raise UserError(
            f"found no {n_splits} folds by patient that all train on every class: {'; '.join(untrained)}, "
            "since patients have images of several classes; add patients of the class, or leave it out"
        )
    return splits


def _lacking(splits: Sequence[Split], side: str, labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    lacks = []
    for number, split in enumerate(splits, 1):
        counts = np.bincount(labels[getattr(split, side)], minlength=len(classes))
        lacks += [f"fold {number} lacks {classes[c]!r}" for c in np.flatnonzero(counts == 0)]
    return lacks


def missing_in_validation(splits: Sequence[Split], labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Notes on folds that do not validate every class, as when a patient has images of several."""
    lacks = _lacking(splits, "val", labels, classes)
    return [f"not every fold validates every class: {'; '.join(lacks)}"] if lacks else []


def hold_out(
    labels: np.ndarray, groups: np.ndarray | None, val_ratio: float, random_state: int, classes: Sequence[str]
) -> Split:
    """Hold out about `val_ratio` of every class; with `groups` (N,) no group is on both sides.

    Every class has at least one image on each side. Raises UserError when that cannot be.
    """
    counts = np.bincount(labels, minlength=len(classes))
    small = [f"{classes[c]!r} has {n}" for c, n in enumerate(counts) if n < 2]
    if small:
        raise UserError(f"every class needs an image to train on and one to validate on: {'; '.join(small)}")
    if groups is None:
        random = np.random.RandomState(random_state)  # its stream is frozen across NumPy versions
        val = []
        for c in range(len(classes)):
            of_class = np.flatnonzero(labels == c)
            n_val = int(np.clip(round(len(of_class) * val_ratio), 1, len(of_class) - 1))
            val.append(random.permutation(of_class)[:n_val])
        held = np.sort(np.concatenate(val))
        return Split(np.setdiff1d(np.arange(len(labels)), held), held)

    check_groups(groups_per_class(labels, groups, len(classes)), classes, 2)
    millionths = min(max(round(val_ratio * 10**6), 1), 10**6 - 1)
    held = _divide(labels, groups, [10**6 - millionths, millionths], random_state)
    split = Split(np.flatnonzero(held == 0), np.flatnonzero(held == 1))
    if any(_lacking([split], side, labels, classes) for side in ("train", "val")):
        raise UserError(
            "found no split by patient that leaves every class on both sides; add patients, or give a ready "
            "--val-dir"
        )
    return split


def splits_record(splits: Sequence[Split], paths: Sequence[str], **facts: object) -> dict[str, object]:
    """What splits.json holds: the facts of how it was made, and the image paths of every fold."""
    folds = [
        {side: Names(paths[i] for i in getattr(split, side)) for side in ("train", "val")} for split in splits
    ]
    return {**facts, "folds": folds}


def splits_from_record(
    record: object,
    file: object,
    folder: ImageFolder,
    groups: np.ndarray | None,
    fingerprint: str,
    n_splits: int,
) -> list[Split]:
    """The folds of a splits.json, whose content is `record` and whose name `file`, as indices into `folder`.

    Raises UserError unless it holds `n_splits` folds of just these images with this fingerprint, each image
    validates once and trains in all other folds, every fold trains on every class, and no group of `groups`
    (N,) is on both sides.
    """
    folds = _folds_of(record, file)
    if len(folds) != n_splits:
        raise UserError(f"{file} holds {len(folds)} folds, not --n-splits {n_splits}; restore it, {ANEW}")
    position = {nfc(path): i for i, path in enumerate(folder.paths)}
    stored = {name for fold in folds for names in fold.values() for name in names}
    changes = [
        f"{len(names)} {word}:\n{shorten(sorted(names))}"
        for word, names in (("new", position.keys() - stored), ("gone", stored - position.keys()))
        if names
    ]
    if changes:
        raise UserError(
            f"{file} does not fit the images of {folder.root} any more; "
            + "\n".join(changes)
            + f"\nrestore the images, {ANEW}"
        )
    if record["dataset_fingerprint"] != fingerprint:
        raise UserError(
            f"images of {folder.root} have changed in content since {file} was written; restore them, {ANEW}"
        )
    sides = [
        Split(*(np.array(sorted(position[name] for name in fold[side]), int) for side in ("train", "val")))
        for fold in folds
    ]
    times = np.bincount(np.concatenate([split.val for split in sides]), minlength=len(position))
    wrong = [f"{folder.paths[i]}: {times[i]} times" for i in np.flatnonzero(times != 1)]
    if wrong:
        raise UserError(
            f"{file} must validate every image once, over all folds, and does not:\n{shorten(wrong)}\n"
            f"restore it, {ANEW}"
        )
    _check_sides(sides, file, folder, groups)
    return sides


def _folds_of(record: object, file: object) -> list[dict[str, list[str]]]:
    """The stored names, NFC, of both sides of every fold. Raises UserError on another form."""

    def is_fold(fold: object) -> bool:
        return isinstance(fold, Mapping) and all(
            isinstance(fold.get(side), list) and all(isinstance(name, str) for name in fold[side])
            for side in ("train", "val")
        )

    well_formed = (
        isinstance(record, Mapping)
        and isinstance(record.get("dataset_fingerprint"), str)
        and isinstance(record.get("folds"), list)
        and all(map(is_fold, record["folds"]))
    )
    if not well_formed:
        raise UserError(
            f'{file} is no record of folds: it needs "dataset_fingerprint", and "folds" with the paths of '
            f'"train" and "val" in each; restore it, {ANEW}'
        )
    return [
        {side: [nfc(name) for name in fold[side]] for side in ("train", "val")} for fold in record["folds"]
    ]


def _check_sides(
    splits: Sequence[Split], file: object, folder: ImageFolder, groups: np.ndarray | None
) -> None:
    """Raises UserError unless both sides of each fold are whole, apart, and all classes trained on."""
    everything = np.arange(len(folder.paths))
    for number, split in enumerate(splits, 1):
        for side in ("train", "val"):
            if not len(getattr(split, side)):
                raise UserError(f'{file}: "{side}" of fold {number} is empty; restore it, {ANEW}')
        times = np.bincount(split.train, minlength=len(everything)) + np.isin(everything, split.val)
        wrong = [
            f"{folder.paths[i]} is {'there twice' if times[i] else 'on neither side'}"
            for i in np.flatnonzero(times != 1)
        ]
        if wrong:
            raise UserError(
                f"{file}: fold {number} must have every image once, to train or to validate, and has not:\n"
                f"{shorten(wrong)}\nrestore it, {ANEW}"
            )
        if groups is None:
            continue
        both = np.intersect1d(groups[split.train], groups[split.val])
        if len(both):
            pairs = [
                " | ".join(folder.paths[side[groups[side] == group][0]] for side in (split.train, split.val))
                for group in both
            ]
            raise UserError(
                f"{file}: fold {number} trains and validates on one patient, on identical images, or on one "
                f"in two formats:\n{shorten(pairs)}\nrestore it, or the patients it was made with, {ANEW}"
            )
    untrained = _lacking(splits, "train", folder.labels, folder.classes)
    if untrained:
        raise UserError(
            f"{file} must train on every class in every fold: {'; '.join(untrained)}; restore it, {ANEW}"
        )
