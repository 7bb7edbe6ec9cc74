#!/usr/bin/env python3
"""Measure a trained model on labelled images it has not seen, such as another hospital's.

python evaluate_clip.py --checkpoint RUN --data-dir LABELLED --output-dir DIR
python evaluate_clip.py --checkpoint CV_RUN --data-dir LABELLED --output-dir DIR --group-pattern '^(P\\d+)_'
"""

import argparse
import dataclasses
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import NUMBERS, Parser, exit_code_of
from common.errors import UserError, did_you_mean, listed, number, one_line
from common.run_files import KNOWN_IMAGES, find_checkpoints, refuse_output_dir

if TYPE_CHECKING:
    import numpy as np

    from data.findings import Finding
    from data.scan import ImageFolder
    from evaluation.predict import Ensemble
    from evaluation.trained import TrainedModel
    from training.config import Config
    from training.dataset import DataSet

EPILOG = """\
--checkpoint: a checkpoint file, or a run's folder (its last epoch); a cross-validation's folder, or several
checkpoints, are an ensemble: the mean of their probabilities.

--data-dir: one sub-folder of images per class, as in training. Classes are matched by name. A class of the
model without a folder here is said, and what cannot be measured of it is null. A folder that is no class of
the model is refused: --rename THEIRS=OURS says which class it is, --skip-extra leaves its images out.

--output-dir receives config.json (what was evaluated on what), predictions.csv, metrics.json,
metrics_table.csv and .tex, data_check.json, report.html and figures/. Images that the model was trained or
validated on (found by their pixels, whatever their names) make its numbers too good: they are counted before
anything is computed, and known_images.csv names them.

exit code: 0 done, 1 failed, 2 bad input, 130 Ctrl-C
"""

OF_EARLIER_VERSION = (
    "trained by an earlier version of this program, which did not keep which images it used; whether these "
    "are among them is not known"
)
WRITTEN_ANEW = (
    "trained or validated on a folder of this path, and none of these images is, by its pixels, one that it "
    "used; files that were written anew cannot be recognised, so whether they are among those is not known"
)


def read_arguments(typed: Sequence[str]) -> argparse.Namespace:
    """The typed options. Raises UserError naming every mistake."""
    parser = Parser(prog="evaluate_clip.py", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="trained model or models (required)",
    )
    add("--data-dir", help="folder with one sub-folder of images per class, or tar shards (required)")
    add("--output-dir", type=Path, help="folder for the results (required)")
    add("--group-pattern", help="regular expression on the file name whose first group is the patient")
    add("--groups-file", type=Path, help="CSV with columns path,group that names each image's patient")
    add("--rename", nargs="+", action="extend", default=[], metavar="THEIRS=OURS",
        help="this folder is that class of the model; one or several")  # fmt: skip
    add("--skip-extra", action="store_true", help="leave out folders that are no class of the model")
    add("--skip-unreadable", action="store_true", help="leave unreadable images out instead of stopping")
    add("--cache-dir", type=Path, help="folder for decoded images (default: ~/.cache/train_clip)")
    add("--no-cache", action="store_true", help="keep no decoded images on disk")
    add("--num-workers", default="4", metavar="N", help="processes that load images (default: 4)")
    add("--batch-size", default="64", metavar="N", help="images at a time (default: 64)")
    add("--gpu-id", default="0", metavar="N", help="CUDA device; -1 is the CPU (default: 0)")
    add("--no-amp", action="store_true", help="compute in float32")
    add("--overwrite", action="store_true", help="replace another evaluation's results in --output-dir")
    found, problems = parser.examine(typed, ("--checkpoint", "--data-dir", "--output-dir"), NUMBERS)
    problems += [
        f"--rename {pair!r} must be THEIRS=OURS" for pair in found.rename if pair.strip() and "=" not in pair
    ]
    if found.cache_dir and found.no_cache:
        problems.append("--cache-dir and --no-cache exclude each other")
    if problems:
        raise UserError(*problems)
    return found


