"""Tables ready to paste: LaTeX (booktabs) and CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import text_cell, write_csv, write_whole

OVERALL = {
    "accuracy": "Accuracy (%)",
    "balanced_accuracy": "Balanced accuracy (%)",
    "macro_f1": "Macro-F1 (%)",
    "macro_roc_auc": "Macro ROC-AUC (%)",
    "macro_average_precision": "Macro average precision (%)",
    "mcc": "MCC",
    "cohen_kappa": "Cohen's kappa",
    "nll": "NLL (nats)",
    "brier": "Brier score",
    "ece": "ECE",
}
PER_CLASS = {
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Precision",
    "f1": "F1",
    "roc_auc": "ROC-AUC",
    "average_precision": "AP",
}
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{letter: "\\" + letter for letter in "&%$#_{}"},
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "±": r"$\pm$",
    }
)


def latex(text: str) -> str:
    """`text` for LaTeX: special characters escaped, line breaks and other control characters made blanks."""
    return "".join(c if c.isprintable() else " " for c in text).translate(_LATEX)


def percent(entry: Mapping[str, Any]) -> str:
    """The like of 87.0 (85.1 to 88.9) from an interval entry of fractions; "–" where undefined."""
    return with_interval(entry, 100, 1)


def with_interval(entry: Mapping[str, Any], factor: float, digits: int) -> str:
    if entry["value"] is None:
        return "–"
    value = f"{factor * entry['value']:.{digits}f}"
    if entry["low"] is None:
        return value
    return f"{value} ({factor * entry['low']:.{digits}f} to {factor * entry['high']:.{digits}f})"


def tabular(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A booktabs tabular; the first column to the left, the others to the right."""

    def line(cells: Sequence[str]) -> str:
        # behind the \\ of the line before, "[" and "*" would be its arguments
        guard = "{}" if cells[0].startswith(("[", "*")) else ""
        return guard + " & ".join(latex(cell) for cell in cells) + r" \\"

    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            line(header),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def write_latex(path: Path, *blocks: str) -> None:
    head = "% \\usepackage{booktabs}; Chinese names: \\usepackage[UTF8]{ctex}, compiled with xelatex"
    write_whole(path, lambda file: file.write("\n\n".join([head, *blocks, ""]).encode()))


def write_metrics_tables(output_dir: Path, metrics: Mapping[str, Any]) -> None:
    """metrics_table.csv (one number per row, fractions) and metrics_table.tex (overall, then per class)."""
    long = [["all", key, metrics[key]] for key in OVERALL]
    long += [[name, key, own[key]] for name, own in metrics["per_class"].items() for key in PER_CLASS]
    write_csv(
        output_dir / "metrics_table.csv",
        ["class", "measure", "value", "low", "high", "method"],
        [
            [text_cell(name), key, *(entry[part] for part in ("value", "low", "high", "method"))]
            for name, key, entry in long
        ],
    )
    overall = [
        [title, percent(metrics[key]) if "%" in title else with_interval(metrics[key], 1, 3)]
        for key, title in OVERALL.items()
    ]
    by_class = [
        [name, str(own["support"]), *(percent(own[key]) for key in PER_CLASS)]
        for name, own in metrics["per_class"].items()
    ]
    unit = metrics["interval"]["unit"]
    write_latex(
        output_dir / "metrics_table.tex",
        tabular([f"{metrics['n_images']} images", f"value (95 % interval over {unit}s)"], overall),
        tabular(["Class", "n", *(f"{title} (%)" for title in PER_CLASS.values())], by_class),
    )
