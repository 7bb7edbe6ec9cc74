"""The files of a run: whose they are, what config.json says, predictions as CSV."""

import csv
import dataclasses
import io
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import read_json, write_whole
from training.config import FIELDS, Config, flag_of
from training.dataset import DataSet
from training.device import Hardware

RESULT_FILES = (
    "config.json",
    "history.json",
    "splits.json",
    "checkpoint_latest.pth",
    "checkpoint_best.pth",
    "cv_summary.json",
    "oof_predictions.csv",
)
# May differ when a cross-validation or an entry is continued: they say where and how, not what. The images
# themselves are compared by content.
FREE_ON_CONTINUE = frozenset(
    {
        "data_dir", "output_dir", "overwrite", "resume_from", "gpu_id", "num_workers", "fold",
        "multi_config", "config_file", "config_index",
    }
)  # fmt: skip
_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "scikit-learn", "pillow", "numpy", "pydicom")


def results_in(output_dir: Path) -> list[str]:
    """Names of what an earlier run left in the folder."""
    if not output_dir.is_dir():
        return []
    folds = [p.name for p in output_dir.iterdir() if re.fullmatch(r"fold_\d+", p.name)]
    return [name for name in RESULT_FILES if (output_dir / name).exists()] + sorted(folds)


def check_writable(output_dir: Path) -> None:
    """Raises UserError when the folder is a file or cannot be written to."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir} is a file; give a folder")
    nearest = next(p for p in (output_dir.absolute(), *output_dir.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(
            f"--output-dir {output_dir} cannot be written: {nearest} is no folder that may be written"
        )


def refuse_results(output_dir: Path, config: Config) -> None:
    """Raises UserError when the folder holds results that no option says to replace or to continue."""
    check_writable(output_dir)
    found = results_in(output_dir)
    latest = output_dir / "checkpoint_latest.pth"
    resumes_here = config.resume_from and Path(config.resume_from).resolve().parent == output_dir.resolve()
    if found and not config.overwrite and not resumes_here:
        hint = f" --resume-from {latest} to continue it," if latest.exists() else ""
        raise UserError(
            f"--output-dir {output_dir} holds another run's results ({', '.join(found)}); use another folder,"
            f"{hint} or --overwrite to replace it"
        )


def continues(output_dir: Path, config: Config, texts: Mapping[str, Sequence[str]] | None = None) -> bool:
    """True when the folder holds the beginning of this very run, False when it holds nothing (or
    --overwrite).

    Raises UserError, naming the options that differ, when it holds another run.
    """
    check_writable(output_dir)
    found = results_in(output_dir)
    if not found or config.overwrite:
        return False
    if "config.json" not in found:
        raise UserError(
            f"--output-dir {output_dir} holds {', '.join(found)} but no config.json, so it cannot be "
            "continued; "
            "use another folder, or --overwrite to replace it"
        )
    stored = read_json(output_dir / "config.json", "the run's config.json")
    differing = [
        f"{flag_of(name)} {stored.get(name)} there, {getattr(config, name)} now"
        for name in FIELDS
        if name not in FREE_ON_CONTINUE and stored.get(name) != getattr(config, name)
    ]
    if texts is not None and stored.get("class_texts") != texts:
        differing.append("the class sentences have changed")
    if differing:
        raise UserError(
            f"--output-dir {output_dir} holds a run with other options ({'; '.join(differing)}); "
            "give the same options to continue it, use another folder, or --overwrite to replace it"
        )
    return True


def prepare_output_folder(output_dir: Path, overwrite: bool) -> None:
    """Make the folder; with `overwrite` remove the results (and nothing else) that a run left there."""
    output_dir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for name in results_in(output_dir):
            path = output_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_record(
    config: Config, data: DataSet, class_texts: Mapping[str, Sequence[str]], hardware: Hardware
) -> dict[str, Any]:
    """Content of config.json: the options by their JSON keys, then what else made the result."""
    counts = np.bincount(data.folder.labels, minlength=len(data.folder.classes)).tolist()
    return {
        **dataclasses.asdict(config),
        "classes": list(data.folder.classes),
        "class_texts": {name: list(own) for name, own in class_texts.items()},
        "dataset_fingerprint": data.fingerprint,
        "images_per_class": dict(zip(data.folder.classes, counts, strict=True)),
        "hardware": hardware.description,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Commit of this program, with "-dirty" when files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """UTF-8 with BOM, so that Excel shows Chinese."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode("utf-8-sig")))
