"""evaluate_clip.py on folders whose classes fit, are renamed, are missing, are too many."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from quick import train
from sklearn.metrics import accuracy_score, roc_auc_score

import evaluate_clip
from common.errors import UserError
from common.run_files import find_checkpoints
from data.scan import ImageFolder, scan_folder
from evaluation.checkpoints import write_file
from evaluation.claim import claim_items
from evaluation.results import read_predictions
from evaluation.run_folder import read_run_folder
from evaluation.trained import load_trained
from training.outputs import locked

FLAGS = ["--num-workers", "0", "--gpu-id", "-1"]


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.report.write_report", lambda folder: None)
        yield


def evaluate(checkpoints, data, output, *flags):
    paths = ["--checkpoint", *checkpoints, "--data-dir", data, "--output-dir", output]
    return evaluate_clip.main([*map(str, paths), *FLAGS, *flags])


@pytest.fixture(scope="module")
def elsewhere(class_folder, tmp_path_factory):
    """Another hospital: one class under another name, one missing, one that the model does not know."""
    root = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(class_folder / "正常", root / "正常")
    shutil.copytree(class_folder / "肺炎", root / "pneumonia")
    shutil.copytree(class_folder / "气胸", root / "骨折")
    for path in root.rglob("*.png"):
        ImageOps.invert(Image.open(path).convert("L")).save(path)  # not the images that the model knows
        path.rename(path.with_name(f"x_{path.name}"))
    return root


def test_numbers_are_those_of_scikit_learn_on_the_written_predictions(finished, elsewhere, tmp_path, capsys):
    flags = ["--rename", "pneumonia=肺炎", "--skip-extra", "--group-pattern", r"_(P\d+)_"]
    assert evaluate([finished], elsewhere, tmp_path, *flags) == 0
    said = capsys.readouterr().out
    assert "48 images, 50.0 % of the most frequent class: accuracy " in said
    left_out = "note: left out 24 images of 1 folder that is no class of the model (--skip-extra)\n  骨折: 24"
    assert left_out in said and "no images of 气胸" in said
    findings = json.loads((tmp_path / "data_check.json").read_text("utf-8"))["findings"]
    (found,) = (found for found in findings if found["kind"] == "no_class")
    assert (found["count"], found["examples"]) == (24, ["骨折: 24"])
    excluded = "excluded: 24 images of no class of the model (骨折: 24), see data_check.json; the data check"
    assert excluded in claim_items(read_run_folder(tmp_path), None, 0)[34].answer
    run = read_predictions(tmp_path / "predictions.csv")
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert len(run.paths) == 48 and metrics["n_groups"] == 24
    assert {run.classes[c] for c in run.labels} == {"正常", "肺炎"}
    assert all(
        ("pneumonia" in path) == (run.classes[c] == "肺炎")
        for path, c in zip(run.paths, run.labels, strict=True)
    )
    assert metrics["accuracy"]["value"] == pytest.approx(accuracy_score(run.labels, run.probs.argmax(1)))
    c = run.classes.index("肺炎")
    expected = roc_auc_score(run.labels == c, run.probs[:, c])
    assert metrics["per_class"]["肺炎"]["roc_auc"]["value"] == pytest.approx(expected)
    assert metrics["per_class"]["气胸"]["sensitivity"]["value"] is None
    record = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert record["images_per_class"] == {"正常": 24, "气胸": 0, "肺炎": 24}


def test_several_checkpoints_are_averaged(finished, elsewhere, tmp_path):
    flags = ["--rename", "pneumonia=肺炎", "骨折=气胸", "--no-amp"]
    files = [finished / "checkpoint_latest.pth", finished / "checkpoint_best.pth"]
    probs = []
    for number, checkpoints in enumerate((files[:1], files[1:], files)):
        assert evaluate(checkpoints, elsewhere, tmp_path / str(number), *flags) == 0
        probs.append(read_predictions(tmp_path / str(number) / "predictions.csv").probs)
    np.testing.assert_allclose(probs[2], (probs[0] + probs[1]) / 2, atol=1e-6)
    folder = read_run_folder(tmp_path / "2")
    assert folder.differing == []  # one run's
    found = [(model["epoch"], model["epoch_is"]) for model in folder.config["models"]]
    history = json.loads((finished / "history.json").read_text("utf-8"))["val_acc"]
    best = 1 + history.index(max(history))
    assert found == [(4, "last"), (best, "chosen")]


def test_an_ensemble_of_models_trained_in_other_ways_says_in_what(finished, elsewhere, tmp_path):
    config = torch.load(finished / "checkpoint_latest.pth", weights_only=True)["config"]
    changed = {"learning_rate": 0.5, "gpu_id": 3, "save_best": False, "data_dir": "moved"}
    of_before = {key: value for key, value in config.items() if key != "cutmix_prob"}
    other = changed_copy(finished, tmp_path / "other.pth", config=of_before | changed)
    flags = ["--rename", "pneumonia=肺炎", "--skip-extra"]
    assert evaluate([finished, other], elsewhere, tmp_path / "out", *flags) == 0
    folder = read_run_folder(tmp_path / "out")
    assert folder.differing == ["learning_rate"]
    assert [model["learning_rate"] for model in folder.config["models"]] == [config["learning_rate"], 0.5]
    assert "gpu_id" not in folder.config["models"][0]  # where it was trained says nothing of the model


def known_to_model(folder):
    """Their number, and the paths in known_images.csv."""
    listed = folder / "known_images.csv"
    lines = listed.read_text("utf-8-sig").splitlines()[1:] if listed.exists() else ()
    return json.loads((folder / "config.json").read_text("utf-8"))["n_known_images"], tuple(lines)


def test_images_that_the_model_was_trained_on_are_named(finished, class_folder, elsewhere, tmp_path, capsys):
    assert evaluate([finished], class_folder, tmp_path / "own") == 0
    n = len(scan_folder(class_folder).paths)
    assert f"danger: all {n} images were used to train or validate" in capsys.readouterr().out
    assert known_to_model(tmp_path / "own") == (n, scan_folder(class_folder).paths)

    fits = ["--rename", "pneumonia=肺炎", "--skip-extra"]
    assert evaluate([finished], elsewhere, tmp_path / "none", *fits) == 0
    assert "to train or validate" not in capsys.readouterr().out
    assert known_to_model(tmp_path / "none") == (0, ())

    mixed = Path(shutil.copytree(elsewhere, tmp_path / "mixed"))
    one = sorted((class_folder / "肺炎").iterdir())[0]
    Image.open(one).save(mixed / "pneumonia" / "renamed.bmp")  # the same pixels in another kind of file
    assert evaluate([finished], mixed, tmp_path / "one", *fits) == 0
    assert "danger: of 49 images 1 was used to train or validate" in capsys.readouterr().out
    assert known_to_model(tmp_path / "one") == (1, ("pneumonia/renamed.bmp",))
    found = json.loads((tmp_path / "one" / "data_check.json").read_text("utf-8"))["findings"][0]
    assert found["kind"] == "known_to_model" and found["examples"] == ["pneumonia/renamed.bmp"]


def changed_copy(run, path, **change):
    """The run's checkpoint with other parts; those that are None are left out."""
    content = torch.load(run / "checkpoint_latest.pth", weights_only=True) | {"checksum": None} | change
    write_file(path, {key: value for key, value in content.items() if value is not None})
    for tower in run.glob("frozen_*"):
        shutil.copy(tower, path.parent)
    return path


