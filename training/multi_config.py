"""Several configurations, one after the other: a folder each, one leaderboard."""

import dataclasses
import gc
import math
import re
import traceback
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.files import read_json, write_json
from models.clip import check_image_encoder
from training.config import Config, flag_of, make_config, read_config_file
from training.cross_validation import METRICS, mean_std
from training.device import explain_failure
from training.outputs import check_writable, continues, write_csv
from training.run import train
from training.state import EarlyStopping

_NOT_PER_ENTRY = (
    "data_dir",
    "output_dir",
    "multi_config",
    "config_file",
    "resume_from",
    "overwrite",
    "fold",
    "config_index",
)
FAILURE = "failure.json"
COLUMNS = (
    "rank", "entry", "folder", "status", "image_encoder_name", "text_encoder_name", "folds",
    *(f"{key}_{part}" for key in METRICS for part in ("mean", "std_sample")),
    "best_val_acc_mean", "best_val_acc_std_sample",
    "million_parameters", "images_per_second", "minutes", "error",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """One configuration of --config-file, with the folder its results go to."""

    number: int
    folder: Path
    config: Config


def folder_name(number: int, options: Mapping[str, Any], name: str | None) -> str:
    """`01_resnet50_bert-base-chinese`, or `01_NAME`: unique by its number, valid on every file system."""
    if name is None:
        text = Path(options["text_encoder_name"]).name or options["text_encoder_name"]
        name = f"{options['image_encoder_name']}_{text}"
    name = re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFC", name)).strip("-. ")[:80]
    return f"{number:02d}_{name}"


def read_entries(config: Config, typed: Mapping[str, Any]) -> list[Entry]:
    """All entries, checked together. Typed flags win over the file; the file wins over the defaults.

    Raises UserError with each mistake's entry number.
    """
    entries, problems, said = [], [], set()
    for number, own in enumerate(read_config_file(Path(config.config_file)), 1):
        options = dict(own)
        name = options.pop("name", None)
        fixed = [key for key in _NOT_PER_ENTRY if key in options]
        if fixed:
            problems.append(
                f"entry {number}: {', '.join(fixed)} cannot be set per entry; give it on the command line"
            )
            continue
        for key, value in typed.items():
            if key in options and options[key] != value and key not in said:
                said.add(key)
                print(
                    f"note: {flag_of(key)} {value} on the command line wins over {options[key]} in the file"
                )
        merged = {**dataclasses.asdict(Config()), **options, **typed}
        folder = Path(config.output_dir) / folder_name(number, merged, name)
        merged |= {
            "output_dir": str(folder),
            "multi_config": False,
            "config_file": None,
            "config_index": None,
        }
        try:
            entries.append(Entry(number, folder, make_config(merged)))
            check_image_encoder(merged["image_encoder_name"])
        except UserError as error:
            problems += [f"entry {number}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*(f"--config-file {config.config_file}, {problem}" for problem in problems))
    return entries


def train_entries(config: Config, typed: Mapping[str, Any]) -> int:
    """Train every entry that is not finished, or `config.config_index` alone. One that fails is reported
    and the others run.

    Returns 0, or 1 when an entry failed. The leaderboard is made from what the entries' folders hold,
    after every entry, so that entries may also run as separate jobs.
    """
    output_dir = Path(config.output_dir)
    check_writable(output_dir)
    entries = read_entries(config, typed)
    if config.config_index is not None and config.config_index > len(entries):
        raise UserError(
            f"--config-index {config.config_index}: {config.config_file} has {len(entries)} entries"
        )
    chosen = [entry for entry in entries if config.config_index in (None, entry.number)]
    # every folder is looked at before the first entry starts
    begun = [continues(entry.folder, entry.config) for entry in chosen]
    failed = []
    for entry, going_on in zip(chosen, begun, strict=True):
        print(f"\n=== configuration {entry.number} of {len(entries)}: {entry.folder.name}", flush=True)
        if going_on and is_finished(entry):
            print("finished already")
        elif not _train_entry(entry, going_on):
            failed.append(entry.folder.name)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        ranked = write_leaderboard(output_dir, [leaderboard_row(entry) for entry in entries])
    print_leaderboard(ranked, output_dir)
    if failed:
        print(
            f"failed: {', '.join(failed)}; the same command again tries them anew and skips the finished ones"
        )
    return 1 if failed else 0


def is_finished(entry: Entry) -> bool:
    if entry.config.use_cv:
        return (entry.folder / "cv_summary.json").exists()
    history_file = entry.folder / "history.json"
    if not history_file.exists():
        return False
    history = read_json(history_file, "the entry's history.json")
    stopping = EarlyStopping(
        entry.config.early_stopping_monitor,
        entry.config.early_stopping_patience,
        entry.config.early_stopping_min_delta,
    )
    stopped = any(stopping.update(value) for value in history[stopping.monitor])
    return stopped or len(history["val_acc"]) >= entry.config.epochs


def _train_entry(entry: Entry, begun: bool) -> bool:
    """Train one entry, from its last checkpoint where it has one. False: it failed, and failure.json says
    why.
    """
    config, typed = entry.config, {}
    failure = entry.folder / FAILURE
    failure.unlink(missing_ok=True)
    latest = entry.folder / "checkpoint_latest.pth"
    if not config.use_cv and begun:
        # killed before its first checkpoint: nothing is lost by starting anew
        change = {"resume_from": str(latest)} if latest.exists() else {"overwrite": True}
        config = dataclasses.replace(config, **change)
        typed = {key: getattr(config, key) for key in ("data_dir", "output_dir", "gpu_id", "num_workers")}
    try:
        train(config, typed)
    except UserError as error:
        message = "; ".join(error.problems)
    except Exception as error:  # an entry must not take the others with it
        message = explain_failure(error, config)
        if message is None:
            message = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    else:
        return True
    print(f"configuration {entry.number} failed: {message}", flush=True)
    entry.folder.mkdir(parents=True, exist_ok=True)
    write_json(failure, {"error": message})
    return False


def leaderboard_row(entry: Entry) -> dict[str, Any]:
    """One row: last-epoch results as mean and sample std over folds (std null for a single run)."""
    failure = entry.folder / FAILURE
    error = read_json(failure, "the entry's failure.json")["error"] if failure.exists() else None
    status = "failed" if error else "finished" if is_finished(entry) else "not finished"
    config = entry.config
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {
        "entry": entry.number,
        "folder": entry.folder.name,
        "status": status,
        "image_encoder_name": config.image_encoder_name,
        "text_encoder_name": config.text_encoder_name,
        "folds": config.n_splits if config.use_cv else 1,
        "error": error,
    }
    if status != "finished":
        return row
    folders = (
        [entry.folder / f"fold_{k}" for k in range(1, config.n_splits + 1)]
        if config.use_cv
        else [entry.folder]
    )
    histories = [read_json(folder / "history.json", "the entry's history.json") for folder in folders]
    columns = {key: [history[key][-1] for history in histories] for key in METRICS}
    columns["best_val_acc"] = [max(history["val_acc"]) for history in histories]
    for key, values in columns.items():
        row[f"{key}_mean"] = float(np.mean(values))
        row[f"{key}_std_sample"] = mean_std(values)["std_sample"] if len(values) > 1 else None
    speeds = [speed for history in histories for speed in history["images_per_second"]]
    row["images_per_second"] = len(speeds) / math.fsum(1 / speed for speed in speeds)
    row["minutes"] = math.fsum(s for history in histories for s in history["epoch_seconds"]) / 60
    checkpoint = torch.load(
        folders[0] / "checkpoint_latest.pth", map_location="meta", weights_only=True, mmap=True
    )
    names = [
        name for name in checkpoint["model"] if not name.endswith(("running_mean", "running_var", "_tracked"))
    ]
    row["million_parameters"] = sum(checkpoint["model"][name].numel() for name in names) / 1e6
    return row


def write_leaderboard(output_dir: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rank by mean validation accuracy of the last epoch, failures last; write JSON and CSV."""
    ranked = [
        dict(row)
        for row in sorted(rows, key=lambda row: (row["status"] != "finished", -(row["val_acc_mean"] or 0)))
    ]
    for rank, row in enumerate(ranked, 1):
        row["rank"] = rank if row["status"] == "finished" else None
    write_json(output_dir / "leaderboard.json", ranked)
    write_csv(
        output_dir / "leaderboard.csv", COLUMNS, [[row[column] for column in COLUMNS] for row in ranked]
    )
    return ranked


def print_leaderboard(ranked: Sequence[Mapping[str, Any]], output_dir: Path) -> None:
    print("\nlast epoch, mean ± sample standard deviation over folds, percent")
    print(
        f"{'rank':>4}  {'val accuracy':>14}  {'balanced':>14}  {'macro-F1':>14}  {'M par.':>7}  "
        f"{'img/s':>6}  {'min':>6}  folder"
    )
    for row in ranked:
        if row["status"] != "finished":
            print(
                f"{'-':>4}  {row['folder']}: {row['status']}"
                + (f": {row['error'][:120]}" if row["error"] else "")
            )
            continue
        cells = []
        for key in ("val_acc", "val_balanced_acc", "val_macro_f1"):
            std = row[f"{key}_std_sample"]
            cells.append(f"{row[f'{key}_mean']:.2f}" + (f" ± {std:.2f}" if std is not None else ""))
        print(
            f"{row['rank']:>4}  "
            + "  ".join(f"{cell:>14}" for cell in cells)
            + f"  {row['million_parameters']:7.1f}  {row['images_per_second']:6.0f}  {row['minutes']:6.1f}  "
            + row["folder"]
        )
    print(f"files in {output_dir}: leaderboard.json, leaderboard.csv, and a folder per configuration")
