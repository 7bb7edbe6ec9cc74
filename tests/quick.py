"""A training that takes a second or two, and a checkpoint without one, for tests of what is around it."""

import json

from evaluation.checkpoints import FORMAT
from models.clip import build_clip
from train_clip import main

QUICK = [
    "--image-encoder",
    "timm:test_resnet",
    "--image-weights",
    "none",
    "--text-encoder",
    "bert-tiny-bytes",
    "--img-size",
    "32",
    "--embed-dim",
    "16",
    "--batch-size",
    "16",
    "--num-workers",
    "0",
    "--gpu-id",
    "-1",
    "--no-amp",
    "--learning-rate",
    "3e-4",
]


def train(data, output, *flags):
    return main(["--data-dir", str(data), "--output-dir", str(output), *QUICK, *map(str, flags)])


class Killed(Exception):
    """Raised where a test ends a run."""


def raising_at(number, function, error=Killed):
    """`function`, whose call of that number raises `error` instead; and the list of its calls."""
    calls = []

    def called(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise error
        return function(*arguments)

    return called, calls


def without_gradient(tower) -> list[str]:
    """The parameters that get none, or zeros."""
    return [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()]


def quick_clip():
    """The model that QUICK trains."""
    return build_clip(
        "timm:test_resnet",
        "bert-tiny-bytes",
        img_size=32,
        embed_dim=16,
        temperature=0.07,
        image_weights="none",
    )


def history_of(folder):
    return json.loads((folder / "history.json").read_text("utf-8"))


def write_nothing(run_dir):
    """In place of evaluation.report.write_report, which draws for seconds."""
    (run_dir / "report.html").write_text("-")


def a_checkpoint(classes, class_features, model, config, **own):
    """What a checkpoint for use holds; `model`: its weights."""
    return {
        "format": FORMAT,
        "config": {
            "image_encoder_name": "resnet18", "text_encoder_name": "bert-tiny-bytes", "data_dir": "-",
            "temperature": 0.1, "use_amp": False, **config,
        },
        "classes": list(classes),
        "class_texts": {name: [name] for name in classes},
        "class_features": class_features,
        "model": model,
        "frozen": {}, "history": {}, "epoch": 1, "dataset_fingerprint": "f", "split_fingerprint": "f",
        "pretrained": {"image": [], "text": []},
        **own,
    }  # fmt: skip
