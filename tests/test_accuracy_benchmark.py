import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quick import raising_at

from benchmarks import accuracy, accuracy_peers
from benchmarks.accuracy import altered_copy, kept_images, main, make_recipe
from benchmarks.accuracy_peers import PEERS, size_of
from benchmarks.accuracy_table import FoldResult, against, corrected_t, stacked, summary_of
from common.device import choose_hardware
from common.errors import RunFailed, UserError
from data.scan import scan_folder
from data.splits import Split
from evaluation.results import Predictions, read_predictions
from models.clip import build_image_tower
from training.config import Config
from training.dataset import read_images, scan

SMALL = {"image_encoder_name": "resnet18", "batch_size": 16, "use_amp": False}


def fold_result(rights, seed=42, fold=1, first=0, groups=None):
    """Of two classes in turn; rights (n,): whether each image is got right."""
    rights = np.asarray(rights, bool)
    labels = np.arange(len(rights)) % 2
    probs = np.where((labels == rights)[:, None], [0.2, 0.8], [0.8, 0.2])
    paths = tuple(f"{label}/{first + i}.png" for i, label in enumerate(labels))
    one = Predictions(("0", "1"), paths, labels, probs, np.full(len(labels), fold), groups)
    return FoldResult(seed, fold, one, n_train=4 * len(labels), minutes=1.0)


def five_folds(rights, seed=42):
    return [fold_result(own, seed, f + 1, 1000 * f) for f, own in enumerate(np.split(np.asarray(rights), 5))]


def test_the_corrected_t_test():
    d = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    # t = 3 / sqrt(2.5 * (1/5 + 1/4)) = 2.828, 4 degrees of freedom
    assert corrected_t(d, 0.25) == pytest.approx(0.0474, abs=1e-4)
    assert corrected_t(d, 0.0) < corrected_t(d, 0.25) == corrected_t(-d, 0.25)
    assert corrected_t(d[:1], 0.25) is None
    assert corrected_t(np.array([2.0, 2.0]), 0.25) == 1.0  # two folds alike by chance prove nothing


def test_only_a_difference_beyond_noise_is_called_so():
    random = np.random.default_rng(0)
    weak, other = random.random(400) < 0.6, random.random(400) < 0.6
    results = {name: five_folds(own) for name, own in (("weak", weak), ("same", other), ("all", weak | True))}
    same, better = against("weak", results)
    assert [row["recipe"] for row in (same, better)] == ["same", "all"]
    assert better["accuracy"]["value"] == pytest.approx(100 * (1 - weak.mean()))
    assert better["accuracy"]["low"] > 0 and better["accuracy"]["beyond_noise"] and better["n"] == 5
    assert not same["accuracy"]["beyond_noise"] and same["accuracy"]["low"] < 0 < same["accuracy"]["high"]


def test_only_folds_and_seeds_that_both_have_are_compared():
    results = {
        "a": [fold_result([1, 0] * 20, 42, 1)],
        "b": [fold_result([1, 1] * 20, s, 1) for s in (42, 43)],
    }
    (row,) = against("a", results)
    assert row["n"] == 1 and row["accuracy"]["value"] == pytest.approx(50)
    assert row["accuracy"]["p"] is None and "beyond_noise" not in row["accuracy"]
    assert against("c", results) == []


