"""A folder of a million images: the scan, the memory of the whole start-up and of the loading processes.

    python -m benchmarks.big_folder                       # some 10 minutes on two cores
    python -m benchmarks.big_folder --images 100000

Makes a folder of tiny images, all different (8 x 8 pixels; 4 GB of disk, since a file takes a whole block),
in a temporary place, and does in a fresh process what a run does until its first training step, with
--no-cache and too many images for memory. Decoding is therefore as short as it can be, and what is held per
image is as it is for large images. Prints Markdown.
"""

import argparse
import io
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.cli import Parser, exit_code_of
from common.errors import RunFailed, UserError
from data.images import MEMORY_FOR_IMAGES

ROOT = Path(__file__).resolve().parent.parent
CLASSES, FOLDERS = 10, 100  # folders of each class
WORKERS, BATCH = 2, 100
PARTS = 4  # of the epoch, to look at the processes' memory after each


def make_folder(root: Path, n_images: int) -> None:
    """10 classes of 100 folders; four images of each patient. An image's first pixels are its number."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "BMP")
    header, pixels = data.getvalue()[:-192], data.getvalue()[-192:]
    number = 0
    for c in range(CLASSES):
        for f in range(FOLDERS):
            folder = root / f"类别{c}" / f"医院{f:03d}"
            folder.mkdir(parents=True)
            for _ in range(n_images // (CLASSES * FOLDERS)):
                path = folder / f"P{number // 4:07d}_{number % 4}.bmp"
                path.write_bytes(header + number.to_bytes(8, "little") + pixels[8:])
                number += 1


def memory_of(process: int | str = "self") -> dict[str, float]:
    """MB of a process: Rss (pages it has), Pss (shared ones by their share), Uss (its own alone)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {
        "Rss": kb["Rss"] / 1000,
        "Pss": kb["Pss"] / 1000,
        "Uss": (kb["Private_Clean"] + kb["Private_Dirty"]) / 1000,
    }


def start_up(data_dir: Path, img_size: int, n_read: int) -> None:
    """What `training.run` does until the first step, then a part of an epoch; prints a JSON object a step."""
    started = time.monotonic()

    def say(step: str, **more: float) -> None:
        nonlocal started
        seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        print("row:" + json.dumps({"step": step, "seconds": seconds, "peak": peak, **memory_of(), **more}))
        sys.stdout.flush()
        started = time.monotonic()

    import training.run  # noqa: F401 -- all that a run imports
    from common.device import choose_hardware
    from common.files import write_json
    from data.loader import EpochBatches, ImageDataset, build_loader
    from training import dataset
    from training.build import build_model
    from training.config import Config

    config = Config(
        data_dir=str(data_dir), img_size=img_size, use_cache=False, group_pattern=r"^(P\d+)_",
        image_encoder_name="starnet_dual_pyramid_rcf", image_weights="none",
        text_encoder_name="bert-tiny-bytes",
    )  # fmt: skip
    build_model(config, choose_hardware(-1, True))
    say("libraries and models")
    folder, _ = dataset.scan(config)
    say("scan")
    patients = dataset.patients_of(config, folder, None)
    say("patients")
    data = dataset.read_images(config, folder, None, patients, at_least=2)
    say("reading")
    split = dataset.split_of(config, data)
    say("split")
    dataset.findings_of(data, [split])
    say("findings")
    with tempfile.TemporaryDirectory() as temporary:
        write_json(Path(temporary) / "splits.json", dataset.splits_record_of(config, data, [split]))
    dataset.split_fingerprint(data, split)
    say("splits.json")
    chosen = np.random.default_rng(0).choice(
        split.train, min(n_read, len(split.train)), replace=False
    )  # of all over the folder
    images = ImageDataset(data.files, data.labels, img_size, data.squares)
    batches = EpochBatches(chosen, BATCH, 0)
    loader = build_loader(images, batches, WORKERS)
    epoch = iter(loader)
    next(epoch)
    say("first batch")
    pids = [worker.pid for worker in epoch._workers]
    for part in range(PARTS):
        for _ in range(len(batches) // PARTS - (part == 0)):
            next(epoch)
        own = [memory_of(pid) for pid in pids]
        say("worker", number=part + 1, pss=max(m["Pss"] for m in own), uss=max(m["Uss"] for m in own))


def measure(data_dir: Path, n_images: int, n_read: int) -> list[dict[str, float]]:
    """The rows of `start_up` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.big_folder", "--of", str(data_dir)]
    command += ["--images", str(n_images), "--read", str(n_read)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"the start-up failed:\n{done.stderr[-2000:]}")
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("row:")]


def print_rows(n_images: int, n_read: int, rows: list[dict[str, float]]) -> None:
    print(f"| {n_images:,} images, step | seconds | MB afterwards | highest MB so far |\n|---|---|---|---|")
    for row in rows:
        if row["step"] != "worker":
            print(f"| {row['step']} | {row['seconds']:.1f} | {row['Rss']:.0f} | {row['peak']:.0f} |")
    print(f"\n| of {n_read:,} images read by {WORKERS} processes | MB of its own, larger one | PSS, MB |")
    print("|---|---|---|")
    for row in rows:
        if row["step"] == "worker":
            print(f"| {row['number']} / {PARTS} | {row['uss']:.0f} | {row['pss']:.0f} |")


def read_arguments(typed: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.big_folder", description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000, help="how many (default: %(default)s)")
    parser.add_argument("--read", type=int, default=200_000, help="of them, by two processes at the end")
    parser.add_argument("--of", type=Path, help="measure this folder in this process")
    found = parser.read(typed, required=())
    if found.images < 4 * CLASSES * FOLDERS:
        raise UserError(f"--images must be at least {4 * CLASSES * FOLDERS}")
    return found


def main(typed: Sequence[str] | None = None) -> int:
    def program() -> int:
        args = read_arguments(sys.argv[1:] if typed is None else typed)
        if args.of:
            size = 32 * math.ceil(math.sqrt(MEMORY_FOR_IMAGES / args.images / 3) / 32 + 1e-9)
            start_up(args.of, size, args.read)  # at this size they are too many to be kept in memory
            return 0
        with tempfile.TemporaryDirectory() as temporary:
            make_folder(Path(temporary), args.images)
            rows = measure(Path(temporary), args.images, args.read)
        print_rows(args.images, args.read, rows)
        return 0

    return exit_code_of(program, interrupted="nothing was measured")


if __name__ == "__main__":
    sys.exit(main())
