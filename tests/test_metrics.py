"""The metrics of metrics.json against scikit-learn, on all images and resample by resample."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as sk

import evaluation.metrics
from common.errors import UserError
from evaluation.calibration import adaptive_bins, ece
from evaluation.metrics import classification_metrics, full_metrics, majority_baseline

HEADLINE = [
    *("accuracy", "balanced_accuracy", "macro_f1", "mcc", "cohen_kappa"),
    *("macro_roc_auc", "macro_average_precision", "nll", "brier", "ece"),
]
MACRO = ["balanced_accuracy", "macro_f1", "macro_roc_auc", "macro_average_precision"]
PER_CLASS = ["sensitivity", "specificity", "precision", "f1", "roc_auc", "average_precision"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # scikit-learn's


def draw(n: int, n_classes: int, *, present: list[int] | None = None, ties: bool = False, seed: int = 0):
    """Random probabilities (N, C) that know something of the labels (N,)."""
    random = np.random.RandomState(seed)
    labels = random.choice(np.arange(n_classes) if present is None else present, n)
    scores = np.exp(random.normal(size=(n, n_classes)) + 1.2 * np.eye(n_classes)[labels])
    if ties:
        scores = np.ceil(scores)
    return scores / scores.sum(1, keepdims=True), labels


def reference(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every metric but the ECE by scikit-learn, "name" or "name of class c"; NaN where undefined."""
    n_classes, predictions = probs.shape[1], probs.argmax(1)
    found = {
        "accuracy": sk.accuracy_score(labels, predictions),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predictions),
        "macro_f1": sk.f1_score(labels, predictions, average="macro", zero_division=0),
        "mcc": sk.matthews_corrcoef(labels, predictions) if len(set(labels)) > 1 else np.nan,
        "cohen_kappa": sk.cohen_kappa_score(labels, predictions),
        "nll": sk.log_loss(labels, probs, labels=range(n_classes)),
        "brier": sk.brier_score_loss(labels, probs, labels=range(n_classes), scale_by_half=False),
    }
    aucs, aps = [], []
    for c in range(n_classes):
        true, said = labels == c, predictions == c
        aucs.append(sk.roc_auc_score(true, probs[:, c]) if 0 < true.sum() < len(true) else np.nan)
        aps.append(sk.average_precision_score(true, probs[:, c]) if 0 < true.sum() < len(true) else np.nan)
        found |= {
            f"sensitivity of {c}": sk.recall_score(true, said, zero_division=np.nan),
            f"specificity of {c}": sk.recall_score(~true, ~said, zero_division=np.nan),
            f"precision of {c}": sk.precision_score(true, said, zero_division=np.nan),
            f"f1 of {c}": sk.f1_score(true, said, zero_division=np.nan),
            f"roc_auc of {c}": aucs[-1],
            f"average_precision of {c}": aps[-1],
        }
    found["macro_roc_auc"], found["macro_average_precision"] = np.nanmean(aucs), np.nanmean(aps)
    return found


def entries(found: dict) -> dict[str, dict]:
    """The interval entries of full_metrics under the names of `reference`."""
    of_classes = {
        f"{key} of {c}": found["per_class"][name][key]
        for c, name in enumerate(found["classes"])
        for key in PER_CLASS
    }
    return {key: found[key] for key in HEADLINE} | of_classes


def names(probs: np.ndarray) -> list[str]:
    return list("甲乙丙丁戊己"[: probs.shape[1]])


