"""Look a data folder over before anything is trained on it, and say what is wrong in order of danger.

    python -m data.check --data-dir single_label_data --groups-file patients.csv

Prints the findings and writes them to data_check.json. The exit code is 0 whatever is found, 2 for bad input.
"""

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from common.cli import Parser, exit_code_of, imports
from common.errors import UserError, number, one_line
from common.files import MOST_OF_SPLITS, read_json, why_unwritable, write_json

with imports():
    import numpy as np

    from data.findings import (
        LEVELS,
        MOST_EXAMPLES,
        Finding,
        by_danger,
        finding,
        print_findings,
        quick_findings,
        sides_of,
    )
    from data.groups import groups_by_pattern, groups_from_file, merge_groups, patient_pattern
    from data.images import Facts, inspect_images
    from data.looks import Look, look_at, near_pairs
    from data.scan import FORMAT_OF_SUFFIX, ImageFolder, nfc
    from data.shards import scan_and_check
    from data.shortcuts import FOLDS, Audit, audit_shortcuts
    from data.splits import Split

NEARLY_CONSTANT = 2.0  # grey levels of standard deviation; real films have more than 10
ELSEWHERE = "and test on images from another source"
MENDS = {
    "shape": "a model can learn the frame instead of the disease, so crop or pad all classes alike",
    "format": "every format leaves marks that a model can learn, so save all classes alike from originals",
    "brightness": "disease changes brightness, but so do exposure and export, so find out which it is",
    "everything": "a model can learn how an image was made instead of the disease, so mix the sources",
}
NEAR = {  # kind: level and what a pair means, from the greatest danger to the least
    "near_across_splits": (
        "danger",
        "in training and in validation, which makes the validation too good; put both on one side",
    ),
    "near_across_classes": ("warning", "in two classes; see whether it is one picture with two labels"),
    "near_across_patients": (
        "warning",
        "under two patients; see whether it is one patient, for splits will not keep the two together",
    ),
    "near_within": (
        "warning",
        "in one class; only a split by patient keeps them together, so give patients, or remove one of each",
    ),
}


def _near_findings(
    folder: ImageFolder,
    digests: Sequence[str],
    looks: Sequence[Look],
    patients: Sequence[str] | None,
    sides: np.ndarray,
) -> list[Finding]:
    """Pairs that look the same without being identical, each counted once, under its greatest danger."""
    labels = folder.labels
    content = np.unique(digests, return_inverse=True)[1]
    patient = None if patients is None else np.unique(patients, return_inverse=True)[1]
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    for a, b in near_pairs(looks):
        tests = {
            "near_across_splits": (sides[:, a] * sides[:, b] == 2).any(0),  # 1 trains, 2 validates
            "near_across_classes": labels[a] != labels[b],
            "near_across_patients": np.zeros(len(a), bool) if patient is None else patient[a] != patient[b],
            "near_within": np.ones(len(a), bool),
        }
        left = content[a] != content[b]
        for kind, test in tests.items():
            hits = np.flatnonzero(left & test)
            left &= ~test
            counts[kind] += len(hits)
            for i in hits[: MOST_EXAMPLES - len(examples[kind])]:
                examples[kind].append(f"{folder.paths[a[i]]} ~ {folder.paths[b[i]]}")
    found = []
    for kind, (level, meaning) in NEAR.items():
        if counts[kind]:
            looks_same = number(counts[kind], "pair of images looks", "pairs of images look")
            # one patient's near copies stay together in a split by patient
            harmless = kind == "near_within" and patients is not None
            message = f"{looks_same} the same "
            message += "within one class and patient; they count twice" if harmless else meaning
            found.append(finding("note" if harmless else level, kind, message, examples[kind], counts[kind]))
    return found


