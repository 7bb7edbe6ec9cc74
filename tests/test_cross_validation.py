"""Cross-validation through the command line: folds, summary, stopped and continued."""

import csv
import json
import shutil

import pytest
from quick import Killed, history_of, raising_at, train

import training.fit as fit_module

pytestmark = pytest.mark.usefixtures("quick_report")


def cross_validate(data, output, *flags):
    # of random depth, so that a fold knows what was drawn before it
    flags = ("--image-encoder", "starnet_dual_pyramid_rcf", *flags)
    return train(data, output, "--use-cv", "--n-splits", 3, "--epochs", 2, *flags)


@pytest.fixture(scope="module")
def cv_run(quick_report, class_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("cv") / "cv"
    assert cross_validate(class_folder, output, "--group-pattern", r"^(P\d+)_") == 0
    return output


def test_cross_validation_predicts_every_image_once_and_out_of_fold(cv_run, class_folder):
    with open(cv_run / "oof_predictions.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (cv_run / "oof_predictions.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    assert sorted(row["path"] for row in rows) == sorted(
        path.relative_to(class_folder).as_posix() for path in class_folder.rglob("*.png")
    )
    folds = json.loads((cv_run / "splits.json").read_text("utf-8"))["folds"]
    for row in rows:
        assert row["path"] in folds[int(row["fold"]) - 1]["val"]
        assert row["path"] not in folds[int(row["fold"]) - 1]["train"]
        assert row["label"] == row["path"].split("/")[0]
        probs = {name: float(row[f"prob_{name}"]) for name in ("正常", "肺炎", "气胸")}
        assert sum(probs.values()) == pytest.approx(1) and max(probs, key=probs.get) == row["prediction"]


def test_cv_summary_is_the_mean_and_both_deviations_of_the_folds(cv_run):
    summary = json.loads((cv_run / "cv_summary.json").read_text("utf-8"))
    last = [history_of(cv_run / f"fold_{k}")["val_loss"][-1] for k in (1, 2, 3)]
    mean = sum(last) / 3
    squares = sum((x - mean) ** 2 for x in last)
    entry = summary["last_epoch"]["val_loss"]
    assert entry["mean"] == pytest.approx(mean)
    assert entry["std_population"] == pytest.approx((squares / 3) ** 0.5)
    assert entry["std_sample"] == pytest.approx((squares / 2) ** 0.5)
    best = [max(history_of(cv_run / f"fold_{k}")["val_acc"]) for k in (1, 2, 3)]
    assert summary["best_val_acc"]["mean"] == pytest.approx(sum(best) / 3)


def test_folds_differ_and_have_the_guides_files(cv_run):
    for k in (1, 2, 3):
        assert {"checkpoint_latest.pth", "checkpoint_best.pth", "history.json"} <= {
            p.name for p in (cv_run / f"fold_{k}").iterdir()
        }
    assert history_of(cv_run / "fold_1")["train_loss"] != history_of(cv_run / "fold_2")["train_loss"]


def test_a_killed_cross_validation_continued_by_the_same_command_ends_with_the_same_summary(
    cv_run, class_folder, tmp_path, monkeypatch
):
    killed_in_fold_2, _ = raising_at(4, fit_module.validate)  # fold 1: two epochs; fold 2: the second
    flags = ("--group-pattern", r"^(P\d+)_")
    monkeypatch.setattr(fit_module, "validate", killed_in_fold_2)
    with pytest.raises(Killed):
        cross_validate(class_folder, tmp_path / "cv", *flags)
    monkeypatch.undo()
    assert not (tmp_path / "cv" / "cv_summary.json").exists()
    assert cross_validate(class_folder, tmp_path / "cv", *flags) == 0
    for name in ("cv_summary.json", "oof_predictions.csv"):
        assert (tmp_path / "cv" / name).read_bytes() == (cv_run / name).read_bytes()


def test_folds_as_separate_jobs_give_the_same_summary(cv_run, class_folder, tmp_path):
    for k in (3, 1, 2):
        assert not (tmp_path / "cv" / "cv_summary.json").exists()
        assert cross_validate(class_folder, tmp_path / "cv", "--group-pattern", r"^(P\d+)_", "--fold", k) == 0
    assert (tmp_path / "cv" / "cv_summary.json").read_bytes() == (cv_run / "cv_summary.json").read_bytes()
    assert json.loads((tmp_path / "cv" / "config.json").read_text())["fold"] is None  # it is of all folds


def test_other_options_or_other_images_do_not_continue_a_cross_validation(
    cv_run, class_folder, tmp_path, capsys
):
    for of_one, way_out in ([], "--overwrite to replace it"), (["--fold", 2], "or clear the folder by hand"):
        other = ["--group-pattern", r"^(P\d+)_", "--embed-dim", 8, *of_one]
        assert cross_validate(class_folder, cv_run, *other) == 2
        error = capsys.readouterr().err
        assert "--embed-dim 16 there, 8 now" in error and way_out in error
    changed = tmp_path / "images"
    shutil.copytree(class_folder, changed)
    (changed / "正常" / "P000_0.png").rename(changed / "正常" / "P099_0.png")
    assert cross_validate(changed, cv_run, "--group-pattern", r"^(P\d+)_") == 2
    error = capsys.readouterr().err
    assert "1 new:\n  正常/P099_0.png" in error and "1 gone:\n  正常/P000_0.png" in error


def test_edited_sentences_do_not_mix_into_a_begun_cross_validation(class_folder, tmp_path, capsys):
    texts = tmp_path / "texts.json"
    texts.write_text('{"正常": "一"}', encoding="utf-8")
    flags = ("--class-texts-file", texts)
    assert cross_validate(class_folder, tmp_path / "cv", *flags, "--fold", 1) == 0
    texts.write_text('{"正常": "二"}', encoding="utf-8")
    assert cross_validate(class_folder, tmp_path / "cv", *flags, "--fold", 2) == 2
    assert "class sentences have changed" in capsys.readouterr().err