def assert_equals_reference(probs: np.ndarray, labels: np.ndarray, **options) -> dict:
    found = full_metrics(probs, labels, names(probs), resamples=20, **options)
    json.dumps(found, allow_nan=False)
    values = {key: np.nan if e["value"] is None else e["value"] for key, e in entries(found).items()}
    assert values.pop("ece") == pytest.approx(ece(probs, labels))
    assert values == pytest.approx(reference(probs, labels), abs=1e-10, nan_ok=True)
    expected = sk.confusion_matrix(labels, probs.argmax(1), labels=range(probs.shape[1]))
    assert found["confusion_matrix"] == expected.tolist()
    for c, name in enumerate(names(probs)):
        (tn, fp), (fn, tp) = sk.multilabel_confusion_matrix(
            labels, probs.argmax(1), labels=range(probs.shape[1])
        )[c]
        counts = ("true_negatives", "false_positives", "false_negatives", "true_positives")
        assert [found["per_class"][name][key] for key in counts] == [tn, fp, fn, tp]
        assert found["per_class"][name]["support"] == (labels == c).sum()
    return found


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n_classes", [2, 3, 6])
def test_values_equal_scikit_learn(n_classes, ties):
    probs, labels = draw(400, n_classes, ties=ties, seed=n_classes)
    found = assert_equals_reference(probs, labels)
    if n_classes > 2:
        macro = sk.roc_auc_score(labels, probs, multi_class="ovr", average="macro")
        assert found["macro_roc_auc"]["value"] == pytest.approx(macro)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_values_equal_scikit_learn_on_small_sets_with_ties_and_missing_classes(data):
    n_classes, n = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 25))
    scores = st.lists(st.integers(1, 4), min_size=n_classes, max_size=n_classes)
    probs = np.array(data.draw(st.lists(scores, min_size=n, max_size=n)), float)
    probs /= probs.sum(1, keepdims=True)
    labels = np.array(data.draw(st.lists(st.integers(0, n_classes - 1), min_size=n, max_size=n)))
    groups = np.array(data.draw(st.lists(st.integers(-2, 9), min_size=n, max_size=n)))
    assert_equals_reference(probs, labels, groups=data.draw(st.sampled_from([None, groups])))


def test_metrics_while_training_are_the_same_numbers():
    probs, labels = draw(200, 4)
    found = full_metrics(probs, labels, names(probs), resamples=2)
    same = {"loss": "nll", "acc": "accuracy", "balanced_acc": "balanced_accuracy", "macro_f1": "macro_f1"}
    for short, long in same.items():
        assert found[long]["value"] == pytest.approx(classification_metrics(probs, labels)[short])


def test_an_absent_class_is_null_not_0():
    probs, labels = draw(300, 4, present=[0, 2, 3])
    probs[:, 1] /= 1e3  # never predicted either
    found = assert_equals_reference(probs / probs.sum(1, keepdims=True), labels)
    absent = found["per_class"]["乙"]
    nothing = dict.fromkeys(("value", "low", "high", "method"))
    assert absent["f1"] == absent["roc_auc"] == absent["average_precision"] == nothing
    assert absent["sensitivity"] == absent["precision"] == nothing | {"wilson": None}
    assert absent["specificity"]["value"] == 1 and absent["support"] == 0
    others = [found["per_class"][name]["roc_auc"]["value"] for name in "甲丙丁"]
    assert found["macro_roc_auc"]["value"] == pytest.approx(np.mean(others))


def test_only_one_class_present():
    probs, labels = draw(50, 3, present=[1])
    found = assert_equals_reference(probs, labels)
    own = found["per_class"]["乙"]
    for entry in (found["macro_roc_auc"], found["macro_average_precision"], found["mcc"], own["specificity"]):
        assert entry["value"] is entry["low"] is entry["method"] is None
    assert own["average_precision"]["value"] is own["roc_auc"]["value"] is None


def test_one_class_present_and_predicted():
    found = full_metrics(np.array([[0.9, 0.1]] * 5), np.zeros(5, int), ["a", "b"], resamples=50)
    assert found["cohen_kappa"]["value"] is found["mcc"]["value"] is None
    assert found["accuracy"]["value"] == 1


def test_a_resample_of_one_class_says_nothing_of_the_mcc_and_predictions_of_one_class_make_it_0():
    labels = np.array([0, 1] * 3)  # one resample in 32 is of one class
    found = full_metrics(np.eye(2)[labels], labels, ["a", "b"])
    for key in ("mcc", "cohen_kappa", "balanced_accuracy"):
        assert found[key] == {"value": 1, "low": None, "high": None, "method": "bootstrap"}
    alike = full_metrics(np.array([[0.7, 0.3]] * 6), labels, ["a", "b"])["mcc"]
    assert alike["value"] == sk.matthews_corrcoef(labels, np.zeros(6)) == 0


def slow_bootstrap(probs, labels, units, resamples, seed) -> dict[str, list[float]]:
    """Percentiles of plain resampled sets, scored by scikit-learn one at a time. Where a set lacks a class, a
    mean over classes would be another quantity.
    """
    n_units = units.max() + 1
    draws = np.random.default_rng(seed).integers(n_units, size=(resamples, n_units))
    bins, gap = adaptive_bins(probs.max(1)), (probs.argmax(1) == labels) - probs.max(1)
    rows = []
    for drawn in draws:
        images = np.concatenate([np.flatnonzero(units == unit) for unit in drawn])
        own_ece = sum(abs(gap[images][bins[images] == b].sum()) for b in set(bins)) / len(images)
        row = reference(probs[images], labels[images]) | {"ece": own_ece}
        if set(labels[images]) != set(labels):
            row |= dict.fromkeys(MACRO, np.nan)
        rows.append(row)
    samples = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    samples["ece"] = np.maximum(0, samples["ece"] - samples["ece"].mean() + ece(probs, labels))
    return {key: np.nanquantile(values, [0.025, 0.975]).tolist() for key, values in samples.items()}


