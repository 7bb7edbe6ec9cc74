"""Runs that are killed, starved and stopped, each continued by the same command; figures as Markdown rows.

    python -m benchmarks.torture --what kills --times 100     # some 15 minutes on two cores
    python -m benchmarks.torture --what cv multi stops workers twice clock full read-only vanish

Every case ends with a comparison: weights, optimizer moments, random state, history (without times) and
predictions of the tortured run against those of one that nothing happened to, bit for bit. A small run: 60
images of 48 x 48, the dual pyramid at 32 px (it draws random depths) and the tiny text tower, one thread,
saved three times a second, but for `held`. What needs a mount (full, read-only) needs root.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.cli import Parser, exit_code_of
from common.errors import RunFailed, UserError
from evaluation.checkpoints import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("epoch_seconds", "images_per_second")
SMALL = (
    "--text-encoder", "bert-tiny-bytes", "--img-size", "32", "--embed-dim", "16", "--batch-size", "8",
    "--num-workers", "0", "--gpu-id", "-1", "--learning-rate", "3e-4", "--save-every-minutes", "0.005",
)  # fmt: skip
COMPARED = ("predictions.csv", "oof_predictions.csv", "cv_summary.json", "metrics.json", "splits.json")
SINGLE = ("--epochs", "3", "--resume-from", "auto")
HELD = ("--epochs", "30", "--save-every-minutes", "0", "--resume-from", "auto")
LONGER = ("--epochs", "12", "--resume-from", "auto")
FOLDS = ("--epochs", "2", "--use-cv", "--n-splits", "2")
ENTRIES = [{"epochs": 2}, {"epochs": 1, "use_cv": True, "n_splits": 2, "embed_dim": 8}]
TRACEBACK = "Traceback (most recent call last)"


def make_images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for c, name in enumerate(("正常", "肺炎", "气胸")):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            grey = np.clip(generator.normal(60 + 50 * c, 20, (48, 48)), 0, 255).astype(np.uint8)
            Image.fromarray(grey).save(folder / name / f"{i}.png")


class Torture:
    """data: the images. One reference per kind of run, made when it is first needed."""

    def __init__(self, root: Path, seed: int):
        self.root, self.data, self.random = root, root / "data", random.Random(seed)
        self.references: dict[tuple[str, ...], dict[str, Any]] = {}
        self.seconds: dict[tuple[str, ...], float] = {}
        make_images(self.data)
        (root / "entries.json").write_text(json.dumps(ENTRIES))
        self.entries = ("--multi-config", "--config-file", str(root / "entries.json"))

    def command(self, out: Path, kind: Sequence[str], before: str = "") -> list[str]:
        """`before`: Python to run first in the same process."""
        start = [sys.executable, "train_clip.py"]
        if before:
            start = [sys.executable, "-c", f"{before}\nimport sys, train_clip; sys.exit(train_clip.main())"]
        return [*start, "--data-dir", str(self.data), "--output-dir", str(out), *SMALL, *kind]

    def start(self, out: Path, kind: Sequence[str], before: str = "") -> subprocess.Popen:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.root / "cache"),
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        with open(self.root / "log.txt", "ab") as log:
            return subprocess.Popen(
                self.command(out, kind, before), cwd=ROOT, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def said(self) -> str:
        """By the processes since this was last asked."""
        path = self.root / "log.txt"
        text = path.read_text("utf-8", "replace") if path.exists() else ""
        path.unlink(missing_ok=True)
        if TRACEBACK in text:
            raise RunFailed(f"a traceback:\n{text[-3000:]}")
        return text

    def finish(self, out: Path, kind: Sequence[str], before: str = "") -> None:
        code = self.start(out, kind, before).wait()
        said = self.said()
        if code:
            raise RunFailed(f"exit code {code} instead of 0:\n{said[-3000:]}")

    def reference(self, kind: tuple[str, ...]) -> dict[str, Any]:
        if kind not in self.references:
            out = self.root / f"reference {len(self.references)}"
            started = time.monotonic()
            self.finish(out, kind)
            self.seconds[kind] = time.monotonic() - started
            self.references[kind] = contents(out)
        return self.references[kind]

    def compare(self, out: Path, kind: tuple[str, ...]) -> None:
        different = differences(contents(out), self.reference(kind))
        if different:
            raise RunFailed(f"{out} differs from the uninterrupted run in {', '.join(different[:10])}")
        shutil.rmtree(out)


def contents(out: Path) -> dict[str, Any]:
    """What must be equal at the end: (file, part) -> tensors, numbers or bytes."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.name.startswith("checkpoint_"):
            checkpoint = read_checkpoint(path)
            found |= _leaves(checkpoint["model"], f"{name} model")
            found |= _leaves(checkpoint.get("optimizer", {}), f"{name} optimizer")
            found |= _leaves(checkpoint.get("rng", {}), f"{name} rng")
        elif path.name == "history.json":
            history = json.loads(path.read_text())
            found |= {f"{name} {key}": own for key, own in history.items() if key not in TIMES}
        elif path.name in COMPARED:
            found[name] = path.read_bytes()
    return found


