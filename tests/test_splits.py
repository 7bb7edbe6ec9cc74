"""No group on both sides, nothing lost, every class where it must be, the same split for the same seed."""

import itertools
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from quick import train
from sklearn.model_selection import StratifiedGroupKFold

from common.errors import UserError
from data.splits import Split, hold_out, k_folds, missing_in_validation, splits_record

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
    except UserError:  # then no side for each group, of all there are, would do
        sides = (np.array(side)[groups] for side in itertools.product((0, 1), repeat=groups.max() + 1))
        assert not any(on_both_sides(Split(side == 0, side == 1), labels) for side in sides)
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


@quick
@given(with_patients(2), st.floats(0.1, 0.5), seeds)
def test_hold_out_by_patient_is_within_half_a_patient_of_its_share(data, ratio, seed):
    """Given one by one, largest first, the last to come leaves a class at most half its images off."""
    labels, patients = data
    split = hold_out(labels, patients, ratio, seed, names(labels))
    for c in range(labels.max() + 1):
        images = np.unique(patients[labels == c], return_counts=True)[1]
        held = (labels[split.val] == c).sum()
        one_patient = len(set(patients[split.val][labels[split.val] == c])) == 1
        assert abs(held - ratio * images.sum()) <= images.max() / 2 + 1e-3 or one_patient


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.45, 0.5])
def test_one_duplicate_pair_does_not_change_the_ratio(ratio):
    labels, groups = np.tile([0, 1, 2], 200), np.arange(600)
    groups[3] = 0
    split = hold_out(labels, groups, ratio, 42, NAMES[:3])
    check(split, labels, groups)
    assert np.array_equal(np.bincount(labels[split.val]), np.full(3, round(200 * ratio)))


def test_hold_out_by_patient_of_a_ratio_below_one_image_holds_out_one():
    labels, patients = np.repeat([0, 1], 6), np.arange(12)
    split = hold_out(labels, patients, 0.05, 0, NAMES[:2])
    check(split, labels, patients)
    assert on_both_sides(split, labels) and len(split.val) == 2
    labels, patients = np.repeat([0, 1], [9, 2]), np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 4])
    split = hold_out(labels, patients, 0.05, 0, NAMES[:2])
    assert split.val.tolist() in ([4, 5, 9], [4, 5, 10])  # the smaller patient of the first class


def test_hold_out_finds_a_split_that_largest_first_does_not():
    labels, patients = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 2, 3, 1, 3])
    for seed in range(20):
        split = hold_out(labels, patients, 0.2, seed, NAMES[:3])
        check(split, labels, patients)
        assert on_both_sides(split, labels)


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
        assert set(labels[fold.train]) == set(labels)
    assert np.array_equal(np.sort(np.concatenate([fold.val for fold in folds])), np.arange(len(labels)))
    notes = missing_in_validation(folds, labels, names(labels))
    assert bool(notes) == any(set(labels[fold.val]) != set(labels) for fold in folds)


def test_a_fold_may_lack_a_class_to_validate_on_but_none_to_train_on():
    patients = np.repeat(np.arange(4), 3)  # each has three of the four classes
    labels = np.array([c for patient in range(4) for c in range(4) if c != patient])
    folds = k_folds(labels, patients, 3, 0, NAMES)  # one fold has two patients, two have one and lack a class
    lone = [k for k, fold in enumerate(folds, 1) if len(fold.val) == 3]
    (note,) = missing_in_validation(folds, labels, NAMES)
    assert [int(part[5]) for part in note.split(": ")[1].split("; ")] == lone and len(lone) == 2
    assert all(set(labels[fold.train]) == set(labels) for fold in folds)

    # three patients, each pair of them with a class of its own: two of them always share a fold
    labels, patients = np.array([0, 1, 1, 2, 2, 0]), np.array([0, 0, 1, 1, 2, 2])
    with pytest.raises(UserError, match=r"found no 2 folds by patient .*: fold [12] lacks '.*add patients"):
        k_folds(labels, patients, 2, 0, NAMES[:3])
    assert missing_in_validation(k_folds(labels, None, 2, 0, NAMES[:3]), labels, NAMES[:3]) == []


def test_folds_by_patient_are_as_even_as_those_of_scikit_learn():
    random = np.random.RandomState(3)
    patients = np.repeat(np.arange(200), random.geometric(0.5, 200))
    labels = random.choice(3, 200, p=[0.6, 0.3, 0.1])[patients]
    labels[random.rand(len(labels)) < 0.1] = 0  # some patients have been well

    def uneven(sides) -> float:
        held = np.array([np.bincount(labels[val], minlength=3) for val in sides])
        return (((held - held.mean(0)) / held.sum(0)) ** 2).sum()

    theirs = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(labels, labels, patients)
    ours = k_folds(labels, patients, 5, 0, NAMES[:3])
    assert uneven(fold.val for fold in ours) <= 1.5 * uneven(val for _, val in theirs) + 1e-5


