#!/usr/bin/env python3
"""Predict the class of images with a trained model, or with several whose probabilities are averaged.

python predict_clip.py --checkpoint RUN --input FOLDER --output predictions.csv
python predict_clip.py --checkpoint RUN_A RUN_B --input image.png --output predictions.csv --heatmaps maps
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import NUMBERS, Parser, exit_code_of
from common.errors import UserError, all_of, one_line, shorten
from common.files import why_unwritable
from common.run_files import find_checkpoints

if TYPE_CHECKING:
    from data.inputs import ImageList
    from evaluation.predict import Tally
    from evaluation.trained import TrainedModel

MOST_NEW_CLASSES = 20_000
EPILOG = """\
--checkpoint: a checkpoint file, or a run's folder (its last epoch). The folder of a cross-validation stands
for an ensemble of its folds, and several checkpoints for one of all: the mean of their probabilities. They
need the same classes; each reads the images at its own size and in the precision it was validated in.

--input: an image, a folder (every image below it, sorted), or a list: .txt with a path per line, or .csv with
a column path. Paths of a list are relative to its folder, or absolute. Rows come in the order of the input.

--output, a CSV that opens in Excel with Chinese names, has the columns
  path            relative to the folder of --input, or as the list has it
  prediction      the class of highest probability, which is the column probability
  spread          its sample standard deviation over the models, empty for a single one
  prob_<class>    the probability of each class
  error           why an image could not be read; the numbers of its row are then empty
A spreadsheet takes a cell that begins with = + - or @ for a formula. So such a path is written with ./ before
it (it is the same path), and such a class or error with an apostrophe.

--class-texts-file: zero-shot. The classes are those of the file, a JSON such as {"积液": "胸腔积液"}, one or
several sentences each. Nobody has measured how well the model tells them apart: try it on labelled images.

