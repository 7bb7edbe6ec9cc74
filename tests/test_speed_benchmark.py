"""benchmarks/speed.py and speed_gpu.py run with the program as it is; their figures are not tested."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks import whole_run
from benchmarks.floor import floor_of, in_turn
from benchmarks.speed import own_steps, parts_of_a_step, seconds_at_floor, turned_copies, upscaled
from benchmarks.speed_gpu import Utilisation, main
from common.device import choose_hardware
from common.errors import RunFailed
from data.images import read_image
from data.scan import scan_folder

HARDWARE = choose_hardware(-1, False)


def test_a_step_and_its_parts_are_measured():
    (seconds,) = in_turn(own_steps("resnet18", 32, 4, 3, HARDWARE, 1), rounds=1)
    assert seconds > 0
    parts = dict(parts_of_a_step("resnet18", 32, 2, HARDWARE))
    assert sum(parts.values()) == pytest.approx(1) and parts["backward"] > 0.1


def test_the_floor_counts_images_a_second():
    floor = floor_of("resnet18", 32, 4, HARDWARE)
    assert floor.evaluate > 0 and floor.train > 0


STAND_IN = """
import os, pathlib, sys, time
def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.001)
folder = pathlib.Path(__file__).parent
(folder / "pid").write_text(str(os.getpid()))
print("read 30 images in 0.5 s")
print("training on 24 images, validating on 6 images")
for epoch in (1, 2):
    wait_for(f"floor {epoch}")
    print(f"epoch {epoch}/2")
"""


class StandIn:
    """In place of the program: ends an epoch when its floor was measured, and itself as `end` says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, end: str):
        self.folder, self.away, self.floors = folder, 0.0, 0
        (folder / "train_clip.py").write_text(STAND_IN + end, encoding="utf-8")
        monkeypatch.setattr(whole_run, "ROOT", folder)
        self.clock = time.perf_counter
        monkeypatch.setattr(whole_run.time, "perf_counter", lambda: self.clock() + self.away)

    def state(self) -> str:
        """One letter of the system's: T for stopped."""
        status = Path("/proc", (self.folder / "pid").read_text(), "stat")
        return status.read_text().rsplit(") ", 1)[1][0]

    def floor(self) -> list[float]:
        deadline = self.clock() + 60
        while self.state() not in "TZ":  # a signal takes its time; Z: it has ended
            assert self.clock() < deadline, "the run goes on while its floor is measured"
        self.away += 1000  # as if it had taken so many seconds
        self.floors += 1
        (self.folder / f"floor {self.floors}").touch()
        return [float(self.floors)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_stands_still_while_its_floor_is_measured_and_that_time_does_not_count(
    class_folder, tmp_path, monkeypatch
):
    run = StandIn(tmp_path, monkeypatch, "print('done:'); time.sleep(600)")
    found = whole_run.whole_run(class_folder, "resnet18", "none", [], tmp_path / "work", run.floor)
    assert (found.n_train, found.n_val, found.read) == (24, 6, 0.5)
    assert len(found.epochs) == len(found.memory) == 2 and found.floors == [[1.0], [2.0], [3.0]]
    assert all(0 <= seconds < 1000 for seconds in [found.start, *found.epochs])
    with pytest.raises(FileNotFoundError):
        run.state()  # it was ended, though it would have gone on


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_fails_is_reported_with_its_last_words(class_folder, tmp_path, monkeypatch):
    run = StandIn(tmp_path, monkeypatch, "raise SystemExit('no room')")
    with pytest.raises(RunFailed, match="no room"):
        whole_run.whole_run(class_folder, "resnet18", "none", [], tmp_path / "work", run.floor)


def test_an_epoch_is_held_against_the_floor_on_both_its_sides():
    run = whole_run.Run(n_train=9, n_val=6, floors=[[2.0, 1.0, 3.0], [6.0, 1.0, 3.0], [6.0, 3.0, 6.0]])
    # mean speeds: 1/3 and 1/6 of a step a second, 1 and 2/3 of a pass, 1/3 and 1/4 of the text tower's
    assert seconds_at_floor(run, 4) == pytest.approx([9 / 4 * 3 + 1.5 + 9, 9 / 4 * 6 + 1.5 * 1.5 + 12])
    run.floors = [own[:2] for own in run.floors]
    assert seconds_at_floor(run, 4) == pytest.approx([9 / 4 * 3 + 1.5, 9 / 4 * 6 + 1.5 * 1.5])


def test_folders_for_measuring_hold_the_same_classes(class_folder, tmp_path):
    own = scan_folder(class_folder)
    large, copies = (
        upscaled(class_folder, 60, tmp_path / "large"),
        turned_copies(class_folder, 2, tmp_path / "2"),
    )
    assert scan_folder(large).classes == scan_folder(copies).classes == own.classes
    assert len(scan_folder(large).paths) == len(own.paths) == len(scan_folder(copies).paths) / 2
    assert min(read_image(large / scan_folder(large).paths[0]).size) == 60


def test_utilisation_is_the_mean_of_what_was_seen_between():
    seen = Utilisation("GPU-0")
    seen.seen = [(1.0, 10.0), (2.0, 50.0), (3.0, 70.0), (4.0, 0.0)]
    assert seen.between(1.5, 3.5) == 60


def test_without_a_gpu_the_gpu_benchmark_names_the_other(class_folder, capsys):
    assert main(["--data-dir", str(class_folder), "--gpu-id", "-1"]) == 2
    assert "benchmarks.speed" in capsys.readouterr().err