def test_the_same_images_in_another_seed_narrow_no_interval():
    rights = np.random.default_rng(1).random(100) < 0.7

    def width(runs):
        entry = summary_of(runs)["accuracy"]
        return entry["high"] - entry["low"]

    one, two = [fold_result(rights)], [fold_result(rights, seed) for seed in (42, 43)]
    assert width(two) == pytest.approx(width(one), abs=1e-9)
    assert len(set(stacked(two).paths)) == 200 and len(set(stacked(two).groups)) == 100
    patients = [fold_result(rights, groups=np.arange(100) // 10)]
    assert len(set(stacked(patients).groups)) == 10


def test_the_summary_is_over_folds_in_percent():
    summary = summary_of([fold_result([1] * 10), fold_result([1, 1, 1, 0] * 5, fold=2, first=50)])
    assert summary["accuracy"]["mean"] == pytest.approx(87.5)  # of 100 and 75
    assert summary["accuracy"]["std_sample"] == pytest.approx(25 / np.sqrt(2))
    assert summary["accuracy"]["value"] == pytest.approx(100 * 25 / 30)
    assert summary["recall"]["0"]["mean"] == 100 and summary["recall"]["1"]["mean"] == pytest.approx(75)


def test_a_class_without_images_has_no_recall():
    one = fold_result([1, 0, 1, 1])
    zeros = Predictions(
        ("0", "1", "2"), one.predictions.paths, one.predictions.labels, np.eye(3)[[0, 1, 0, 1]]
    )
    summary = summary_of([FoldResult(42, 1, zeros, 16, 1.0)])
    assert summary["recall"]["2"] == dict.fromkeys(("mean", "std_sample", "value", "low", "high"))
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("a", {"peer": "softmx"}, "did you mean 'softmax'"),
        ("a", {"peer": "softmax", "loss": "ce"}, "'loss' has no effect on softmax"),
        ("a", {"peer": "softmax", "label_smoothing": "much"}, "must be a number"),
        ("a", {"learning_rat": 1e-3}, "did you mean 'learning_rate'"),
        ("a", {"n_splits": 3}, "same for all recipes"),
        ("../a", {}, "names a folder"),
    ],
)
def test_a_wrong_recipe_is_refused(name, options, said):
    with pytest.raises(UserError, match=said):
        make_recipe(name, options, {}, {"n_splits": 5, "data_dir": "d", "output_dir": "o", "epochs": 2})


def test_a_recipe_wins_over_what_is_common():
    base = {"epochs": 2, "data_dir": "d", "output_dir": "o"}
    recipe = make_recipe("a", {"epochs": 7, "peer": "softmax"}, {"image_weights": "none", "epochs": 5}, base)
    assert recipe.config.epochs == 7 and recipe.config.image_weights == "none"
    assert recipe.own == {"label_smoothing": 0.0}


def test_a_recipe_has_what_its_preset_sets_and_a_peer_takes_none():
    base = {"epochs": 2, "data_dir": "d", "output_dir": "o"}
    config = make_recipe("a", {"preset": "small-data"}, {"augmentation": "standard"}, base).config
    assert (config.augmentation, config.cutmix_prob, config.logit_adjustment) == ("minimal", 0.5, True)
    config = make_recipe("a", {"cutmix_prob": 0.0}, {"preset": "small-data"}, base).config
    assert (config.augmentation, config.cutmix_prob, config.logit_adjustment) == ("minimal", 0, True)
    with pytest.raises(UserError, match="softmax takes no preset"):
        make_recipe("a", {"peer": "softmax"}, {"preset": "small-data"}, base)


def test_a_lopsided_subset_keeps_patients_together(class_folder):
    folder = scan_folder(class_folder)
    patients = [path.split("/")[1].split("_")[0] for path in folder.paths]
    kept = kept_images(folder, patients, {"肺炎": 6})
    own = [patients[i] for i in kept if folder.paths[i].startswith("肺炎")]
    assert len(own) == 6 and len(set(own)) == 3 and len(kept) == 2 * 24 + 6
    assert kept == kept_images(folder, patients, {"肺炎": 6})
    assert set(kept) < set(kept_images(folder, patients, {"肺炎": 8}))
    assert len(kept_images(folder, None, {"肺炎": 5})) == 2 * 24 + 5
    with pytest.raises(UserError, match="did you mean"):
        kept_images(folder, None, {"肺": 5})
    with pytest.raises(UserError, match="there are 24"):
        kept_images(folder, None, {"肺炎": 25})


