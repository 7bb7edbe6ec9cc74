"""The files of a run: whose they are, what config.json says."""

import contextlib
import dataclasses
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from common.device import Hardware
from common.distributed import is_main
from common.errors import UserError
from common.files import MOST_OF_SPLITS, check_writable, read_json
from common.run_files import BEST, KNOWN_IMAGES, LATEST, PREVIOUS, fold_dir, fold_number, frozen_file
from data.scan import ImageFolder, nfc
from evaluation.checkpoints import DAMAGED, TOWERS, read_checkpoint
from models.clip import CLIPModel
from training.config import FIELDS, Config, of_preset, shown, value_of
from training.dataset import DataSet
from training.state import frozen_towers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
SILENT_SECONDS = 2.0  # of waiting for another run
CHECKPOINTS = (LATEST, PREVIOUS, BEST, DAMAGED)
RESULT_FILES = (
    "config.json",
    "history.json",
    "splits.json",
    *CHECKPOINTS,
    *map(frozen_file, TOWERS),
    "cv_summary.json",
    "predictions.csv",
    "oof_predictions.csv",
    "metrics.json",
    "metrics_table.csv",
    "metrics_table.tex",
    "data_check.json",
    KNOWN_IMAGES,
    "report.html",
)
FOLD_FILES = (
    "history.json",
    *CHECKPOINTS,
    "result.json",
    "predictions.csv",
)
# May differ when a cross-validation or an entry is continued: they say where and how, not what. The images
# themselves are compared by content.
FREE_ON_CONTINUE = frozenset(name for name, f in FIELDS.items() if f.metadata["on_resume"] == "free")
_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "scikit-learn", "pillow", "numpy", "pydicom")


def results_in(output_dir: Path) -> list[str]:
    """Names of what an earlier run left in the folder."""
    if not output_dir.is_dir():
        return []
    folds = [folder.name for folder in _folds_with(FOLD_FILES, output_dir)]
    return [name for name in RESULT_FILES if (output_dir / name).exists()] + folds


def _folds_with(names: Sequence[str], output_dir: Path) -> list[Path]:
    """The folders of folds that hold one of the files `names`, by their numbers."""
    folds = [folder for folder in output_dir.iterdir() if fold_number(folder) is not None]
    folds = [folder for folder in folds if any((folder / name).exists() for name in names)]
    return sorted(folds, key=fold_number)


def resumes_in(output_dir: Path, config: Config) -> bool:
    """Does the run go on from a checkpoint of the folder it writes to?"""
    if not config.resume_from:
        return False
    return Path(config.resume_from).resolve().parent == output_dir.resolve()


def _is_of_first_epoch(best: Path) -> bool:
    try:
        return read_checkpoint(best, with_text=False)["epoch"] == 1
    except UserError:  # there is none, or none that can be read
        return False


def _has_keys(path: Path, *keys: str) -> bool:
    """Is it a run's? Other programs write files of these names too, and export_clip.py a config.json."""
    try:
        return set(keys) <= read_json(path, path.name).keys()
    except (UserError, AttributeError):  # none, or none of a run's form
        return False


def _nothing_trained(output_dir: Path, found: Sequence[str]) -> bool:
    """Was what lies there killed before its first checkpoint, or only looked at by data.check?"""
    of_a_start = set(map(frozen_file, TOWERS))
    if _has_keys(output_dir / "data_check.json", "findings"):
        of_a_start.add("data_check.json")
    if _has_keys(output_dir / "config.json", "data_dir", "dataset_fingerprint"):
        of_a_start |= {"config.json", "splits.json"}
        if _is_of_first_epoch(output_dir / BEST):
            of_a_start.add(BEST)  # it is written before the first latest
    return set(found) <= of_a_start


def refuse_results(output_dir: Path, config: Config) -> None:
    """Raises UserError when the folder holds results that no option says to replace or to continue."""
    check_writable(output_dir)
    found = results_in(output_dir)
    if _nothing_trained(output_dir, found):
        return
    latest = output_dir / LATEST
    if found and not config.overwrite and not resumes_in(output_dir, config):
        hint = f" --resume-from {shlex.quote(str(latest))} to continue it," if latest.exists() else ""
        raise UserError(
            f"--output-dir {output_dir} holds a run's results ({', '.join(found)}); use another folder,"
            f"{hint} or --overwrite to replace it"
        )


