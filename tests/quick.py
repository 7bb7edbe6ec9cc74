"""A training that takes a second or two, for tests of what is around it."""

from train_clip import main

QUICK = [
    "--image-encoder",
    "resnet18",
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
