"""Several configurations, one after the other: a folder each, one leaderboard."""

import dataclasses
import gc
import math
import os
import re
import traceback
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.device import gpu_meant
from common.distributed import first_here_first, is_main, n_processes, of_the_first
from common.errors import UserError, all_of, first_line
from common.files import check_writable, read_json, text_cell, write_csv, write_json
from common.run_files import fold_dir, saved_in
from data.scan import ImageFolder
from data.shards import may_run_a_command, scan_images
from evaluation.compare import compare
from evaluation.results import Predictions, read_run_predictions
from evaluation.tables import latex, rounded, tabular, write_latex
from training.begin import refuse_for_processes
from training.build import refuse_unfit
from training.config import Config, as_typed, of_preset
from training.cross_validation import METRICS, mean_std
from training.dataset import check_by_names, sentences_and_notes
from training.failures import explain_failure
from training.options import in_json, layered, make_config, read_config_file, refuse_missing
from training.outputs import (
    FREE_ON_CONTINUE,
    InUse,
    continues,
    locked,
    refuse_other_images,
)
from training.run import train

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
SHOWN = {"val_acc": "val accuracy", "val_balanced_acc": "balanced", "val_macro_f1": "macro-F1"}
COLUMNS = (
    "rank", "entry", "folder", "status", "image_encoder_name", "text_encoder_name", "folds",
    *(f"{key}_{part}" for key in METRICS for part in ("mean", "std_sample")),
    "best_val_acc_mean", "best_val_acc_std_sample",
    "accuracy", "accuracy_low", "accuracy_high", "interval_over", "against_first",
    "million_parameters", "images_per_second", "minutes", "error",
)  # fmt: skip