def match_classes(
    folder: "ImageFolder", classes: Sequence[str], renames: Sequence[str], skip_extra: bool
) -> "tuple[ImageFolder, list[Finding]]":
    """The folder with the model's `classes` as its own, and what of other folders was left out; says what
    differs.

    Raises UserError for a folder that is no class, unless `skip_extra`, and for a rename that fits nothing.
    """
    import numpy as np

    from data.findings import finding
    from data.scan import nfc

    def sides_of(pair: str) -> tuple[str, str]:
        """Names may hold "=" themselves: the split at which both sides are known, else the first."""
        splits = [(pair[:i], pair[i + 1 :]) for i, character in enumerate(pair) if character == "="]
        splits = [(nfc(theirs.strip()), nfc(ours.strip())) for theirs, ours in splits]
        return next((s for s in splits if s[0] in folder.classes and s[1] in classes), splits[0])

    pairs = list(dict.fromkeys(map(sides_of, renames)))
    problems = [
        f"--rename {theirs}={ours}: {wrong!r} is no {what}{did_you_mean(wrong, known)}"
        for theirs, ours in pairs
        for wrong, known, what in (
            (theirs, folder.classes, "folder of --data-dir"),
            (ours, classes, "class of the model"),
        )
        if wrong not in known
    ]
    for name, times in Counter(theirs for theirs, _ in pairs).items():
        if times > 1:
            several = " and ".join(repr(ours) for theirs, ours in pairs if theirs == name)
            problems.append(f"--rename: the folder {name!r} cannot be {several} at once; give it one class")
    renamed = dict(pairs)
    ours_of = {name: name for name in folder.classes} | renamed
    extra = [name for name in folder.classes if name not in renamed and name not in classes]
    if extra and not skip_extra:
        problems += [
            f"--data-dir {folder.root}: the folder {name!r} is no class of the model"
            f"{did_you_mean(name, classes)}; say which one it is (--rename {one_line(name)}=CLASS), or leave "
            "its images out (--skip-extra)"
            for name in extra
        ]
    if problems:
        names = f"the model's classes are {listed(classes)}; the folders {listed(folder.classes)}"
        raise UserError(*problems, names)

    counts = np.bincount(folder.labels, minlength=len(folder.classes))
    for name in folder.classes:
        if name not in extra and ours_of[name] != name:
            print(f"note: the folder {name!r} is taken for the class {ours_of[name]!r}")
    absent = [name for name in classes if name not in ours_of.values()]
    if absent:
        print(
            f"note: no images of {listed(absent)}; what cannot be measured without them is null, and "
            "where they were predicted their F1 is 0 in the macro-F1"
        )
    new = np.array([classes.index(ours_of[n]) if n not in extra else -1 for n in folder.classes])[
        folder.labels
    ]
    kept = np.flatnonzero(new >= 0)
    if not len(kept):
        raise UserError(f"--data-dir {folder.root} has no images of the model's classes {listed(classes)}")
    order = kept[np.argsort(new[kept], kind="stable")]
    findings = []
    if extra:
        n_out = len(new) - len(kept)
        message = (
            f"left out {number(n_out, 'image', 'images')} of {number(len(extra), 'folder', 'folders')} that "
            f"{'is' if len(extra) == 1 else 'are'} no class of the model (--skip-extra)"
        )
        of_each = [f"{name}: {n}" for name, n in zip(folder.classes, counts, strict=True) if name in extra]
        findings.append(finding("note", "no_class", message, of_each, n_out, most=None))
    return dataclasses.replace(folder.take(order), classes=tuple(classes), labels=new[order]), findings


def refuse_contradictions(options: "Config") -> None:
    """Raises UserError naming every pair of options that exclude each other."""
    from training.options import contradictions

    problems = contradictions(options)
    if problems:
        raise UserError(*problems)