def test_a_class_smaller_than_the_folds_is_named():
    labels = np.repeat([0, 1, 2], [9, 3, 4])
    with pytest.raises(UserError) as caught:
        k_folds(labels, None, 5, 0, NAMES[:3])
    message = str(caught.value)
    assert "'肺炎' has 3; '气胸' has 4;" in message and "正常" not in message
    assert "--n-splits 3" in message
    with pytest.raises(UserError) as caught:
        k_folds(np.array([0, 0, 1]), None, 2, 0, NAMES[:2])
    assert "'肺炎' has 1;" in str(caught.value) and "--n-splits" not in str(caught.value)


def test_a_class_of_too_few_patients_is_named():
    labels, patients = np.repeat([0, 1], [6, 6]), np.array([0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 7, 7])
    k_folds(labels, patients, 2, 0, NAMES[:2])
    with pytest.raises(UserError, match=r"at least 3 patients.*'肺炎' has images of only 2 patients"):
        k_folds(labels, patients, 3, 0, NAMES[:2])
    with pytest.raises(UserError, match=r"or use --n-splits 2$"):
        k_folds(labels, patients, 5, 0, NAMES[:2])
    with pytest.raises(UserError, match=r"need at least 7 images .* or use --n-splits 2$"):
        k_folds(labels, patients, 7, 0, NAMES[:2])
    patients[6:] = 6
    with pytest.raises(UserError, match=r"leave the class out$"):
        k_folds(labels, patients, 5, 0, NAMES[:2])


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


@quick
@given(with_mixed_groups(), st.permutations(range(8)), seeds)
def test_how_groups_are_numbered_has_no_say(data, numbers, seed):
    labels, groups = data

    def sides(groups) -> list[list[int]] | str:
        try:
            split = hold_out(labels, groups, 0.3, seed, names(labels))
            return [side.val.tolist() for side in (split, *k_folds(labels, groups, 2, seed, names(labels)))]
        except UserError as error:
            return str(error)

    assert sides(groups) == sides(10 * np.array(numbers)[groups])


def test_the_splits_of_every_version_are_these():
    """Written down: a NumPy or a scikit-learn that moves one image moves the results of a paper."""
    labels = np.repeat([0, 1, 2], [12, 8, 4])
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 8, 8, 9, 10, 11, 7, 12, 13, 14, 15, 15])

    def fold_of_each(folds) -> str:
        return "".join(str(next(k for k, fold in enumerate(folds) if i in fold.val)) for i in range(24))

    assert fold_of_each(k_folds(labels, groups, 3, 42, NAMES[:3])) == "222001110120111202021200"
    assert fold_of_each(k_folds(labels, None, 4, 42, NAMES[:3])) == "102301310322322001132013"
    assert hold_out(labels, groups, 0.25, 42, NAMES[:3]).val.tolist() == [3, 4, 11, 16, 18, 21]
    assert hold_out(labels, None, 0.25, 42, NAMES[:3]).val.tolist() == [0, 9, 10, 12, 18, 23]
    labels, groups = np.array([0, 0, 1, 1, 2, 2]), np.array([5, 6, 5, 4, 6, 1])  # as hard to place as others
    assert hold_out(labels, groups, 0.2, 42, NAMES[:3]).val.tolist() == [1, 3, 4]


def test_hold_out_moves_no_more_patients_than_both_sides_need():
    """Patient 3, once moved, spreads both classes."""
    labels, patients = np.array([0, 0, 1, 1, 1, 1]), np.array([2, 3, 0, 2, 0, 3])
    assert hold_out(labels, patients, 0.2, 42, NAMES[:2]).val.tolist() == [1, 5]


def test_record_holds_facts_and_paths():
    splits = [Split(np.array([1, 2]), np.array([0])), Split(np.array([0]), np.array([1, 2]))]
    record = splits_record(splits, ["a/1.png", "a/2.png", "肺/3.png"], random_state=42, n_splits=2)
    assert json.loads(json.dumps(record, default=list)) == {
        "random_state": 42,
        "n_splits": 2,
        "folds": [
            {"train": ["a/2.png", "肺/3.png"], "val": ["a/1.png"]},
            {"train": ["a/1.png"], "val": ["a/2.png", "肺/3.png"]},
        ],
    }


def test_folds_of_too_few_patients_are_refused_before_images_are_read_with_how_many_there_may_be(
    tmp_path, capsys
):
    for name, i, j in itertools.product("ab", range(3), range(2)):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        grey = 40 * i + 20 * j + 5 * (name == "b")
        Image.new("L", (8, 8), grey).save(tmp_path / "data" / name / f"P{i}_{j}.png")
    flags = ["--use-cv", "--n-splits", "7", "--group-pattern", r"^(P\d)", "--epochs", "1"]
    assert train(tmp_path / "data", tmp_path / "run", *flags) == 2
    said = capsys.readouterr()
    assert "or use --n-splits 3\n" in said.err and "images in" not in said.out
