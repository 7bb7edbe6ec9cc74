"""How far several configurations are, how they rank, and what tells two of them apart."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, first_line
from common.files import read_json, text_cell, write_csv, write_json
from common.run_files import fold_dir
from evaluation.compare import compare
from evaluation.results import Predictions, read_run_predictions
from evaluation.tables import latex, rounded, tabular, write_latex
from training.config import Config
from training.cross_validation import METRICS, mean_std

FAILURE = "failure.json"
SHOWN = {"val_acc": "val accuracy", "val_balanced_acc": "balanced", "val_macro_f1": "macro-F1"}
COLUMNS = (
    "rank", "entry", "folder", "status", "image_encoder_name", "text_encoder_name", "folds",
    *(f"{key}_{part}" for key in METRICS for part in ("mean", "std_sample")),
    "best_val_acc_mean", "best_val_acc_std_sample",
    "accuracy", "accuracy_low", "accuracy_high", "interval_over", "against_first",
    "million_parameters", "images_per_second", "minutes", "error",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """One configuration of --config-file, with the folder its results go to."""

    number: int
    folder: Path
    config: Config


def is_finished(entry: Entry) -> bool:
    return (entry.folder / "report.html").exists()  # the last file that a run writes


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