def _mixed_findings(folder: ImageFolder, facts: Sequence[Facts]) -> list[Finding]:
    found = []
    paths = folder.paths
    wrong = []
    for path, f in zip(paths, facts, strict=True):
        named = FORMAT_OF_SUFFIX.get(PurePosixPath(path).suffix.lower())
        actual = "JPEG" if f.format == "MPO" else f.format  # a camera's JPEG with a preview
        if named and named != actual:
            wrong.append(f"{path}: {actual}")
    if wrong:
        has = number(len(wrong), "image has", "images have")
        message = (
            f"{has} a suffix of another format; they are read by content here, but rename them for others"
        )
        found.append(finding("note", "wrong_suffix", message, wrong))
    kinds = {
        "mixed_format": ("file formats", [f.format for f in facts]),
        "mixed_mode": ("colour modes", [f.mode for f in facts]),
        "mixed_bits": ("bit depths", [f"{f.bits} bit" for f in facts]),
        "mixed_size": ("sizes", [f"{f.width} x {f.height}" for f in facts]),
    }
    for kind, (what, values) in kinds.items():
        mixed = []
        for c, name in enumerate(folder.classes):
            counts = Counter(values[i] for i in np.flatnonzero(folder.labels == c))
            if len(counts) > 1:
                common = ", ".join(f"{value} ({times})" for value, times in counts.most_common(4))
                rest = f" and {len(counts) - 4} more" if len(counts) > 4 else ""
                mixed.append(f"{name}: {common}{rest}")
        if mixed:
            has = number(len(mixed), "class has", "classes have")
            message = (
                f"{has} images of several {what}; that is no fault where each class has the same mixture"
            )
            found.append(finding("note", kind, message, mixed))
    return found


def _features(facts: Sequence[Facts], looks: Sequence[Look]) -> dict[str, np.ndarray]:
    """What the shortcut audit may look at: name -> (N,)."""
    return {
        "width": np.array([f.width for f in facts]),
        "height": np.array([f.height for f in facts]),
        "aspect": np.array([f.width / f.height for f in facts]),
        "format": np.array([f.format for f in facts]),
        "mode": np.array([f.mode for f in facts]),
        "bits": np.array([f.bits for f in facts]),
        "mean": np.array([look.mean for look in looks]),
        "std": np.array([look.std for look in looks]),
        "border": np.array([look.border for look in looks]),
    }


def _typical(values: np.ndarray) -> str:
    """The median of numbers, the most frequent word."""
    if values.dtype.kind in "fiu":
        return f"{np.median(values):.3g}"
    words, times = np.unique(values, return_counts=True)
    return str(words[times.argmax()])


def _who_is_told(apart: Mapping[str, list[str]], n_classes: int) -> str:
    """{"a": ["b", "c"], "b": ["a"], "c": ["a"]} of 3 classes -> "a from the rest"."""
    if n_classes == 2:
        return " from ".join(apart)
    whole = [name for name, others in apart.items() if len(others) == n_classes - 1]
    if len(whole) == n_classes:
        return "every class from the rest"
    phrases = [f"{', '.join(whole)} from the rest"] if whole else []
    said = set(whole)
    for name, others in apart.items():
        new = [other for other in others if other not in said]
        if name not in said and new:
            phrases.append(f"{name} from {', '.join(new)}")
        said.add(name)
    return "; ".join(phrases)


def _evidence(name: str, audit: Audit, features: Mapping[str, np.ndarray], folder: ImageFolder) -> str:
    own = folder.labels == folder.classes.index(name)
    typical = ((key, _typical(features[key][own]), _typical(features[key][~own])) for key in audit.features)
    differing = [
        f"{key} {of_class} against {of_rest}" for key, of_class, of_rest in typical if of_class != of_rest
    ]
    return "; ".join([f"{name}: AUC {audit.auc[name]:.2f} against all others", *differing])


def _shortcut_findings(
    audits: Mapping[str, Audit], features: Mapping[str, np.ndarray], folder: ImageFolder, by_patient: bool
) -> list[Finding]:
    found = []
    for title, audit in audits.items():
        if not audit.beyond_luck:
            continue
        subject = "All of these together" if title == "everything" else f"{title.capitalize()} alone"
        tells = _who_is_told(audit.apart, len(audit.auc)) or "something of the class"
        folds = f"{FOLDS}-fold cross-validation{' by patient' if by_patient else ''}"
        message = (
            f"{subject} ({', '.join(audit.features)}) can tell {tells}: balanced accuracy "
            f"over {len(audit.auc)} classes {audit.balanced_accuracy:.1%} in {folds}, "
            f"{audit.chance:.1%} by chance, at most {audit.luck:.1%} by luck; {MENDS[title]}, {ELSEWHERE}"
        )
        others = {name: len(audit.apart.get(name, ())) for name in audit.auc}
        names = [name for name, n in others.items() if n == max(others.values())]
        examples = [_evidence(name, audit, features, folder) for name in names]
        level = "danger" if audit.apart else "warning"
        found.append(finding(level, f"shortcut_{title}", message, examples))
    return found