def evaluate(typed: Sequence[str]) -> int:
    """Check, load, read, predict, write. Returns the exit code (see --help)."""
    arguments = read_arguments(typed)
    from data.groups import patient_pattern
    from data.shards import scan_and_check
    from training.config import Config
    from training.options import refuse_missing

    options = Config(
        data_dir=str(arguments.data_dir),
        output_dir=str(arguments.output_dir),
        group_pattern=arguments.group_pattern,
        groups_file=str(arguments.groups_file) if arguments.groups_file else None,
        skip_unreadable=arguments.skip_unreadable,
        cache_dir=str(arguments.cache_dir) if arguments.cache_dir else None,
        use_cache=not arguments.no_cache,
        overwrite=arguments.overwrite,
        num_workers=arguments.num_workers,
        batch_size=arguments.batch_size,
    )
    (folder,) = scan_and_check(
        {"--data-dir": arguments.data_dir},
        partial(refuse_contradictions, options),
        partial(refuse_missing, options, weights=False),
        partial(refuse_output_dir, arguments.output_dir),
        *([partial(patient_pattern, options.group_pattern)] if options.group_pattern else []),
        *(partial(find_checkpoints, path) for path in arguments.checkpoint),
        at_least=1,
        cache_dir=arguments.cache_dir,
    )
    for note in folder.notes:
        print(f"note: {note}")

    import numpy as np  # the heavy libraries, only now

    from common.files import path_cell, write_csv, write_json
    from data.findings import by_danger, print_findings
    from evaluation.predict import Ensemble
    from evaluation.report import write_report
    from evaluation.results import headline, write_results
    from evaluation.tables import rounded
    from evaluation.trained import load_models
    from training.dataset import findings_of, patients_of, read_images
    from training.failures import failures_explained
    from training.outputs import locked, prepare_output_folder, print_files, refuse_results

    refuse_results(arguments.output_dir, options)
    models = load_models(arguments.checkpoint, arguments.gpu_id, not arguments.no_amp)
    ensemble = Ensemble(models)
    folder, left_out = match_classes(folder, ensemble.classes, arguments.rename, arguments.skip_extra)
    options = dataclasses.replace(options, img_size=ensemble.sizes[0])
    data = read_images(options, folder, None, patients_of(options, folder, None), at_least=0)
    known, silent = images_known_to(models, data)
    known_to_model = known_findings(known, silent, len(data.files))
    findings = by_danger([*findings_of(data, []), *known_to_model, *left_out])
    print_findings(findings)
    with failures_explained(arguments.batch_size):
        probs = mean_probs(ensemble, data, options)
    predictions = data.predictions(np.arange(len(data.files)), probs)

    output_dir = arguments.output_dir
    with locked(output_dir):
        refuse_output_dir(output_dir)  # again: of what began while this evaluation computed
        refuse_results(output_dir, options)
        prepare_output_folder(output_dir, arguments.overwrite)
        n_known = len(known) if known or not silent else None
        write_json(output_dir / "config.json", record_of(arguments, data, models, n_known))
        write_json(output_dir / "data_check.json", {"findings": findings})
        if known:
            write_csv(output_dir / KNOWN_IMAGES, ["path"], [[path_cell(path)] for path in known])
        metrics = write_results(output_dir, predictions, "predictions.csv")
        share = 100 * np.bincount(predictions.labels).max() / len(predictions.labels)
        n = number(len(predictions.paths), "image", "images")
        print(f"{n}, {rounded(share)} % of the most frequent class: {headline(metrics)}")
        write_report(output_dir)
    print_files(output_dir)
    return 0


def images_known_to(
    models: "Sequence[TrainedModel]", data: "DataSet"
) -> tuple[list[str], dict[str, list[str]]]:
    """The paths of the images that a model was trained or validated on, by their pixels; and why that is not
    known of some checkpoints -> these.

    A checkpoint without `image_keys` knows its images all together: by their fingerprint.
    """
    import numpy as np

    root = Path(os.path.realpath(data.folder.root))
    known, silent = np.zeros(len(data.files), bool), defaultdict(list)
    for model in models:
        keys = model.facts.get("image_keys")
        if keys is not None:
            found = np.isin(data.inspection.keys(), keys)
            if not found.any() and root in model.folders:
                silent[WRITTEN_ANEW].append(str(model.path))
            known |= found
        # with --val-dir one string holds both fingerprints
        elif data.fingerprint in model.facts["dataset_fingerprint"]:
            known[:] = True
        else:
            silent[OF_EARLIER_VERSION].append(str(model.path))
    return [data.paths[i] for i in np.flatnonzero(known)], dict(silent)


