"""Training through the command line's own main(), on a small made-up folder."""

import csv
import json
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quick import train

import training.fit as fit_module
import training.run as run_module
from common.errors import RunFailed, UserError
from evaluation.checkpoints import read_checkpoint
from evaluation.metrics import classification_metrics
from train_clip import main
from training.multi_config import METRICS, print_leaderboard, read_entries
from training.options import make_config
from training.resume import config_of_resumed_run
from training.state import HISTORY_KEYS, EarlyStopping

pytestmark = pytest.mark.usefixtures("quick_report")


def history_of(folder):
    return json.loads((folder / "history.json").read_text("utf-8"))


def test_an_easy_set_is_learned(finished):
    assert history_of(finished)["val_acc"][-1] > 90


def test_history_has_all_keys_at_equal_length_in_percent(finished):
    history = history_of(finished)
    assert set(history) == set(HISTORY_KEYS)
    assert {len(values) for values in history.values()} == {4}
    assert 1 < max(history["train_acc"]) <= 100


def test_config_json_holds_options_versions_classes_and_fingerprint(finished):
    config = json.loads((finished / "config.json").read_text("utf-8"))
    assert config["image_encoder_name"] == "resnet18" and config["epochs"] == 4 and config["use_amp"] is False
    assert config["classes"] == sorted(("正常", "肺炎", "气胸"))
    assert config["versions"]["torch"] == metadata.version("torch")
    assert len(config["dataset_fingerprint"]) == 64


def test_no_patient_is_on_both_sides(finished):
    (fold,) = json.loads((finished / "splits.json").read_text("utf-8"))["folds"]
    patients = [{path.split("/")[1].split("_")[0] for path in fold[side]} for side in ("train", "val")]
    assert not patients[0] & patients[1]
    assert len(fold["train"]) + len(fold["val"]) == 72


def test_checkpoints_load_without_unpickling_and_hold_what_the_guide_lists(finished):
    latest, best = (
        torch.load(finished / f"checkpoint_{name}.pth", weights_only=True) for name in ("latest", "best")
    )
    of_use = {"model", "epoch", "history", "classes", "class_texts", "class_features", "config"}
    of_training = {"optimizer", "scheduler", "scaler", "rng", "early_stopping", "in_epoch"}
    assert of_use | of_training <= set(latest)
    assert of_use <= set(best) and not of_training & set(best)


