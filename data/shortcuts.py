"""The shortcut audit: can the class be told from how an image was made, without looking at what it shows?

A model that can will score on the scanner, the exporter or the exposure, and fail in the next hospital.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.progress import progress
from data.groups import groups_per_class

FEATURE_SETS = {
    "shape": ("width", "height", "aspect"),
    "format": ("format", "mode", "bits"),
    "brightness": ("mean", "std", "border"),
}
ALL = "everything"
FOLDS = 5
# With fewer independent images per class not even a perfect guess would stand out from luck (see `luck`).
LEAST_GROUPS = 10
# "Excellent" discrimination in Hosmer, Lemeshow and Sturdivant, Applied Logistic Regression, 2013.
APART_AUC = 0.8
# Three standard errors, times 4/3: cross-validated scores of random features were measured to spread 0.9 to
# 1.3 times as wide as independent guesses, because the folds share training images.
LUCK_Z = 4.0


@dataclass(frozen=True)
class Audit:
    """What one set of features tells about the class, by cross-validation.

    balanced_accuracy: mean recall over the C classes audited. chance: 1 / C. luck: the most that features
    which know nothing would reach. auc: class -> area under the ROC curve against all the others. apart:
    class -> the classes it is told apart from; none where the balanced accuracy may be luck. A class must
    be told from each other one by itself: where one class stands out, the AUC of the others against all is
    high too, by elimination.
    """

    features: tuple[str, ...]
    balanced_accuracy: float
    chance: float
    luck: float
    auc: dict[str, float]
    apart: dict[str, list[str]]

    @property
    def beyond_luck(self) -> bool:
        return self.balanced_accuracy > self.luck


def luck(predictions: np.ndarray, n_groups: np.ndarray) -> float:
    """The balanced accuracy that predictions (N,) made without knowing the class hardly ever exceed.

    Such predictions name class c at the same rate p_c whatever the true class, so the recalls have mean p_c
    and their average has mean 1 / C. Each recall is a share of independent draws, one per patient at least:
    its variance is at most p_c (1 - p_c) / n_groups_c. That is a binomial interval around chance.
    """
    n_classes = len(n_groups)
    rates = (np.bincount(predictions, minlength=n_classes) + 1) / (len(predictions) + n_classes)
    variance = (rates * (1 - rates) / n_groups).sum() / n_classes**2
    return float(1 / n_classes + LUCK_Z * np.sqrt(variance))


def _columns(features: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """(N, F) float64; words become their index in sorted order."""
    columns = []
    for name in names:
        values = features[name]
        columns.append(values if values.dtype.kind in "fiu" else np.unique(values, return_inverse=True)[1])
    return np.column_stack(columns).astype(np.float64)


def _held_out_probs(
    columns: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, n_classes: int
) -> np.ndarray:
    """(N, C) probabilities, each image's from a forest that saw no image of its group."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(
        FOLDS, shuffle=True, random_state=0
    )
    probs = np.zeros((len(labels), n_classes))
    for train, val in splitter.split(columns, labels, groups):
        forest = RandomForestClassifier(
            n_estimators=50, min_samples_leaf=5, class_weight="balanced", random_state=0,
            max_samples=min(len(train), 3000),  # per tree; keeps large folders to seconds
        )  # fmt: skip
        forest.fit(columns[train], labels[train])
        probs[np.ix_(val, forest.classes_)] = forest.predict_proba(columns[val])
    return probs


def _told_apart(
    probs: np.ndarray, labels: np.ndarray, counts: np.ndarray, classes: Sequence[str]
) -> dict[str, list[str]]:
    """Class -> the classes it is told apart from, by the AUC of the images of the two alone."""
    from sklearn.metrics import roc_auc_score

    apart: dict[str, list[str]] = {}
    for a, b in itertools.combinations(range(len(classes)), 2):
        # Mann-Whitney: the standard error of an AUC of 0.5 from so many patients; three of them are luck
        error = np.sqrt((counts[a] + counts[b] + 1) / (12 * counts[a] * counts[b]))
        of_two = (labels == a) | (labels == b)
        share = probs[of_two, a] / np.maximum(probs[of_two, a] + probs[of_two, b], 1e-12)
        if roc_auc_score(labels[of_two] == a, share) >= max(APART_AUC, 0.5 + 3 * error):
            apart.setdefault(classes[a], []).append(classes[b])
            apart.setdefault(classes[b], []).append(classes[a])
    return {name: apart[name] for name in classes if name in apart}


def _audit_set(
    features: Mapping[str, np.ndarray],
    names: tuple[str, ...],
    labels: np.ndarray,
    groups: np.ndarray | None,
    classes: Sequence[str],
) -> Audit:
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    chance = 1 / len(classes)
    columns = _columns(features, names)
    if (columns == columns[0]).all():
        return Audit(names, chance, chance, chance, dict.fromkeys(classes, 0.5), {})
    probs = _held_out_probs(columns, labels, groups, len(classes))
    predictions = probs.argmax(1)
    counts = groups_per_class(labels, groups, len(classes))
    score, most = float(balanced_accuracy_score(labels, predictions)), luck(predictions, counts)
    auc = {name: float(roc_auc_score(labels == c, probs[:, c])) for c, name in enumerate(classes)}
    apart = _told_apart(probs, labels, counts, classes) if score > most else {}
    return Audit(names, score, chance, most, auc, apart)


def audit_shortcuts(
    features: Mapping[str, np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray | None,
    classes: Sequence[str],
) -> tuple[dict[str, Audit], str]:
    """Audit every feature set and all features together, and say what was left out ("" when nothing).

    features: name -> (N,) numbers or words, for the names in FEATURE_SETS. groups: (N,) or None; images of
    one group (patient, identical pixels) are never on both sides of a fold. Classes of fewer than
    LEAST_GROUPS groups are left out; with fewer than two classes left nothing is audited.
    """
    counts = groups_per_class(labels, groups, len(classes))
    kept = np.flatnonzero(counts >= LEAST_GROUPS)
    small = ", ".join(f"{classes[c]} ({counts[c]})" for c in np.flatnonzero(counts < LEAST_GROUPS))
    skipped = f"fewer than {LEAST_GROUPS} patients or different images: {small}" if small else ""
    if len(kept) < 2:
        return {}, skipped
    chosen = np.isin(labels, kept)
    labels = np.searchsorted(kept, labels[chosen])
    groups = None if groups is None else groups[chosen]
    classes = [classes[c] for c in kept]
    features = {name: values[chosen] for name, values in features.items()}
    sets = {**FEATURE_SETS, ALL: tuple(name for names in FEATURE_SETS.values() for name in names)}
    bar = progress(sets.items(), "auditing shortcuts")
    return {title: _audit_set(features, names, labels, groups, classes) for title, names in bar}, skipped