def test_a_checkpoint_that_keeps_no_images_says_so(finished, class_folder, elsewhere, tmp_path, capsys):
    old = changed_copy(finished, tmp_path / "old.pth", image_keys=None)
    flags = ["--rename", "pneumonia=肺炎", "--skip-extra"]
    assert evaluate([old], elsewhere, tmp_path / "out", *flags) == 0
    assert "did not keep which images" in " ".join(capsys.readouterr().out.split())
    assert known_to_model(tmp_path / "out") == (None, ())
    assert evaluate([old], class_folder, tmp_path / "own") == 0  # it knows what all of them were
    assert known_to_model(tmp_path / "own")[0] == len(scan_folder(class_folder).paths)
    mixed = Path(shutil.copytree(elsewhere, tmp_path / "mixed"))
    shutil.copy(sorted((class_folder / "正常").iterdir())[0], mixed / "正常" / "same.png")
    assert evaluate([old, finished], mixed, tmp_path / "both", *flags) == 0
    assert "did not keep which images" in " ".join(capsys.readouterr().out.split())
    assert known_to_model(tmp_path / "both") == (1, ("正常/same.png",))
    findings = json.loads((tmp_path / "both" / "data_check.json").read_text("utf-8"))["findings"]
    levels = {f["kind"]: f["level"] for f in findings}
    assert levels["known_to_model"] == "danger" and levels["known_to_model_unknown"] == "warning"