class _Problems:
    """Of entries, by their numbers. What is wrong for several is said once."""

    def __init__(self):
        self._entries_with: dict[str, list[str]] = {}

    def add(self, number: int, *problems: str) -> None:
        for problem in problems:
            self._entries_with.setdefault(problem, []).append(str(number))

    def refuse(self, where: str = "") -> None:
        """Raises UserError where there is any."""
        if self._entries_with:
            said = self._entries_with.items()
            raise UserError(*(f"{where}entry {', '.join(numbers)}: {what}" for what, numbers in said))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One configuration of --config-file, with the folder its results go to."""

    number: int
    folder: Path
    config: Config


def folder_name(number: int, config: Config, name: str | None) -> str:
    """`01_resnet50_bert-base-chinese`, or `01_NAME`: unique by its number, valid on every file system."""
    if name is None:
        text = Path(config.text_encoder_name).name or config.text_encoder_name
        name = f"{config.image_encoder_name}_{text}"
    name = re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFC", name)).strip("-. ")[:80].rstrip("-. ")
    return f"{number:02d}_{name or 'unnamed'}"


def read_entries(config: Config, typed: Mapping[str, Any]) -> list[Entry]:
    """All entries, checked together. Typed flags win over the file; the file wins over the defaults.

    Raises UserError with each mistake's entry number.
    """
    entries, problems, said = [], _Problems(), set()
    for number, own in enumerate(read_config_file(Path(config.config_file)), 1):
        options = dict(own)
        name = options.pop("name", None)
        fixed = [key for key in _NOT_PER_ENTRY if key in options]
        if fixed:
            problems.add(number, f"{', '.join(fixed)} cannot be set per entry; give it on the command line")
            continue
        if "val_dir" not in typed and may_run_a_command(options.get("val_dir")):
            why = "val_dir may be a command to run or an address; type --val-dir to allow that"
            problems.add(number, why)
            continue
        for key, value in {**of_preset(typed), **typed}.items():
            if key in options and options[key] != value and key not in said:
                said.add(key)
                of = "" if key in typed else f" by --preset {typed['preset']}"
                print(
                    f"note: {as_typed(key, value)}{of} on the command line wins over "
                    f"{in_json(options[key])} in the file"
                )
        of_this_run = {"multi_config": False, "config_file": None, "config_index": None}
        try:
            own = make_config({**layered(options, typed), **of_this_run})
            folder = Path(config.output_dir) / folder_name(number, own, name)
            entry = Entry(number, folder, dataclasses.replace(own, output_dir=str(folder)))
            to_train = config.config_index in (None, number) and (own.overwrite or not is_finished(entry))
            all_of(
                partial(refuse_for_processes, own),
                partial(refuse_missing, own, weights=to_train and (own.overwrite or not saved_in(folder))),
                partial(_refuse_pipes, own),
                *([partial(gpu_meant, own.gpu_id), partial(refuse_unfit, own)] if to_train else []),
            )
            entries.append(entry)
        except UserError as error:
            problems.add(number, *error.problems)
    problems.refuse(f"--config-file {config.config_file}, ")
    return entries


def train_entries(config: Config, typed: Mapping[str, Any]) -> int:
    """Train every entry that is not finished, or `config.config_index` alone. One that fails is reported
    and the others run.

    Returns 0, or 1 when an entry failed. The leaderboard is made from what the entries' folders hold,
    after every entry, so that entries may also run as separate jobs.
    """
    output_dir = Path(config.output_dir)
    all_of(
        partial(check_writable, output_dir),
        partial(refuse_missing, config, weights=False),
        partial(_refuse_pipes, config),
    )
    entries = read_entries(config, typed)
    if config.config_index is not None and config.config_index > len(entries):
        raise UserError(
            f"--config-index {config.config_index}: {config.config_file} has {len(entries)} entries"
        )
    chosen = [entry for entry in entries if config.config_index in (None, entry.number)]
    # every folder is looked at before the first entry starts
    with first_here_first():  # the others find the shards fetched
        images = scan_images(config.data_dir, cache_dir=config.cache_dir)
    texts = [sentences_and_notes(entry.config, images)[0] for entry in chosen]
    begun, problems = [], []
    for entry, own in zip(chosen, texts, strict=True):
        try:
            begun.append(continues(entry.folder, entry.config, own))
            if begun[-1] and is_finished(entry):
                refuse_other_images(entry.folder, entry.config, images)
        except UserError as error:
            problems += [f"entry {entry.number}: {problem}" for problem in error.problems]
    if problems:
        alone = ["--overwrite replaces all entries; with --config-index N it replaces entry N alone"]
        raise UserError(*problems, *(alone if n_processes() == 1 else []))
    to_train = [entry for entry, on in zip(chosen, begun, strict=True) if not (on and is_finished(entry))]
    _refuse_by_names(to_train, images)
    failed = []
    for entry, going_on in zip(chosen, begun, strict=True):
        print(f"\n=== configuration {entry.number} of {len(entries)}: {entry.folder.name}", flush=True)
        if of_the_first(going_on and is_finished(entry)):  # which may still be writing the entry before
            print("finished already")
        elif not _train_entry(entry, going_on):
            failed.append(entry.folder.name)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if is_main():
            with locked(output_dir, wait=True):  # jobs of other entries may be ending too
                ranked = write_leaderboard(output_dir, entries)
    if is_main():
        print_leaderboard(ranked, output_dir)
    if failed:
        print(
            f"failed: {', '.join(failed)}; the same command again tries them anew and skips the finished ones"
        )
    return 1 if failed else 0


def _refuse_by_names(entries: Sequence[Entry], images: ImageFolder) -> None:
    """As `check_by_names`, of each entry."""
    problems = _Problems()
    for entry in entries:
        try:
            check_by_names(entry.config, images)
        except UserError as error:
            problems.add(entry.number, *error.problems)
    problems.refuse()


def _refuse_pipes(config: Config) -> None:
    paths = {name: getattr(config, name) for name in ("class_texts_file", "groups_file")}
    problems = [
        f"{as_typed(name, path)} is a pipe, which can be read only once, and a comparison reads it several "
        "times; save it as a file"
        for name, path in paths.items()
        if path and os.path.exists(path) and Path(path).is_fifo()
    ]
    if problems:
        raise UserError(*problems)


def is_finished(entry: Entry) -> bool:
    return (entry.folder / "report.html").exists()  # the last file that a run writes


def _train_entry(entry: Entry, begun: bool) -> bool:
    """Train one entry, from its last checkpoint where it has one. False: it failed, and failure.json says
    why.
    """
    config, typed = entry.config, {}
    failure = entry.folder / FAILURE
    if is_main():
        failure.unlink(missing_ok=True)
    if not config.use_cv and begun:
        saved = saved_in(entry.folder)
        # killed before its first checkpoint: nothing is lost by starting anew
        change = {"resume_from": str(saved)} if saved else {"overwrite": True}
        config = dataclasses.replace(config, **change)
        # --val-dir too: an address or a command was typed, else the entry would have been refused
        mine = {"val_dir", *FREE_ON_CONTINUE} - {"resume_from", "overwrite"}
        typed = {key: getattr(config, key) for key in mine}
    if n_processes() > 1:  # of which one may have failed alone, so the others could not go on
        train(config, typed)
        return True
    try:
        train(config, typed)
    except InUse as error:  # whoever trains it will say how it ends
        print(f"configuration {entry.number} failed: {error}", flush=True)
        return False
    except UserError as error:
        message = "; ".join(error.problems)
    except Exception as error:  # an entry must not take the others with it
        message = explain_failure(error, config)
        if message is None:
            message = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    else:
        failure.unlink(missing_ok=True)  # of a second command, which was refused meanwhile
        return True
    print(f"configuration {entry.number} failed: {message}", flush=True)
    entry.folder.mkdir(parents=True, exist_ok=True)
    write_json(failure, {"error": message})
    return False


def status_of(entry: Entry) -> str:
    if (entry.folder / FAILURE).exists():
        return "failed"
    return "finished" if is_finished(entry) else "not finished"


def leaderboard_row(entry: Entry) -> tuple[dict[str, Any], Predictions | None]:
    """One row, and the predictions behind it where the entry is finished.

    A finished entry whose folder lacks something is a failed one: it must not take the others' rows with it.
    """
    config = entry.config
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {
        "entry": entry.number,
        "folder": entry.folder.name,
        "status": status_of(entry),
        "image_encoder_name": config.image_encoder_name,
        "text_encoder_name": config.text_encoder_name,
        "folds": config.n_splits if config.use_cv else 1,
    }
    try:
        if row["status"] == "finished":
            return row | _results(entry), read_run_predictions(entry.folder)
        if row["status"] == "failed":
            row["error"] = str(read_json(entry.folder / FAILURE, "the entry's failure.json")["error"])
    except UserError as error:
        row |= {"status": "failed", "error": "; ".join(error.problems)}
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        what = f"its results are damaged ({type(error).__name__}: {first_line(error)})"
        mend = f"restore them, or --overwrite with --config-index {entry.number}"
        row |= {"status": "failed", "error": f"{what}; {mend}"}
    return row, None


def _results(entry: Entry) -> dict[str, Any]:
    """Last-epoch results as mean and sample std over folds (null for a single run), and what they cost."""
    folders = (
        [fold_dir(entry.folder, k) for k in range(1, entry.config.n_splits + 1)]
        if entry.config.use_cv
        else [entry.folder]
    )
    histories = [read_json(folder / "history.json", "the entry's history.json") for folder in folders]
    record = read_json(entry.folder / "config.json", "the entry's config.json")
    metrics = read_json(entry.folder / "metrics.json", "the entry's metrics.json")
    accuracy = metrics["accuracy"]
    columns = {key: [history[key][-1] for history in histories] for key in METRICS}
    columns["best_val_acc"] = [max(history["val_acc"]) for history in histories]
    speeds = [speed for history in histories for speed in history["images_per_second"]]
    return {
        **{f"{key}_mean": float(np.mean(values)) for key, values in columns.items()},
        **{
            f"{key}_std_sample": mean_std(values)["std_sample"] if len(values) > 1 else None
            for key, values in columns.items()
        },
        "accuracy": 100 * accuracy["value"],
        "accuracy_low": 100 * accuracy["low"],
        "accuracy_high": 100 * accuracy["high"],
        "interval_over": f"{metrics['interval']['unit']}s",
        "million_parameters": record["million_parameters"],
        "images_per_second": len(speeds) / math.fsum(1 / speed for speed in speeds),
        "minutes": math.fsum(s for history in histories for s in history["epoch_seconds"]) / 60,
    }


def write_leaderboard(output_dir: Path, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Rank by mean validation accuracy of the last epoch, failures last, and test each pair of entries that
    predicted the same images. Writes leaderboard.json, .csv and .tex, and comparison.json.
    """
    while True:
        statuses = [status_of(entry) for entry in entries]
        ranked, comparison = _rank([leaderboard_row(entry) for entry in entries])
        write_json(output_dir / "leaderboard.json", ranked)
        cells = [[row[column] for column in COLUMNS] for row in ranked]
        cells = [[text_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in cells]
        write_csv(output_dir / "leaderboard.csv", COLUMNS, cells)
        write_json(output_dir / "comparison.json", comparison)
        write_latex(output_dir / "leaderboard.tex", *leaderboard_table(ranked))
        if statuses == [status_of(entry) for entry in entries]:
            return ranked
        # another job finished meanwhile: its leaderboard may have been overwritten by this older one


def _rank(
    rows: Sequence[tuple[dict[str, Any], Predictions | None]],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows in order, with rank and against_first; and the content of comparison.json."""
    ranked = sorted(rows, key=lambda row: (row[1] is None, -(row[0]["val_acc_mean"] or 0)))
    finished = {row["folder"]: predictions for row, predictions in ranked if predictions is not None}
    comparison = compare(finished)
    against_first = {
        pair["b"]: _verdict(pair) for pair in comparison["pairs"] if pair["a"] == next(iter(finished))
    }
    for rank, (row, predictions) in enumerate(ranked, 1):
        if predictions is not None:
            row["rank"] = rank
            row["against_first"] = "first" if rank == 1 else against_first.get(row["folder"], "other images")
    return [row for row, _ in ranked], comparison


def _verdict(pair: Mapping[str, Any]) -> str:
    """On b against a. Ranks go by the mean of folds, the test by all images, so that they may disagree."""
    if not pair["beyond_noise"]:
        return "within noise"
    return f"{'worse' if pair['difference']['accuracy']['value'] > 0 else 'better'} beyond noise"


def leaderboard_table(ranked: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The finished entries as a booktabs table, and what its numbers are, in LaTeX."""
    finished = [row for row in ranked if row["status"] == "finished"]
    over = " or ".join(sorted({row["interval_over"] for row in finished}))
    rows = [
        [
            row["folder"],
            *(_mean_std(row, key) for key in SHOWN),
            "{} ({} to {})".format(*(rounded(row[f"accuracy{side}"]) for side in ("", "_low", "_high"))),
            row["against_first"],
            f"{row['million_parameters']:.1f}",
        ]
        for row in finished
    ]
    columns = ["Accuracy on all images (%)", "Against the first", "Million parameters"]
    header = ["Configuration", *(f"{title} (%)" for title in SHOWN.values()), *columns]
    note = (
        "Last epoch; of a cross-validation mean ± sample standard deviation over folds. All images: those "
        f"validated in any fold, with the 95 % interval over {over}. Beyond noise: McNemar's p after Holm is "
        "below 0.05 and the paired bootstrap's 95 % interval excludes 0."
    )
    return tabular(header, rows), latex(note) if finished else ""


def _mean_std(row: Mapping[str, Any], key: str) -> str:
    std = row[f"{key}_std_sample"]
    return f"{row[f'{key}_mean']:.2f}" + (f" ± {std:.2f}" if std is not None else "")


def print_leaderboard(ranked: Sequence[Mapping[str, Any]], output_dir: Path) -> None:
    over_folds = any(row["val_acc_std_sample"] is not None for row in ranked)
    print(f"\nlast epoch{', mean ± sample standard deviation over folds' * over_folds}, percent")
    print(
        f"{'rank':>4}  "
        + "  ".join(f"{title:>14}" for title in SHOWN.values())
        + f"  {'M par.':>7}  {'img/s':>6}  {'min':>6}  folder: against the first"
    )
    for row in ranked:
        if row["status"] != "finished":
            why = f": {row['error'].splitlines()[0]}" if row["error"] else ""
            print(f"{'-':>4}  {row['folder']}: {row['status']}{why}")
            continue
        minutes = f"{row['minutes']:.1f}" if row["minutes"] >= 0.05 else "<0.1"
        print(
            f"{row['rank']:>4}  "
            + "  ".join(f"{_mean_std(row, key):>14}" for key in SHOWN)
            + f"  {row['million_parameters']:7.1f}  {row['images_per_second']:6.0f}  {minutes:>6}  "
            + f"{row['folder']}: {row['against_first']}"
        )
    if sum(row["status"] == "finished" for row in ranked) > 1:
        print(
            "noise: McNemar's test (Holm) and the bootstrap of the accuracy's difference, see comparison.json"
        )
    print(
        f"files in {output_dir}: leaderboard.json, leaderboard.csv, leaderboard.tex, comparison.json, and a "
        "folder per configuration"
    )