def test_best_checkpoint_is_of_the_first_best_epoch(finished):
    history = history_of(finished)
    best = torch.load(finished / "checkpoint_best.pth", weights_only=True)
    assert best["epoch"] == int(np.argmax(history["val_acc"])) + 1


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "flags",
    [
        ["--image-encoder", "starnet_dual_pyramid_rcf", "--num-workers", 2],  # random depth, loader processes
        ["--freeze-text-encoder", "--augmentation", "minimal"],
    ],
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(class_folder, tmp_path, monkeypatch, flags):
    flags = ["--epochs", 3, "--text-template", "一张{class_name}", *flags]
    assert train(class_folder, tmp_path / "whole", *flags) == 0

    validate, calls = fit_module.validate, []

    def killed_in_the_second_epoch(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return validate(*arguments)

    monkeypatch.setattr(fit_module, "validate", killed_in_the_second_epoch)
    with pytest.raises(Killed):
        train(class_folder, tmp_path / "cut", *flags)
    monkeypatch.undo()
    torch.manual_seed(999)  # a new process starts elsewhere in the random stream
    (tmp_path / "cut" / "history.json").unlink()  # as if killed between checkpoint and history
    latest = tmp_path / "cut" / "checkpoint_latest.pth"
    assert train(class_folder, tmp_path / "cut", *flags, "--resume-from", latest) == 0

    whole, cut = (read_checkpoint(tmp_path / name / "checkpoint_latest.pth") for name in ("whole", "cut"))
    assert all(torch.equal(whole["model"][name], cut["model"][name]) for name in whole["model"])
    timing = {"epoch_seconds", "images_per_second"}
    assert {k: v for k, v in whole["history"].items() if k not in timing} == {
        k: v for k, v in cut["history"].items() if k not in timing
    }
    assert whole["best"] == cut["best"] and whole["early_stopping"] == cut["early_stopping"]


def test_workers_do_not_change_the_result(class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("data.images.MEMORY_FOR_IMAGES", 0)  # so that there is something for them to do
    for workers in (0, 1, 2):
        flags = ["--epochs", 1, "--num-workers", workers, "--no-cache"]
        assert train(class_folder, tmp_path / str(workers), *flags) == 0
    a, b, c = (read_checkpoint(tmp_path / name / "checkpoint_latest.pth")["model"] for name in "012")
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)


def test_a_compiled_run_is_the_run(class_folder, tmp_path, monkeypatch, capsys):
    """--compile with all of torch.compile but its last step, which makes code for the machine."""
    compiled, real = [], torch.compile

    def backend(graph, _):
        compiled.append(1)
        return graph.forward

    assert train(class_folder, tmp_path / "plain", "--epochs", 1) == 0
    monkeypatch.setattr(torch, "compile", lambda forward: real(forward, backend=backend))
    assert train(class_folder, tmp_path / "compiled", "--epochs", 1, "--compile") == 0
    assert "compiled in" in capsys.readouterr().out and len(compiled) == 1  # for batches of 14 and of 15
    one, other = (
        json.loads((tmp_path / name / "history.json").read_text()) for name in ("plain", "compiled")
    )
    for key in ("train_loss", "val_loss", "val_acc"):
        assert other[key] == pytest.approx(one[key], rel=1e-4), key
    latest = tmp_path / "compiled" / "checkpoint_latest.pth"
    assert train(class_folder, tmp_path / "compiled", "--epochs", 2, "--resume-from", latest) == 0
    assert "begun with --compile and goes on without" in capsys.readouterr().out and len(compiled) == 1
    folds = ("--use-cv", "--n-splits", 2, "--epochs", 1, "--compile")
    assert train(class_folder, tmp_path / "folds", *folds) == 0 and len(compiled) == 2  # once for both


def test_resuming_takes_untyped_options_from_the_checkpoint(finished, class_folder, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    latest = copy / "checkpoint_latest.pth"
    code = main(
        [
            "--data-dir",
            str(class_folder),
            "--output-dir",
            str(copy),
            "--resume-from",
            str(latest),
            "--epochs",
            "5",
        ]
    )
    assert code == 0 and len(history_of(copy)["val_acc"]) == 5
    assert "--epochs 4 -> 5" in capsys.readouterr().out
    assert history_of(copy)["val_acc"][:4] == history_of(finished)["val_acc"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"random_state": 7}, "--random-state 7 does not fit.*which was trained with 0"),
        ({"preset": "small-data"}, "--preset small-data does not fit.*which was trained without it"),
        ({"freeze_text_encoder": True}, "^--freeze-text-encoder does not fit.*which was trained without it"),
        ({"freeze_image_encoder": False}, "^without --freeze-image-encoder does not.*was trained with it"),
        ({"logit_adjustment_tau": 0.5}, "tau 0.5 has no effect without --logit-adjustment"),
    ],
)
def test_what_a_resumed_run_cannot_take_is_refused(finished, typed, said):
    checkpoint = torch.load(finished / "checkpoint_latest.pth", weights_only=True)
    checkpoint["config"] |= {"random_state": 0, "freeze_image_encoder": "freeze_image_encoder" in typed}
    needed = {"data_dir": "d", "output_dir": "o", "resume_from": "latest.pth"}
    with pytest.raises(UserError, match=said):
        config_of_resumed_run(make_config({**needed, **typed}), checkpoint, typed)