def test_images_of_a_validation_folder_are_known_too(class_folder, elsewhere, tmp_path, quick_report):
    val = Path(shutil.copytree(elsewhere, tmp_path / "val"))
    (val / "pneumonia").rename(val / "肺炎")
    (val / "骨折").rename(val / "气胸")
    assert train(class_folder, tmp_path / "run", "--val-dir", val, "--epochs", 1) == 0
    assert evaluate([tmp_path / "run" / "checkpoint_best.pth"], val, tmp_path / "out") == 0
    assert known_to_model(tmp_path / "out")[0] == len(scan_folder(val).paths)


def test_other_images_in_a_folder_of_the_same_path_are_not_called_known(
    finished, elsewhere, tmp_path, capsys
):
    """As where each user mounts the own images at one place."""
    config = torch.load(finished / "checkpoint_latest.pth", weights_only=True)["config"]
    flags = ["--rename", "pneumonia=肺炎", "--skip-extra"]
    for name in ("data_dir", "val_dir"):
        there = changed_copy(finished, tmp_path / "there.pth", config=config | {name: str(elsewhere)})
        assert evaluate([there], elsewhere, tmp_path / name, *flags) == 0
        streams = capsys.readouterr()
        said = " ".join(streams.out.split())
        assert "written anew cannot be recognised" in said and "danger" not in said
        assert known_to_model(tmp_path / name) == (None, ())


@pytest.mark.parametrize(("flags", "code"), [(["--num-workers", "0"], 0), (["--num-workers", "2"], 2)])
def test_too_little_shared_memory_is_said_for_the_processes_that_were_asked_for(
    finished, elsewhere, tmp_path, monkeypatch, capsys, flags, code
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("training.dataset.MEMORY_FOR_IMAGES", 0)
    monkeypatch.setattr("data.loader.SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("data.loader.shutil.disk_usage", lambda path: usage._replace(free=0))
    fits = ["--rename", "pneumonia=肺炎", "--skip-extra"]
    assert evaluate([finished], elsewhere, tmp_path / "out", *fits, *flags, "--batch-size", "512") == code
    if code:
        # 512 images of 32 x 32 in colour, two batches for each process
        assert f"need {2 * min(2, os.cpu_count()) * 512 * 3 * 32**2 / 1e6:.0f} MB" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [torch.zeros(()).long(), torch.zeros(2, 2).long(), torch.zeros(3), [1]])
def test_image_keys_of_another_form_are_refused(finished, elsewhere, tmp_path, capsys, keys):
    odd = changed_copy(finished, tmp_path / "odd.pth", image_keys=keys)
    assert evaluate([odd], elsewhere, tmp_path / "out") == 2
    assert "in another form: image_keys" in capsys.readouterr().err


def test_results_are_not_overwritten_without_being_told(finished, class_folder, tmp_path, capsys):
    before = sorted(path.name for path in finished.iterdir())
    assert evaluate([finished], class_folder, finished, "--overwrite") == 2  # it would remove the model
    assert "a folder of its own" in capsys.readouterr().err
    assert sorted(path.name for path in finished.iterdir()) == before
    for name in ("checkpoint_best.pth", "splits.json", "fold_3/history.json"):
        kept = tmp_path / name[0] / name
        kept.parent.mkdir(parents=True)
        kept.touch()
        assert evaluate([finished], class_folder, tmp_path / name[0], "--overwrite") == 2
        assert f"is the folder of a run (it holds {kept.name})" in capsys.readouterr().err and kept.exists()
    assert evaluate([finished], class_folder, class_folder / "out") == 2
    assert "lies in --data-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("came", "flags", "said"),
    [
        ("metrics.json", [], "holds a run's results (metrics.json)"),
        ("checkpoint_latest.pth", ["--overwrite"], "the folder of a run (it holds checkpoint_latest.pth)"),
        (".lock", ["--overwrite"], "is in use by another run"),  # a training holds it to its end
    ],
)
def test_what_another_program_wrote_or_writes_there_meanwhile_stays(
    finished, class_folder, tmp_path, capsys, monkeypatch, came, flags, said
):
    mean_probs = evaluate_clip.mean_probs

    def beside_another(*given):
        (tmp_path / came).write_text("another's")
        if came == ".lock":
            other.enter_context(locked(tmp_path))
        return mean_probs(*given)

    monkeypatch.setattr(evaluate_clip, "mean_probs", beside_another)
    with contextlib.ExitStack() as other:
        assert evaluate([finished], class_folder, tmp_path, *flags) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / came).exists() and not (tmp_path / "predictions.csv").exists()


