"""No group on both sides, nothing lost, every class where it must be, the same split for the same seed."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.splits import Split, hold_out, k_folds, splits_record

NAMES = ("正常", "肺炎", "气胸", "结核")
quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)
ratios = st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.5])


@pytest.fixture(autouse=True)
def no_warnings():
    """A warning of a library below is noise that the user cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@st.composite
def labelled(draw, at_least: int):
    """Labels in any order, with at least `at_least` images of each of 2 to 4 classes."""
    counts = draw(st.lists(st.integers(at_least, at_least + 12), min_size=2, max_size=4))
    return np.array(draw(st.permutations(np.repeat(np.arange(len(counts)), counts).tolist())))


@st.composite
def with_patients(draw, at_least: int):
    """Patients of one class each, at least `at_least` per class, with 1 to 4 images each."""
    n_patients = draw(st.lists(st.integers(at_least, at_least + 5), min_size=2, max_size=4))
    class_of = np.repeat(np.arange(len(n_patients)), n_patients)
    n_images = draw(st.lists(st.integers(1, 4), min_size=len(class_of), max_size=len(class_of)))
    patients = np.repeat(np.arange(len(class_of)), n_images)
    order = np.array(draw(st.permutations(range(len(patients)))))
    return class_of[patients][order], patients[order]