@pytest.mark.parametrize("grouped", [False, True])
def test_bootstrap_equals_a_slow_loop_over_scikit_learn(grouped):
    probs, labels = draw(45, 3, ties=True, seed=3)
    labels[labels == 2] = 0
    labels[:2] = 2  # so rare that some resamples lack it
    patients = np.random.RandomState(0).choice([3, 10, -4, 99, 7, 8, 50, 61, 62, 63, 64], 45)
    units = np.unique(patients, return_inverse=True)[1] if grouped else np.arange(45)
    found = full_metrics(
        probs, labels, list("abc"), groups=patients if grouped else None, seed=5, resamples=80
    )
    for key, expected in slow_bootstrap(probs, labels, units, 80, seed=5).items():
        entry = entries(found)[key]
        if "wilson" in entry and not grouped:
            assert entry["method"] == "wilson"
        else:
            assert entry["method"] == "bootstrap"
            assert [entry["low"], entry["high"]] == pytest.approx(expected, abs=1e-10), key
    assert found["interval"] == {"level": 0.95, "resamples": 80, "unit": "patient" if grouped else "image"}
    assert found["n_groups"] == (11 if grouped else None)


def test_a_class_without_images_that_was_predicted_counts_in_every_resample_of_the_macro_f1():
    """Class 2 has no image and is predicted once; some resamples lack that image."""
    labels, predictions = np.repeat([0, 1], 10), np.r_[[0] * 9, 2, [1] * 8, 0, 0]
    found = full_metrics(0.1 + 0.7 * np.eye(3)[predictions], labels, list("abc"), resamples=200)
    random = np.random.default_rng(0)
    resampled = [
        sk.f1_score(labels[drawn], predictions[drawn], labels=[0, 1, 2], average="macro", zero_division=0)
        for drawn in random.integers(20, size=(200, 20))
    ]
    entry = found["macro_f1"]
    assert entry["value"] == pytest.approx(sk.f1_score(labels, predictions, average="macro", zero_division=0))
    assert [entry["low"], entry["high"]] == pytest.approx(np.percentile(resampled, [2.5, 97.5]))
    assert entry["high"] <= 2 / 3


def test_copies_of_an_image_of_one_patient_add_no_certainty():
    probs, labels = draw(80, 3)
    single = full_metrics(probs, labels, list("abc"), groups=np.arange(80), resamples=100)
    copies = np.repeat(np.arange(80), 5)
    fivefold = full_metrics(probs[copies], labels[copies], list("abc"), groups=copies, resamples=100)
    for key in ("accuracy", "macro_f1", "macro_roc_auc", "nll"):
        assert fivefold[key]["low"] == pytest.approx(single[key]["low"])
        assert fivefold[key]["high"] == pytest.approx(single[key]["high"])
    assert np.diff(fivefold["accuracy"]["wilson"]) < 0.6 * np.diff(single["accuracy"]["wilson"])


def test_wilson_for_proportions_of_single_images():
    probs, labels = draw(263, 3)
    found = full_metrics(probs, labels, list("abc"), resamples=20)
    own = found["per_class"]["b"]
    right, said, rest = own["true_positives"], own["false_positives"], own["true_negatives"]
    for entry, k, n in (
        (found["accuracy"], (probs.argmax(1) == labels).sum(), 263),
        (own["sensitivity"], right, own["support"]),
        (own["specificity"], rest, 263 - own["support"]),
        (own["precision"], right, right + said),
    ):
        expected = binomtest(int(k), int(n)).proportion_ci(method="wilson")
        assert [entry["low"], entry["high"]] == pytest.approx([expected.low, expected.high])
        assert entry["wilson"] == [entry["low"], entry["high"]] and entry["method"] == "wilson"


