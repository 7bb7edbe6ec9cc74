import json
import re
import socket
import subprocess
import sys
from csv import DictReader
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import predict_clip
import train_clip
from evaluation.results import read_predictions
from tests import several
from tests.quick import QUICK
from training.losses import contrastive_loss

ROOT = Path(__file__).resolve().parent.parent


def start_torchrun(n, *arguments, torchrun_options=("--standalone",)):
    """tests/several.py on n processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", *torchrun_options]
    return subprocess.Popen(
        [*command, "tests/several.py", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def torchrun(n, *arguments, torchrun_options=()):
    """Exit code, stdout, stderr."""
    process = start_torchrun(n, *arguments, torchrun_options=("--standalone", *torchrun_options))
    try:
        printed, error = process.communicate(timeout=600)  # a machine may be busy: alone it takes 15 s
    except subprocess.TimeoutExpired:
        process.terminate()  # with those it has started; what they said until then is the test's to show
        printed, error = process.communicate()
    finally:
        process.kill()
    return process.returncode, printed, error


def expected(encoder, kind, groups):
    """The loss and the gradients of the whole batch, by the formula, and the running statistics; BatchNorm
    sees the images of a group together.
    """
    model, texts = several.a_model(encoder)
    groups = [torch.from_numpy(np.concatenate(group)) for group in groups]
    features = torch.cat([model.image_projection(model.image_tower(several.a_batch()[g])) for g in groups])
    images = F.normalize(features[torch.cat(groups).argsort()], dim=1)
    sentences = F.normalize(model.text_projection(model.text_tower(**texts)), dim=1)
    logits = model.logit_scale.exp() * images @ sentences.T
    loss = contrastive_loss(kind, logits, several.LABELS)[0]
    loss.backward()
    return several.results(loss.detach(), model)


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    out = tmp_path_factory.mktemp("steps") / "steps.pt"
    code, _, error = torchrun(3, "steps", out)
    assert code == 0, error
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("encoder", several.ENCODERS)
def test_several_processes_have_the_loss_and_gradients_of_the_whole_batch(of_three, encoder):
    """13 images on 3 processes, at once and in parts; BatchNorm over what all have at the moment."""
    shares = np.array_split(np.arange(len(several.LABELS)), 3)
    for (name, kind, most), (loss, gradients) in of_three.items():
        if name == encoder:
            groups = (
                [shares] if most is None else zip(*(np.array_split(own, 2) for own in shares), strict=True)
            )
            whole_loss, whole_gradients = expected(encoder, kind, groups)
            torch.testing.assert_close(loss, whole_loss, atol=1e-10, rtol=0)
            torch.testing.assert_close(gradients, whole_gradients, atol=1e-10, rtol=1e-8)


BASE = [
    *QUICK, "--image-encoder", "timm:test_vit", "--epochs", "2", "--batch-size", "7",
    "--save-every-minutes", "0.00001",
]  # fmt: skip


def options(data, out, *more):
    return ["--data-dir", data, "--output-dir", out, *BASE, *more]


def end_of(out):
    """History without times, and predictions."""
    history = json.loads((out / "history.json").read_text())
    times = ("epoch_seconds", "images_per_second")
    predictions = read_predictions(out / "predictions.csv")
    return {k: v for k, v in history.items() if k not in times}, predictions.paths, predictions.probs


def assert_close(one, other):
    """To float tolerance: float32, two epochs."""
    assert one[0].keys() == other[0].keys() and one[1] == other[1]
    for key, values in one[0].items():
        assert values == pytest.approx(other[0][key], rel=1e-3), key
    np.testing.assert_allclose(one[2], other[2], atol=1e-3)


@pytest.fixture(scope="module")
def of_one(quick_report, class_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    assert train_clip.main([str(o) for o in options(class_folder, out)]) == 0
    assert not torch.distributed.is_initialized()
    return end_of(out)


@pytest.fixture(scope="module")
def of_two(class_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "run"
    code, printed, error = torchrun(2, "-", *options(class_folder, out))
    assert code == 0, error
    assert printed.count("epoch 2/2") == printed.count("done: 2 epochs") == 1
    assert "float32, 2 processes" in printed
    return out, end_of(out)


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one_and_only_the_first_writes(of_one, of_two):
    """57 images in batches of 7: uneven shares. Every validation image is counted once."""
    out, end = of_two
    assert_close(end, of_one)
    assert (out / "report.html").exists() and not list(out.glob(".*.tmp"))


@pytest.mark.slow
def test_two_machines_start_again_after_one_lost_its_process(class_folder, tmp_path, of_two):
    """Bit for bit the same end, though torchrun counts the restart on that machine alone. --overwrite does
    not throw away what the first start did.
    """
    out = tmp_path / "run"
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    machines = [
        start_torchrun(
            1, "kill", *options(class_folder, out, "--overwrite"),
            torchrun_options=[
                "--nnodes=2", "--max-restarts=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"
            ],
        )
        for _ in range(2)
    ]  # fmt: skip
    ends = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    assert sum(printed.count("resuming in epoch 1 of 2, after 5 of") for printed, _ in ends) == 1
    one, other = end_of(out), of_two[1]
    assert one[:2] == other[:2] and np.array_equal(one[2], other[2])


@pytest.mark.slow
def test_machines_that_do_not_see_the_same_are_refused(class_folder, tmp_path):
    code, _, error = torchrun(2, "other", *options(class_folder, tmp_path / "run"))
    assert code != 0 and error.count("of this run do not see the same --learning-rate: give") == 1


@pytest.mark.slow
def test_stopped_with_two_processes_a_run_goes_on_with_three(class_folder, tmp_path, of_one):
    """SIGTERM reaches the second process alone; all stop after the same step."""
    out = tmp_path / "run"
    code, printed, error = torchrun(2, "stop", *options(class_folder, out))
    assert code != 0 and "exitcode  : 143" in error, error
    assert "saving after step 6 of 9 of epoch 1" in printed
    code, printed, error = torchrun(3, "-", *options(class_folder, out, "--resume-from", "auto"))
    assert code == 0, error
    assert "resuming in epoch 1 of 2, after 6 of 9 steps" in printed
    assert_close(end_of(out), of_one)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_and_is_said_once(class_folder, tmp_path):
    code, _, error = torchrun(2, "raise", *options(class_folder, tmp_path / "run"))
    assert code != 0 and error.count("Traceback") == 1  # torchrun's own
    assert len(re.findall(r"error: process 1 of 2, on \S+: out of memory", error)) == 1
    assert "process 0 of 2" not in error


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path):
    code, _, error = torchrun(2, "-", *options(tmp_path / "nothing", tmp_path / "run"))
    assert code != 0 and error.count("is not a folder") == 1 and not (tmp_path / "run").exists()


def test_a_batch_too_small_for_the_processes_is_refused(class_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.begin.n_processes", lambda: 8)
    assert train_clip.main([str(o) for o in options(class_folder, tmp_path / "run")]) == 2
    assert "--batch-size 7 is for all 8 processes together" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_cross_validation_with_micro_batches_and_a_validation_set_smaller_than_the_processes(
    class_folder, tmp_path, quick_report
):
    folds = [
        "--use-cv",
        "--n-splits",
        "2",
        "--epochs",
        "1",
        "--freeze-text-encoder",
        "--micro-batch-size",
        "2",
    ]
    assert train_clip.main([str(o) for o in options(class_folder, tmp_path / "one", *folds)]) == 0
    code, _, error = torchrun(2, "-", *options(class_folder, tmp_path / "two", *folds))
    assert code == 0, error
    one, two = (read_predictions(tmp_path / name / "oof_predictions.csv") for name in ("one", "two"))
    assert one.paths == two.paths and len(set(two.paths)) == 72
    np.testing.assert_allclose(one.probs, two.probs, atol=1e-3)

    val = tmp_path / "val"
    for name in ("正常", "肺炎"):
        (val / name).mkdir(parents=True)
        image = sorted((class_folder / name).iterdir())[0]
        Image.open(image).rotate(90).save(val / name / image.name)
    # BatchNorm's statistics differ between processes; those of the first are the model's, for all images
    given = options(class_folder, tmp_path / "three", "--val-dir", val, "--epochs", "1")
    code, _, error = torchrun(3, "-", *given, "--image-encoder", "resnet18")
    assert code == 0, error
    latest, csv = tmp_path / "three" / "checkpoint_latest.pth", tmp_path / "predicted.csv"
    assert predict_clip.main(["--checkpoint", str(latest), "--input", str(val), "--output", str(csv)]) == 0
    validated = read_predictions(tmp_path / "three" / "predictions.csv")
    with open(csv, encoding="utf-8-sig", newline="") as file:
        rows = {row["path"]: row for row in DictReader(file)}
    assert len(rows) == len(validated.paths) == 2
    for path, probs in zip(validated.paths, validated.probs, strict=True):
        predicted = [float(rows[path][f"prob_{name}"]) for name in validated.classes]
        assert predicted == pytest.approx(probs.tolist(), abs=1e-4)