def _leaves(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, (dict, list)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {leaf: own for key, part in parts for leaf, own in _leaves(part, f"{name} {key}").items()}
    return {name: value}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or not same(one[name], other[name])
    ]


def unreadable(out: Path) -> list[str]:
    """Files under their final names that are not whole."""
    bad = []
    for path in out.rglob("*") if out.exists() else ():
        try:
            if path.suffix == ".pth" and path.name.startswith("checkpoint_"):
                read_checkpoint(path)
            elif path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
        except (UserError, ValueError) as error:
            bad.append(f"{path}: {error}")
    return bad


def kill(torture: Torture, times: int, kind: tuple[str, ...]) -> str:
    """SIGKILL at random moments until the run ends by itself, over and over."""
    torture.reference(kind)
    kills = runs = in_a_write = 0
    while kills < times:
        out = torture.root / "out"
        while True:
            process = torture.start(out, kind)
            try:
                code = process.wait(torture.random.uniform(0, torture.seconds[kind]))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                in_a_write += any(out.rglob(".*.tmp"))
                bad = unreadable(out)
                if bad:
                    raise RunFailed(f"after kill {kills}: {bad}") from None
                continue
            said = torture.said()
            if code:
                raise RunFailed(f"exit code {code} after {kills} kills:\n{said[-3000:]}")
            break
        left = [str(path) for path in out.rglob(".*.tmp")]
        if left:
            raise RunFailed(f"left behind: {left}")
        torture.compare(out, kind)
        runs += 1
    return f"{kills} kills ({in_a_write} within a write) in {runs} runs: 0 unreadable files, all ends equal"


def stop(torture: Torture, times: int) -> str:
    """SIGTERM within the epochs: exit code 143, soon, and the end is the same."""
    kind = LONGER
    torture.reference(kind)
    slowest, stops, runs = 0.0, 0, 0
    while stops < times:
        out, code, said = torture.root / "out", 143, ""
        while code:
            process = torture.start(out, kind)
            wait_for(lambda: "training on" in (torture.root / "log.txt").read_text("utf-8"), process)
            started = time.monotonic()
            if "done: " not in said:  # all epochs are behind it: let it write its report
                time.sleep(torture.random.uniform(0, 3))
                started = time.monotonic()
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            said = torture.said()
            if "stopping: saving after step" in said:
                slowest = max(slowest, time.monotonic() - started)
                stops += 1
            # the bare signal: all was done, and Python was ending
            if code not in (0, 143, -signal.SIGTERM) or unreadable(out):
                raise RunFailed(f"exit code {code}:\n{said[-3000:]}\n{unreadable(out)}")
        torture.compare(out, kind)
        runs += 1
    where = f"{stops} SIGTERMs within an epoch in {runs} runs"
    return f"{where}: exit code 143 in {slowest:.1f} s at most, all ends equal"


def workers(torture: Torture, times: int) -> str:
    """Images read from the files at every epoch by 0, 1, 2 and 4 processes."""
    read_always = "import data.images; data.images.MEMORY_FOR_IMAGES = 0"
    many = "import os; os.cpu_count = lambda: 8"
    for number in (0, 1, 2, 4):
        out = torture.root / "out"
        torture.finish(out, (*SINGLE, "--no-cache", "--num-workers", str(number)), f"{read_always}\n{many}")
        torture.compare(out, SINGLE)
    return "0, 1, 2 and 4 processes that read images: equal to the run that had them in memory"


def twice(torture: Torture, times: int) -> str:
    for _ in range(2):
        torture.finish(torture.root / "out", SINGLE)
        torture.compare(torture.root / "out", SINGLE)
    return "the same command twice more: equal"


def clock(torture: Torture, times: int) -> str:
    """The wall clock jumps by up to a year at every look."""
    jump = (
        "import random, time; real = time.time; draw = random.Random(1)\n"
        "time.time = lambda: real() + draw.uniform(-3e7, 3e7)"
    )
    torture.finish(torture.root / "out", SINGLE, jump)
    torture.compare(torture.root / "out", SINGLE)
    return "a wall clock that jumps by up to a year: equal"


