"""Labelled predictions as a file: the one form in which runs, folds and evaluations keep them."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import lines_of, text_cell, text_of_cell, write_csv, write_json
from evaluation.metrics import full_metrics
from evaluation.tables import OVERALL, value_and_interval, why_missing, write_metrics_tables

COLUMNS = ("path", "label", "fold", "prediction", "group")


@dataclass(frozen=True)
class Predictions:
    """Probabilities (N, C) of N images whose class is known.

    paths: relative to the data folder. labels (N,): indices into classes. folds (N,): number of the fold that
    predicted each image, or None. groups (N,): images of one patient share a number, or None where unknown.
    """

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: np.ndarray
    probs: np.ndarray
    folds: np.ndarray | None = None
    groups: np.ndarray | None = None

    def metrics(self) -> dict[str, Any]:
        """Content of metrics.json, see evaluation.metrics. Temperatures are cross-fitted over the folds."""
        return full_metrics(self.probs, self.labels, self.classes, groups=self.groups, parts=self.folds)

    def write(self, path: Path) -> None:
        """One row per image: path, label, fold, prediction, group, one probability per class."""

        def cells(values: np.ndarray | None) -> list[Any]:
            return [""] * len(self.paths) if values is None else values.tolist()

        labels, predicted = (
            [text_cell(self.classes[i]) for i in which] for which in (self.labels, self.probs.argmax(1))
        )
        paths = map(text_cell, self.paths)
        columns = (paths, labels, cells(self.folds), predicted, cells(self.groups), self.probs.tolist())
        rows = [[*row, *map(repr, probs)] for *row, probs in zip(*columns, strict=True)]
        write_csv(path, [*COLUMNS, *(f"prob_{name}" for name in self.classes)], rows)


def read_predictions(path: Path) -> Predictions:
    """What `Predictions.write` wrote, to the last bit. Raises UserError for any other file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(lines_of(file, str(path)))
        if tuple(header[: len(COLUMNS)]) != COLUMNS:
            raise ValueError(f"its first columns are {', '.join(header[: len(COLUMNS)])}")
        classes = tuple(name.removeprefix("prob_") for name in header[len(COLUMNS) :])
        paths, labels, folds, _, groups, *probs = zip(*rows, strict=True)
        index = {name: i for i, name in enumerate(classes)}
        return Predictions(
            classes,
            tuple(map(text_of_cell, paths)),
            np.array([index[text_of_cell(name)] for name in labels]),
            np.array(probs, np.float64).T,
            np.array(folds, np.int64) if folds[0] else None,
            np.array(groups, np.int64) if groups[0] else None,
        )
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except KeyError as error:
        wrong = f"it has no column prob_{error.args[0]}"
        raise UserError(f"{path} holds no predictions of this program: {wrong}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} holds no predictions of this program: {error}") from None


def read_run_predictions(run_dir: Path) -> Predictions:
    """What a run says of its validation images: out of fold for a cross-validation, else its last epoch."""
    oof = run_dir / "oof_predictions.csv"
    return read_predictions(oof if oof.exists() else run_dir / "predictions.csv")


def write_results(output_dir: Path, predictions: Predictions, name: str) -> dict[str, Any]:
    """Write the predictions as `name`, metrics.json, metrics_table.csv and .tex. Returns the metrics."""
    predictions.write(output_dir / name)
    metrics = predictions.metrics()
    write_json(output_dir / "metrics.json", metrics)
    write_metrics_tables(output_dir, metrics)
    return metrics


def headline(metrics: Mapping[str, Any]) -> str:
    """The few numbers a person wants first, with their intervals."""
    shown = ("accuracy", "balanced_accuracy", "macro_f1", "macro_roc_auc")
    cells = []
    for key in shown:
        name = OVERALL[key].removesuffix(" (%)")
        value, interval = value_and_interval(metrics[key], OVERALL[key])
        cells.append(f"{name[0].lower()}{name[1:]} {value}{f' ({interval})' if interval else ''}")
    missing, _ = why_missing(metrics[key] for key in shown)
    about = f"95 % intervals over {metrics['interval']['unit']}s"
    return f"{', '.join(cells)} ({'. '.join(filter(None, [about, missing]))})"
