"""Training through the command line's own main(), on a small made-up folder."""

import itertools
import json
import os
import shutil
from importlib import metadata

import numpy as np
import pytest
import torch
from PIL import Image
from quick import history_of, quick_clip, train

import training.fit as fit_module
import training.one_split as one_split
from common.device import choose_hardware
from common.errors import RunFailed
from evaluation.checkpoints import read_checkpoint
from evaluation.metrics import classification_metrics
from training.begin import build_and_read, look, say_what_options_do
from training.build import compile_image_tower
from training.config import Config
from training.dataset import findings_of, patients_of, read_images, scan, split_of, splits_record_of
from training.options import make_config
from training.state import HISTORY_KEYS, EarlyStopping

pytestmark = pytest.mark.usefixtures("quick_report")


def test_an_easy_set_is_learned(finished):
    assert history_of(finished)["val_acc"][-1] > 90


def test_history_has_all_keys_at_equal_length_in_percent(finished):
    history = history_of(finished)
    assert set(history) == set(HISTORY_KEYS)
    assert {len(values) for values in history.values()} == {4}
    assert 1 < max(history["train_acc"]) <= 100
    metrics = json.loads((finished / "metrics.json").read_text("utf-8"))
    of_last = {"val_loss": "nll", "val_acc": "accuracy", "val_balanced_acc": "balanced_accuracy"}
    for key, name in {**of_last, "val_macro_f1": "macro_f1"}.items():
        factor = 1 if key == "val_loss" else 100
        assert history[key][-1] == pytest.approx(factor * metrics[name]["value"]), key


def test_config_json_holds_options_versions_classes_and_fingerprint(finished):
    config = json.loads((finished / "config.json").read_text("utf-8"))
    assert (
        config["image_encoder_name"] == "timm:test_resnet"
        and config["epochs"] == 4
        and config["use_amp"] is False
    )
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


def test_each_epoch_has_its_order_and_the_best_is_the_first_of_the_highest_value(
    class_folder, tmp_path, monkeypatch
):
    orders, values = [], iter([60.0, 90.0, 70.0, 90.0])
    one_epoch, validate = fit_module.train_one_epoch, fit_module.validate

    def watched(state, sentences, loader, *given, **options):
        orders.append([index for batch in loader.batch_sampler for index in batch])
        return one_epoch(state, sentences, loader, *given, **options)

    def prescribed(*given):
        metrics, *others = validate(*given)
        return metrics | {"val_acc": next(values)}, *others

    monkeypatch.setattr(fit_module, "train_one_epoch", watched)
    monkeypatch.setattr(fit_module, "validate", prescribed)
    flags = ["--epochs", 4, "--image-encoder", "timm:test_resnet"]
    assert train(class_folder, tmp_path / "run", *flags) == 0
    assert len({tuple(order) for order in orders}) == 4 and len({tuple(sorted(own)) for own in orders}) == 1
    latest, best = (
        read_checkpoint(tmp_path / "run" / f"checkpoint_{name}.pth") for name in ("latest", "best")
    )
    assert latest["best"] == {"value": 90.0, "epoch": 2} and best["epoch"] == 2


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


def test_what_cannot_be_compiled_is_tried_by_one_fold_alone(monkeypatch, capsys):
    def refuse(forward):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    model, hardware = quick_clip(), choose_hardware(-1, False)
    for _ in range(2):
        compile_image_tower(model, Config(img_size=32), 2, hardware)
    assert capsys.readouterr().out.count("cannot (RuntimeError: no compiler); training goes on") == 1


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
    say_what_options_do(make_config({"data_dir": "d", "output_dir": "o", **options}))
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
    """Every weight moves from what the seed gave it; the biases of the keys of attention have no gradient."""
    history = history_of(finished)
    assert len(set(history["temperature"])) == 4
    torch.manual_seed(json.loads((finished / "config.json").read_text("utf-8"))["random_state"])
    begun, ended = quick_clip(), read_checkpoint(finished / "checkpoint_latest.pth")["model"]
    assert history["temperature"][-1] == pytest.approx(float(torch.exp(-ended["logit_scale"])))
    still = [name for name, p in begun.named_parameters() if torch.equal(p, ended[name])]
    assert [name for name in still if not name.endswith("key.bias")] == []
    assert {name.split(".")[0] for name, _ in begun.named_parameters()} == {
        "image_tower", "text_tower", "image_projection", "text_projection", "logit_scale",
    }  # fmt: skip


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
    run, none = tmp_path / "run", ["--epochs", 1, "--no-save-best"]
    assert train(class_folder, run, *none) == 0
    assert not (run / "checkpoint_best.pth").exists()
    assert train(class_folder, run, "--epochs", 1, "--overwrite", "--early-stopping-monitor", "val_loss") == 0
    for epochs, is_best in ((1, True), (2, False)):  # it goes where it is the best no more
        assert train(class_folder, run, *none, "--epochs", epochs, "--resume-from", "auto") == 0
        assert (run / "checkpoint_best.pth").exists() == is_best


