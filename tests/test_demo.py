"""The demo set: plainly synthetic, repeatable, whole or absent, and without a shortcut to the class."""

import json
import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from data import demo

PATIENTS, SIZE = 12, 128


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return demo.make_demo(tmp_path_factory.mktemp("demo") / "new" / "set", PATIENTS, SIZE)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_layout(made):
    assert {path.name for path in made.iterdir() if path.is_dir()} == set(demo.CLASSES)
    rows = demo.read_rows(made)
    assert {row["path"] for row in rows} == {path.relative_to(made).as_posix() for path in made.glob("*/*")}
    assert list(rows[0]) == list(demo.COLUMNS)
    assert (made / "lesions.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    for row in rows:
        folder, name = row["path"].split("/")
        assert row["label"] == folder and name.startswith(row["group"] + "_")
    for group in {row["group"] for row in rows}:
        labels = [row["label"] for row in rows if row["group"] == group]
        assert 2 <= len(labels) <= 5 and len(set(labels)) == 1


def test_every_image_says_that_it_is_synthetic(made):
    tile = np.asarray(demo.synthetic_tile())
    height, width = tile.shape
    for path in made.glob("*/*.png"):
        with Image.open(path) as image:
            assert image.mode == "L" and image.size == (SIZE, SIZE)
            assert image.text["Description"] == "synthetic phantom, not a patient"
            corner = np.asarray(image)[SIZE - height - 2 : SIZE - 2, 2 : 2 + width]
        assert np.array_equal(corner, tile)
    readme = (made / "README.txt").read_text(encoding="utf-8")
    assert "SYNTHETIC" in readme and "合成" in readme


def test_boxes_lie_in_the_image_and_only_normal_has_none(made):
    for row in demo.read_rows(made):
        box = [row[key] for key in ("x0", "y0", "x1", "y1")]
        if row["label"] == demo.NORMAL:
            assert box == [""] * 4
        else:
            x0, y0, x1, y1 = map(int, box)
            assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE
            assert (x1 - x0) * (y1 - y0) < 0.35 * SIZE**2


@pytest.mark.parametrize("label", demo.CLASSES[1:])
@pytest.mark.parametrize("patient", range(4))
def test_the_lesion_is_the_only_difference(patient, label):
    """The same patient drawn healthy and ill: equal pixels outside the box, different ones inside."""
    healthy = demo.draw_patient(patient, SIZE, 42, demo.NORMAL)
    ill = demo.draw_patient(patient, SIZE, 42, label)
    for (_, plain, none), (_, marked, box) in zip_longest(healthy, ill):
        difference = np.abs(np.asarray(plain, dtype=int) - np.asarray(marked, dtype=int))
        x0, y0, x1, y1 = box
        assert none is None
        assert difference[y0:y1, x0:x1].max() > 15
        # The box ends where the lesion fades below 0.4; beyond a margin nothing may be left of it.
        margin = SIZE // 8
        difference[max(y0 - margin, 0) : y1 + margin, max(x0 - margin, 0) : x1 + margin] = 0
        assert difference.max() == 0


def test_more_patients_leave_the_earlier_ones_as_they_were(made, tmp_path):
    larger = demo.make_demo(tmp_path / "larger", PATIENTS + 2, SIZE)
    rows, more = demo.read_rows(made), demo.read_rows(larger)
    assert more[: len(rows)] == rows and len(more) > len(rows)
    for row in rows:
        assert (made / row["path"]).read_bytes() == (larger / row["path"]).read_bytes()


def test_the_seed_changes_the_pictures(made):
    first = demo.read_rows(made)[0]
    assert first["group"] == "P001" and first["path"].endswith("P001_1.png")
    _, same, _ = next(demo.draw_patient(0, SIZE, 42))
    _, other, _ = next(demo.draw_patient(0, SIZE, 43))
    assert np.array_equal(pixels(made / first["path"]), np.asarray(same))
    assert not np.array_equal(np.asarray(same), np.asarray(other))


def test_a_finished_set_is_left_alone(made, capsys):
    before = (made / "demo.json").stat().st_mtime_ns
    assert demo.make_demo(made, PATIENTS, SIZE) == made
    assert "left as it is" in capsys.readouterr().out
    assert (made / "demo.json").stat().st_mtime_ns == before


def test_anything_else_in_the_way_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="not a complete demo set"):
        demo.make_demo(made, PATIENTS, SIZE, seed=7)
    with pytest.raises(UserError):
        demo.make_demo(tmp_path, PATIENTS, SIZE)
    for content in ("", "[]", '{"parameters": {}}', json.dumps({"parameters": {"version": 1}})):
        (tmp_path / "demo.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError):
            demo.make_demo(tmp_path, PATIENTS, SIZE)


def test_a_set_with_an_image_missing_is_not_complete(tmp_path):
    folder = demo.make_demo(tmp_path / "set", PATIENTS, SIZE)
    next(folder.glob("*/*.png")).unlink()
    with pytest.raises(UserError):
        demo.make_demo(folder, PATIENTS, SIZE)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    drawn = demo.draw_patient

    def stop_at_third(patient, *rest):
        if patient == 2:
            raise KeyboardInterrupt
        return drawn(patient, *rest)

    monkeypatch.setattr(demo, "draw_patient", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        demo.make_demo(tmp_path / "set", PATIENTS, SIZE)
    assert list(tmp_path.iterdir()) == []


def test_bad_numbers_are_all_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        demo.make_demo(tmp_path / "set", patients=3, size=10, seed=-1)
    assert len(caught.value.problems) == 3
    assert not (tmp_path / "set").exists()


def test_command_line(made, capsys):
    arguments = ["--output", str(made), "--patients", str(PATIENTS), "--size", str(SIZE)]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    assert str(made) in printed and "synthetic" in printed
    for label in demo.CLASSES:
        assert f"{label}: " in printed
    for wrong, says in (
        ([*arguments, "--seed", "1"], "not a complete demo set"),
        (["--sead", "1"], "unknown option --sead (did you mean '--seed'"),
        (["--size", "large"], "argument --size"),
        (["--output", str(made / "README.txt" / "set")], "no folder that may be written"),
    ):
        assert demo.main(wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error


def test_a_console_without_chinese_letters_is_no_reason_to_stop(made):
    command = [sys.executable, "-m", "data.demo", "--output", str(made), "--patients", str(PATIENTS)]
    done = subprocess.run(
        [*command, "--size", str(SIZE)], cwd=Path(__file__).parent.parent, capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == b""
    assert b"  ??: " in done.stdout  # the name of a class of two letters
