"""What one reading of a data folder tells at no further cost, in order of danger.

A finding is a dictionary: level ("danger": results would be wrong; "warning": look at it; "note": know it),
kind (one of KINDS), message, count (of what the message counts first) and examples (as text: at most 20, but
every image or folder that was left out).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from common.errors import number, one_line
from data.groups import groups_per_class
from data.images import Inspection
from data.scan import ImageFolder, first_alike
from data.splits import Split

Finding = dict[str, Any]
LEVELS = ("danger", "warning", "note")
# Within a level, the more dangerous first.
KINDS = (
    "known_to_model", "known_to_model_unknown", "unreadable",
    "identical_across_splits", "near_across_splits", "patient_across_splits", "identical_across_classes",
    "shortcut_shape", "shortcut_format", "shortcut_brightness",
    "shortcut_everything", "class_too_small", "near_across_classes", "near_across_patients", "near_within",
    "patient_in_several_classes", "constant", "nearly_constant", "tiny", "identical_within", "class_small",
    "lopsided", "not_audited", "outside_splits", "wrong_suffix", "mixed_format", "mixed_mode", "mixed_bits",
    "mixed_size", "no_class", "passed_over",
)  # fmt: skip
MOST_EXAMPLES = 20
TINY = 64  # pixels of the shorter side
FEWEST = 5  # images or patients of a class: one for each of the usual five folds
FEW = 20  # below, a sensitivity of 80 % has a 95 % interval wider than 58 % to 92 % (Wilson)
LOPSIDED = 10  # images of the largest class for one of the smallest


def finding(
    level: str,
    kind: str,
    message: str,
    examples: Sequence[str] = (),
    count: int | None = None,
    most: int | None = MOST_EXAMPLES,
) -> Finding:
    count = len(examples) if count is None else count
    return {
        "level": level, "kind": kind, "message": message, "count": count, "examples": list(examples[:most]),
    }  # fmt: skip


def by_danger(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda f: (LEVELS.index(f["level"]), KINDS.index(f["kind"])))


def sides_of(splits: Sequence[Split] | None, n: int) -> np.ndarray:
    """(F, N) int8: 0 where an image is not in the fold, 1 where it trains, 2 where it validates."""
    sides = np.zeros((len(splits or ()), n), np.int8)
    for fold, split in zip(sides, splits or (), strict=True):
        fold[split.train], fold[split.val] = 1, 2
    return sides


def _shared(keys: Sequence[str] | np.ndarray) -> dict[Any, list[int]]:
    """Key -> indices that have it, for keys of more than one; an empty one is none."""
    first = first_alike(keys)
    members: dict[Any, list[int]] = defaultdict(list)
    for i in np.flatnonzero(np.bincount(first, minlength=len(first))[first] > 1).tolist():
        if keys[i]:
            members[keys[i]].append(i)
    return members


def _leaks(members: dict[Any, list[int]], sides: np.ndarray) -> dict[Any, int]:
    """Key -> the first fold (from 0) that has members on both sides, for the keys that have one."""
    found = {}
    for key, own in members.items():
        both = (sides[:, own] == 1).any(1) & (sides[:, own] == 2).any(1)
        if both.any():
            found[key] = int(np.argmax(both))
    return found


def _file_findings(paths: Sequence[str], inspection: Inspection) -> list[Finding]:
    findings = []
    if inspection.errors:
        message = (
            f"{len(inspection.errors)} of {len(paths)} images cannot be read; mend or remove them, for "
            "training stops at them or leaves them out"
        )
        unreadable = [f"{paths[i]}: {why}" for i, why in inspection.errors.items()]
        findings.append(finding("warning", "unreadable", message, unreadable, most=None))
    facts = inspection.facts
    constant = [i for i, f in enumerate(facts) if f and f.constant]
    if constant:
        shows = number(len(constant), "image shows", "images show")
        message = f"{shows} one colour and nothing else; remove what holds no picture"
        examples = [paths[i] for i in constant[:MOST_EXAMPLES]]
        findings.append(finding("warning", "constant", message, examples, len(constant)))
    tiny = [i for i, f in enumerate(facts) if f and min(f.width, f.height) < TINY]
    if tiny:
        has = number(len(tiny), "image has", "images have")
        message = f"{has} a side shorter than {TINY} pixels; take the full images if these are previews"
        examples = [f"{paths[i]}: {facts[i].width} x {facts[i].height}" for i in tiny[:MOST_EXAMPLES]]
        findings.append(finding("warning", "tiny", message, examples, len(tiny)))
    return findings


def _identical_findings(folder: ImageFolder, digests: np.ndarray, sides: np.ndarray) -> list[Finding]:
    paths, labels = folder.paths, folder.labels
    members = _shared(digests)

    def listed(own: Sequence[int]) -> str:
        return " = ".join(paths[i] for i in own[:4]) + (f" = {len(own) - 4} more" if len(own) > 4 else "")

    findings = []
    leaks = _leaks(members, sides)
    if leaks:
        has = number(len(leaks), "picture has", "pictures have")
        message = (
            f"{has} identical copies in training and in validation, which makes the validation too good; "
            "split again with identical images on one side"
        )
        examples = [f"fold {fold + 1}: {listed(members[digest])}" for digest, fold in leaks.items()]
        findings.append(finding("danger", "identical_across_splits", message, examples))
    across = [listed(own) for own in members.values() if len(set(labels[own])) > 1]
    if across:
        has = number(len(across), "picture has", "pictures have")
        message = (
            f"{has} identical copies in several classes; find out which label is right and remove the others"
        )
        findings.append(finding("danger", "identical_across_classes", message, across))
    within = []
    copies = 0
    for own in members.values():
        for c in np.unique(labels[own]):
            same = [i for i in own if labels[i] == c]
            copies += len(same) - 1
            if len(same) > 1:
                within.append(listed(same))
    if copies:
        repeats = number(copies, "image repeats", "images repeat")
        message = (
            f"{repeats} another of the same class pixel by pixel; training keeps them on one side of a "
            "split, but they count twice, so remove the copies"
        )
        findings.append(finding("warning", "identical_within", message, within, copies))
    return findings


def _patient_findings(folder: ImageFolder, patients: Sequence[str], sides: np.ndarray) -> list[Finding]:
    members = _shared(patients)
    n_patients = len(set(patients))
    findings = []
    leaks = _leaks(members, sides)
    if leaks:
        have = number(len(leaks), f"of {n_patients} patients has", f"of {n_patients} patients have")
        message = (
            f"{have} images in training and in validation, which makes the validation too good; split by "
            "patient"
        )
        examples = [f"{patient}: fold {fold + 1}" for patient, fold in leaks.items()]
        findings.append(finding("danger", "patient_across_splits", message, examples))
    several = []
    for patient, own in members.items():
        counts = Counter(folder.classes[folder.labels[i]] for i in own)
        if len(counts) > 1:
            several.append(f"{patient}: " + ", ".join(f"{name} x {n}" for name, n in counts.items()))
    if several:
        have = number(len(several), f"of {n_patients} patients has", f"of {n_patients} patients have")
        message = (
            f"{have} images in several classes; that is right where a disease came or went and else a wrong "
            "label, so look at them"
        )
        findings.append(finding("warning", "patient_in_several_classes", message, several))
    return findings


def _class_findings(
    folder: ImageFolder, digests: np.ndarray, groups: np.ndarray | None, unit: str
) -> list[Finding]:
    """Sizes as the splits count them, in `groups`, which are called `unit`; unreadable images are none."""
    labels = folder.labels[digests != b""]
    images = np.bincount(labels, minlength=len(folder.classes))
    counts = groups_per_class(labels, groups, len(folder.classes))
    sizes = dict(zip(folder.classes, map(int, counts), strict=True))
    findings = []
    fewest = [f"{name}: {n}" for name, n in sizes.items() if n < FEWEST]
    if fewest:
        has = number(len(fewest), "class has", "classes have")
        message = (
            f"{has} fewer than {FEWEST} {unit}, too few for the usual {FEWEST} folds; add some, leave the "
            "class out, or use fewer folds"
        )
        findings.append(finding("danger", "class_too_small", message, fewest))
    few = [f"{name}: {n}" for name, n in sizes.items() if FEWEST <= n < FEW]
    if few:
        has = number(len(few), "class has", "classes have")
        message = f"{has} fewer than {FEW} {unit}; add some, or report the scores with their wide intervals"
        findings.append(finding("warning", "class_small", message, few))
    if images.max() > LOPSIDED * images.min():
        most, least = int(images.argmax()), int(images.argmin())
        message = (
            f"{folder.classes[most]} has {images[most]} images and {folder.classes[least]} {images[least]}, "
            f"more than {LOPSIDED} to 1; go by balanced accuracy: --early-stopping-monitor val_balanced_acc; "
            "compare --logit-adjustment, which finds rare classes more often"
        )
        counted = [f"{name}: {n}" for name, n in zip(folder.classes, images, strict=True)]
        findings.append(finding("warning", "lopsided", message, counted))
    return findings


def quick_findings(
    folder: ImageFolder,
    inspection: Inspection,
    groups: np.ndarray | None,
    patients: Sequence[str] | None = None,
    splits: Sequence[Split] | None = None,
    for_training: bool = True,
) -> list[Finding]:
    """What one reading of the images tells, most dangerous first, without opening a file again.

    Without `for_training` nothing is said of how many images the classes have.

    inspection: of `folder.files()`, in that order. groups: of those that can be read, see `merge_groups`.
    patients: of each image. splits: indices into the folder's images; those of a separate validation folder
    are one Split over both.
    """
    sides = sides_of(splits, len(folder.paths))
    findings = _file_findings(folder.paths, inspection)
    findings += _identical_findings(folder, inspection.digests, sides)
    if patients is not None:
        findings += _patient_findings(folder, patients, sides)
    if for_training:
        unit = "different images" if patients is None else "patients"
        findings += _class_findings(folder, inspection.digests, groups, unit)
    return by_danger(findings)


def print_findings(findings: Sequence[Finding], examples: int = 5) -> None:
    """One paragraph for each: level, message, and some of the examples."""
    for found in findings:
        print(f"{found['level']}: {one_line(found['message'])}")
        for example in found["examples"][:examples]:
            print(f"  {one_line(example)}")
        if len(found["examples"]) > examples:
            print("  ...")