def test_the_cropped_copy_is_the_middle_as_a_square(tmp_path):
    pixels = np.zeros((100, 200), np.uint8)
    pixels[10:90, 60:140] = 200  # what is left when a tenth of the shorter side goes from each edge
    pixels[12:88, 62:138] = 255
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "set" / name / "x.png")
    options = argparse.Namespace(
        data_dir=tmp_path / "set", out=tmp_path / "out", groups_file=None, keep={}, border_crop=0.1
    )
    with Image.open(altered_copy(options) / "a" / "x.png") as image:
        assert image.size == (256, 256) and 180 < image.getextrema()[0] <= 200
    options.border_crop = 0.2
    with pytest.raises(UserError, match="another --out"):
        altered_copy(options)


@pytest.fixture
def recipes(tmp_path) -> Path:
    path = tmp_path / "recipes.json"
    common = {**SMALL, "text_encoder_name": "bert-tiny-bytes", "image_weights": "none"}
    del common["use_amp"]
    named = {"soft": {"peer": "softmax"}, "frozen": {"peer": "logistic"}, "ours": {"embed_dim": 16}}
    path.write_text(json.dumps({"common": common, **named}), "utf-8")
    return path


@pytest.mark.usefixtures("quick_report")
def test_a_comparison_from_end_to_end(class_folder, recipes, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["--data-dir", class_folder, "--out", out, "--recipes-file", recipes, "--n-splits", 2]
    command = [*map(str, command), "--epochs", "1", "--img-size", "32", "--gpu-id", "-1"]
    assert main([*command, "--folds", "1"]) == 0
    assert main(command) == 0
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert {name: own["runs"] for name, own in results["recipes"].items()} == {
        name: [[42, 1], [42, 2]] for name in ("soft", "frozen", "ours")
    }
    assert [(row["recipe"], row["n"]) for row in results["against"]] == [("frozen", 2), ("ours", 2)]
    assert "| ours | 2 |" in (out / "results.md").read_text("utf-8")
    seed = out / "seed_42"
    of_fold = {n: read_predictions(seed / n / "fold_2" / "predictions.csv") for n in results["recipes"]}
    assert len({one.paths for one in of_fold.values()}) == 1 and len(of_fold["soft"].paths) == 36
    (own, shared) = (json.loads((at / "splits.json").read_text("utf-8")) for at in (seed / "ours", seed))
    assert own["folds"] == shared["folds"] and not list(out.rglob("*.pth"))

    # only what is not finished is trained
    (seed / "frozen" / "fold_1" / "predictions.csv").unlink()
    trained = []
    monkeypatch.setattr(
        accuracy, "train_fold", lambda recipe, s, fold, *_: trained.append((recipe.name, s, fold))
    )
    assert main(command) == 0 and trained == [("frozen", 42, 1)]

    def fails(recipe, *_):
        raise RunFailed("no luck")

    monkeypatch.setattr(accuracy, "train_fold", fails)
    assert main(command) == 1 and "frozen failed: no luck" in (out / "results.md").read_text("utf-8")
    changed = recipes.read_text("utf-8").replace('"embed_dim": 16', '"embed_dim": 32')
    recipes.write_text(changed, "utf-8")
    capsys.readouterr()
    assert main(command) == 2 and "embed_dim 16 there, 32 now" in capsys.readouterr().err


def test_a_killed_softmax_run_ends_as_if_it_had_not_been(class_folder, tmp_path, monkeypatch):
    config = Config(
        **SMALL,
        data_dir=str(class_folder),
        image_weights="none",
        img_size=32,
        epochs=3,
        gpu_id=-1,
        use_cache=False,
    )
    folder, _ = scan(config)
    data = read_images(config, folder, None, None, at_least=2)
    split = Split(np.flatnonzero(np.arange(72) % 3 > 0), np.flatnonzero(np.arange(72) % 3 == 0))
    hardware, softmax = choose_hardware(-1, False), PEERS["softmax"]

    def train(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return softmax.train(config, softmax.own, data, split, hardware, tmp_path / name, 43)

    whole = train("whole")
    assert (whole.argmax(1) == data.labels[split.val]).mean() > 0.5  # it learns something
    killed, calls = raising_at(2, accuracy_peers.outputs_of, KeyboardInterrupt)
    monkeypatch.setattr(accuracy_peers, "outputs_of", killed)
    with pytest.raises(KeyboardInterrupt):
        train("killed")
    assert (train("killed") == whole).all() and len(calls) == 4
    history = json.loads((tmp_path / "killed" / "history.json").read_text("utf-8"))
    assert len(history["train_loss"]) == 3 and not list((tmp_path / "killed").glob("*.pth"))


def test_sizes_of_architectures():
    resnet, star, dual = (
        size_of(name, 224) for name in ("resnet18", "timm:starnet_s1", "starnet_dual_pyramid_rcf")
    )
    assert resnet["million_parameters"] == pytest.approx(11.18, abs=0.01)
    assert resnet["gmac"] == pytest.approx(1.82, abs=0.02)  # He et al. 2016 say 1.8
    assert star["gmac"] == pytest.approx(0.42, abs=0.01) and star["gmac"] < dual["gmac"]


def test_the_parts_of_the_dual_pyramid_are_what_is_left_of_it():
    local, alone, late, whole = (
        size_of(name, 64)
        for name in ("timm:starnet_s1", "rcf-global", "rcf-late", "starnet_dual_pyramid_rcf")
    )
    adapter = 2 * (192 * 192 + 3 * 192) + 192  # two 1 x 1 convolutions with bias and GroupNorm, and the gains
    norm = 2 * 192  # the head's, which is counted with each pyramid
    parts = 1e6 * (local["million_parameters"] + alone["million_parameters"]) - norm
    assert 1e6 * late["million_parameters"] == pytest.approx(parts + adapter)
    assert late["gmac"] == pytest.approx(local["gmac"] + alone["gmac"] + 2 * 192 * 192 * 4 / 1e9)
    assert late["gmac"] < whole["gmac"] and late["million_parameters"] < whole["million_parameters"]
    for name in ("rcf-global", "rcf-late", "darkcovidnet"):
        tower = build_image_tower(name, "none", 64)
        images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
        (tower(images) * torch.randn(tower.num_features)).sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tower.parameters())


def test_the_published_network_is_of_the_published_size():
    """Ozturk et al. 2020: for two classes 1,164,434 trainable parameters, the last convolution with a filter
    for each, and a linear layer that sees their 13 x 13 maps.
    """
    assert build_image_tower("darkcovidnet", "none", 256).num_features == 3 * 13 * 13
    for_three_classes = 1e6 * size_of("darkcovidnet", 128)["million_parameters"]
    one_filter, linear = 256 * 3 * 3 + 2, 2 * 13 * 13 * 2 + 2
    assert round(for_three_classes) - one_filter + linear == 1_164_434
    with pytest.raises(UserError, match="there are none for darkcovidnet"):
        build_image_tower("darkcovidnet", "pretrained", 256)


def test_mistakes_are_said_together(tmp_path, capsys):
    assert main(["--data-dir", str(tmp_path)]) == 2 and "--out is required" in capsys.readouterr().err
    given = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]
    assert main([*given, "--folds", "6"]) == 2 and main([*given, "--keep", "a"]) == 2
    assert main([*given, "--n-splits", "1", "--folds", "1", "--seeds", "-1"]) == 2
    assert "'n_splits' must be at least 2" in capsys.readouterr().err
    capsys.readouterr()
    assert main([*given, "--recipes", "our-rcf"]) == 2
    assert "did you mean 'ours-rcf'" in capsys.readouterr().err
