"""Predictions as a file, the tables, and paired comparisons, against hand-worked cases and scipy."""

import csv

import numpy as np
import pytest
from scipy.stats import binom

from common.errors import UserError
from evaluation.compare import compare, holm, mcnemar_p
from evaluation.results import Predictions, headline, read_predictions, write_results
from evaluation.tables import latex, with_interval


def made_up(n=60, seed=0, skill=2.0, groups=True) -> Predictions:
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    logits = random.normal(size=(n, 3))
    logits[np.arange(n), labels] += skill
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Predictions(
        ("正常", "a,b", '"q"'),
        tuple(f"正常/图 {i:03d}.png" for i in range(n)),
        labels,
        probs,
        folds=np.arange(n) // 20 + 1,
        groups=np.arange(n) // 2 if groups else None,
    )


@pytest.mark.parametrize("groups", [True, False])
def test_predictions_come_back_to_the_last_bit(tmp_path, groups):
    before = made_up(groups=groups)
    before.write(tmp_path / "p.csv")
    after = read_predictions(tmp_path / "p.csv")
    assert (after.classes, after.paths) == (before.classes, before.paths)
    assert (after.probs == before.probs).all() and (after.labels == before.labels).all()
    assert (after.folds == before.folds).all()
    assert (after.groups == before.groups).all() if groups else after.groups is None


def test_class_names_and_paths_are_no_formulas_and_come_back(tmp_path):
    before = made_up()
    classes = ("=cmd()", "'=x", "一")
    before = Predictions(
        classes,
        tuple(f"{classes[i]}/{n}.png" for n, i in enumerate(before.labels)),
        before.labels,
        before.probs,
    )
    write_results(tmp_path, before, "predictions.csv")
    after = read_predictions(tmp_path / "predictions.csv")
    assert (after.classes, after.paths) == (before.classes, before.paths)
    assert (after.labels == before.labels).all()
    for name in ("predictions.csv", "metrics_table.csv"):
        with open(tmp_path / name, encoding="utf-8-sig", newline="") as file:
            assert not any(cell.startswith(("=", "@", "+")) for row in csv.reader(file) for cell in row)


