"""A splits.json that was edited, or no longer fits the data, stops the run and says what is wrong."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import UserError
from common.files import write_json
from data.scan import ImageFolder
from data.splits import k_folds, splits_from_record, splits_record
from training.cross_validation import stored_splits

CLASSES = ("正常", "肺炎")
PATHS = tuple(f"{name}/é{i:02d}.png" for name in CLASSES for i in range(10))
LABELS = np.repeat([0, 1], 10)
PATIENTS = np.arange(20) // 2
FOLDER = ImageFolder(Path("图像"), CLASSES, PATHS, LABELS, ())
SPLITS = k_folds(LABELS, PATIENTS, 5, 42, CLASSES)


@pytest.fixture
def record() -> dict:
    made = splits_record(SPLITS, PATHS, n_splits=5, dataset_fingerprint="f" * 8)
    return json.loads(json.dumps(made, default=list))


def read(record, groups=PATIENTS, folder=FOLDER, fingerprint="f" * 8):
    return splits_from_record(record, "run/splits.json", folder, groups, fingerprint, 5)


def refusal(record, **other) -> str:
    with pytest.raises(UserError) as caught:
        read(record, **other)
    message = str(caught.value)
    assert "run/splits.json" in message and "restore" in message
    assert "another --output-dir (or with --overwrite)" in message
    return message


def same(splits) -> bool:
    return all(
        np.array_equal(one.train, other.train) and np.array_equal(one.val, other.val)
        for one, other in zip(splits, SPLITS, strict=True)
    )


def test_what_was_written_is_read_back_in_any_order_and_spelling(record):
    assert same(read(record)) and same(read(record, groups=None))
    for fold in record["folds"]:
        fold["train"] = [
            name.replace("é", "e\u0301") for name in reversed(fold["train"])
        ]  # as macOS writes it
    assert same(read(record))
    of_macos = ImageFolder(FOLDER.root, CLASSES, tuple(p.replace("é", "e\u0301") for p in PATHS), LABELS, ())
    assert same(read(record, folder=of_macos))


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"dataset_fingerprint": "ffffffff"},
        {"folds": []},
        {"dataset_fingerprint": "ffffffff", "folds": {"train": [], "val": []}},
        {"dataset_fingerprint": "ffffffff", "folds": [{"train": ["a"]}]},
        {"dataset_fingerprint": "ffffffff", "folds": [{"train": ["a"], "val": "b"}]},
        {"dataset_fingerprint": "ffffffff", "folds": [{"train": ["a"], "val": [1]}]},
        {"dataset_fingerprint": "ffffffff", "folds": ["a"]},
    ],
)
def test_another_form_is_refused(broken):
    assert "is no record of folds" in refusal(broken)


def test_another_number_of_folds_is_refused(record):
    del record["folds"][3]
    assert "holds 4 folds, not --n-splits 5" in refusal(record)


def test_new_gone_and_changed_images_are_named(record):
    renamed = ("正常/新.png", *PATHS[1:])
    message = refusal(record, folder=ImageFolder(FOLDER.root, CLASSES, renamed, LABELS, ()))
    assert "1 new:\n  正常/新.png" in message and f"1 gone:\n  {PATHS[0]}" in message
    assert "have changed in content" in refusal(record, fingerprint="e" * 8)
    record["folds"][0]["train"][0] = "正常/谁.png"
    assert "1 gone:\n  正常/谁.png" in refusal(record)


def test_an_image_that_validates_twice_or_never_is_named(record):
    first, second = (fold["val"] for fold in record["folds"][:2])
    twice, never = first[0], second[0]
    second[0] = twice
    message = refusal(record)
    assert f"{twice}: 2 times" in message and f"{never}: 0 times" in message


def test_an_empty_side_is_refused(record):
    record["folds"][1]["train"] = []
    assert '"train" of fold 2 is empty' in refusal(record)
    moved = record["folds"][0]
    record["folds"][2]["val"] += moved["val"]
    moved["val"] = []
    assert '"val" of fold 1 is empty' in refusal(record)


def test_a_leak_into_training_is_refused(record):
    fold = record["folds"][2]
    fold["train"] += fold["val"]
    message = refusal(record)
    assert "fold 3 must have every image once" in message and f"{fold['val'][0]} is there twice" in message


def test_a_shortened_or_repeating_training_side_is_refused(record):
    fold = record["folds"][4]
    dropped = fold["train"][4:]
    fold["train"] = fold["train"][:4]
    message = refusal(record)
    assert "fold 5" in message and f"{dropped[0]} is on neither side" in message
    fold["train"] += [*dropped, dropped[0]]
    assert f"{dropped[0]} is there twice" in refusal(record)


def test_a_patient_on_both_sides_is_refused(record):
    """As after an edit of --groups-file between two folds."""
    one, other = SPLITS[0].val[0], SPLITS[0].train[0]
    groups = np.arange(20)
    groups[one] = groups[other]
    message = refusal(record, groups=groups)
    assert "fold 1 trains and validates on one patient, on identical images, or on one in two" in message
    assert f"{PATHS[other]} | {PATHS[one]}" in message


def test_a_fold_that_does_not_train_on_a_class_is_refused(record):
    ten = list(PATHS)
    held = [ten[10:], ten[:3], ten[3:6], ten[6:8], ten[8:10]]
    record["folds"] = [{"train": [p for p in ten if p not in val], "val": val} for val in held]
    assert "fold 1 lacks '肺炎'" in refusal(record, groups=None)


def test_the_run_reads_its_own_file(record, tmp_path):
    data = SimpleNamespace(folder=FOLDER, groups=PATIENTS, fingerprint="f" * 8)
    write_json(tmp_path / "config.json", {"n_splits": 5})
    write_json(tmp_path / "splits.json", record)
    assert same(stored_splits(tmp_path / "splits.json", data))
    write_json(tmp_path / "config.json", {"n_splits": 4})
    with pytest.raises(UserError, match="holds 5 folds, not --n-splits 4"):
        stored_splits(tmp_path / "splits.json", data)
