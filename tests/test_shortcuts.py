"""The audit sees what features tell of patients it has not met, and takes no chance for a rule."""

import numpy as np
import pytest

from data.shortcuts import audit_shortcuts, luck


def features(n: int, **given) -> dict[str, np.ndarray]:
    plain = {name: np.zeros(n) for name in ("width", "height", "aspect", "bits", "mean", "std", "border")}
    return {**plain, "format": np.array(["PNG"] * n), "mode": np.array(["L"] * n), **given}


def test_images_of_one_patient_do_not_vouch_for_each_other():
    """Every patient has a size of their own and a class by lot: a split through patients finds a rule."""
    random = np.random.RandomState(0)
    patients = np.repeat(np.arange(60), 6)
    labels = np.repeat(random.permutation([0, 1] * 30), 6)
    given = features(360, width=random.rand(60)[patients])
    by_patient, _ = audit_shortcuts(given, labels, patients, ["a", "b"])
    by_image, _ = audit_shortcuts(given, labels, None, ["a", "b"])
    assert not by_patient["shape"].beyond_luck and not by_patient["shape"].apart
    assert by_image["shape"].balanced_accuracy > 0.75 and by_image["shape"].apart == {"a": ["b"], "b": ["a"]}


def test_random_features_are_not_taken_for_shortcuts():
    random = np.random.RandomState(0)
    labels = np.repeat([0, 1, 2], (15, 40, 60))
    for _ in range(2):
        given = features(115, width=random.rand(115), aspect=random.rand(115), mean=random.rand(115))
        audits, left_out = audit_shortcuts(given, labels, None, ["a", "b", "c"])
        assert not any(audit.beyond_luck for audit in audits.values()) and not left_out
        assert audits["format"].balanced_accuracy == audits["format"].chance == 1 / 3


def test_a_weak_trace_is_a_warning_that_gives_no_class_away():
    random = np.random.RandomState(0)
    labels = np.repeat([0, 1], 400)
    given = features(800, mean=random.normal(0.9 * labels))
    audit = audit_shortcuts(given, labels, None, ["a", "b"])[0]["brightness"]
    assert audit.beyond_luck and not audit.apart
    assert 0.55 < audit.auc["a"] < 0.8 and audit.auc["a"] == pytest.approx(audit.auc["b"])


def test_luck_is_what_guesses_hardly_ever_reach():
    random = np.random.RandomState(0)
    counts = np.array([12, 30, 80])
    labels = np.repeat([0, 1, 2], counts)
    guesses = random.choice(3, (4000, 122), p=(0.5, 0.3, 0.2))
    scores = np.mean([(guesses[:, labels == c] == c).mean(1) for c in range(3)], axis=0)
    limit = np.array([luck(guess, counts) for guess in guesses])
    assert (scores > limit).mean() < 0.001
    z = (scores - 1 / 3) / (limit - 1 / 3) * 4
    assert abs(z.mean()) < 0.1 and 0.9 < z.std() < 1.1
