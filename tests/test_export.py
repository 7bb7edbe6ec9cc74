"""Exports through export_clip.py's own main(), answered for by onnxruntime and by a rebuilt model."""

import contextlib
import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from quick import history_of
from safetensors import safe_open

import evaluation.export as module
import train_clip
from common.errors import RunFailed
from data.images import read_image, to_square
from evaluation.checkpoints import read_checkpoint, write_file
from evaluation.results import read_predictions
from evaluation.trained import TrainedModel
from export_clip import main
from models.clip import build_clip

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("正常", "气胸", "肺炎")
TRAIN = shlex.split(
    "--image-encoder resnet18 --image-weights none --text-encoder bert-tiny-bytes --img-size 32 --epochs 2 "
    "--embed-dim 16 --batch-size 16 --num-workers 0 --gpu-id -1 --no-amp --learning-rate 3e-4"
)


def train(data, output, *flags):
    command = ["--data-dir", str(data), "--output-dir", str(output), *TRAIN, *map(str, flags)]
    assert train_clip.main(command) == 0
    return output


def export(checkpoint, output, *flags):
    return main(["--checkpoint", str(checkpoint), "--output-dir", str(output), *map(str, flags)])


@pytest.fixture(scope="module")
def run(class_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "单 run"
    return train(
        class_folder, output, "--group-pattern", r"^(P\d+)_", "--text-template", "一张{class_name}|图"
    )


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("exports") / "导出" / "model"
    assert export(run, output) == 0
    return output


def images_of(run, class_folder):
    """The run's validation images, (N, 3, 32, 32) float32 0..255, and the probabilities it stored."""
    stored = read_predictions(run / "predictions.csv")
    squares = [to_square(read_image(class_folder / path), 32) for path in stored.paths]
    return np.stack(squares).transpose(0, 3, 1, 2).astype(np.float32), stored.probs


def python_blocks(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


# --- the model answers --------------------------------------------------------------------------------------


def test_onnx_gives_the_probabilities_the_run_stored_for_any_number_of_images(run, exported, class_folder):
    images, probs = images_of(run, class_folder)
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    assert [i.shape for i in session.get_inputs()] == [["N", 3, 32, 32]]
    for batch in (1, 2, len(images)):
        found, features = session.run(["probs", "image_features"], {"images": images[:batch]})
        np.testing.assert_allclose(found, probs[:batch], atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES)


def test_the_cards_onnxruntime_snippet_runs_as_it_stands(run, exported, class_folder, monkeypatch):
    stored = read_predictions(run / "predictions.csv")
    shutil.copy(class_folder / stored.paths[0], exported / "image.png")
    snippet = python_blocks((exported / "README.md").read_text("utf-8"))[0]
    assert len([line for line in snippet.splitlines() if line and not line.startswith("import")]) == 3
    monkeypatch.chdir(exported)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet, {})
    (exported / "image.png").unlink()
    answer = eval(printed.getvalue())
    assert tuple(answer) == CLASSES
    np.testing.assert_allclose(list(answer.values()), stored.probs[0], atol=1e-4)


def test_the_cards_pytorch_snippet_rebuilds_the_model_from_the_safetensors(
    run, exported, class_folder, monkeypatch
):
    images, probs = images_of(run, class_folder)
    snippet = python_blocks((exported / "README.md").read_text("utf-8"))[1]
    monkeypatch.chdir(exported)
    names = {"images": torch.from_numpy(images)}
    with torch.no_grad():
        exec(snippet.replace("# probs =", "probs ="), names)
    np.testing.assert_allclose(names["probs"].numpy(), probs, atol=1e-5)


def test_tensors_are_the_checkpoints_without_the_text_tower(run, exported):
    model = torch.load(run / "checkpoint_latest.pth", weights_only=True)
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)
        names = set(file.keys())
        assert names == {n for n in model["model"] if not n.startswith("text_")} | {"class_features"}
        assert torch.equal(file.get_tensor("class_features"), model["class_features"])
        for name in names - {"class_features"}:
            assert torch.equal(file.get_tensor(name), model["model"][name])


