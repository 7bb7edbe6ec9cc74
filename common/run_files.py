"""The files of a run that several packages know by name, and the checkpoints that a path stands for."""

import re
from pathlib import Path

from common.errors import UserError
from common.files import check_writable

LATEST, PREVIOUS, BEST = "checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
PREDICTIONS = "predictions.csv"  # written last in a fold's folder: where it is, the fold is finished
KNOWN_IMAGES = "known_images.csv"  # of an evaluation: the images that the model was made with


def fold_dir(run: Path, number: int) -> Path:
    return run / f"fold_{number}"


def fold_number(folder: Path) -> int | None:
    """Of which fold the folder is, by its name; None where it is of none."""
    found = re.fullmatch(r"fold_(\d+)", folder.name)
    return int(found[1]) if found else None


def saved_in(run_dir: Path) -> Path | None:
    """The checkpoint to go on from, though it may be gone and only the one before it be there; None where
    nothing was saved.
    """
    return run_dir / LATEST if any((run_dir / name).exists() for name in (LATEST, PREVIOUS)) else None


def frozen_file(tower: str) -> str:
    """The name of the file of a tower that does not change: one for a run, or for all folds together."""
    return f"frozen_{tower}.pth"


def frozen_beside(checkpoint: Path, tower: str) -> Path:
    """That file of a checkpoint: beside it, or one folder above; it need not exist."""
    beside, above = (folder / frozen_file(tower) for folder in (checkpoint.parent, checkpoint.parent.parent))
    return beside if beside.is_file() or not above.is_file() else above


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints that `path` stands for: the file itself, a run's checkpoint_latest.pth (the last
    epoch, whose numbers were not chosen), or one of each fold of a cross-validation, in the folds' order.

    Raises UserError when there is none, or when a fold is not finished.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--checkpoint {path} does not exist; give a run's folder or a checkpoint file")
    folds = sorted((number, p) for p in path.iterdir() if (number := fold_number(p)) is not None)
    if folds:
        unfinished = [p.name for _, p in folds if not (p / PREDICTIONS).exists()]
        if unfinished or not (path / "cv_summary.json").exists():
            raise UserError(
                f"--checkpoint {path} is a cross-validation that is not finished "
                f"({', '.join(unfinished) or 'folds are missing'}); finish it with the same command, or give "
                "the folders of single folds"
            )
        return [p / LATEST for _, p in folds]
    if (path / LATEST).exists():
        return [path / LATEST]
    runs = sorted(p.name for p in path.iterdir() if (p / "config.json").exists())
    hint = f"one of its runs: {', '.join(runs[:10])}" if runs else "the folder of a finished run"
    if (path / BEST).exists():
        hint = f"{path / BEST}, the model of its best epoch"
    raise UserError(f"--checkpoint {path} holds no {LATEST}; give {hint}")


def refuse_output_dir(folder: Path) -> None:
    """Raises UserError where nothing can be written, and where a run or a cross-validation has written: other
    programs would replace its config.json, or remove its model.
    """
    check_writable(folder)
    of_runs = ("checkpoint_*", "frozen_*", "history.json", "splits.json", "cv_summary.json")
    found = [path.name for name in of_runs for part in ("", "fold_*/") for path in folder.glob(part + name)]
    if found:
        raise UserError(
            f"--output-dir {folder} is the folder of a run (it holds {found[0]}), whose files are not "
            "replaced; give a folder of its own"
        )
