"""benchmarks/speed.py and speed_gpu.py run with the program as it is; what they measure is not tested."""

import pytest

from benchmarks.speed import floor_of, in_turn, own_steps, parts_of_a_step, turned_copies, upscaled
from benchmarks.speed_gpu import Utilisation, main
from common.device import choose_hardware
from data.images import read_image
from data.scan import scan_folder

HARDWARE = choose_hardware(-1, False)


def test_a_step_and_its_parts_are_measured():
    assert all(
        s > 0 for s in in_turn(HARDWARE.device, own_steps("resnet18", 32, 4, 3, HARDWARE, 1), rounds=1)
    )
    parts = dict(parts_of_a_step("resnet18", 32, 2, HARDWARE))
    assert sum(parts.values()) == pytest.approx(1) and parts["backward"] > 0.1


def test_the_floor_counts_images_a_second():
    floor = floor_of("resnet18", 32, 4, HARDWARE)
    assert floor.evaluate > 0 and floor.train > 0


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
    seen = Utilisation(0)
    seen.seen = [(1.0, 10.0), (2.0, 50.0), (3.0, 70.0), (4.0, 0.0)]
    assert seen.between(1.5, 3.5) == 60


def test_without_a_gpu_the_gpu_benchmark_names_the_other(class_folder, capsys):
    assert main(["--data-dir", str(class_folder), "--gpu-id", "-1"]) == 2
    assert "benchmarks.speed" in capsys.readouterr().err