def test_a_loss_that_is_never_finite_stops_and_names_the_files(class_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        one_split,
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

    def fit(state, sentences, train_loader, val_loader, augment, hardware, options, *, chance_loss, **_):
        labels = torch.cat([labels for _, labels, _ in train_loader])
        seen.update(shown=torch.bincount(labels).tolist(), chance=chance_loss)
        logits = torch.tensor([[0.3, -0.2], [1.0, 0.5]])
        seen["loss"] = options.criterion(logits, torch.tensor([0, 1]))[1].item()
        raise RunFailed("seen")

    monkeypatch.setattr(one_split, "fit", fit)
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


def test_val_dir_is_used_as_it_is(class_folder, tmp_path, capsys):
    val = tmp_path / "val"
    for name in ("正常", "肺炎", "气胸"):
        (val / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (20, 20), 30 + 100 * i).save(val / name / f"{name}{i}.png")
    assert train(class_folder, tmp_path / "run", "--epochs", 1, "--val-dir", val) == 0
    (fold,) = json.loads((tmp_path / "run" / "splits.json").read_text("utf-8"))["folds"]
    assert len(fold["train"]) == 72 and sorted(p.split("/")[1] for p in fold["val"])[0].startswith("正常")
    said = "validating on 6 of --val-dir (if patients have several images, name them"
    assert said in capsys.readouterr().out


def test_val_dir_with_pictures_of_data_dir_is_refused(class_folder, tmp_path, capsys):
    for name in ("正常", "肺炎"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("L", (20, 20), 77).save(tmp_path / "val" / name / "0.png")
    Image.open(class_folder / "正常" / "P000_0.png").save(tmp_path / "val" / "正常" / "new name.bmp")
    assert train(class_folder, tmp_path / "run", "--epochs", 1, "--val-dir", tmp_path / "val") == 2
    error = capsys.readouterr().err
    assert "1 picture of --val-dir is in --data-dir too, pixel by pixel" in error
    assert "P000_0.png = " in error and "new name.bmp" in error and not (tmp_path / "run").exists()


def test_data_dir_as_val_dir_is_refused_with_what_else_is_wrong(class_folder, tmp_path, capsys):
    flags = ["--val-dir", class_folder / ".." / class_folder.name, "--class-texts-file", tmp_path / "none"]
    assert train(class_folder, tmp_path / "run", "--epochs", 1, *flags) == 2
    error = capsys.readouterr().err
    assert "is --data-dir itself" in error and "none does not exist" in error


def test_pictures_of_one_name_in_both_folders_count_as_two(tmp_path):
    for side, name in itertools.product(("data", "val"), "ab"):
        (tmp_path / side / name).mkdir(parents=True)
        for i in range(10):
            grey = 10 * i + 100 * (side == "val") + (name == "b")
            Image.new("L", (8, 8), grey).save(tmp_path / side / name / f"{i}.png")
    folders = {"data_dir": str(tmp_path / "data"), "val_dir": str(tmp_path / "val")}
    config = Config(**folders, img_size=8, use_cache=False)
    data = read_images(config, *scan(config), None, at_least=1)
    assert data.groups is None
    assert "class_small" not in {found["kind"] for found in findings_of(data, [split_of(config, data)])}


def test_two_patients_of_one_picture_are_kept_together_and_counted_as_two(tmp_path):
    for name, i in itertools.product("ab", range(5)):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 * max(i, 1)).save(tmp_path / "data" / name / f"P{i}.png")
    pattern = r"^(P\d)"
    config = Config(data_dir=str(tmp_path / "data"), group_pattern=pattern, img_size=8, use_cache=False)
    folders = scan(config)
    data = read_images(config, *folders, patients_of(config, *folders), at_least=1)
    assert len(set(data.groups)) == 4
    assert splits_record_of(config, data, [split_of(config, data)])["n_groups"] == 5


def test_a_picture_in_two_formats_is_on_one_side(class_folder, tmp_path, capsys):
    shutil.copytree(class_folder, tmp_path / "data")
    for path in sorted((tmp_path / "data").rglob("*.png")):
        Image.open(path).save(path.with_suffix(".jpg"), quality=60)
    assert train(tmp_path / "data", tmp_path / "run", "--epochs", 1) == 0
    assert "72 images have the name of another in the folder but for the format" in capsys.readouterr().out
    (fold,) = json.loads((tmp_path / "run" / "splits.json").read_text("utf-8"))["folds"]
    names = [{path.rsplit(".", 1)[0] for path in fold[side]} for side in ("train", "val")]
    assert len(fold["train"]) + len(fold["val"]) == 144 and not names[0] & names[1]


@pytest.mark.parametrize(
    ("load", "threads", "cores", "said"),
    [(8.1, 2, 8, True), (8, 2, 8, False), (8.1, 1, 8, False), (8.1, 2, 4, False)],
)
def test_a_busy_machine_is_said_where_threads_would_wait(
    class_folder, tmp_path, monkeypatch, capsys, load, threads, cores, said
):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    config = Config(
        data_dir=str(class_folder), output_dir=str(tmp_path), image_encoder_name="timm:test_resnet",
        image_weights="none", text_encoder_name="bert-tiny-bytes", img_size=32, gpu_id=-1, use_cache=False,
    )  # fmt: skip
    build_and_read(config, look(config, None))
    assert ("OMP_NUM_THREADS=1" in capsys.readouterr().out) == said


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


def test_an_odd_number_of_images_in_batches_of_two(class_folder, tmp_path):
    assert train(class_folder, tmp_path / "run", "--epochs", 1, "--batch-size", 2) == 0