def test_options_that_a_checkpoint_of_an_earlier_version_lacks_were_the_defaults(finished, capsys):
    checkpoint = torch.load(finished / "checkpoint_latest.pth", weights_only=True)
    needed = {"data_dir": "d", "output_dir": "o", "resume_from": "latest.pth"}
    typed = {"embed_dim": 512, "loss": "unicl", "grad_clip": 2.0, "use_amp": False, "save_best": False}
    checkpoint["config"] = {n: v for n, v in checkpoint["config"].items() if n not in typed}
    config = config_of_resumed_run(make_config({**needed, **typed}), checkpoint, typed)
    changes = "--grad-clip 1.0 -> 2.0, --no-amp not given -> given, --no-save-best not given -> given"
    assert f"resuming with changed options: {changes}\n" in capsys.readouterr().out
    assert (config.embed_dim, config.grad_clip, config.use_amp) == (512, 2.0, False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        (
            {"preset": "small-data"},
            "preset small-data sets --augmentation minimal, --logit-adjustment, --cutmix-prob 0.5\n",
        ),
        (
            {"preset": "small-data", "logit_adjustment_tau": 0.5},
            "preset small-data sets --augmentation minimal, --logit-adjustment (with --logit-adjustment-tau "
            "0.5), --cutmix-prob 0.5\n",
        ),
        (
            {"preset": "small-data", "cutmix_prob": 0.0, "logit_adjustment": False},
            "preset small-data sets --augmentation minimal; given instead: without --logit-adjustment, "
            "--cutmix-prob 0.0\n",
        ),
        (
            {"logit_adjustment": True, "use_weighted_sampling": True},
            "note: --use-weighted-sampling and --logit-adjustment both make up for rare classes; together "
            "they do it twice, and frequent classes may be missed for it\n",
        ),
    ],
)
def test_a_run_says_what_its_preset_sets_and_what_is_done_twice(options, said, capsys):
    run_module.say_what_options_do(make_config({"data_dir": "d", "output_dir": "o", **options}))
    assert capsys.readouterr().out == said


def test_training_mode_lasts_the_whole_epoch_and_each_image_passes_the_tower_once(
    class_folder, tmp_path, monkeypatch
):
    from models.image_encoders import ImageTower

    seen, forward = [], ImageTower.forward
    monkeypatch.setattr(
        ImageTower,
        "forward",
        lambda self, images: seen.append((self.training, len(images))) or forward(self, images),
    )
    assert train(class_folder, tmp_path / "run", "--epochs", 1, "--val-ratio", 0.25) == 0
    seen = (
        seen[: next(i for i, (training, _) in enumerate(seen) if not training)],
        [n for t, n in seen if not t],
    )
    assert [n for _, n in seen[0]] == [14, 14, 13, 13]  # 54 images, batches of at most 16, as even as can be
    assert sum(seen[1]) % 18 == 0


def test_both_towers_projections_and_the_temperature_learn(finished):
    history = history_of(finished)
    assert len(set(history["temperature"])) == 4


