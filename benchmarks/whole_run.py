"""A whole training run as a user starts it, and when it prints what."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import RunFailed
from common.files import write_json
from data.scan import scan_folder

ROOT = Path(__file__).resolve().parent.parent
TRAINING = "training on "  # how the line begins that is printed before the first step
SENTENCE = "这是一张{}的胸部X光图像，可见双肺纹理、心影与膈面，供放射科医师参考诊断之用，请结合临床"


@dataclass
class Run:
    """A whole run, in seconds: to read the images; each epoch; from the start to where the first step begins.

    ended: when the last epoch did, by time.perf_counter, where no floor was measured. memory: MB held at each
    epoch's end. floors: what was measured before the first epoch and after each, while the run was stopped.
    """

    n_train: int = 0
    n_val: int = 0
    read: float = 0.0
    start: float = 0.0
    ended: float = 0.0
    epochs: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    floors: list[list[float]] = field(default_factory=list)


def sentences_of(data_dir: Path) -> dict[str, str]:
    """class -> the sentence that it is trained with."""
    return {name: SENTENCE.format(name) for name in scan_folder(data_dir).classes}


def whole_run(
    data_dir: Path,
    encoder: str,
    text: str,
    options: Sequence[str],
    work: Path,
    floor: Callable[[], list[float]] | None = None,
) -> Run:
    """Train as a user would, in a process of its own, and note when it prints what. With `floor` the training
    is stopped before the first epoch and after each to call it; that time does not count.
    """
    work.mkdir(exist_ok=True)
    texts = work / "texts.json"
    write_json(texts, sentences_of(data_dir))
    command = [
        sys.executable, str(ROOT / "train_clip.py"), "--data-dir", str(data_dir),
        "--output-dir", str(work / "run"), "--overwrite", "--image-encoder", encoder, "--text-encoder", text,
        "--image-weights", "none", "--text-weights", "none",
        "--class-texts-file", str(texts), "--cache-dir", str(work / "cache"), *options,
    ]  # fmt: skip
    found = Run()
    between = None if floor is None else lambda: found.floors.append(floor())
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    started = last = time.perf_counter()
    with open(work / "errors.txt", "w") as errors, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
    ) as run, _watched(run, between) as lines:  # fmt: skip
        for now, line in lines:
            if line.startswith("read "):
                found.read = float(line.split(" images in ")[1].split()[0])
            elif line.startswith(TRAINING):
                found.n_train = int(line.split()[2])
                found.n_val = int(line.split("validating on ")[1].split()[0])
                found.start, last = now - started, now
            elif line.startswith("epoch "):
                found.epochs.append(now - last)
                found.ended = time.perf_counter()
                found.memory += memory_of(run.pid)
                last = now
            elif line.startswith("warning: torch.compile cannot"):
                raise RunFailed(line.strip())
            elif line.startswith("done:"):
                return found  # what follows, the report, is measured elsewhere
        said = (work / "errors.txt").read_text()
        raise RunFailed(f"{' '.join(command)} failed: {said[-500:]}")


@contextlib.contextmanager
def _watched(
    run: subprocess.Popen, between: Callable[[], object] | None
) -> Iterator[Iterator[tuple[float, str]]]:
    """In the block: each line of `run` and when it came, by a clock that stands still while `run` does: it is
    stopped for `between`, where there is one, before its first epoch and after each. After the block it is
    killed, with the processes that load its images.
    """
    printed: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        try:
            for line in run.stdout:
                printed.put(line)
        finally:
            printed.put("")

    def lines() -> Iterator[tuple[float, str]]:
        stopped = 0.0  # seconds
        while line := printed.get():
            came = time.perf_counter()
            if between and line.startswith((TRAINING, "epoch ")):
                os.killpg(run.pid, signal.SIGSTOP)
                between()
                os.killpg(run.pid, signal.SIGCONT)
            now, stopped = came - stopped, stopped + time.perf_counter() - came
            yield now, line

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield lines()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        listener.join()


def memory_of(pid: int) -> list[float]:
    """MB that a process holds: one number, none where the system is not Linux."""
    status = Path(f"/proc/{pid}/status").read_text() if sys.platform == "linux" else ""
    return [int(row.split()[1]) / 1024 for row in status.splitlines() if "VmRSS" in row]
