"""Scores, paired differences and tables of benchmarks.accuracy, from the predictions of its runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.floor import table
from common.files import write_json, write_whole
from data.scan import nfc
from evaluation.compare import MEASURES, compare, holm
from evaluation.intervals import bootstrap_weights, percentile_interval
from evaluation.metrics import WeightedMetrics
from evaluation.results import Predictions

RESAMPLES = 2000
TITLES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1",
    "macro_roc_auc": "macro-AUC",
}  # fmt: skip


@dataclass(frozen=True)
class FoldResult:
    """What one recipe says of the validation images of one fold. n_train: images that it was trained on."""

    seed: int
    fold: int
    predictions: Predictions
    n_train: int
    minutes: float


Results = Mapping[str, Sequence[FoldResult]]


def stacked(runs: Sequence[FoldResult]) -> Predictions:
    """All of them as one, each seed's images under names of their own. groups: the patient, or the image
    where patients are not known, by the same number for all seeds.
    """
    parts = [run.predictions for run in runs]
    names = [f"{run.seed}/{path}" for run in runs for path in run.predictions.paths]
    units = np.unique([nfc(path) for part in parts for path in part.paths], return_inverse=True)[1]
    if all(part.groups is not None for part in parts):
        units = np.concatenate([part.groups for part in parts])
    labels, probs = (np.concatenate([getattr(part, key) for part in parts]) for key in ("labels", "probs"))
    return Predictions(parts[0].classes, tuple(names), labels, probs, groups=units)


def measures(predictions: Predictions) -> dict[str, np.ndarray]:
    """Fractions by the keys of WeightedMetrics: (1,) each, those of the classes (1, C)."""
    return WeightedMetrics(predictions.probs, predictions.labels)(np.ones((1, len(predictions.labels))))


def corrected_t(differences: np.ndarray, val_over_train: float) -> float | None:
    """Two-sided p of paired differences (n,) of folds and seeds; None for a single one.

    Nadeau & Bengio 2003, "Inference for the generalization error": training sets of folds overlap, so the
    variance of the mean is taken for (1 / n + n_val / n_train) times that of the differences, not 1 / n.
    """
    n = len(differences)
    if n < 2:
        return None
    error = np.sqrt(differences.var(ddof=1) * (1 / n + val_over_train))
    if error < 1e-12:  # two folds that differ alike by chance do not make it certain
        return 1.0
    return float(2 * student.sf(abs(differences.mean()) / error, n - 1))


def summary_of(runs: Sequence[FoldResult]) -> dict[str, Any]:
    """Of one recipe, in percent: mean and sample std over its folds and seeds, and of all its predictions
    together the value with the 95 % interval of a bootstrap over patients or images.
    """
    everything, each = stacked(runs), [measures(run.predictions) for run in runs]
    units = np.unique(everything.groups, return_inverse=True)[1]
    metrics = WeightedMetrics(everything.probs, everything.labels)
    chunks = [metrics(weights) for weights in bootstrap_weights(units, RESAMPLES, seed=0)]
    whole = measures(everything)

    def entry(key: str, column: int = 0) -> dict[str, float | None]:
        def of(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
            return 100 * metrics[key].reshape(len(metrics["accuracy"]), -1)[:, column]

        of_folds = np.concatenate([of(one) for one in each])
        of_folds = of_folds[~np.isnan(of_folds)]  # a fold without the class says nothing of it
        low, high = percentile_interval(np.concatenate([of(chunk) for chunk in chunks])) or (None, None)
        return {
            "mean": float(of_folds.mean()) if len(of_folds) else None,
            "std_sample": float(of_folds.std(ddof=1)) if len(of_folds) > 1 else None,
            "value": float(of(whole)[0]) if len(of_folds) else None,
            "low": low,
            "high": high,
        }

    recalls = {name: entry("sensitivity", c) for c, name in enumerate(everything.classes)}
    return {
        "n": len(runs),
        "runs": [[run.seed, run.fold] for run in runs],
        **{key: entry(key) for key in TITLES},
        "recall": recalls,
        "minutes_per_fold": float(np.mean([run.minutes for run in runs])),
    }


def against(first: str, results: Results) -> list[dict[str, Any]]:
    """For every recipe but `first`, on the folds and seeds that both have: recipe - first in percentage
    points, the paired bootstrap's interval, the corrected t-test's p and what Holm makes of it, by measure.
    """
    reference = {(run.seed, run.fold): run for run in results.get(first, ())}
    rows = []
    for name, runs in results.items():
        own = [run for run in runs if (run.seed, run.fold) in reference]
        if name == first or not own:
            continue
        paired = [reference[run.seed, run.fold] for run in own]
        compared = compare({name: stacked(own), first: stacked(paired)}, resamples=RESAMPLES)["pairs"][0]
        ratio = float(np.mean([len(run.predictions.labels) / run.n_train for run in own]))
        row = {"recipe": name, "against": first, "n": len(own)}
        row |= {key: compared[key] for key in ("only_a_right", "only_b_right", "mcnemar_p")}
        for key in MEASURES:
            difference = [
                100 * (measures(a.predictions)[key][0] - measures(b.predictions)[key][0])
                for a, b in zip(own, paired, strict=True)
            ]
            bounds = {k: None if v is None else 100 * v for k, v in compared["difference"][key].items()}
            row[key] = {**bounds, "of_folds": difference, "p": corrected_t(np.array(difference), ratio)}
        rows.append(row)
    for key in MEASURES:
        tested = [row[key] for row in rows if row[key]["p"] is not None]
        for entry, p in zip(tested, holm([entry["p"] for entry in tested]), strict=True):
            clear = entry["low"] is not None and (entry["low"] > 0 or entry["high"] < 0)
            entry |= {"p_holm": p, "beyond_noise": bool(clear and p < 0.05)}
    return rows


def _score(entry: Mapping[str, Any]) -> str:
    if entry["mean"] is None:
        return "–"
    spread = "" if entry["std_sample"] is None else f" ± {entry['std_sample']:.1f}"
    interval = "" if entry["low"] is None else f" ({entry['low']:.1f} to {entry['high']:.1f})"
    return f"{entry['mean']:.1f}{spread}{interval}"


def _difference(entry: Mapping[str, Any]) -> str:
    interval = "" if entry["low"] is None else f" ({entry['low']:+.1f} to {entry['high']:+.1f})"
    p = "" if entry["p"] is None else f", p {entry['p_holm']:.2g}"
    cell = f"{entry['value']:+.1f}{interval}{p}"
    return f"**{cell}**" if entry.get("beyond_noise") else cell


def score_table(summaries: Mapping[str, Mapping[str, Any]], smallest: str) -> str:
    """A line per recipe; `smallest`: the class whose recall is shown."""
    rows = [
        (
            name,
            own["n"],
            *(_score(own[key]) for key in TITLES),
            _score(own["recall"][smallest]),
            f"{own['minutes_per_fold']:.1f}",
        )
        for name, own in summaries.items()
    ]
    head = ("recipe", "folds x seeds", *TITLES.values(), f"recall of {smallest}", "minutes a fold")
    return table(head, rows)


def difference_table(compared: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            row["recipe"],
            row["n"],
            *(_difference(row[key]) for key in MEASURES),
            f"{row['only_a_right']} / {row['only_b_right']}",
        )
        for row in compared
    ]
    measured = (TITLES[key] for key in MEASURES)
    return table(("recipe", "folds x seeds", *measured, "only it / only the first right"), rows)


def write_tables(out: Path, first: str, results: Results, failures: Mapping[str, str], facts: str) -> str:
    """results.md and results.json, of recipes with at least one finished fold. Returns the former."""
    lines = [f"{facts}\n"]
    summaries = {name: summary_of(runs) for name, runs in results.items()}
    compared = against(first, results)
    if results:
        whole = stacked(next(iter(results.values())))
        smallest = whole.classes[int(np.bincount(whole.labels, minlength=len(whole.classes)).argmin())]
        lines += [
            "Percent, last epoch: mean ± sample std over folds and seeds (95 % interval of all their "
            "predictions taken together, over patients where they are known; where folds are small it may "
            "lie beside the mean).\n",
            score_table(summaries, smallest),
        ]
    if compared:
        lines += [
            f"Against {first}, percentage points on the same images, of all predictions taken together "
            "(paired 95 % interval; p of the corrected t-test over folds and seeds, after Holm). Bold: "
            "beyond noise.\n",
            difference_table(compared),
        ]
    lines += [f"{name} failed: {why}\n" for name, why in failures.items()]
    text = "\n".join(lines)
    write_whole(out / "results.md", lambda file: file.write(text.encode()))
    numbers = {"facts": facts, "recipes": summaries, "against": compared, "failed": failures}
    write_json(out / "results.json", numbers)
    return text