def refuse_full_disk(output_dir: Path, model: CLIPModel, config: Config) -> None:
    """Raises UserError when the disk has no room for the checkpoints of the run."""
    sizes = {name: value.numel() * value.element_size() for name, value in model.state_dict().items()}
    frozen = frozen_towers(model)
    once = sum(size for name, size in sizes.items() if name.split(".")[0] in frozen)
    of_use = sum(sizes.values()) - once
    # AdamW holds two numbers for each that is trained
    whole = of_use + 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    left_behind = whole + of_use * config.save_best
    n_runs = config.n_splits if config.use_cv and config.fold is None else 1
    # the last of the folds, at its peak: the latest, the one before, the next, and the next best
    needed = once + n_runs * left_behind + 2 * whole + of_use * config.save_best
    folds = range(1, config.n_splits + 1) if config.fold is None else [config.fold]
    folders = [fold_dir(output_dir, number) for number in folds] if config.use_cv else [output_dir]
    replaced = [folder / name for folder in folders for name in CHECKPOINTS]
    replaced += [output_dir / frozen_file(tower) for tower in frozen]
    stats = [path.stat() for path in replaced if path.exists()]
    needed -= sum({stat.st_ino: stat.st_size for stat in stats}.values())  # two may be one file
    free = shutil.disk_usage(next(p for p in (output_dir, *output_dir.absolute().parents) if p.exists())).free
    if needed > free:
        raise UserError(
            f"--output-dir {output_dir}: checkpoints will need about {needed / 1e6:.0f} MB more there, "
            f"counting the copies kept while they are replaced, and {free / 1e6:.0f} MB are free; make room, "
            "or give a folder on another disk"
        )


def continues(output_dir: Path, config: Config, texts: Mapping[str, Sequence[str]]) -> bool:
    """True when the folder holds this very run or its beginning, False when nothing in it is to be kept.

    Raises UserError, naming what differs, when it holds a run with other options or sentences. The images are
    compared when they are read.
    """
    check_writable(output_dir)
    found = results_in(output_dir)
    if config.overwrite or (set(found) <= {"data_check.json"} and _nothing_trained(output_dir, found)):
        return False
    replace = "clear the folder by hand" if config.fold else "--overwrite"
    if "config.json" not in found:
        raise UserError(
            f"--output-dir {output_dir} holds {', '.join(found)} but no config.json, so it cannot be "
            f"continued; use another folder, or {replace} to replace it"
        )
    stored = read_json(output_dir / "config.json", "the run's config.json")
    differing = [
        f"{shown(name, stored.get(name, FIELDS[name].default))} there, "
        f"{value_of(name, getattr(config, name))} now"
        for name in FIELDS
        # a run of an earlier version lacks options that have come since
        if name not in FREE_ON_CONTINUE and stored.get(name, FIELDS[name].default) != getattr(config, name)
    ]
    if stored.get("class_texts") != texts:
        differing.append("the class sentences have changed")
    if differing and not config.use_cv and _nothing_trained(output_dir, found):
        return False  # of a cross-validation other jobs may be training their first epochs
    if differing:
        raise UserError(
            f"--output-dir {output_dir} holds a run with other options ({'; '.join(differing)}); "
            f"give the same options to continue it, use another folder, or {replace} to replace it"
        )
    return True


def refuse_other_images(output_dir: Path, config: Config, folder: ImageFolder) -> None:
    """Raises UserError when a finished run was made with images of other names than `folder` has: it would be
    passed over without reading any.
    """
    path = output_dir / "splits.json"
    try:
        split = read_json(path, "the run's splits.json", MOST_OF_SPLITS)["folds"][0]
        # with --val-dir the validation images are of another folder
        had = {nfc(name) for name in split["train"] + ([] if config.val_dir else split["val"])}
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{path} is damaged; restore it, or start anew with --overwrite") from None
    have = {nfc(name) for name in folder.paths}
    new, gone = (0 if config.skip_unreadable else len(have - had)), len(had - have)
    if new or gone:
        raise UserError(
            f"{output_dir} is finished, but of the images of --data-dir {new} are new to it and {gone} are "
            "gone; use another --output-dir, or --overwrite to start anew"
        )