def test_validation_loss_is_the_mean_over_images_whatever_the_batches(class_folder, tmp_path):
    losses = []
    for batch in (4, 13):
        output = tmp_path / str(batch)
        # no step is taken in effect: what differs is only how validation is batched
        assert train(class_folder, output, "--epochs", 1, "--learning-rate", 1e-12, "--batch-size", batch,
                     "--image-encoder", "timm:vit_tiny_patch16_224") == 0  # fmt: skip
        losses.append(history_of(output)["val_loss"][0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_metrics_against_a_hand_worked_case():
    probs = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3]])
    metrics = classification_metrics(probs, np.array([0, 1, 1, 2]))
    assert metrics["acc"] == pytest.approx(0.5)
    assert metrics["balanced_acc"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert metrics["loss"] == pytest.approx(-np.log([0.7, 0.3, 0.8, 0.3]).mean())


@pytest.mark.parametrize(
    ("monitor", "patience", "min_delta", "values", "stops_after"),
    [
        ("val_acc", 2, 0.0, [50, 60, 60, 60, 70], 4),
        ("val_acc", 2, 0.0, [50, 49, 51, 50, 52, 51, 53], None),  # improves within patience each time
        (
            "val_acc",
            3,
            0.5,
            [50, 50.4, 50.8, 51.2, 51.3, 51.2, 51.25],
            6,
        ),  # 50.8 counts, then nothing over 51.3
        ("val_loss", 1, 0.0, [1.0, 0.9, 0.95], 3),
        ("val_loss", 2, 0.1, [1.0, 0.95, 0.85, 0.8, 0.76], 5),
        ("val_acc", None, 0.0, [1, 0, 0, 0, 0], None),
    ],
)
def test_early_stopping(monitor, patience, min_delta, values, stops_after):
    stopping = EarlyStopping(monitor, patience, min_delta)
    stopped = [stopping.update(value) for value in values]
    assert (stopped.index(True) + 1 if True in stopped else None) == stops_after


def test_early_stopping_ends_the_run_and_keeps_the_last_epoch_in_the_history(class_folder, tmp_path, capsys):
    flags = ["--epochs", 9, "--early-stopping-patience", 2, "--early-stopping-min-delta", 100]
    assert train(class_folder, tmp_path / "run", *flags) == 0
    assert (
        len(history_of(tmp_path / "run")["val_acc"]) == 3
    )  # the first sets the mark, two do not beat it by 100
    assert "stopped early" in capsys.readouterr().out


def test_no_save_best_writes_no_best_checkpoint(class_folder, tmp_path):
    assert train(class_folder, tmp_path / "run", "--epochs", 1, "--no-save-best") == 0
    assert not (tmp_path / "run" / "checkpoint_best.pth").exists()


def test_a_loss_that_is_never_finite_stops_and_names_the_files(class_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        run_module,
        "contrastive_loss",
        lambda kind, logits, labels, **named: (logits.sum() * float("nan"), logits.sum()),
    )
    assert train(class_folder, tmp_path / "run", "--epochs", 1) == 1
    error = capsys.readouterr().err
    assert "not a finite number" in error and error.count(".png") in (14, 15)  # one batch of 57


def test_a_single_image_that_batchnorm_cannot_compare_is_said_in_words(class_folder, tmp_path, capsys):
    assert train(class_folder, tmp_path / "run", "--epochs", 1, "--micro-batch-size", 1) == 1
    assert "BatchNorm got a single image" in capsys.readouterr().err


@pytest.mark.parametrize("tau", [0, 0.5, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_evens_out_classes_reaches_the_training(lopsided_folder, tmp_path, monkeypatch, tau, weighted):
    """Of 30 and 6 images 24 and 5 (here and there one more) train."""
    seen = {}

    def fit(state, sentences, train_loader, *args, criterion, chance_loss, **options):
        labels = torch.cat([labels for _, labels, _ in train_loader])
        seen.update(shown=torch.bincount(labels).tolist(), chance=chance_loss)
        logits = torch.tensor([[0.3, -0.2], [1.0, 0.5]])
        seen["loss"] = criterion(logits, torch.tensor([0, 1]))[1].item()
        raise RunFailed("seen")

    monkeypatch.setattr(run_module, "fit", fit)
    flags = ["--use-weighted-sampling"] * weighted
    if tau:
        flags += ["--logit-adjustment", "--logit-adjustment-tau", tau]
    assert train(lopsided_folder, tmp_path / "run", *flags) == 1
    (fold,) = json.loads((tmp_path / "run" / "splits.json").read_text("utf-8"))["folds"]
    n = np.array([sum(path.startswith(name) for path in fold["train"]) for name in ("few", "many")])
    expected = np.full(2, n.sum() / 2) if weighted else n
    assert np.abs(np.array(seen["shown"]) - expected).max() <= 0.5
    share = n / n.sum()
    assert seen["chance"] == pytest.approx(np.log(2) if weighted else -(share * np.log(share)).sum())
    weighed = np.exp([[0.3, -0.2], [1.0, 0.5]]) * share**tau
    assert seen["loss"] == pytest.approx(-np.log(weighed[[0, 1], [0, 1]] / weighed.sum(1)).mean(), rel=1e-5)


@pytest.fixture(scope="module")
def lopsided_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lopsided") / "data"
    for name, count in (("few", 6), ("many", 30)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (20, 20), 6 * i + 10 * len(name)).save(folder / name / f"{i}.png")
    return folder


def test_val_dir_is_used_as_it_is(class_folder, tmp_path):
    val = tmp_path / "val"
    for name in ("正常", "肺炎", "气胸"):
        (val / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (20, 20), 30 + 100 * i).save(val / name / f"{name}{i}.png")
    assert train(class_folder, tmp_path / "run", "--epochs", 1, "--val-dir", val) == 0
    (fold,) = json.loads((tmp_path / "run" / "splits.json").read_text("utf-8"))["folds"]
    assert len(fold["train"]) == 72 and sorted(p.split("/")[1] for p in fold["val"])[0].startswith("正常")


def test_one_batch_can_be_overfitted(tmp_path):
    random = np.random.RandomState(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(random.randint(0, 255, (32, 32), dtype=np.uint8)).save(
                tmp_path / "data" / name / f"{i}.png"
            )
    assert train(tmp_path / "data", tmp_path / "run", "--epochs", 25, "--augmentation", "none") == 0
    assert history_of(tmp_path / "run")["train_loss"][-1] < 0.05


# --- cross-validation ---------------------------------------------------------------------------------------


def cross_validate(data, output, *flags):
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
    validate, calls = fit_module.validate, []

    def killed_in_fold_2(*arguments):
        calls.append(1)
        if len(calls) == 4:  # fold 1: two epochs; fold 2: the second epoch
            raise Killed
        return validate(*arguments)

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


# --- several configurations ---------------------------------------------------------------------------------


def typed_for(entries, folder):
    """The options that have `entries` trained from a file in `folder`."""
    file = folder / "c.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    out = str(folder / "out")
    return {"data_dir": "d", "output_dir": out, "multi_config": True, "config_file": str(file)}


def test_a_typed_preset_wins_over_the_file(tmp_path, capsys):
    """As typed options do; a preset in the file does not win over what its own entry says."""
    own = {"augmentation": "standard", "epochs": 3, "logit_adjustment": True}
    entries = [own, {"preset": "small-data", "cutmix_prob": 1}, {}]
    typed = typed_for(entries, tmp_path)
    plain = [entry.config for entry in read_entries(make_config(typed), typed)]
    assert [c.augmentation for c in plain] == ["standard", "minimal", "standard"]
    assert [c.cutmix_prob for c in plain] == [0, 1, 0] and capsys.readouterr().out == ""

    typed |= {"preset": "small-data", "logit_adjustment": False}
    configs = [entry.config for entry in read_entries(make_config(typed), typed)]
    for config in configs:
        found = (config.augmentation, config.cutmix_prob, config.logit_adjustment)
        assert found == ("minimal", 0.5, False)
    assert configs[0].epochs == 3
    assert capsys.readouterr().out.splitlines() == [
        f"note: {typed} on the command line wins over {own} in the file"
        for typed, own in (
            ("--augmentation minimal by --preset small-data", "'standard'"),
            ("without --logit-adjustment", "true"),
            ("--cutmix-prob 0.5 by --preset small-data", "1"),
        )
    ]


def test_an_entry_that_several_processes_cannot_train_is_refused_with_its_number(tmp_path, monkeypatch):
    entries = [{"batch_size": 2}, {"compile": True}, {"preset": "small-data", "batch_size": 3}]
    typed = typed_for(entries, tmp_path)
    monkeypatch.setattr(run_module, "n_processes", lambda: 2)
    with pytest.raises(UserError) as refused:
        read_entries(make_config(typed), typed)
    second, third = refused.value.problems
    assert "entry 2: --compile was never tried with several processes" in second
    assert "entry 3: --cutmix-prob of --preset small-data pairs images within a process" in third


def test_weights_of_an_entry_are_missed_before_any_is_trained(tmp_path):
    typed = typed_for([{"image_weights": "no.pth"}, {"name": "done", "text_weights": "no"}], tmp_path)
    with pytest.raises(UserError) as refused:
        read_entries(make_config(typed), typed)
    first, second = refused.value.problems
    assert "entry 1: --image-weights no.pth does not exist" in first
    assert "entry 2: --text-weights no does not exist" in second
    (tmp_path / "out" / "02_done").mkdir(parents=True)
    (tmp_path / "out" / "02_done" / "report.html").touch()  # so its weights are not read again
    with pytest.raises(UserError) as refused:
        read_entries(make_config(typed), typed)
    assert refused.value.problems == (first,)
    typed["overwrite"] = True
    with pytest.raises(UserError) as refused:
        read_entries(make_config(typed), typed)
    assert refused.value.problems == (first, second)


def test_several_configurations_rank_the_good_report_the_broken_and_skip_the_finished(
    class_folder, tmp_path, capsys
):
    entries = [
        {
            "name": "坏 / 的",
            "img_size": 40,
            "image_encoder_name": "starnet_dual_pyramid_rcf",
            "use_cv": False,
            "n_splits": 5,
            "epochs": 1,
        },
        {
            "image_encoder_name": "resnet18",
            "epochs": 1,
            "preset": "small-data",
            "augmentation": "standard",  # the default, and not the preset's
            "cutmix_prob": 1,
        },
        {"image_encoder_name": "resnet18", "epochs": 1, "use_cv": True, "n_splits": 2},
    ]
    (tmp_path / "c.json").write_text(json.dumps(entries), encoding="utf-8")
    flags = "--image-weights none --text-encoder bert-tiny-bytes --embed-dim 16 --num-workers 0 --img-size 32"
    command = ["--data-dir", str(class_folder), "--output-dir", str(tmp_path / "out"), "--multi-config",
               "--config-file", str(tmp_path / "c.json"), *flags.split()]  # fmt: skip
    assert main([*command, "--image-encoder", "nothing"]) == 2  # a typed flag wins; refused before any starts
    capsys.readouterr()
    assert main(command) == 0  # the typed --img-size 32 wins over the broken entry's 40
    assert "--img-size 32 on the command line wins over 40" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out" / "01_坏-的")

    command = command[:-2]
    entries[1]["img_size"] = entries[2]["img_size"] = 32
    (tmp_path / "c.json").write_text(json.dumps(entries), encoding="utf-8")
    assert main(command) == 1
    output = capsys.readouterr().out
    assert output.count("finished already") == 2 and "needs a multiple of 32" in output
    assert "last epoch, mean ± sample standard deviation over folds, percent" in output
    board = json.loads((tmp_path / "out" / "leaderboard.json").read_text("utf-8"))
    assert [row["status"] for row in board] == ["finished", "finished", "failed"]
    assert [row["rank"] for row in board] == [1, 2, None]
    by_entry = {row["entry"]: row for row in board}
    used = json.loads((tmp_path / "out" / by_entry[2]["folder"] / "config.json").read_text("utf-8"))
    assert (used["logit_adjustment"], used["cutmix_prob"]) == (True, 1)  # by the preset; by the entry itself
    recipe = {"preset", "augmentation", "logit_adjustment", "cutmix_prob"}
    assert recipe <= set(used["changed_options"]) and "weight_decay" not in used["changed_options"]
    assert by_entry[2]["folds"] == 1 and by_entry[2]["val_acc_std_sample"] is None
    summary = json.loads((tmp_path / "out" / by_entry[3]["folder"] / "cv_summary.json").read_text("utf-8"))
    assert by_entry[3]["val_acc_mean"] == pytest.approx(summary["last_epoch"]["val_acc"]["mean"])
    expected = sum(p.numel() for p in _resnet18_clip().parameters()) / 1e6
    assert by_entry[2]["million_parameters"] == pytest.approx(expected)


def test_a_training_of_seconds_is_not_said_to_take_no_time(capsys):
    row = {f"{key}_{part}": None for key in METRICS for part in ("mean", "std_sample")}
    row |= {"rank": 1, "status": "finished", "folder": "01", "against_first": "first", "images_per_second": 9}
    row |= {f"{key}_mean": 50 for key in METRICS} | {"million_parameters": 1}
    print_leaderboard([{**row, "minutes": 0.04}, {**row, "minutes": 0.06}], Path("out"))
    _, *lines, _, _ = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[-3] for line in lines[1:]] == ["<0.1", "0.1"]


def _resnet18_clip():
    from models.clip import build_clip

    return build_clip(
        "resnet18", "bert-tiny-bytes", img_size=32, embed_dim=16, temperature=0.07, image_weights="none"
    )


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no checkpoint of this program"):
        read_checkpoint(tmp_path / "x.pth")


def test_edited_sentences_do_not_mix_into_a_begun_cross_validation(class_folder, tmp_path, capsys):
    texts = tmp_path / "texts.json"
    texts.write_text('{"正常": "一"}', encoding="utf-8")
    flags = ("--class-texts-file", texts)
    assert cross_validate(class_folder, tmp_path / "cv", *flags, "--fold", 1) == 0
    texts.write_text('{"正常": "二"}', encoding="utf-8")
    assert cross_validate(class_folder, tmp_path / "cv", *flags, "--fold", 2) == 2
    assert "class sentences have changed" in capsys.readouterr().err


def test_learning_rate_typed_on_resume_is_used(finished, class_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    latest = copy / "checkpoint_latest.pth"
    flags = ["--epochs", 6, "--learning-rate", 1e-5, "--warmup-epochs", 0, "--resume-from", latest]
    assert train(class_folder, copy, *flags) == 0
    # half a cosine over 24 steps, new layers at ten times the typed rate, read after step 20
    assert history_of(copy)["lr"][4] == pytest.approx(1e-4 * 0.5 * (1 + np.cos(np.pi * 19 / 24)))


def test_what_the_checkpoint_knows_is_not_refused_before_it_is_read(finished, class_folder, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    base = ["--data-dir", str(class_folder), "--output-dir", str(copy)]
    base += ["--resume-from", str(copy / "checkpoint_latest.pth")]
    assert main([*base, "--warmup-epochs", "4"]) == 2
    assert "--warmup-epochs 4 must be less than --epochs 4" in capsys.readouterr().err
    assert main([*base, "--group-pattern", r"^(P\d\d)"]) == 2
    assert "the split differs" in capsys.readouterr().err


def resume(run, data, *flags):
    latest = run / "checkpoint_latest.pth"
    return main(
        ["--data-dir", str(data), "--output-dir", str(run), "--resume-from", str(latest), *map(str, flags)]
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", 0.5],
        ["--image-weights", "pretrained"],
        ["--freeze-image-encoder"],
        ["--early-stopping-monitor", "val_loss"],
        ["--embed-dim", 8],
    ],
)
def test_options_that_cannot_change_in_mid_run_are_refused_and_nothing_is_written(
    finished, class_folder, tmp_path, capsys, flags
):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    assert resume(copy, class_folder, "--epochs", 5, *flags) == 2
    assert f"{flags[0]} " in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


def test_another_batch_size_on_resume_keeps_the_place_in_the_schedule(finished, class_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    assert resume(copy, class_folder, "--epochs", 8, "--batch-size", 32, "--warmup-epochs", 0) == 0
    # two steps an epoch: the last step of epoch 5 is the tenth of 16
    assert history_of(copy)["lr"][4] == pytest.approx(3e-3 * 0.5 * (1 + np.cos(np.pi * 9 / 16)))


def test_another_val_dir_on_resume_is_refused(class_folder, tmp_path, capsys):
    for k in (1, 2):
        for name in ("正常", "肺炎", "气胸"):
            (tmp_path / f"v{k}" / name).mkdir(parents=True)
            Image.new("L", (20, 20), 40 * k).save(tmp_path / f"v{k}" / name / "a.png")
    run = tmp_path / "run"
    assert train(class_folder, run, "--epochs", 1, "--val-dir", tmp_path / "v1") == 0
    assert resume(run, class_folder, "--epochs", 2, "--val-dir", tmp_path / "v2") == 2
    assert "have changed since" in capsys.readouterr().err


def test_a_run_without_a_scaler_can_be_resumed_with_one(finished):
    from training.state import TrainState

    checkpoint = read_checkpoint(finished / "checkpoint_latest.pth")
    assert checkpoint["scaler"] == {}
    model = _resnet18_clip()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    for group in optimizer.param_groups:
        group |= {"peak_lr": 1.0}
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    state = TrainState(model, optimizer, scaler, EarlyStopping("val_acc", None, 0.0), 4, 16, 1)
    state.restore(checkpoint, "x")
    assert (state.epoch, state.step) == (4, 16)


def test_an_odd_number_of_images_in_batches_of_two(class_folder, tmp_path):
    assert train(class_folder, tmp_path / "run", "--epochs", 1, "--batch-size", 2) == 0