def known_findings(
    known: Sequence[str], silent: Mapping[str, Sequence[str]], n_images: int
) -> "list[Finding]":
    """What is to be said of images that a model knows, and of models that do not tell."""
    from data.findings import finding

    unknown = [
        finding("warning", "known_to_model_unknown", f"{', '.join(of)}: {why}", count=len(of))
        for why, of in silent.items()
    ]
    which = f"of {number(n_images, 'image', 'images')} {number(len(known), 'was', 'were')}"
    if len(known) == n_images:
        which = "all " * (n_images > 1) + number(n_images, "image was", "images were")
    message = (
        f"{which} used to train or validate a model, so what follows is too good; {KNOWN_IMAGES} names them; "
        "remove them from the folder, or take the honest numbers from the run's own metrics.json"
    )
    return [finding("danger", "known_to_model", message, known), *unknown] if known else unknown


def mean_probs(ensemble: "Ensemble", data: "DataSet", options: "Config") -> "np.ndarray":
    """(N, C): the mean of the models' probabilities. The images are read again for each further size."""
    import numpy as np

    from data.loader import EpochBatches, ImageDataset, build_loader
    from evaluation.predict import predict_probs
    from training.dataset import inspection_of

    squares = {options.img_size: data.squares}
    for size in ensemble.sizes:
        if size not in squares:
            squares[size] = inspection_of(dataclasses.replace(options, img_size=size), [data.folder]).squares
    images = {
        size: ImageDataset(data.files, data.labels, size, own, ensemble.device)
        for size, own in squares.items()
    }
    batches = EpochBatches(np.arange(len(data.files)), options.batch_size, None)
    each = []
    for model, features in zip(ensemble.models, ensemble.features, strict=True):
        loader = build_loader(images[model.img_size], batches, options.num_workers)
        each.append(predict_probs(model.model, features, loader, model.autocast, model.device)[0])
    return np.mean(each, axis=0)


def record_of(
    arguments: argparse.Namespace,
    data: "DataSet",
    models: "Sequence[TrainedModel]",
    n_known: int | None,
) -> dict[str, Any]:
    """Content of the evaluation's config.json: what was evaluated on what, with what. Of each model the
    options that matter most, and all in which the models differ.
    """
    from training.config import FIELDS
    from training.outputs import FREE_ON_CONTINUE, library_versions

    # a checkpoint of an earlier version lacks options that have come since
    options = [{n: model.facts["config"].get(n, FIELDS[n].default) for n in FIELDS} for model in models]
    of_model = ["data_dir", "image_encoder_name", "text_encoder_name", "img_size", "random_state", "epochs"]
    of_no_model = {*of_model, *FREE_ON_CONTINUE, "save_best"}  # what is the same model without
    differing = [n for n in FIELDS if any(own[n] != options[0][n] for own in options)]
    of_model += [n for n in differing if n not in of_no_model]
    facts = ["epoch", "epoch_is"]
    for name in ("class_texts", "dataset_fingerprint", "changed_on_resume"):
        if any(model.facts.get(name, []) != models[0].facts.get(name, []) for model in models):
            facts.append(name)
    typed = ("data_dir", "group_pattern", "groups_file", "rename", "skip_extra", "skip_unreadable")
    return {
        "checkpoints": [str(model.path) for model in models],
        "models": [
            {key: own[key] for key in of_model} | {key: model.facts.get(key, []) for key in facts}
            for model, own in zip(models, options, strict=True)
        ],
        **{key: getattr(arguments, key) for key in typed},
        "data_dir": str(arguments.data_dir),
        "groups_file": str(arguments.groups_file) if arguments.groups_file else None,
        "cache_dir": str(arguments.cache_dir) if arguments.cache_dir else None,
        "classes": list(models[0].classes),
        "class_texts": models[0].class_texts,
        "images_per_class": data.images_per_class(),
        "dataset_fingerprint": data.fingerprint,
        "n_known_images": n_known,
        "gpu_id": arguments.gpu_id,
        **library_versions(),
    }


def main(typed: Sequence[str] | None = None) -> int:
    return exit_code_of(
        lambda: evaluate(sys.argv[1:] if typed is None else typed),
        "the evaluation is not complete; the same command makes it anew, with --overwrite where it had begun "
        "to write",
    )


if __name__ == "__main__":
    sys.exit(main())