def remove_results(output_dir: Path) -> None:
    """Before a finished run goes on: what its last end left would not fit the new weights."""
    for name in ("predictions.csv", "metrics.json", "metrics_table.csv", "metrics_table.tex", "report.html"):
        (output_dir / name).unlink(missing_ok=True)


class InUse(UserError):
    """Another run keeps the folder."""


def _lock(file: TextIO, folder: Path, wait: bool) -> None:
    silent_until = time.monotonic() + (SILENT_SECONDS if wait else 0)
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= silent_until:
                break
            time.sleep(0.1)
    file.seek(0)
    in_use = f"{folder} is in use by another run ({file.read().strip() or 'unknown'})"
    if not wait:
        raise InUse(f"{in_use}; wait for it, or give another --output-dir")
    print(f"note: {in_use}; waiting for it", flush=True)
    fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Make `folder` and keep it for this process; what killed writers left there and in its figures/ is
    removed, so all that is written there, but a remade report, is written within such a block.

    The lock is the system's, which lets go of it however the process ends (Linux, macOS; elsewhere there is
    none). Raises InUse when another process keeps the folder. With `wait` this one waits instead: that is
    for a folder which jobs share, each for a moment. Of the processes of one run the first keeps it.
    """
    if not is_main():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        if fcntl:
            try:
                _lock(file, folder, wait)
            except OSError as error:
                print(f"note: {folder} cannot be locked ({error.strerror}); let no two runs write there")
                yield
                return
            file.truncate(0)
            with contextlib.suppress(OSError):  # a full disk: the run's own files say so better
                os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
            for left_over in (*folder.glob(".*.tmp"), *folder.glob("figures/.*.tmp")):
                left_over.unlink(missing_ok=True)
        yield


def prepare_output_folder(output_dir: Path, overwrite: bool) -> None:
    """Make the folder; with `overwrite` remove the files (and nothing else) that a run wrote there.

    Raises InUse, before anything is removed, when a fold is being trained there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if not overwrite:
        return
    folds = _folds_with((*FOLD_FILES, LOCK), output_dir)  # in its first epoch one holds nothing but its lock
    with contextlib.ExitStack() as stack:
        for fold in folds:
            stack.enter_context(locked(fold))
        files = [output_dir / name for name in RESULT_FILES if (output_dir / name).is_file()]
        for file in files + [fold / name for fold in folds for name in FOLD_FILES]:
            file.unlink(missing_ok=True)
    for fold in folds:
        with contextlib.suppress(OSError):  # it holds something else too
            (fold / LOCK).unlink()
            fold.rmdir()


def run_record(
    config: Config,
    data: DataSet,
    class_texts: Mapping[str, Sequence[str]],
    hardware: Hardware,
    n_parameters: int,
) -> dict[str, Any]:
    """Content of config.json: the options by their JSON keys, then what else made the result."""
    options = dataclasses.asdict(config)
    preset = of_preset(options)
    return {
        **options,
        "changed_options": [
            name
            for name, f in FIELDS.items()
            if name not in FREE_ON_CONTINUE and (options[name] != f.default or name in preset)
        ],
        "classes": list(data.folder.classes),
        "class_texts": {name: list(own) for name, own in class_texts.items()},
        "dataset_fingerprint": data.fingerprint,
        "images_per_class": data.images_per_class(),
        "million_parameters": n_parameters / 1e6,
        "hardware": hardware.description,
        **library_versions(),
    }


def library_versions() -> dict[str, Any]:
    """{"versions", "git_commit"}: with what a result was made."""
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    return {"versions": {"python": platform.python_version(), **versions}, "git_commit": git_commit()}


def print_files(output_dir: Path) -> None:
    figures = ["figures/"] * (output_dir / "figures").is_dir()
    print(f"files in {output_dir}: {', '.join(results_in(output_dir) + figures)}")
    print(f"to look at the result: {output_dir / 'report.html'}")


def print_use(output_dir: Path) -> None:
    command = ["python", "predict_clip.py", "--checkpoint", str(output_dir)]
    print(f"to use the model: {shlex.join(command)} --input IMAGES --output FILE.csv")


def git_commit() -> str | None:
    """Commit of this program, with "-dirty" when files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