@st.composite
def with_mixed_groups(draw):
    """Groups that may hold images of several classes, as when one patient has both."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), min_size=6, max_size=30))
    labels, groups = np.array(pairs).T
    return np.unique(labels, return_inverse=True)[1], np.unique(groups, return_inverse=True)[1]


def names(labels) -> tuple[str, ...]:
    return NAMES[: labels.max() + 1]


def check(split: Split, labels, groups=None) -> None:
    """Nothing is lost, repeated or on both sides; indices ascend."""
    assert np.array_equal(np.sort(np.concatenate([split.train, split.val])), np.arange(len(labels)))
    for side in (split.train, split.val):
        assert len(side) and (np.diff(side) > 0).all()
    if groups is not None:
        assert not set(groups[split.train]) & set(groups[split.val])


def on_both_sides(split: Split, labels) -> bool:
    return set(labels[split.train]) == set(labels[split.val]) == set(labels)


# ---- hold-out


@quick
@given(labelled(2), ratios, seeds)
def test_hold_out_takes_its_share_of_every_class(labels, ratio, seed):
    split = hold_out(labels, None, ratio, seed, names(labels))
    check(split, labels)
    assert on_both_sides(split, labels)
    for c in range(labels.max() + 1):
        n, held = (labels == c).sum(), (labels[split.val] == c).sum()
        assert abs(held - n * ratio) <= 0.5 or held == 1


@quick
@given(with_patients(2), ratios, seeds)
def test_hold_out_by_patient(data, ratio, seed):
    labels, patients = data
    split = hold_out(labels, patients, ratio, seed, names(labels))
    check(split, labels, patients)
    assert on_both_sides(split, labels)


@quick
@given(with_mixed_groups(), ratios, seeds)
def test_hold_out_by_mixed_groups_is_right_or_refused(data, ratio, seed):
    labels, groups = data
    try:
        split = hold_out(labels, groups, ratio, seed, names(labels))
    except UserError:
        return
    check(split, labels, groups)
    assert on_both_sides(split, labels)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.25, 0.5])
def test_hold_out_by_patient_is_near_the_ratio(ratio):
    random = np.random.RandomState(0)
    patients = np.repeat(np.arange(120), random.randint(1, 5, 120))
    labels = patients % 3
    split = hold_out(labels, patients, ratio, 1, NAMES[:3])
    for c in range(3):
        assert abs((labels[split.val] == c).sum() / (labels == c).sum() - ratio) < 0.05


def test_hold_out_by_patient_with_fewer_images_than_folds():
    """A ratio of 0.05 means 20 folds; six images of each class are enough all the same."""
    labels, patients = np.repeat([0, 1], 6), np.arange(12)
    split = hold_out(labels, patients, 0.05, 0, NAMES[:2])
    check(split, labels, patients)
    assert on_both_sides(split, labels) and len(split.val) == 2


def test_hold_out_refuses_the_impossible():
    with pytest.raises(UserError, match="'肺炎' has 1"):
        hold_out(np.array([0, 0, 1, 0]), None, 0.2, 0, NAMES[:2])
    with pytest.raises(UserError, match="'气胸' has 0"):
        hold_out(np.array([0, 0, 1, 1]), None, 0.2, 0, NAMES[:3])
    with pytest.raises(UserError, match="'肺炎' has images of only 1 patient;"):
        hold_out(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 2]), 0.2, 0, NAMES[:2])
    # three patients, each class in two of them: two patients always share a side, and with them a class
    labels, groups = np.array([0, 1, 1, 2, 2, 0]), np.array([0, 0, 1, 1, 2, 2])
    with pytest.raises(UserError, match="no split by patient"):
        hold_out(labels, groups, 0.2, 0, NAMES[:3])


# ---- folds


@quick
@given(st.integers(2, 6).flatmap(lambda k: st.tuples(st.just(k), labelled(k))), seeds)
def test_folds_validate_every_image_once(data, seed):
    k, labels = data
    folds = k_folds(labels, None, k, seed, names(labels))
    assert len(folds) == k
    for fold in folds:
        check(fold, labels)
        assert on_both_sides(fold, labels)
    assert np.array_equal(np.sort(np.concatenate([fold.val for fold in folds])), np.arange(len(labels)))
    held = np.array([np.bincount(labels[fold.val], minlength=labels.max() + 1) for fold in folds])
    assert (held.max(0) - held.min(0) <= 1).all()  # stratified: even to one image


@quick
@given(st.integers(2, 5).flatmap(lambda k: st.tuples(st.just(k), with_patients(k))), seeds)
def test_folds_by_patient(data, seed):
    k, (labels, patients) = data
    folds = k_folds(labels, patients, k, seed, names(labels))
    assert len(folds) == k
    for fold in folds:
        check(fold, labels, patients)
        assert set(labels[fold.train]) == set(labels)
    assert np.array_equal(np.sort(np.concatenate([fold.val for fold in folds])), np.arange(len(labels)))


@quick
@given(with_mixed_groups(), st.integers(2, 4), seeds)
def test_folds_by_mixed_groups_are_right_or_refused(data, k, seed):
    labels, groups = data
    try:
        folds = k_folds(labels, groups, k, seed, names(labels))
    except UserError:
        return
    for fold in folds:
        check(fold, labels, groups)
    assert np.array_equal(np.sort(np.concatenate([fold.val for fold in folds])), np.arange(len(labels)))


def test_a_class_smaller_than_the_folds_is_named():
    labels = np.repeat([0, 1, 2], [9, 3, 4])
    with pytest.raises(UserError) as caught:
        k_folds(labels, None, 5, 0, NAMES[:3])
    message = str(caught.value)
    assert "'肺炎' has 3 images; '气胸' has 4 images" in message and "正常" not in message
    assert "--n-splits 3" in message
    with pytest.raises(UserError) as caught:
        k_folds(np.array([0, 0, 1]), None, 2, 0, NAMES[:2])
    assert "'肺炎' has 1 images" in str(caught.value) and "--n-splits" not in str(caught.value)


def test_a_class_of_too_few_patients_is_named():
    labels, patients = np.repeat([0, 1], [6, 6]), np.array([0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 7, 7])
    k_folds(labels, patients, 2, 0, NAMES[:2])
    with pytest.raises(UserError, match=r"at least 3 patients.*'肺炎' has images of only 2 patients"):
        k_folds(labels, patients, 3, 0, NAMES[:2])


# ---- seeds and the record


@pytest.mark.parametrize("grouped", [False, True])
def test_the_seed_alone_decides(grouped):
    labels = np.tile([0, 1, 1], 40)
    groups = np.arange(120) // 3 if grouped else None

    def held(seed: int) -> list[list[int]]:
        splits = [
            hold_out(labels, groups, 0.2, seed, NAMES[:2]),
            *k_folds(labels, groups, 4, seed, NAMES[:2]),
        ]
        return [split.val.tolist() for split in splits]

    np.random.seed(6)  # the global random state has no say
    first = held(42)
    np.random.seed(7)
    assert held(42) == first
    for seed in (0, 1, 43):
        assert all(a != b for a, b in zip(held(seed), first, strict=True))


def test_record_holds_facts_and_paths():
    splits = [Split(np.array([1, 2]), np.array([0])), Split(np.array([0]), np.array([1, 2]))]
    record = splits_record(splits, ["a/1.png", "a/2.png", "肺/3.png"], random_state=42, n_splits=2)
    assert json.loads(json.dumps(record)) == {
        "random_state": 42,
        "n_splits": 2,
        "folds": [
            {"train": ["a/2.png", "肺/3.png"], "val": ["a/1.png"]},
            {"train": ["a/1.png"], "val": ["a/2.png", "肺/3.png"]},
        ],
    }