def test_folders_and_classes_that_do_not_fit_are_all_named(elsewhere):
    folder = scan_folder(elsewhere)
    with pytest.raises(UserError) as refused:
        evaluate_clip.match_classes(
            folder,
            ("正常", "气胸", "肺炎"),
            ["pneumona=肺炎", "骨折=肺", "正常=肺炎"] + ["正常=气胸"] * 2,
            False,
        )
    text = str(refused.value)
    assert "--rename: the folder '正常' cannot be '肺炎' and '气胸' at once" in text
    assert "'pneumona' is no folder of --data-dir (did you mean 'pneumonia'" in text
    assert "'肺' is no class of the model" in text and "'pneumonia' is no class of the model" in text
    with pytest.raises(UserError) as refused:
        evaluate_clip.match_classes(folder, ("正常", "气胸", "肺炎"), ["pneumonia=x", "骨折=气胸"], False)
    assert refused.value.problems == (
        "--rename pneumonia=x: 'x' is no class of the model",
        "the model's classes are 正常, 气胸, 肺炎; the folders pneumonia, 正常, 骨折",
    )


def test_bad_options_are_all_named(tmp_path, capsys):
    typed = ["--data-dir", "d", "--rename", "a", "", "b=c", "--batch-size", "0"]
    typed += ["--gpu-id", "-5", "--num-workers", "two", "--checkpoint", "c", "--heat", "--cache-dir", ""]
    assert evaluate_clip.main(typed) == 2
    said = capsys.readouterr().err
    for words in (
        "unknown option --heat", "--output-dir is required",
        "--rename 'a' must be THEIRS=OURS", "--rename must be a non-empty text, not ''",
        "--batch-size must be a whole number, 1 to 65536, not '0'", "--num-workers must be a whole number",
        "--gpu-id must be a whole number", "--cache-dir must be a non-empty text, not ''",
    ):  # fmt: skip
        assert words in said
    assert said.count("error: --rename") == 2 and "b=c" not in said
    flags = ["--groups-file", str(tmp_path / "g.csv"), "--group-pattern", "(P)"]
    flags += ["--cache-dir", f"{__file__}/c"]
    assert evaluate([tmp_path / "a", tmp_path / "b"], __file__, __file__, *flags) == 2
    said = capsys.readouterr().err
    for words in (
        "a does not exist", "b does not exist", f"{__file__} is not a folder", "is a file",
        "g.csv does not exist", "exclude each other",
        f"--cache-dir {__file__}/c lies in", f"--cache-dir {__file__}/c cannot be",
    ):  # fmt: skip
        assert words in said
    pipe = f"pipe:touch '{tmp_path}/fetched'"
    assert evaluate([tmp_path / "a"], pipe, tmp_path / "out", "--group-pattern", "(P") == 2
    said = capsys.readouterr().err
    assert "a does not exist" in said and "'(P' is not a regular expression" in said
    assert not (tmp_path / "fetched").exists()


def test_what_a_checkpoint_path_may_be(finished, tmp_path):
    latest = finished / "checkpoint_latest.pth"
    assert find_checkpoints(finished) == find_checkpoints(latest) == [latest]
    for missing, message in (
        (tmp_path / "no", "does not exist"),
        (tmp_path, "holds no checkpoint_latest.pth"),
    ):
        with pytest.raises(UserError, match=message):
            find_checkpoints(missing)
    for number in (10, 2, 1):
        (tmp_path / f"fold_{number}").mkdir()
    with pytest.raises(UserError, match=r"not finished \(fold_1, fold_2, fold_10\)"):
        find_checkpoints(tmp_path)
    for number in (10, 2, 1):
        (tmp_path / f"fold_{number}" / "predictions.csv").touch()
    (tmp_path / "cv_summary.json").touch()
    assert [path.parent.name for path in find_checkpoints(tmp_path)] == ["fold_1", "fold_2", "fold_10"]


def test_class_features_of_the_checkpoint_are_those_of_its_sentences(finished):
    trained = load_trained(finished / "checkpoint_latest.pth", torch.device("cpu"), with_text=True)
    torch.testing.assert_close(trained.features_of(trained.class_texts)[0], trained.class_features)
    assert load_trained(finished / "checkpoint_latest.pth", torch.device("cpu")).model.text_tower is None


def test_names_with_an_equals_sign_can_be_renamed():
    folder = ImageFolder(Path("x"), ("a=b", "c"), ("a=b/1.png", "c/1.png"), np.array([0, 1]), ())
    found, _ = evaluate_clip.match_classes(folder, ("=cmd()", "c"), ["a=b==cmd()"], False)
    assert found.paths == ("a=b/1.png", "c/1.png") and found.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match="'a' is no folder of --data-dir"):
        evaluate_clip.match_classes(folder, ("=cmd()", "c"), ["a==cmd()"], False)
