#!/usr/bin/env python3
"""Export a trained model for use without this program: ONNX, safetensors, and a model card.

python export_clip.py --checkpoint RUN --output-dir exported
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.cli import Parser, exit_code_of
from common.errors import UserError, all_of, did_you_mean
from common.run_files import find_checkpoints, refuse_output_dir

FORMATS = ("onnx", "safetensors")
EPILOG = """\
--checkpoint: a checkpoint file, or a run's folder (its last epoch). Of a cross-validation each fold is
exported into a folder of its own (fold_1, fold_2, ...): an ONNX file holds one model.

onnx         model.onnx: images (N, 3, S, S) float32, RGB, 0 to 255 -> probs (N, classes) and image_features
             (N, D). The normalisation is inside. The answers are compared with PyTorch's before anything is
             written. model.onnx.json: classes, sentences, how a file becomes that input, checksums
safetensors  model.safetensors and config.json: the tensors of the image side and the class features
README.md    the model card: use, data, metrics, limits; the licence is left to you

exit code: 0 done, 1 failed, 2 bad input, 130 interrupted
"""


def read_arguments(typed: Sequence[str]) -> argparse.Namespace:
    """The typed options. Raises UserError naming every mistake."""
    parser = Parser(prog="export_clip.py", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="PATH", help="run folder or checkpoint file (required)")
    add("--output-dir", type=Path, metavar="FOLDER", help="folder for the exported files (required)")
    add(
        "--format", nargs="+", default=list(FORMATS), metavar="NAME", help="onnx, safetensors (default: both)"
    )
    add("--overwrite", action="store_true", help="replace files of the same names in --output-dir")
    found, problems = parser.examine(typed, ("--checkpoint", "--output-dir"))
    problems += [
        f"--format {name!r} is unknown{did_you_mean(name, FORMATS)}; give {' or '.join(FORMATS)}"
        for name in found.format
        if name not in FORMATS
    ]
    if problems:
        raise UserError(*problems)
    return found


def check_folder(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Raises UserError when the folder cannot be written, is a run's, or holds files of these names."""
    refuse_output_dir(folder)
    if folders := [name for name in names if (folder / name).is_dir()]:
        raise UserError(
            f"--output-dir {folder}: {', '.join(folders)} is a folder there and would be a file; give another"
        )
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"--output-dir {folder} holds {', '.join(there)} already; give another folder, or --overwrite"
        )


def export(arguments: argparse.Namespace) -> int:
    """Check, load, convert, compare, write. Returns the exit code."""
    checkpoints, _ = all_of(
        lambda: find_checkpoints(arguments.checkpoint), lambda: refuse_output_dir(arguments.output_dir)
    )

    import torch  # the heavy libraries, only now

    from common.files import write_whole
    from evaluation.export import CARD, FILES, exported_files
    from evaluation.model_card import run_facts
    from evaluation.trained import load_trained

    folders = [arguments.output_dir]
    if len(checkpoints) > 1:
        folders = [arguments.output_dir / checkpoint.parent.name for checkpoint in checkpoints]
        print(
            f"note: a cross-validation: each of its {len(folders)} folds is exported into a folder of its own"
        )
    formats = [name for name in FORMATS if name in arguments.format]
    names = [*(file for name in formats for file in FILES[name]), CARD]
    for folder in folders:
        check_folder(folder, names, arguments.overwrite)

    for checkpoint, folder in zip(checkpoints, folders, strict=True):
        started = time.monotonic()
        trained = load_trained(checkpoint, torch.device("cpu"))
        files, difference = exported_files(trained, formats, run_facts(trained))
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, lambda file, content=content: file.write(content))
        print(f"{checkpoint} -> {folder}, in {time.monotonic() - started:.1f} s")
        if difference is not None:
            print(f"  onnxruntime against PyTorch: largest difference {difference:.1e} (1e-4 is allowed)")
        for name, content in files.items():
            print(f"  {name}  {len(content) / 1e6:,.1f} MB" if len(content) > 1e5 else f"  {name}")
    print("README.md is the model card: complete what only its author knows, and choose the licence")
    return 0


def main(typed: Sequence[str] | None = None) -> int:
    """Returns the exit code (see --help)."""
    words = sys.argv[1:] if typed is None else typed
    return exit_code_of(
        lambda: export(read_arguments(words)), "what is finished is whole, the rest was not written"
    )


if __name__ == "__main__":
    sys.exit(main())
