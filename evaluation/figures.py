"""The figures of a report, for paper and screen: pure functions from numbers to matplotlib figures.

Drawn without pyplot, so that nothing global is touched. Colours are those of Okabe and Ito, which people with
the common kinds of colour blindness can tell apart; with many classes line styles and markers do the rest.
"""

import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from common.files import write_whole
from evaluation.intervals import wilson_interval
from evaluation.tables import rounded, with_interval

INK, MUTED, GRID, PAPER = "#1f2933", "#5b6773", "#d9dee4", "#ffffff"  # follow the page where it is dark
ON_BLUE = "#fffffe"  # text on a strong colour: stays white
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f96")
BLUE, VERMILION, GREEN = COLOURS[:3]
LINES = ("-", "--", ":", "-.", (0, (7, 2, 1, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FEW = 12  # classes up to which each cell, point or line still has room for its own words
PNG_DPI = 200
_THEMED = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}
_STYLE = (
    "<style>:root{--ink:#1f2933;--muted:#5b6773;--grid:#d9dee4;--paper:#ffffff}"
    "@media (prefers-color-scheme:dark)"
    "{:root{--ink:#e4e9ee;--muted:#9aa7b4;--grid:#36404a;--paper:#1a2026}}</style>"
)


def style(families: Sequence[str]) -> Any:
    """Context in which the figures below are made and saved."""
    return mpl.rc_context(
        {
            "font.family": list(families),
            "font.size": 9,
            "text.parse_math": False,  # a class may be called "$x$"
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": MUTED,
            "axes.facecolor": "none",
            "axes.titlesize": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "grid.linewidth": 0.6,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "figure.facecolor": PAPER,
            "savefig.facecolor": PAPER,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "lines.linewidth": 1.6,
            "svg.fonttype": "path",
            "svg.hashsalt": "report",
        }
    )


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write `name`.png (200 dpi) and `name`.svg into the folder.

    Returns the SVG for the page: the same, but its ink and paper follow the reader's light or dark scheme.
    """
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=PNG_DPI)
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    for suffix, data in (("png", png), ("svg", svg)):
        write_whole(folder / f"{name}.{suffix}", lambda file, data=data: file.write(data.getvalue()))
    text = svg.getvalue().decode()
    for colour, variable in _THEMED.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"(<svg\b[^>]*>)", lambda tag: tag[1] + _STYLE, text, count=1)


def short(name: str, width: int = 22) -> str:
    """`name` in at most `width` columns, a Chinese character being two wide; control characters as blanks."""
    kept, used = "", 0
    for c in name:
        used += _columns(c)
        if used > width:
            return kept.rstrip() + "…"
        kept += c if c.isprintable() else " "
    return kept


def _columns(c: str) -> int:
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def _class_style(c: int) -> dict[str, Any]:
    return {"color": COLOURS[c % len(COLOURS)], "linestyle": LINES[c // len(COLOURS) % len(LINES)]}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend_below(figure: Figure, axes: Axes, labels: Sequence[str]) -> None:
    """A legend under the axes, in as many columns as surely fit; the figure grows by its rows."""
    width, height = figure.get_size_inches()
    longest = max((sum(map(_columns, label)) for label in labels), default=0)
    columns = max(1, int(width / (0.45 + 0.075 * longest)))
    rows = max(1, -(-len(labels) // columns))
    columns = -(-len(labels) // rows)  # no more than these rows need: the last is not left almost empty
    figure.set_size_inches(width, height + 0.19 * rows)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def learning_curve(
    curves: Mapping[str, Sequence[Sequence[float]]], unit: str, best_epoch: int | None
) -> Figure:
    """Curves of one kind over epochs. curves: name -> one list per fold (or the one of a single run).

    Each fold is a thin line and their mean a strong one, as far as all folds have come.
    """
    figure, axes = _figure(5.0, 3.3)
    # dashes over a line that they may lie on: balanced accuracy is accuracy where classes are of one size
    styles = ((BLUE, "-"), (VERMILION, "-"), (GREEN, "--"))
    for (colour, style), (name, folds) in zip(styles, curves.items(), strict=False):
        shared = min(map(len, folds))
        mean = np.mean([fold[:shared] for fold in folds], axis=0)
        if len(folds) > 1:
            for fold in folds:
                axes.plot(range(1, len(fold) + 1), fold, color=colour, alpha=0.35, linewidth=0.8)
        label = f"{name}, mean of {len(folds)} folds" if len(folds) > 1 else name
        axes.plot(
            range(1, shared + 1), mean, color=colour, linestyle=style, linewidth=2, label=label,
            marker="o" if shared == 1 else None,
        )  # fmt: skip
    if best_epoch is not None:
        axes.axvline(
            best_epoch, color=MUTED, linestyle=":", linewidth=1.2, label=f"best epoch ({best_epoch})"
        )
    if unit.startswith("Loss"):
        axes.set_ylim(bottom=0)
    longest = max(len(fold) for folds in curves.values() for fold in folds)
    axes.set(xlabel="Epoch", ylabel=unit, xlim=(0.5, longest + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Counts (C, C), a row per true class. Colour is the share of the row, in words too up to 12 classes."""
    n, few = len(classes), len(classes) <= FEW
    names = [short(name, 16) for name in classes]
    rows = counts.sum(1, keepdims=True)
    share = np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)
    cell = float(np.interp(n, [3, FEW, 30], [0.95, 0.62, 0.29]))
    figure, axes = _figure(n * cell + 1.5, n * cell + 1.3)
    colours = np.zeros((n, n, 4))
    colours[..., :3] = mpl.colors.to_rgb(BLUE)
    colours[..., 3] = share * 0.95  # transparent over whatever the page's paper is
    axes.pcolormesh(np.arange(n + 1), np.arange(n + 1), colours, edgecolors=GRID, linewidth=0.5)
    for i, j in zip(*(np.indices((n, n)).reshape(2, -1)), strict=True):
        if not few and counts[i, j] == 0:
            continue
        text = (
            f"{counts[i, j]}\n{rounded(100 * share[i, j])} %" if few and counts[i, j] else f"{counts[i, j]}"
        )
        axes.text(
            j + 0.5, i + 0.5, text, ha="center", va="center", linespacing=1.15,
            fontsize=8.5 if few else 7, color=ON_BLUE if share[i, j] > 0.8 else INK,
        )  # fmt: skip
    axes.set(xlabel="Predicted class", ylabel="True class", aspect="equal")
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9 if few else 8)
    slanted = n > 6 or max(map(len, names)) > 9
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(np.arange(n) + 0.5, names, **slant)
    axes.set_yticks(np.arange(n) + 0.5, names)
    return figure