def _class_summary(
    folder: ImageFolder,
    facts: Sequence[Facts | None],
    looks: Sequence[Look | None],
    patients: Sequence[str] | None,
) -> dict[str, dict[str, Any]]:
    def spread(values: Sequence[float]) -> dict[str, float]:
        low, middle, high = np.percentile(values, [0, 50, 100])
        return {"min": round(low, 1), "median": round(middle, 1), "max": round(high, 1)}

    summary = {}
    for c, name in enumerate(folder.classes):
        own = np.flatnonzero(folder.labels == c)
        of_class = [facts[i] for i in own if facts[i]]
        seen = [looks[i] for i in own if looks[i]]
        summary[name] = {
            "images": len(own),
            "unreadable": len(own) - len(of_class),
            "patients": None if patients is None else len({patients[i] for i in own}),
            "formats": dict(Counter(f.format for f in of_class).most_common()),
            "modes": dict(Counter(f.mode for f in of_class).most_common()),
            "bits": {str(bits): n for bits, n in Counter(f.bits for f in of_class).most_common()},
        }
        if of_class:
            summary[name] |= {
                "width": spread([f.width for f in of_class]),
                "height": spread([f.height for f in of_class]),
                "brightness": spread([look.mean for look in seen]),
                "contrast": spread([look.std for look in seen]),
                "border_brightness": spread([look.border for look in seen]),
            }
    return summary


def check_data(
    folder: ImageFolder, patients: Sequence[str] | None, splits: Sequence[Split] | None = None
) -> dict[str, Any]:
    """Read every image once and return what data_check.json holds.

    patients: of each image. splits: indices into the folder's images. The result has the findings, most
    dangerous first (see data/findings.py), the shortcut audit's numbers, and a summary of each class.
    """
    inspection = inspect_images(folder.files(), None, look_at)
    bad = set(inspection.errors)
    kept = [i for i in range(len(folder.paths)) if i not in bad]
    known = None if patients is None else [patients[i] for i in kept]
    groups = merge_groups(inspection.digests[kept], known, (folder.paths[i] for i in kept))
    found = quick_findings(folder, inspection, groups, patients, splits)
    summary = _class_summary(folder, inspection.facts, inspection.measured, patients)
    found += [finding("note", "passed_over", note) for note in folder.notes]
    sides = sides_of(splits, len(folder.paths))
    outside = [folder.paths[i] for i in np.flatnonzero((sides == 0).any(0))] if splits else []
    if outside:
        message = f"{number(len(outside), 'image is', 'images are')} missing from some fold of the splits"
        found.append(finding("note", "outside_splits", message, outside))

    n_images, n_patients = len(folder.paths), None if patients is None else len(set(patients))
    folder, inspection, sides, patients = folder.without(bad), inspection.without(bad), sides[:, kept], known
    audits: dict[str, Audit] = {}
    if kept:
        facts, looks = inspection.facts, inspection.measured
        blank = [
            path
            for path, f, look in zip(folder.paths, facts, looks, strict=True)
            if look.std < NEARLY_CONSTANT and not f.constant
        ]
        if blank:
            shows = number(len(blank), "image is", "images are")
            message = f"{shows} of nearly one grey level all over; remove what holds no picture"
            found.append(finding("warning", "nearly_constant", message, blank))
        found += _near_findings(folder, inspection.digests, looks, patients, sides)
        found += _mixed_findings(folder, facts)
        features = _features(facts, looks)
        audits, left_out = audit_shortcuts(features, folder.labels, groups, folder.classes)
        found += _shortcut_findings(audits, features, folder, patients is not None)
        if left_out:
            what = "leaves out classes with" if audits else "was skipped; classes with"
            found.append(finding("note", "not_audited", f"the shortcut audit {what} {left_out}"))
    return {
        "data_dir": str(folder.root),
        "images": n_images,
        "patients": n_patients,
        "findings": by_danger(found),
        "shortcuts": {title: asdict(audit) for title, audit in audits.items()},
        "summary": summary,
    }


