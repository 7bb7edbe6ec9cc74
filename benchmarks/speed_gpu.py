"""Whole training runs on a GPU against their floor, in one run on one machine, as Markdown.

    python -m benchmarks.speed_gpu --data-dir xray3 --copies 8
    python -m benchmarks.speed_gpu --data-dir xray3 --copies 8 --compile   # the runs train with --compile
    python -m benchmarks.speed_gpu --data-dir xray3 --copies 8 --eager     # without minutes of compiling

The floor is the image tower alone, measured before the run, eager and compiled by torch.compile, with ten
steps started before the GPU is waited for. A run's share of it is the time that its images would take at the
floor over the time from one epoch's line to the next, validation and checkpoints included, from the second
epoch on. A few hundred images are a second of such a GPU's work: --copies makes more of them, each turned by
another degree.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

import torch

import common.torchvision_compat  # noqa: F401
from benchmarks.accuracy_peers import size_of
from benchmarks.floor import floor_of, table
from benchmarks.speed import TINY, read_with_run_options, turned_copies
from benchmarks.whole_run import whole_run
from common.cli import Parser, exit_code_of
from common.device import Hardware, choose_hardware
from common.errors import RunFailed, UserError

ENCODERS = ("resnet50", "vit", "convnext-tiny", "starnet_dual_pyramid_rcf")


class Utilisation:
    """What nvidia-smi says of a GPU, five times a second, while the block runs. between(): mean percent."""

    def __init__(self, gpu: str):
        command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=utilization.gpu", "-lms", "200"]
        self.command, self.seen = [*command, "--format=csv,noheader,nounits"], []

    def __enter__(self) -> "Utilisation":
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        self.thread = threading.Thread(target=self._listen)
        self.thread.start()
        return self

    def _listen(self) -> None:
        for line in filter(str.isdecimal, map(str.strip, self.process.stdout)):
            self.seen.append((time.perf_counter(), float(line)))

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.thread.join()

    def between(self, start: float, end: float) -> float:
        return mean([percent for when, percent in self.seen if start <= when <= end] or [float("nan")])


def row_of(
    encoder: str, data_dir: Path, options: argparse.Namespace, hardware: Hardware, work: Path
) -> tuple[str, ...]:
    """One encoder's line of the table."""
    size, batch = options.img_size, options.batch_size
    floors = [floor_of(encoder, size, batch, hardware, how) for how in (False, True)[: 2 - options.eager]]
    flags = ["--img-size", str(size), "--batch-size", str(batch), "--gpu-id", str(options.gpu_id)]
    flags += ["--freeze-text-encoder", "--epochs", str(options.epochs), *["--compile"] * options.compile]
    # nvidia-smi does not know CUDA_VISIBLE_DEVICES, by which PyTorch counts
    gpu = f"GPU-{torch.cuda.get_device_properties(hardware.device).uuid}"
    with Utilisation(gpu) as utilisation:
        run = whole_run(data_dir, encoder, TINY, flags, work)
    later = median(run.epochs[1:])
    shares = [(run.n_train / floor.train + run.n_val / floor.evaluate) / later for floor in floors]
    busy = utilisation.between(run.ended - sum(run.epochs[1:]), run.ended)
    rate = run.n_train / (later - run.n_val / floors[0].evaluate)
    teraflops = 3 * 2 * size_of(encoder, size)["gmac"] * rate / 1e3  # backward: twice the forward's
    return (
        encoder, "; ".join(f"{floor.train:.0f} / {floor.evaluate:.0f}" for floor in floors), f"{later:.2f} s",
        "; ".join(f"**{share:.2f}**" for share in shares), f"{rate:.0f}", f"{teraflops:.1f}", f"{busy:.0f} %",
    )  # fmt: skip


HEAD = (
    "image encoder", "floor, training / forward, img/s: eager; compiled", "an epoch from the second on",
    "share of the floor", "training img/s", "TFLOP/s", "utilisation",
)  # fmt: skip


def matrix_teraflops(device: torch.device, side: int = 8192) -> float:
    """What the GPU reaches in bf16 on one large matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize(device)
    return 20 * 2 * side**3 / (time.perf_counter() - started) / 1e12


def read_arguments(typed: Sequence[str]) -> argparse.Namespace:
    """The typed options. Raises UserError naming every mistake."""
    parser = Parser(prog="python -m benchmarks.speed_gpu", description=__doc__)
    add = parser.add_argument
    add("--copies", type=int, default=0, help="train on so many turned copies of each image instead")
    add("--eager", action="store_true", help="no compiled floor: compiling takes minutes")
    add("--compile", action="store_true", help="train with --compile")
    return read_with_run_options(parser, typed, ENCODERS, 256)


def main(typed: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code: 0 done, 1 a run failed, 2 bad input."""

    def program() -> int:
        options = read_arguments(sys.argv[1:] if typed is None else typed)
        hardware = choose_hardware(options.gpu_id, True)
        if hardware.device.type != "cuda":
            raise UserError("there is no GPU; python -m benchmarks.speed measures a CPU")
        if not shutil.which("nvidia-smi"):
            raise UserError("nvidia-smi is not to be found, which tells how busy the GPU is")
        print(
            f"{hardware.description}; torch {torch.__version__}; {options.img_size} px, "
            f"batch {options.batch_size}{', runs with --compile' if options.compile else ''}"
        )
        print(f"a bf16 matrix product of 8192: {matrix_teraflops(hardware.device):.0f} TFLOP/s\n", flush=True)
        with tempfile.TemporaryDirectory() as work:
            data_dir, rows = options.data_dir, []
            if options.copies:
                data_dir = turned_copies(data_dir, options.copies, Path(work) / "copies")
            for encoder in options.image_encoder:
                try:
                    rows.append(row_of(encoder, data_dir, options, hardware, Path(work) / "run"))
                except (RunFailed, torch.OutOfMemoryError) as error:
                    print(f"{encoder} failed: {error}", file=sys.stderr)
                    continue
                print(table(HEAD, rows[-1:]), flush=True)
            print(table(HEAD, rows))
        return 0 if len(rows) == len(options.image_encoder) else 1

    return exit_code_of(program, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