exit code: 0 done, 1 not one image could be predicted (no file is written, a former one stays) or the
machine failed, 2 bad input, 130 interrupted
"""
MOST_HEAT_MAPS = 1000  # more are worth a word


def read_arguments(typed: Sequence[str]) -> argparse.Namespace:
    """The typed options, numbers converted. Raises UserError naming every mistake."""
    parser = Parser(prog="predict_clip.py", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--checkpoint", nargs="+", action="extend", type=Path, metavar="PATH",
        help="run folder or checkpoint file; several are an ensemble (required)")  # fmt: skip
    add("--input", type=Path, metavar="PATH", help="image, folder, or list (.txt, .csv) (required)")
    add("--output", type=Path, metavar="FILE", help="CSV file to write (required)")
    add("--overwrite", action="store_true", help="replace an existing --output, or heat maps")
    add("--class-texts-file", type=Path, metavar="FILE", help="JSON: score these sentences (zero-shot)")
    add("--heatmaps", type=Path, metavar="FOLDER", help="write pictures of what spoke for the class")
    add("--batch-size", default="64", metavar="N", help="images at a time (default: 64)")
    add("--num-workers", default="4", metavar="N",
        help="processes that load images, at most one per CPU core (default: 4)")  # fmt: skip
    add("--gpu-id", default="0", metavar="N", help="CUDA device; -1 is the CPU (default: 0)")
    add("--no-amp", action="store_true", help="compute in float32")
    found, problems = parser.examine(typed, ("--checkpoint", "--input", "--output"), NUMBERS)
    if problems:
        raise UserError(*problems)
    return found


def check_outputs(arguments: argparse.Namespace) -> None:
    """Raises UserError, naming every problem, when an output cannot be written or would replace something."""
    problems = []
    output, heat_maps = arguments.output, arguments.heatmaps
    if output.suffix.lower() != ".csv":
        problems.append(f"--output {output} must end in .csv")
    elif output.is_dir():
        problems.append(f"--output {output} is a folder; give a file such as {output / 'predictions.csv'}")
    elif output.exists() and arguments.input.exists() and output.samefile(arguments.input):
        problems.append(f"--output {output} is the list given as --input; give another file")
    elif output.exists() and not arguments.overwrite:
        problems.append(f"--output {output} exists; give another file, or --overwrite to replace it")
    if heat_maps is not None:
        inside = arguments.input.is_dir() and heat_maps.resolve().is_relative_to(arguments.input.resolve())
        if heat_maps.exists() and not heat_maps.is_dir():
            problems.append(f"--heatmaps {heat_maps} is a file; give a folder")
        elif heat_maps.resolve().is_relative_to(output.resolve()):
            problems.append(
                f"--heatmaps {heat_maps} stands where --output will be a file; give another folder"
            )
        elif inside:
            problems.append(
                f"--heatmaps {heat_maps} lies in --input, where the next run would take the heat maps for "
                "images; give a folder elsewhere"
            )
        elif heat_maps.is_dir() and any(heat_maps.iterdir()) and not arguments.overwrite:
            problems.append(
                f"--heatmaps {heat_maps} is not empty; give another folder, or --overwrite to write into it"
            )
    for flag, path in (("--output", output), ("--heatmaps", heat_maps)):
        if path is not None and (problem := why_unwritable(f"{flag} {path}", path.absolute().parent)):
            problems.append(problem)
    if problems:
        raise UserError(*problems)


def new_sentences(path: Path) -> dict[str, list[str]]:
    """Class -> sentences of --class-texts-file; its keys are the classes. Raises UserError."""
    from data.scan import nfc
    from data.texts import class_sentences, read_texts

    texts, source = read_texts(path)
    if len(texts) < 2 or not all(name.strip() for name in texts):
        raise UserError(
            f"{source} must hold one JSON object with at least two named classes, such as "
            '{"类别1": "描述1", "类别2": "描述2"}'
        )
    if len(texts) > MOST_NEW_CLASSES:
        raise UserError(f"{source} names {len(texts)} classes; at most {MOST_NEW_CLASSES} are scored")
    classes = list(dict.fromkeys(nfc(name) for name in texts))
    return class_sentences(classes, texts, source)[0]


def warn_of_training_images(source: Path, images: "ImageList", models: Sequence["TrainedModel"]) -> None:
    """A model is surer of the images it was trained on than of any other."""
    is_folder = source.is_dir()
    places = [source] if is_folder else _folders_of(images)
    places = {Path(os.path.realpath(place)) for place in places}
    for folder in sorted(set().union(*(model.folders for model in models))):
        inside = any(place.is_relative_to(folder) for place in places)
        # a list names images, not all that lies below their folders
        around = is_folder and any(folder.is_relative_to(place) for place in places)
        if (inside or around) and os.path.exists(folder):
            print(
                f"warning: --input holds images of {folder}, which the model was trained or validated on, so "
                "most of their probabilities are too good; the honest ones are in the run's predictions.csv "
                "or oof_predictions.csv"
            )


def _folders_of(images: "ImageList") -> set[str]:
    """Where the images of a list lie, which may come from Windows."""
    either = {own for name in images.names if "\0" not in name for own in (name, name.replace("\\", "/"))}
    paths = {os.path.join(images.root, name) for name in either}
    paths |= {os.path.realpath(path) for path in paths if os.path.islink(path)}
    return set(map(os.path.dirname, paths))


def print_summary(
    arguments: argparse.Namespace, images: "ImageList", classes: Sequence[str], tally: "Tally"
) -> None:
    from evaluation.tables import rounded

    n, n_good = len(images.names), int(tally.counts.sum())
    of = f"{n:,} image{'s' * (n != 1)}"
    print(f"\npredicted {n_good:,} of {of} in {tally.seconds:.1f} s ({n / tally.seconds:.0f} images/s)")
    for name, count, confidence in zip(classes, tally.counts, tally.confidences, strict=True):
        mean = f"  mean probability {confidence / count:.3f}" if count else ""
        print(f"  {count:8,}  {rounded(100 * count / max(1, n_good), '5.1f')} %  {one_line(name)}{mean}")
    if n_good:
        print(f"mean probability of the predicted class: {tally.confidences.sum() / n_good:.3f}")
    if tally.n_failed:
        has = "image has" if tally.n_failed == 1 else "images have"
        where = "; the column error says why" if n_good else ""
        print(f"{tally.n_failed:,} {has} no prediction{where}:")
        print(shorten(tally.failures, 5) if tally.n_failed <= 5 else shorten(tally.failures[:5]) + "\n  ...")
    if not n_good:
        print(f"not one image could be predicted, so {arguments.output} was not written")
        return
    print(f"{arguments.output}: one row per image")
    if arguments.heatmaps is not None:
        print(f"{arguments.heatmaps}: one heat map per predicted image: row_class_path.png")


def predict(arguments: argparse.Namespace) -> int:
    """Check everything, load, predict, sum up. Returns the exit code."""
    from data.inputs import list_images

    images, texts, *_ = all_of(
        partial(list_images, arguments.input),
        lambda: new_sentences(arguments.class_texts_file) if arguments.class_texts_file else None,
        partial(check_outputs, arguments),
        *(partial(find_checkpoints, path) for path in arguments.checkpoint),
    )
    for note in images.notes:
        print(f"note: {note}")

    from evaluation.predict import Ensemble, predict_files  # the heavy libraries, only now
    from evaluation.trained import load_models
    from training.failures import failures_explained

    models = load_models(arguments.checkpoint, arguments.gpu_id, not arguments.no_amp, texts)
    ensemble = Ensemble(models)
    if len(models) > 1:
        print(f"ensemble: the mean of {len(models)} models")
    if texts is not None:
        print(
            f"zero-shot: the classes are the {len(texts)} of {arguments.class_texts_file}, whose sentences "
            "the model was not trained or validated with"
        )
    warn_of_training_images(arguments.input, images, models)
    if arguments.heatmaps is not None and len(images.names) > MOST_HEAT_MAPS:
        print(f"warning: --heatmaps writes up to {len(images.names):,} pictures, which takes time and room")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with failures_explained(arguments.batch_size):
        tally = predict_files(
            images,
            ensemble,
            arguments.output,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            heat_map_dir=arguments.heatmaps,
        )
    print_summary(arguments, images, ensemble.classes, tally)
    return 0 if tally.counts.sum() else 1


def main(typed: Sequence[str] | None = None) -> int:
    """Returns the exit code (see --help)."""
    words = sys.argv[1:] if typed is None else typed
    return exit_code_of(lambda: predict(read_arguments(words)), "no file of predictions was written")


if __name__ == "__main__":
    sys.exit(main())
