"""Tables ready to paste: LaTeX (booktabs) and CSV."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import number
from common.files import text_cell, write_csv, write_whole

OVERALL = {
    "accuracy": "Accuracy (%)",
    "balanced_accuracy": "Balanced accuracy (%)",
    "macro_f1": "Macro-F1 (%)",
    "macro_roc_auc": "Macro ROC-AUC",
    "macro_average_precision": "Macro average precision",
    "mcc": "MCC",
    "cohen_kappa": "Cohen's kappa",
    "nll": "NLL (nats)",
    "brier": "Brier score",
    "ece": "ECE",
}
PER_CLASS = {
    "sensitivity": "Sensitivity (%)",
    "specificity": "Specificity (%)",
    "precision": "Precision (%)",
    "f1": "F1 (%)",
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


def rounded(value: float, form: str = ".1f") -> str:
    """57 of 80, 71.25 %, becomes 71.3 as 49 of 80, 61.25 %, becomes 61.3; binary fractions would differ."""
    return f"{value + 1e-9:{form}}"


def with_interval(entry: Mapping[str, Any], title: str) -> str:
    """The like of 87.0 (85.1 to 88.9) from an interval entry of fractions where the title of the measure says
    percent, else of 0.870 (0.851 to 0.889); "–" where undefined.
    """
    value, interval = value_and_interval(entry, title, sign="")
    return f"{value} ({interval})" if interval else value


def value_and_interval(entry: Mapping[str, Any], title: str, sign: str = " %") -> tuple[str, str]:
    """The value and its interval as words, in percent where the title of the measure says so; "–" and ""
    where there is none.
    """
    if entry["value"] is None:
        return "–", ""
    factor, form, unit = (100, ".1f", sign) if "%" in title else (1, ".3f", "")
    value, low, high = (
        None if entry[key] is None else rounded(factor * entry[key], form) for key in ("value", "low", "high")
    )
    return f"{value}{unit}", "" if low is None else f"{low} to {high}{unit}"


def why_missing(entries: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    """Why some of these interval entries have no value, or no interval, in English and in Chinese; empty
    where none lacks either.
    """
    entries = list(entries)
    en, zh = [], []
    if any(entry["value"] is None for entry in entries):
        en.append("–: undefined, for want of images, or of predictions, of a class.")
        zh.append("–：缺少某类的图像或预测，无定义。")
    if any(entry["value"] is not None and entry["low"] is None for entry in entries):
        en.append(
            "No interval where all resamples agree, as when all images are right, or none, or more than a "
            "fifth of them lack a class, as where it has one image."
        )
        zh.append(
            "所有重抽样得到同一数值（如全部正确或全部错误），或五分之一以上的重抽样缺少某个类别（如只有一张图像）时，没有区间。"
        )
    return " ".join(en), "".join(zh)


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
    """metrics_table.csv (one number per row, fractions, and why something is missing) and metrics_table.tex
    (overall, then per class, then why something is missing).
    """

    def why(entry: Mapping[str, Any]) -> str:
        return why_missing([entry])[0].removeprefix("–: ")

    long = [["all", key, metrics[key]] for key in OVERALL]
    long += [[name, key, own[key]] for name, own in metrics["per_class"].items() for key in PER_CLASS]
    write_csv(
        output_dir / "metrics_table.csv",
        ["class", "measure", "value", "low", "high", "method", "note"],
        [
            [text_cell(name), key, *(entry[part] for part in ("value", "low", "high", "method")), why(entry)]
            for name, key, entry in long
        ],
    )
    overall = [[title, with_interval(metrics[key], title)] for key, title in OVERALL.items()]
    by_class = [
        [name, str(own["support"]), *(with_interval(own[key], title) for key, title in PER_CLASS.items())]
        for name, own in metrics["per_class"].items()
    ]
    missing, _ = why_missing(entry for _, _, entry in long)
    n, unit = number(metrics["n_images"], "image", "images"), metrics["interval"]["unit"]
    write_latex(
        output_dir / "metrics_table.tex",
        tabular([n, f"value (95 % interval over {unit}s)"], overall),
        tabular(["Class", "n", *PER_CLASS.values()], by_class),
        *([latex(missing)] if missing else []),
    )