def test_perfect_scores_claim_no_certainty():
    probs, labels = np.eye(2)[[0, 1] * 20] * 0.8 + 0.1, np.array([0, 1] * 20)
    patients = np.arange(40) // 4  # 10 patients with both classes
    found = full_metrics(probs, labels, ["a", "b"], groups=patients, resamples=50)
    assert found["macro_roc_auc"] == {"value": 1.0, "low": None, "high": None, "method": "bootstrap"}
    for entry, n in ((found["accuracy"], 40), (found["per_class"]["a"]["sensitivity"], 20)):
        over_patients = binomtest(10, 10).proportion_ci(method="wilson")
        over_images = binomtest(n, n).proportion_ci(method="wilson")
        assert (entry["value"], entry["high"], entry["method"]) == (1.0, 1.0, "wilson")
        assert entry["low"] == pytest.approx(over_patients.low)
        assert entry["wilson"] == pytest.approx([over_images.low, 1.0])


def test_interval_of_the_ece_of_a_calibrated_model_holds_its_value():
    random = np.random.RandomState(0)
    first = random.uniform(0.5, 1, 600)
    labels = (random.rand(600) > first).astype(int)
    entry = full_metrics(np.stack([first, 1 - first], axis=1), labels, ["a", "b"], resamples=300)["ece"]
    assert 0 <= entry["low"] < entry["value"] < entry["high"]


def test_temperature_is_cross_fitted_over_the_given_parts_or_two_halves():
    probs, labels = draw(200, 3)
    folds = np.arange(200) % 5
    of_folds = full_metrics(probs, labels, list("abc"), parts=folds, resamples=2)["calibration"]
    of_halves = full_metrics(probs, labels, list("abc"), resamples=2)["calibration"]
    a, b = of_folds["temperature_scaling"], of_halves["temperature_scaling"]
    assert a["temperature"] == b["temperature"] and a["nll_after"] != b["nll_after"]
    assert sum(bin["count"] for bin in of_folds["bins"]) == 200
    one_patient = full_metrics(probs, labels, list("abc"), groups=np.zeros(200), resamples=2)
    assert one_patient["calibration"]["temperature_scaling"] is None


def test_same_seed_same_numbers():
    probs, labels = draw(100, 3)
    once, again, other = (full_metrics(probs, labels, list("abc"), seed=s, resamples=50) for s in (1, 1, 2))
    assert once == again != other


def test_the_docstring_names_every_key():
    probs, labels = draw(30, 2)
    text = set(re.findall(r"\w+", evaluation.metrics.__doc__))

    def keys(value):
        if isinstance(value, list):
            for item in value:
                yield from keys(item)
        elif isinstance(value, dict):
            for key, item in value.items():
                yield key
                yield from keys(item)

    found = full_metrics(probs, labels, ["甲", "乙"], resamples=2)
    assert set(keys(found)) - {"甲", "乙"} <= text
    first, last = ["schema", "n_images", "n_groups", "classes"], ["per_class", "confusion_matrix"]
    assert list(found) == [*first, *HEADLINE, *last, "calibration", "interval"]


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(UserError, match="no images"):
        full_metrics(np.zeros((0, 2)), np.zeros(0, int), ["a", "b"])
    with pytest.raises(UserError, match="1 of 2 images are not finite"):
        full_metrics(np.array([[0.5, 0.5], [np.nan, np.nan]]), np.array([0, 1]), ["a", "b"])


def test_the_baseline_is_the_most_frequent_class_of_training_scored_on_validation():
    assert majority_baseline(np.array([0, 0, 1, 2, 2, 2]), np.array([2, 0, 0, 0])) == (2, 0.25)


@pytest.mark.parametrize("seed", range(8))
def test_the_metrics_of_an_epoch_equal_scikit_learns_also_where_classes_are_absent(seed):
    random = np.random.default_rng(seed)
    labels = random.choice([0, 2, 3], 20)  # class 1 has no image, class 4 is neither there nor predicted
    probs = random.dirichlet(np.ones(5), 20)
    probs[:, 4] = 0
    probs /= probs.sum(1, keepdims=True)
    predictions = probs.argmax(1)
    found = classification_metrics(probs, labels)
    present = np.unique(labels)
    assert found["acc"] == pytest.approx(sk.accuracy_score(labels, predictions))
    assert found["balanced_acc"] == pytest.approx(
        sk.recall_score(labels, predictions, labels=present, average="macro")
    )
    assert found["macro_f1"] == pytest.approx(
        sk.f1_score(labels, predictions, average="macro", zero_division=0)
    )
    assert found["loss"] == pytest.approx(sk.log_loss(labels, probs, labels=range(5)))
