"""Which images train and which validate. Written once to splits.json, the same on every machine."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import UserError


@dataclass(frozen=True)
class Split:
    """Indices of the training and the validation images, both ascending."""

    train: np.ndarray
    val: np.ndarray


def _check_groups(labels: np.ndarray, groups: np.ndarray, classes: Sequence[str], at_least: int) -> None:
    few = []
    for c, name in enumerate(classes):
        have = len(np.unique(groups[labels == c]))
        if have < at_least:
            few.append(f"{name!r} has images of only {have} patient{'s' if have != 1 else ''}")
    if few:
        raise UserError(
            f"to split by patient every class needs at least {at_least} patients "
            f"(identical images count as one): {'; '.join(few)}; add patients, or leave the class out"
        )


def k_folds(
    labels: np.ndarray, groups: np.ndarray | None, n_splits: int, random_state: int, classes: Sequence[str]
) -> list[Split]:
    """Stratified folds; with `groups` (N,) no group is on both sides of a fold. Every image validates once.

    Raises UserError when a class has fewer images (groups, when grouped) than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    counts = np.bincount(labels, minlength=len(classes))
    small = [f"{classes[c]!r} has {n} images" for c, n in enumerate(counts) if n < n_splits]
    if small:
        fewer = f", or use --n-splits {counts.min()}" if counts.min() >= 2 else ""
        raise UserError(
            f"{n_splits} folds need at least {n_splits} images of every class: {'; '.join(small)}; "
            f"add images or leave the class out{fewer}"
        )
    if groups is None:
        folds = StratifiedKFold(n_splits, shuffle=True, random_state=random_state).split(labels, labels)
    else:
        _check_groups(labels, groups, classes, n_splits)
        splitter = StratifiedGroupKFold(n_splits, shuffle=True, random_state=random_state)
        folds = splitter.split(labels, labels, groups)
    return [Split(np.sort(train), np.sort(val)) for train, val in folds]


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

    from sklearn.model_selection import StratifiedGroupKFold

    _check_groups(labels, groups, classes, 2)
    # scikit-learn refuses more folds than there are groups, or images of the largest class
    n_folds = max(2, min(round(1 / val_ratio), len(np.unique(groups)), counts.max()))
    shares = counts / len(labels)
    best: tuple[float, Split] | None = None
    for count in dict.fromkeys((n_folds, 2)):
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=random_state)
        with warnings.catch_warnings():  # folds that lack a small class are left out below
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            folds = list(splitter.split(labels, labels, groups))
        for train, val in folds:
            sides = [np.bincount(labels[side], minlength=len(classes)) for side in (train, val)]
            if min(side.min() for side in sides) == 0:
                continue
            # of the folds offered, the one whose class shares and size are nearest to those asked for
            distance = np.abs(sides[1] / len(val) - shares).sum() + abs(len(val) / len(labels) - val_ratio)
            if best is None or distance < best[0]:
                best = (distance, Split(np.sort(train), np.sort(val)))
        if best:
            return best[1]
    raise UserError(
        "no split by patient leaves every class on both sides; add patients, or give a ready --val-dir"
    )


def splits_record(splits: Sequence[Split], paths: Sequence[str], **facts: object) -> dict[str, object]:
    """What splits.json holds: the facts of how it was made, and the image paths of every fold."""
    folds = [
        {side: [paths[i] for i in getattr(split, side)] for side in ("train", "val")} for split in splits
    ]
    return {**facts, "folds": folds}