def read_splits(path: Path, folder: ImageFolder) -> list[Split]:
    """The folds of a run's splits.json as indices into `folder`. Raises UserError when they do not fit."""
    record = read_json(path, "--splits", MOST_OF_SPLITS)
    index = {nfc(name): i for i, name in enumerate(folder.paths)}
    try:
        folds = [
            {side: [nfc(name) for name in fold[side]] for side in ("train", "val")}
            for fold in record["folds"]
        ]
    except (KeyError, TypeError):
        raise UserError(
            f'--splits {path} holds no folds; give the splits.json of a run: {{"folds": [{{"train": [paths], '
            '"val": [paths]}]}'
        ) from None
    unknown = [name for fold in folds for side in fold.values() for name in side if name not in index]
    if unknown:
        raise UserError(
            f"--splits {path} names {number(len(set(unknown)), 'image that is', 'images that are')} not in "
            f"--data-dir {folder.root}, such as {unknown[0]}; give the splits.json made from this folder "
            "(one made with --val-dir cannot be checked)"
        )
    both = [name for fold in folds for name in set(fold["train"]) & set(fold["val"])]
    if both:
        train = number(len(both), "image that trains and validates", "images that train and validate")
        raise UserError(f"--splits {path} has {train} in the same fold, such as {both[0]}; split again")
    return [
        Split(*(np.array([index[n] for n in fold[s]], np.int64) for s in ("train", "val"))) for fold in folds
    ]


def _print_report(result: dict[str, Any], seconds: float) -> None:
    counted = number(result["images"], "image", "images")
    if result["patients"] is not None:
        counted += f" of {number(result['patients'], 'patient', 'patients')}"
    print(f"{result['data_dir']}: {counted}, checked in {seconds:.1f} s")
    for name, facts in result["summary"].items():
        line = f"  {one_line(name)}: {number(facts['images'], 'image', 'images')}"
        if facts["patients"] is not None:
            line += f", {number(facts['patients'], 'patient', 'patients')}"
        if "width" in facts:
            size = " x ".join(f"{facts[side]['median']:.0f}" for side in ("width", "height"))
            line += f", median {size} px, {'/'.join(facts['formats'])}"
        print(line)
    print_findings(result["findings"])
    levels = Counter(found["level"] for found in result["findings"])
    print("in all: " + ", ".join(f"{level} {levels[level]}" for level in LEVELS))


def read_arguments(typed: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m data.check", description=__doc__)
    add = parser.add_argument
    add("--data-dir", help="folder with one sub-folder of images per class, or tar shards (required)")
    add("--groups-file", type=Path, help="CSV with columns path,group that names each image's patient")
    add("--group-pattern", help="regular expression on the file name whose first group is the patient")
    add("--splits", type=Path, help="splits.json of a run, to look for leaks between its sides")
    add("--output", type=Path, default=Path("data_check.json"), help="file to write (default: %(default)s)")
    return parser.read(typed, required=("--data-dir",))


def _refuse_unfit(args: argparse.Namespace) -> None:
    """Raises UserError naming what is wrong with the options whatever the images."""
    problems = []
    if args.group_pattern and args.groups_file:
        problems.append("--group-pattern and --groups-file exclude each other: both name the patient")
    for flag, path in (("--groups-file", args.groups_file), ("--splits", args.splits)):
        if path and not os.path.exists(path):
            problems.append(f"{flag} {path} does not exist")
    folder = args.output.absolute().parent
    if args.output.is_dir() or not folder.is_dir():
        problems.append(f"--output {args.output} cannot be written; give a file in a folder that exists")
    elif problem := why_unwritable(f"--output {args.output}", folder):
        problems.append(problem)
    elif args.output.exists() and not _is_of_check(args.output):
        problems.append(
            f"--output {args.output} exists and was not written by this program; give another file"
        )
    if problems:
        raise UserError(*problems)


def _is_of_check(path: Path) -> bool:
    """A run's data_check.json holds findings alone."""
    try:
        return {"findings", "shortcuts", "summary"} <= read_json(path, "--output").keys()
    except (UserError, AttributeError):  # no JSON, or no object
        return False


def run(typed: Sequence[str]) -> int:
    args = read_arguments(typed)
    started = time.monotonic()
    checks = [partial(_refuse_unfit, args)]
    if args.group_pattern:
        checks.append(partial(patient_pattern, args.group_pattern))
    (folder,) = scan_and_check({"--data-dir": args.data_dir}, *checks)
    patients = None
    if args.groups_file:
        patients = groups_from_file(folder, args.groups_file)
    elif args.group_pattern:
        patients = groups_by_pattern(folder, args.group_pattern)
    splits = read_splits(args.splits, folder) if args.splits else None
    result = check_data(folder, patients, splits)
    write_json(args.output, result)
    _print_report(result, time.monotonic() - started)
    print(f"written to {args.output}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    typed = sys.argv[1:] if argv is None else argv
    return exit_code_of(lambda: run(typed), interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