def test_predictions_open_in_excel(tmp_path):
    made_up().write(tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    with open(tmp_path / "p.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "path",
        "label",
        "fold",
        "prediction",
        "group",
        "prob_正常",
        "prob_a,b",
        'prob_"q"',
    ]
    best = max(("正常", "a,b", '"q"'), key=lambda name: float(rows[7][f"prob_{name}"]))
    assert rows[7]["prediction"] == best


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ""),
        ("path,label\n", "its first columns are path, label"),
        ("path,label,fold,prediction,group,prob_a\nx,b,,a,,1\n", "it has no column prob_b"),
    ],
)
def test_other_files_are_refused(tmp_path, text, said):
    (tmp_path / "p.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"p\.csv.*{said}"):
        read_predictions(tmp_path / "p.csv")


def test_tables_hold_every_number_with_its_interval(tmp_path):
    metrics = write_results(tmp_path, made_up(), "predictions.csv")
    with open(tmp_path / "metrics_table.csv", encoding="utf-8-sig", newline="") as file:
        rows = {(row["class"], row["measure"]): row for row in csv.DictReader(file)}
    for part in ("value", "low", "high"):
        assert float(rows["all", "macro_f1"][part]) == metrics["macro_f1"][part]
        assert float(rows["正常", "sensitivity"][part]) == metrics["per_class"]["正常"]["sensitivity"][part]
    tex = (tmp_path / "metrics_table.tex").read_text(encoding="utf-8")
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == tex.count(r"\toprule") == 2
    assert with_interval(metrics["accuracy"], "%") in tex and "正常" in tex
    assert f"Macro ROC-AUC & {metrics['macro_roc_auc']['value']:.3f} (" in tex
    assert f"macro ROC-AUC {metrics['macro_roc_auc']['value']:.3f} (" in headline(metrics)
    assert "No interval" not in tex + headline(metrics) and "undefined" not in tex + headline(metrics)
    accuracy = metrics["balanced_accuracy"]
    said = f"balanced accuracy {100 * accuracy['value']:.1f} % ({100 * accuracy['low']:.1f} to "
    assert "patient" in headline(metrics) and said in headline(metrics)


def table_note(folder, measure):
    with open(folder / "metrics_table.csv", encoding="utf-8-sig", newline="") as file:
        return next(row["note"] for row in csv.DictReader(file) if row["measure"] == measure)


def test_why_an_interval_or_a_value_is_missing_is_said_once(tmp_path):
    perfect = made_up(skill=50.0)
    metrics = write_results(tmp_path, perfect, "predictions.csv")
    tex = (tmp_path / "metrics_table.tex").read_text(encoding="utf-8")
    for text in (tex, headline(metrics)):
        assert text.count("No interval where all resamples agree") == 1
        assert "undefined" not in text
    assert table_note(tmp_path, "accuracy") == ""
    assert table_note(tmp_path, "macro_f1").startswith("No interval where all resamples agree")
    of_one_class = Predictions(perfect.classes, perfect.paths, np.zeros(60, int), perfect.probs)
    metrics = write_results(tmp_path, of_one_class, "predictions.csv")
    tex = (tmp_path / "metrics_table.tex").read_text(encoding="utf-8")
    assert tex.count("–: undefined, for want of images") == headline(metrics).count("–: undefined") == 1
    assert table_note(tmp_path, "macro_roc_auc").startswith("undefined, for want of images")


def test_with_interval():
    assert with_interval({"value": 0.87, "low": 0.8512, "high": 0.8888}, "%") == "87.0 (85.1 to 88.9)"
    assert with_interval({"value": 0.87, "low": 0.8512, "high": 0.8888}, "") == "0.870 (0.851 to 0.889)"
    assert with_interval({"value": 1.0, "low": None, "high": None}, "%") == "100.0"
    assert with_interval({"value": 57 / 80, "low": 49 / 80, "high": 0.98125}, "%") == "71.3 (61.3 to 98.1)"
    assert with_interval({"value": None, "low": None, "high": None}, "%") == "–"


def test_latex_is_escaped():
    assert latex("a_b & 50 % #1 {x} $y$") == r"a\_b \& 50 \% \#1 \{x\} \$y\$"
    assert latex("\\input{/etc/passwd}\nx") == r"\textbackslash{}input\{/etc/passwd\} x"


# Comparison


def test_mcnemar_is_a_two_sided_sign_test():
    # 3 against 12 of 15: twice the tail P(X <= 3), X ~ Binomial(15, 1/2) = 2 * 576 / 2**15
    assert mcnemar_p(3, 12) == pytest.approx(2 * (1 + 15 + 105 + 455) / 2**15)
    assert mcnemar_p(9, 30) == pytest.approx(2 * binom.cdf(9, 39, 0.5))
    assert mcnemar_p(0, 0) == 1


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.04: times 3, 2, 1 = 0.03, 0.04, 0.04
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == [1, 1]


def test_a_model_and_itself_do_not_differ():
    run = made_up()
    (pair,) = compare({"a": run, "b": run})["pairs"]
    assert pair["mcnemar_p"] == 1 and not pair["beyond_noise"]
    assert pair["difference"]["accuracy"]["value"] == 0


def test_a_good_and_a_useless_model_differ_whatever_the_order_of_the_rows():
    good, useless = made_up(200, 1, 4.0), made_up(200, 2, 0.0)
    order = np.random.default_rng(0).permutation(200)
    shuffled = Predictions(
        useless.classes, tuple(useless.paths[i] for i in order), useless.labels[order], useless.probs[order]
    )
    (pair,) = compare({"good": good, "useless": shuffled})["pairs"]
    right = [run.probs.argmax(1) == run.labels for run in (good, useless)]
    assert pair["only_a_right"] == (right[0] & ~right[1]).sum()
    assert pair["only_b_right"] == (right[1] & ~right[0]).sum()
    assert pair["difference"]["accuracy"]["value"] == pytest.approx(right[0].mean() - right[1].mean())
    assert pair["unit"] == "patient" and pair["beyond_noise"]
    low, high = (pair["difference"]["accuracy"][side] for side in ("low", "high"))
    assert low < right[0].mean() - right[1].mean() < high


def test_paired_interval_is_that_of_the_paired_bootstrap():
    a, b = made_up(90, 3, 1.5, groups=False), made_up(90, 4, 1.0, groups=False)
    (pair,) = compare({"a": a, "b": b})["pairs"]
    gain = (a.probs.argmax(1) == a.labels).astype(float) - (b.probs.argmax(1) == b.labels)
    draws = np.random.default_rng(9).integers(90, size=(4000, 90))
    expected = np.quantile(gain[draws].mean(1), [0.025, 0.975])
    have = [pair["difference"]["accuracy"][side] for side in ("low", "high")]
    assert have == pytest.approx(expected, abs=0.02)


def test_runs_on_other_images_are_not_compared():
    a, b = made_up(60), made_up(57)
    found = compare({"a": a, "b": b})
    assert found["pairs"] == [] and found["not_compared"][0]["b"] == "b"