def _score(name: str, measure: str, entry: Mapping[str, Any]) -> str:
    return f"{short(name)}  {measure} {with_interval(entry, measure).replace(' to ', '–')}"


def _per_class_curves(
    probs: np.ndarray, labels: np.ndarray, per_class: Mapping[str, Mapping[str, Any]], kind: str
) -> Figure:
    figure, axes = _figure(4.45, 4.3)  # room for a square and the words at its left and foot
    names = []
    thickness = 1.6 if len(per_class) <= FEW else 1.0
    measure, key = ("AUC", "roc_auc") if kind == "roc" else ("AP", "average_precision")
    if kind == "roc":
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    for c, (name, own) in enumerate(per_class.items()):
        if own[key]["value"] is None:
            continue
        names.append(_score(name, measure, own[key]))
        if kind == "roc":
            false, true, _ = roc_curve(labels == c, probs[:, c])
            axes.plot(false, true, label=names[-1], linewidth=thickness, **_class_style(c))
        else:
            recall, precision = _precision_at(labels == c, probs[:, c])
            axes.step(recall, precision, where="pre", label=names[-1], linewidth=thickness, **_class_style(c))
    if not names:
        axes.text(0.03, 0.93, "No curve: the images are of a single class")
    titles = ("1 − specificity", "Sensitivity") if kind == "roc" else ("Recall (sensitivity)", "Precision")
    axes.set(xlabel=titles[0], ylabel=titles[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
    _legend_below(figure, axes, names)
    return figure


def _precision_at(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each recall that is reached, from 0, and the precision where it is first reached: the steps whose area
    is the average precision.
    """
    precision, recall, _ = precision_recall_curve(positive, scores)
    reached, index = np.unique(recall, return_inverse=True)
    first = np.zeros(len(reached))
    np.maximum.at(first, index, precision)
    first[0] = first[1]
    return reached, first


def roc_curves(probs: np.ndarray, labels: np.ndarray, per_class: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Each class against the rest. probs (N, C), labels (N,), per_class as in metrics.json."""
    return _per_class_curves(probs, labels, per_class, "roc")


def precision_recall_curves(
    probs: np.ndarray, labels: np.ndarray, per_class: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Each class against the rest; the steps whose area is the average precision."""
    return _per_class_curves(probs, labels, per_class, "precision-recall")


def reliability(probs: np.ndarray, labels: np.ndarray, bins: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy of each bin of metrics.json over its mean confidence, with Wilson's 95 % interval; below, how
    many images have which confidence.
    """
    figure = Figure((5.0, 4.8), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), label="perfect calibration")
    x, y = ([b[key] for b in bins] for key in ("mean_confidence", "accuracy"))
    ends = np.array([wilson_interval(b["accuracy"], int(b["count"])) for b in bins]).T  # (2, B)
    axes.vlines(x, *ends, color=BLUE, linewidth=1, alpha=0.6)
    least, most = min(b["count"] for b in bins), max(b["count"] for b in bins)
    size = f"{least}" if least == most else f"{least} to {most}"
    label = f"{'bins' if len(bins) > 1 else 'one bin'} of {size} images, 95 % interval"
    axes.plot(x, y, "o-", color=BLUE, markersize=4.5, label=label)
    axes.set(ylabel="Accuracy", ylim=(-0.02, 1.02), xlim=(0, 1.01))
    confidence, right = probs.max(1), probs.argmax(1) == labels
    counts.hist(
        [confidence[right], confidence[~right]], bins=np.linspace(0, 1, 21), stacked=True,
        color=(BLUE, VERMILION), label=("right", "wrong"), rwidth=0.9,
    )  # fmt: skip
    counts.set(xlabel="Confidence (probability of the predicted class)", ylabel="Images")
    counts.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def embedding_map(
    points: np.ndarray,
    labels: np.ndarray,
    wrong: np.ndarray,
    sentences: np.ndarray,
    classes: Sequence[str],
    shares: Sequence[float],
) -> Figure:
    """points (N, 2) of images of the classes `labels` (N,), ringed where `wrong` (N,); sentences (C, 2)."""
    span = np.ptp(np.concatenate([points, sentences]), axis=0)
    figure, axes = _figure(6.4, float(np.clip(0.6 + 5.6 * span[1] / max(span[0], 1e-9), 2.8, 5.8)))
    names = []
    few = len(classes) <= FEW
    for c, name in enumerate(classes):
        of_class = labels == c
        marker = MARKERS[c // len(COLOURS) % len(MARKERS)]
        names.append(short(name) if few else f"{c + 1}  {short(name)}")
        colour = COLOURS[c % len(COLOURS)]
        axes.scatter(
            *points[of_class].T, s=16, color=colour, marker=marker, alpha=0.7, label=names[-1], linewidth=0
        )
    axes.scatter(
        *points[wrong].T, s=34, facecolors="none", edgecolors=INK, linewidth=0.7, label="misclassified"
    )
    names.append("misclassified")
    under = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.5, "pad": 1} if few else None
    for c, place in enumerate(sentences):
        axes.scatter(
            *place,
            s=170 if few else 70,
            color=COLOURS[c % len(COLOURS)],
            marker="*",
            edgecolors=INK,
            linewidth=0.9,
            zorder=5,  # above all names: one may lie on the star of another class
        )
        axes.annotate(
            short(classes[c], 16) if few else str(c + 1), place, xytext=(7, 6), textcoords="offset points",
            fontsize=8.5, zorder=4, bbox=under,
        )  # fmt: skip
    axes.scatter(
        [], [], s=110, color="none", marker="*", edgecolors=INK, linewidth=0.9, label="class sentences"
    )
    names.append("class sentences")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.1)
    axes.set(xlabel=f"PC 1 ({100 * shares[0]:.0f} % of variance)", ylabel=f"PC 2 ({100 * shares[1]:.0f} %)")
    _legend_below(figure, axes, names)
    return figure


@dataclass(frozen=True)
class Picture:
    """Pictures side by side under one title, each (h, w, 3) uint8 with its own caption."""

    title: str
    images: Sequence[tuple[str, np.ndarray]]


def gallery(pictures: Sequence[Picture]) -> Figure:
    """Two groups of up to three pictures in a row, all on one axes whose unit is the side of a picture."""
    columns, rows = min(2, len(pictures)), -(-len(pictures) // 2)
    wide, high = 3.25, 1.43  # of a group, with the words above its pictures
    width, height = columns * wide, rows * high
    figure = Figure((1.6 * width, 1.6 * height))
    axes = figure.add_axes((0, 0, 1, 1))
    for k, picture in enumerate(pictures):
        left, top = k % 2 * wide + 0.1, k // 2 * high
        axes.text(left, top + 0.08, picture.title, fontsize=8.5, va="top")
        for (caption, image), x in zip(picture.images, left + 1.03 * np.arange(3), strict=False):
            h, w = np.array(image.shape[:2]) / max(image.shape[:2])
            axes.text(x, top + 0.37, caption, fontsize=8, color=MUTED, va="baseline")
            axes.imshow(image, extent=(x, x + w, top + 0.4 + h, top + 0.4))
    axes.set(xlim=(0, width), ylim=(height + 0.06, 0))
    axes.axis("off")
    return figure