def random_model(name, size):
    torch.manual_seed(0)
    model = build_clip(name, None, img_size=size, embed_dim=16, temperature=0.05, image_weights="none").eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and value.ndim:
                value += 0.02 * torch.rand_like(value)  # running statistics are not 0 and 1 either
    features = torch.nn.functional.normalize(torch.randn(3, 16), dim=1)
    facts = {"config": {"image_encoder_name": name, "text_encoder_name": "bert-tiny-bytes"}, "epoch": 1}
    texts = {name: [name] for name in CLASSES}
    return TrainedModel(Path("x"), model, torch.device("cpu"), CLASSES, texts, features, size, facts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["starnet_dual_pyramid_rcf", "timm:vit_tiny_patch16_224"])
def test_other_families_export_too(name):
    trained = random_model(name, 64)
    content = module.onnx_file(trained)
    assert module.check_onnx(content, trained) < 5e-5
    session = onnxruntime.InferenceSession(content)
    noise = torch.rand((5, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    images = (noise * torch.linspace(20, 255, 5).view(5, 1, 1, 1)).round()  # from dark to bright
    _, features = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = trained.model.encode_image(images.to(torch.uint8)).numpy()
    np.testing.assert_allclose(features, expected, atol=5e-5)
    assert np.ptp(expected, axis=0).max() > 1e-3  # far above the tolerance: a constant would not pass


def test_a_model_that_answers_differently_is_not_written(run, tmp_path, monkeypatch, capsys):
    content = {}

    def stale(trained):
        """What was exported before the weights changed."""
        if not content:
            content["onnx"] = make(trained)
            trained.model.image_projection.weight[0] += 0.5
        return content["onnx"]

    make = torch.no_grad()(module.onnx_file)
    monkeypatch.setattr(module, "onnx_file", torch.no_grad()(stale))
    assert export(run, tmp_path / "out", "--format", "onnx", "safetensors") == 1
    assert re.search(r"differ by \d\.\d+e-0\d", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_file_that_onnxruntime_cannot_run_is_a_failure_of_one_line():
    with pytest.raises(RunFailed, match="onnxruntime cannot run"):
        module.check_onnx(b"no model", random_model("resnet18", 32))


# --- what is said of it -------------------------------------------------------------------------------------


def test_the_json_files_say_what_is_needed_and_their_checksums_fit(run, exported):
    for name, weights in (("model.onnx.json", "model.onnx"), ("config.json", "model.safetensors")):
        record = json.loads((exported / name).read_text("utf-8"))
        content = (exported / weights).read_bytes()
        assert record["files"] == {
            weights: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        }
        assert tuple(record["classes"]) == CLASSES and record["class_texts"]["肺炎"] == ["一张肺炎|图"]
        assert record["img_size"] == 32 and record["input"]["range"] == [0, 255]
        assert record["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
        assert record["epoch"] == 2 and record["embed_dim"] == 16
        assert record["training_options"]["learning_rate"] == 3e-4
    assert (
        json.loads((exported / "model.onnx.json").read_text("utf-8"))["checked"]["largest_difference"] < 1e-4
    )


def test_no_file_tells_where_things_lie_on_this_machine(run, exported, class_folder):
    for path in exported.iterdir():
        content = path.read_bytes()
        for folder in (run, class_folder, exported, ROOT, Path(sys.prefix), Path(torch.__file__).parent):
            assert str(folder).encode() not in content, (path.name, folder)


def test_no_folder_is_named_and_a_long_sentence_stays_whole(run, tmp_path):
    other = read_checkpoint(run / "checkpoint_latest.pth")
    other["config"] |= {
        "text_template": "肺" * 200 + "{class_name}", "cache_dir": "/data/hidden/cache",
        "text_encoder_name": "../hidden/bert", "image_weights": "hidden/a.pth", "text_weights": "pretrained",
        "group_pattern": "/",
    }  # fmt: skip
    write_file(tmp_path / "other.pth", other)
    assert export(tmp_path / "other.pth", tmp_path / "out", "--format", "safetensors") == 0
    options = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["training_options"]
    assert options["text_template"] == other["config"]["text_template"] and options["group_pattern"] == "/"
    assert [options[f"{side}_weights"] for side in ("image", "text")] == ["a.pth", "pretrained"]
    assert options["text_encoder_name"] == "bert"
    assert all(b"hidden" not in path.read_bytes() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "name", ["hfl/chinese-roberta", "bert-base-chinese", pytest.param("肺" * 100, id="long")]
)
def test_a_text_encoder_of_a_hub_keeps_its_name(name):
    trained = random_model("resnet18", 32)
    trained.facts["config"]["text_encoder_name"] = name
    assert module.description(trained)["text_encoder_name"] == name


def test_the_card_holds_data_metrics_with_intervals_and_limits(run, exported):
    card = (exported / "README.md").read_text("utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "image-classification" and "license" not in header
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    a = metrics["accuracy"]
    assert f"{100 * a['value']:.1f} ({100 * a['low']:.1f} to {100 * a['high']:.1f})" in card
    split = json.loads((run / "splits.json").read_text("utf-8"))["folds"][0]
    for name in CLASSES:
        n = [sum(path.startswith(name) for path in split[side]) for side in ("train", "val")]
        assert f"| {name} | 一张{name}\\|图 | 24 | {n[0]} | {n[1]} |" in card
    for words in (
        "not a medical device",
        "by patient (none of the 36 is on both sides)",
        "not chosen by the images",
        "started from random weights; epoch",
    ):
        assert words in card
    assert "| `use_amp` | false |" in card
    assert "separated by image" not in card and "\n\n\n" not in card
    assert "- The validation images come from the source of the training images." in card


def test_the_card_says_what_frequencies_the_probabilities_suppose_and_in_what_precision(
    run, exported, tmp_path
):
    card = (exported / "README.md").read_text("utf-8")
    assert "classes as frequent as in training" in card and "compute in bfloat16" not in card
    evened = read_checkpoint(run / "checkpoint_latest.pth")
    evened["config"] |= {"logit_adjustment": True, "logit_adjustment_tau": 0.5, "use_amp": True}
    evened["config"] |= {"group_pattern": None, "val_dir": "elsewhere", "image_weights": "own.safetensors"}
    evened["pretrained"]["image"] = ["backbone.conv1.weight"]
    write_file(tmp_path / "evened.pth", evened)
    assert export(tmp_path / "evened.pth", tmp_path / "out", "--format", "onnx") == 0
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "as frequent as in training" not in card and "logit adjustment with tau 0.5" in card
    assert "compute in bfloat16" in card
    unknown = "come from the source of the training images, or from their patients, is not known"
    assert unknown in card and "separated by image" not in card
    assert "started in part from weights of a file; epoch" in card and "published" not in card


def test_the_card_of_the_best_epoch_names_the_bias(run, tmp_path):
    flags = ["--format", "safetensors"]
    assert export(run / "checkpoint_best.pth", tmp_path / "best", *flags) == 0
    card = (tmp_path / "best" / "README.md").read_text("utf-8")
    assert "optimistic" in card and "without intervals" in card and "onnxruntime as" not in card
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(class_folder, tmp_path_factory, quick_report):
    """Early stopping ended it after the second of five epochs: no gain is enough."""
    output = tmp_path_factory.mktemp("runs") / "stopped"
    flags = ["--epochs", 5, "--early-stopping-patience", 1, "--early-stopping-min-delta", 100]
    return train(class_folder, output, *flags)


def card_of(checkpoint, output):
    assert export(checkpoint, output, "--format", "safetensors") == 0
    return (output / "README.md").read_text("utf-8")


def test_a_chosen_model_is_called_one_whatever_its_file_is_called(stopped, tmp_path):
    own = Path(shutil.copytree(stopped, tmp_path / "run"))
    (own / "checkpoint_best.pth").rename(own / "model.pth")
    card = card_of(own / "model.pth", tmp_path / "chosen")
    best = read_checkpoint(own / "model.pth")["epoch"]
    assert f"epoch {best} is exported" in card and f"Epoch {best} was chosen as the best" in card
    assert (
        f"| Loss (nats) | {history_of(stopped)['val_loss'][best - 1]:.4f} |" in card
    )  # not the last epoch's
    assert "not chosen" not in card and f"{best} of " not in card
    shutil.copy(stopped / "checkpoint_latest.pth", own / "checkpoint_best.pth")
    card = card_of(own / "checkpoint_best.pth", tmp_path / "last")
    metrics = json.loads((stopped / "metrics.json").read_text("utf-8"))
    assert "measured on, though early stopping looked at them." in card and "epoch 2 is exported" in card
    assert f"| Accuracy (%) | {100 * metrics['accuracy']['value']:.1f} (" in card  # with its interval


def test_an_epoch_of_an_unfinished_training_is_not_called_its_last(run, tmp_path):
    own = Path(shutil.copytree(run, tmp_path / "run"))
    begun = read_checkpoint(own / "checkpoint_latest.pth")
    begun["config"] |= {"epochs": 9, "early_stopping_patience": 3, "val_dir": "elsewhere"}
    begun["early_stopping"]["epochs_without"] = 2
    write_file(own / "checkpoint_latest.pth", begun)
    splits = json.loads((own / "splits.json").read_text("utf-8"))
    (split,) = splits["folds"]
    split["val"] = [path for path in split["val"] if not path.startswith("肺炎")]
    (own / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    card = card_of(own, tmp_path / "out")
    n = sum(path.startswith("肺炎") for path in split["train"])
    assert f"图 | {n} | {n} | 0 |" in card  # --val-dir may lack a class
    assert "set apart as a folder of their own, by patient (none of the 36 is on both sides)." in card
    assert "come from the source of the training images is not known" in card
    assert "Epoch 2 of a training that was not finished" in card and "last epoch" not in card
    # without an interval: metrics.json is of another end
    assert f"| Loss (nats) | {history_of(run)['val_loss'][-1]:.4f} |" in card


def test_a_checkpoint_beside_another_runs_files_does_not_borrow_their_numbers(run, tmp_path):
    shutil.copy(run / "checkpoint_latest.pth", tmp_path / "checkpoint_latest.pth")
    config = json.loads((run / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"dataset_fingerprint": "other"}))
    shutil.copy(run / "metrics.json", tmp_path)
    assert export(tmp_path, tmp_path / "out", "--format", "safetensors") == 0
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "counts are not known" in card and "without intervals" in card


def test_each_fold_of_a_cross_validation_is_exported(class_folder, tmp_path, capsys):
    cv = train(class_folder, tmp_path / "cv", "--use-cv", "--n-splits", 2, "--epochs", 1)
    assert export(cv, tmp_path / "out", "--format", "safetensors") == 0
    assert "each of its 2 folds" in capsys.readouterr().out
    metrics = json.loads((cv / "metrics.json").read_text("utf-8"))
    for k in (1, 2):
        card = (tmp_path / "out" / f"fold_{k}" / "README.md").read_text("utf-8")
        assert f"fold {k} of a cross-validation" in card and "separated by image" in card
        assert "of this one alone" in card and f"Of the {metrics['n_images']} images of all folds" in card
        assert (tmp_path / "out" / f"fold_{k}" / "model.safetensors").exists()
    assert export(cv, tmp_path / "out", "--format", "safetensors", "--overwrite") == 0
    assert export(cv, cv, "--format", "safetensors", "--overwrite") == 2
    assert "is the folder of a run" in capsys.readouterr().err


# --- bad input ----------------------------------------------------------------------------------------------


def test_every_mistake_is_said_at_once(tmp_path, capsys):
    assert main(["--output", "x", "--format", "onx", "--checkpoint", "y"]) == 2
    error = capsys.readouterr().err
    for part in ("--output (did you mean '--output-dir'", "--output-dir is required", "(did you mean 'onnx'"):
        assert part in error
    assert export(tmp_path / "none", __file__) == 2
    error = capsys.readouterr().err
    assert "none does not exist" in error and "is a file" in error


@pytest.mark.parametrize(
    ("checkpoint", "output", "message"),
    [
        ("nowhere", "out", "does not exist"),
        ("empty", "out", "holds no checkpoint_latest.pth"),
        ("image.png", "out", "is damaged or no checkpoint"),
        ("run", "image.png", "is a file"),
        ("run", "image.png/out", "no folder that may be written"),
        ("run", "full", "holds config.json, README.md already"),
        ("run", "run", "is the folder of a run"),
        ("run", "blocked", "model.safetensors is a folder there"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(checkpoint, output, message, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("mine")
    (tmp_path / "full" / "config.json").write_text("mine")
    (tmp_path / "blocked" / "model.safetensors").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "image.png")
    shutil.copytree(run, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    flags = ["--overwrite"] if output in ("run", "blocked") else []
    assert export(tmp_path / checkpoint, tmp_path / output, "--format", "safetensors", *flags) == 2
    assert message in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_overwrite_replaces_the_files_of_the_same_names_alone(run, tmp_path):
    (tmp_path / "README.md").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    assert export(run, tmp_path, "--format", "safetensors", "--overwrite") == 0
    assert "medical device" in (tmp_path / "README.md").read_text("utf-8")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "export_clip.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "--format" in done.stdout
    assert not re.search(r"\| +(torch|timm|onnx|transformers|sklearn|numpy)$", done.stderr, re.MULTILINE)
