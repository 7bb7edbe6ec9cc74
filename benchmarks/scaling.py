"""One training on several processes, and a large batch in little memory; figures as Markdown rows.

    python -m benchmarks.scaling --what speed   # with nothing else running
    python -m benchmarks.scaling --what memory

Each figure is of train_clip.py itself, on random images that are decoded already. Speed: images/s of the last
epoch, of as many processes as are given, one thread each. Memory: on a CPU the most that the training process
held (its other needs, some 400 MB, included); on a GPU the most that PyTorch had allocated there.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.cli import Parser, exit_code_of
from common.errors import RunFailed

ROOT = Path(__file__).resolve().parent.parent
# Runs train_clip and says the process's peak: of its resident pages (Linux gives KiB), or of a GPU's memory.
WITH_PEAK = """
import resource, sys, torch, train_clip
code = train_clip.main(sys.argv[1:])
gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
print("peak", gpu or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def make_images(folder: Path, n: int, size: int) -> None:
    generator = np.random.default_rng(0)
    for number, name in enumerate(("a", "b", "c")):
        (folder / name).mkdir(parents=True)
        for i in range(number, n, 3):
            pixels = generator.integers(0, 256, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png", compress_level=1)


class Bench:
    def __init__(self, root: Path, arguments):
        self.root, self.arguments = root, arguments
        self.data = root / "data"
        make_images(self.data, arguments.images, arguments.img_size)

    def options(self, encoder: str, batch_size: int, epochs: int) -> list[str]:
        gpu = [] if torch.cuda.is_available() else ["--gpu-id", "-1"]
        return [
            "--data-dir", str(self.data), "--output-dir", str(self.root / "out"), "--val-ratio", "0.1",
            "--image-encoder", encoder, "--image-weights", "none", "--text-encoder", "bert-tiny-bytes",
            "--img-size", str(self.arguments.img_size), "--batch-size", str(batch_size),
            "--epochs", str(epochs), "--num-workers", "0", "--no-save-best", *gpu,
        ]  # fmt: skip

    def run(self, command: Sequence[str], threads: int) -> str:
        """Standard output. Raises RunFailed with what it said when it failed."""
        shutil.rmtree(self.root / "out", ignore_errors=True)
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(self.root / "cache"),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RunFailed(f"{' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def images_per_second(self, encoder: str, processes: int, threads: int, batch_size: int) -> float:
        options = self.options(encoder, batch_size, self.arguments.epochs)
        if processes > 1:
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            self.run([*start, "train_clip.py", *options], threads)
        else:
            self.run(["train_clip.py", *options], threads)
        history = json.loads((self.root / "out" / "history.json").read_text(encoding="utf-8"))
        return history["images_per_second"][-1]

    def peak(self, encoder: str, batch_size: int, *more: str) -> float:
        """Megabytes."""
        printed = self.run(
            ["-c", WITH_PEAK, *self.options(encoder, batch_size, 1), *more], os.cpu_count() or 1
        )
        return int(printed.rsplit("peak", 1)[1]) / 1e6


def speed(bench: Bench) -> Iterator[str]:
    yield "| encoder | batch | processes x threads | images/s | against one |\n|---|---|---|---|---|"
    for encoder in bench.arguments.encoders:
        batch_size = bench.arguments.batch_sizes[0]
        one = bench.images_per_second(encoder, 1, 1, batch_size)
        yield f"| {encoder} | {batch_size} | 1 x 1 | {one:.1f} | 1.00 |"
        for processes in bench.arguments.processes:
            for n, threads in ((1, processes), (processes, 1)):
                several = bench.images_per_second(encoder, n, threads, batch_size)
                yield f"| {encoder} | {batch_size} | {n} x {threads} | {several:.1f} | {several / one:.2f} |"


def memory(bench: Bench) -> Iterator[str]:
    ways = {
        "at once": (),
        "--gradient-checkpointing": ("--gradient-checkpointing",),
        "--micro-batch-size 8": ("--micro-batch-size", "8"),
        "both": ("--micro-batch-size", "8", "--gradient-checkpointing"),
    }
    yield f"| encoder | batch | {' | '.join(ways)} |\n|---|---|{'---|' * len(ways)}"
    for encoder in bench.arguments.encoders:
        for batch_size in bench.arguments.batch_sizes:
            peaks = [bench.peak(encoder, batch_size, *options) for options in ways.values()]
            yield f"| {encoder} | {batch_size} | {' | '.join(f'{peak:.0f} MB' for peak in peaks)} |"


CASES = {"speed": speed, "memory": memory}


def read_arguments(arguments: Sequence[str]):
    parser = Parser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--what", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    encoders = ["resnet18", "starnet_dual_pyramid_rcf"]
    parser.add_argument("--encoders", nargs="+", default=encoders, metavar="NAME")
    parser.add_argument("--processes", nargs="+", type=int, default=[2], metavar="N")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 64, 128, 256], metavar="N")
    parser.add_argument("--images", type=int, default=400, metavar="N")
    parser.add_argument("--img-size", type=int, default=224, metavar="N")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="of a run whose speed is taken")
    return parser.read(arguments, ())


def measure(arguments: Sequence[str]) -> int:
    options = read_arguments(arguments)
    with tempfile.TemporaryDirectory(prefix="scaling_") as root:
        bench = Bench(Path(root), options)
        for case in options.what:
            for row in CASES[case](bench):
                print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: measure(sys.argv[1:]), "stopped"))