@contextmanager
def small_disk(torture: Torture, megabytes: int):
    folder = torture.root / "disk"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.02)


def after_an_epoch(torture: Torture, disk: Path, happen: Callable[[], object]) -> tuple[int, str]:
    """Let something `happen` when the first epoch is saved. Returns the exit code and what was said."""
    process = torture.start(disk / "out", SINGLE)
    wait_for((disk / "out" / "checkpoint_best.pth").exists, process)
    happen()
    code = process.wait()
    return code, torture.said()


def full(torture: Torture, times: int) -> str:
    with small_disk(torture, 20) as disk:
        code = torture.start(disk / "out", SINGLE).wait()
        said = torture.said()
        if code != 2 or "checkpoints will need about" not in said:
            raise RunFailed(f"a disk too small was not said: exit code {code}\n{said[-2000:]}")
    with small_disk(torture, 400) as disk:

        def fill() -> None:
            with open(disk / "filler", "wb") as file:
                try:
                    while True:
                        file.write(bytes(2**20))
                        file.flush()
                except OSError:
                    pass

        code, said = after_an_epoch(torture, disk, fill)
        if code != 1 or "No space left" not in said or unreadable(disk):
            raise RunFailed(f"exit code {code}:\n{said[-2000:]}\n{unreadable(disk)}")
        (disk / "filler").unlink()
        torture.finish(disk / "out", SINGLE)
        torture.compare(disk / "out", SINGLE)
    return (
        "a disk too small: refused, exit code 2; one filled in mid-run: exit code 1, files whole, continued "
        "to the same end"
    )


def read_only(torture: Torture, times: int) -> str:
    with small_disk(torture, 400) as disk:
        process = torture.start(disk / "out", SINGLE)
        wait_for((disk / "out" / "checkpoint_best.pth").exists, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code = torture.start(disk / "out", SINGLE).wait()
        said = torture.said()
        if code != 2 or "cannot be written" not in said or unreadable(disk):
            raise RunFailed(f"exit code {code} on a read-only folder:\n{said[-2000:]}")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        torture.finish(disk / "out", SINGLE)
        torture.compare(disk / "out", SINGLE)
    return "a half-finished run on a disk that became read-only: exit code 2; writable again, the same end"


def vanish(torture: Torture, times: int) -> str:
    out = torture.root / "place" / "out"
    code, said = after_an_epoch(torture, out.parent, lambda: shutil.rmtree(out))
    if code != 1 or "No such file or directory" not in said:
        raise RunFailed(f"exit code {code}:\n{said[-2000:]}")
    images = torture.root / "images that go"
    shutil.copytree(torture.data, images)
    shutil.rmtree(out, ignore_errors=True)
    process = torture.start(out, (*SINGLE, "--no-cache", "--data-dir", str(images)),
                            "import data.images; data.images.MEMORY_FOR_IMAGES = 0")  # fmt: skip
    wait_for((out / "checkpoint_best.pth").exists, process)
    shutil.rmtree(images)
    code = process.wait()
    said = torture.said()
    if code != 1 or "could be read at the start but not any more" not in said or unreadable(out):
        raise RunFailed(f"exit code {code}:\n{said[-2000:]}")
    return "an output folder, then the images, removed in mid-run: exit code 1, one message each"


CASES: dict[str, Callable[[Torture, int], str]] = {
    "kills": lambda torture, times: kill(torture, times, SINGLE),
    "held": lambda torture, times: kill(torture, times, HELD),
    "cv": lambda torture, times: kill(torture, times, FOLDS),
    "multi": lambda torture, times: kill(torture, times, torture.entries),
    "stops": stop,
    "workers": workers,
    "twice": twice,
    "clock": clock,
    "full": full,
    "read-only": read_only,
    "vanish": vanish,
}


def read_arguments(arguments: Sequence[str]):
    parser = Parser(prog="python -m benchmarks.torture", description=__doc__)
    parser.add_argument("--what", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--times", type=int, default=20, metavar="N", help="kills or stops of a case")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    return parser.read(arguments, ())


def torture_all(arguments: Sequence[str]) -> int:
    options = read_arguments(arguments)
    print("| case | outcome | minutes |\n|---|---|---|", flush=True)
    failed = 0
    for case in options.what:
        with tempfile.TemporaryDirectory(prefix="torture_") as root:
            started = time.monotonic()
            try:
                outcome = CASES[case](Torture(Path(root), options.seed), options.times)
            except RunFailed as error:
                outcome, failed = f"FAILED: {error}", 1
            print(f"| {case} | {outcome} | {(time.monotonic() - started) / 60:.1f} |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: torture_all(sys.argv[1:]), "stopped"))
