"""The data check finds what was planted, and nothing in a folder where nothing was."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.check import check_data, main, read_splits
from data.findings import KINDS, LEVELS, quick_findings
from data.groups import groups_by_pattern, groups_from_file, merge_groups
from data.images import inspect_images
from data.scan import scan_folder
from data.shortcuts import LEAST_GROUPS
from data.splits import Split

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("正常", "肺炎", "气胸")


def picture(random: np.random.RandomState, width: int = 96, height: int = 80) -> Image.Image:
    """Lumps of grey that no other picture has, on a little noise; equal brightness on the whole."""
    coarse = random.permutation(np.linspace(40, 215, 100)).reshape(10, 10).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), float)
    return Image.fromarray(np.clip(smooth + random.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three classes with Chinese names, 12 patients x 2 images each, sizes drawn alike: nothing wrong."""
    random = np.random.RandomState(0)
    for c, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        for i in range(24):
            image = picture(random, *random.randint(70, 110, 2))
            image.save(tmp_path / name / f"P{c}{i // 2:02d}_{i % 2}.png")
    return tmp_path


def check(root: Path, pattern: str | None = r"^(P\d+)_", splits=None, audit: bool = False) -> dict:
    """check_data, without the slow audit where it is not what is tested."""
    images = scan_folder(root)
    patients = groups_by_pattern(images, pattern) if pattern else None
    with pytest.MonkeyPatch.context() as patch:
        if not audit:
            patch.setattr("data.check.audit_shortcuts", lambda *_: ({}, ""))
        return check_data(images, patients, splits)


def kinds(result: dict) -> dict[str, dict]:
    found = {f["kind"]: f for f in result["findings"]}
    assert len(found) == len(result["findings"])
    for finding in found.values():
        assert finding["level"] in LEVELS and finding["kind"] in KINDS and len(finding["examples"]) <= 20
    return found


def fold_of(root: Path, val: set[str]) -> list[Split]:
    held = np.array([path in val for path in scan_folder(root).paths])
    return [Split(np.flatnonzero(~held), np.flatnonzero(held))]


# ---- a folder without faults


def test_nothing_is_found_where_nothing_is_wrong(folder):
    result = check(folder, audit=True)
    # 12 patients a class are few, and sizes are mixed: these are true
    assert set(kinds(result)) == {"class_small", "mixed_size"}
    assert result["images"] == 72 and result["patients"] == 36
    assert list(result["summary"]) == list(scan_folder(folder).classes)
    facts = result["summary"]["肺炎"]
    assert (facts["images"], facts["patients"], facts["unreadable"]) == (24, 12, 0)
    assert facts["formats"] == {"PNG": 24} and facts["modes"] == {"L": 24} and facts["bits"] == {"8": 24}
    widths = sorted(Image.open(path).width for path in (folder / "肺炎").iterdir())
    assert facts["width"] == {"min": widths[0], "median": np.median(widths), "max": widths[-1]}
    json.dumps(result, allow_nan=False)


# ---- files


def test_files_that_show_nothing(folder):
    (folder / "正常" / "P001_0.png").write_bytes(b"no image")
    Image.new("RGB", (90, 90), (7, 8, 9)).save(folder / "肺炎" / "P100_1.png")
    Image.fromarray(np.full((90, 90), 3000, np.uint16)).save(folder / "肺炎" / "P101_1.png")
    near = np.full((90, 90), 100, np.uint8)
    near[40, 40] = 101
    Image.fromarray(near).save(folder / "气胸" / "P200_0.png")
    picture(np.random.RandomState(5), 63, 300).save(folder / "气胸" / "P201_0.png")
    picture(np.random.RandomState(6), 64, 300).save(folder / "气胸" / "P202_0.png")
    found = kinds(check(folder))
    assert found["unreadable"]["count"] == 1 and found["unreadable"]["examples"][0].startswith(
        "正常/P001_0.png: "
    )
    assert found["constant"]["examples"] == ["肺炎/P100_1.png", "肺炎/P101_1.png"]
    assert found["nearly_constant"]["examples"] == ["气胸/P200_0.png"]
    assert found["tiny"]["examples"] == ["气胸/P201_0.png: 63 x 300"]
    assert {found[kind]["level"] for kind in ("unreadable", "constant", "nearly_constant", "tiny")} == {
        "warning"
    }


def test_a_folder_of_broken_files_is_still_told(tmp_path):
    for name in NAMES[:2]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
    found = kinds(check(tmp_path, None))
    assert found["unreadable"]["count"] == 2 and found["class_too_small"]["count"] == 2


def test_a_png_named_jpg_and_several_depths(folder):
    path = folder / "正常" / "P001_0.png"
    path.rename(path.with_suffix(".jpg"))
    deep = np.asarray(Image.open(folder / "肺炎" / "P101_0.png")).astype(np.uint16) * 200
    Image.fromarray(deep).save(folder / "肺炎" / "P101_0.png")
    Image.open(folder / "气胸" / "P201_0.png").convert("RGB").save(folder / "气胸" / "P201_0.bmp")
    (folder / "气胸" / "P201_0.png").unlink()
    found = kinds(check(folder))
    assert found["wrong_suffix"]["examples"] == ["正常/P001_0.jpg: PNG"]
    assert found["mixed_bits"]["examples"] == ["肺炎: 8 bit (23), 16 bit (1)"]
    assert found["mixed_format"]["examples"] == ["气胸: PNG (23), BMP (1)"]
    assert set(found["mixed_mode"]["examples"]) == {"气胸: L (23), RGB (1)", "肺炎: L (23), I;16 (1)"}
    assert {found[kind]["level"] for kind in ("wrong_suffix", "mixed_bits", "mixed_format")} == {"note"}


def test_what_the_scan_passed_over_is_a_note(folder):
    (folder / "正常" / "readme.txt").write_text("x")
    assert ".txt" in kinds(check(folder))["passed_over"]["message"]


# ---- copies


def test_identical_images_within_and_across_classes(folder):
    source = Image.open(folder / "正常" / "P003_0.png")
    source.save(folder / "正常" / "P003_2.bmp")  # other bytes, the same pixels
    source.save(folder / "正常" / "P003_3.png")
    Image.open(folder / "肺炎" / "P104_0.png").save(folder / "气胸" / "P204_9.png")
    found = kinds(check(folder))
    assert found["identical_within"]["count"] == 2 and found["identical_within"]["level"] == "warning"
    assert found["identical_within"]["examples"] == ["正常/P003_0.png = 正常/P003_2.bmp = 正常/P003_3.png"]
    across = found["identical_across_classes"]
    assert across["count"] == 1 and across["level"] == "danger"
    assert across["examples"] == ["气胸/P204_9.png = 肺炎/P104_0.png"]
    assert not {kind for kind in found if kind.startswith("near_")}


def saved_again(source: Path, target: Path, scale: float = 0.9, quality: int = 60) -> None:
    image = Image.open(source)
    size = [round(side * scale) for side in image.size]
    image.resize(size, Image.Resampling.BICUBIC).save(target, quality=quality)


def test_near_copies_are_told_by_what_they_endanger(folder):
    saved_again(folder / "正常" / "P002_0.png", folder / "正常" / "P002_7.jpg")
    saved_again(folder / "正常" / "P003_0.png", folder / "正常" / "P009_7.jpg", 1.3, 30)
    saved_again(folder / "肺炎" / "P104_0.png", folder / "气胸" / "P204_7.jpg", 0.8, 90)
    found = kinds(check(folder))
    assert found["near_within"]["examples"] == ["正常/P002_0.png ~ 正常/P002_7.jpg"]
    assert found["near_within"]["level"] == "note"  # a split by patient keeps them together
    assert found["near_across_patients"]["examples"] == ["正常/P003_0.png ~ 正常/P009_7.jpg"]
    assert found["near_across_classes"]["examples"] == ["气胸/P204_7.jpg ~ 肺炎/P104_0.png"]
    found = kinds(check(folder, None))
    assert found["near_within"]["count"] == 2 and found["near_within"]["level"] == "warning"
    found = kinds(check(folder, splits=fold_of(folder, {"正常/P002_7.jpg"})))
    assert found["near_across_splits"]["examples"] == ["正常/P002_0.png ~ 正常/P002_7.jpg"]
    assert found["near_across_splits"]["level"] == "danger" and "near_within" not in found


# ---- patients, splits, class sizes


def test_patients_in_two_classes_and_on_both_sides(folder):
    for number in (3, 5):
        Image.open(folder / "正常" / f"P0{number:02d}_1.png").rotate(90).save(
            folder / "肺炎" / f"P0{number:02d}_8.png"
        )
    held = {"正常/P001_0.png", "正常/P001_1.png", "气胸/P200_0.png", "肺炎/P003_8.png"}
    found = kinds(check(folder, splits=fold_of(folder, held)))
    assert found["patient_in_several_classes"]["examples"] == [
        "P003: 正常 x 2, 肺炎 x 1",
        "P005: 正常 x 2, 肺炎 x 1",
    ]
    assert found["patient_across_splits"]["examples"] == ["P003: fold 1", "P200: fold 1"]
    assert found["patient_across_splits"]["level"] == "danger"
    assert "patient_across_splits" not in kinds(check(folder, splits=fold_of(folder, set())))
    assert "patient_in_several_classes" not in kinds(check(folder, None))


def test_identical_images_on_both_sides_of_the_second_fold(folder):
    Image.open(folder / "正常" / "P003_0.png").save(folder / "正常" / "P004_5.png")
    splits = [
        *fold_of(folder, {"正常/P003_0.png", "正常/P004_5.png"}),
        *fold_of(folder, {"正常/P004_5.png"}),
    ]
    leak = kinds(check(folder, None, splits))["identical_across_splits"]
    assert leak["level"] == "danger" and leak["examples"] == ["fold 2: 正常/P003_0.png = 正常/P004_5.png"]
    part = [Split(splits[0].train[2:], splits[0].val)]
    assert kinds(check(folder, None, part))["outside_splits"]["count"] == 2


def test_small_and_lopsided_classes(tmp_path):
    random = np.random.RandomState(3)
    for name, n in (("a", 4), ("b", 5), ("c", 19), ("d", 20), ("e", 41)):
        (tmp_path / name).mkdir()
        for i in range(n):
            picture(random).save(tmp_path / name / f"P{i % 18}_{i}.png")
    found = kinds(check(tmp_path, None))
    assert found["class_too_small"]["examples"] == ["a: 4"] and found["class_too_small"]["level"] == "danger"
    assert found["class_small"]["examples"] == ["b: 5", "c: 19"]
    assert found["lopsided"]["count"] == 5 and "e has 41 images and a 4" in found["lopsided"]["message"]
    assert "d: 18" in kinds(check(tmp_path))["class_small"]["examples"]  # 20 images, 18 patients
    (tmp_path / "e" / "P4_40.png").unlink()
    assert "lopsided" not in kinds(check(tmp_path, None))  # ten to one is not more than ten to one
    Image.open(tmp_path / "b" / "P0_0.png").save(tmp_path / "b" / "P1_1.png")
    assert kinds(check(tmp_path, None))["class_too_small"]["examples"] == [
        "a: 4",
        "b: 4",
    ]  # copies count once


def test_the_quick_part_reads_no_file_again(folder):
    Image.open(folder / "正常" / "P003_0.png").save(folder / "肺炎" / "P003_5.png")
    (folder / "气胸" / "P200_0.png").write_bytes(b"")
    images = scan_folder(folder)
    inspection = inspect_images(images.files(), 8)
    for file in images.files():
        file.unlink()
    patients = [path if path.startswith("气胸") else "one" for path in images.paths]
    splits = [Split(np.flatnonzero(images.labels < 2), np.flatnonzero(images.labels == 2))]
    read = np.flatnonzero(inspection.digests != b"")
    groups = merge_groups(inspection.digests[read], [patients[i] for i in read], images.paths.take(read))
    found = quick_findings(images, inspection, groups, patients, splits)
    order = [KINDS.index(f["kind"]) for f in found if f["level"] == "danger"]
    assert order == sorted(order) and [f["level"] for f in found] == sorted(
        (f["level"] for f in found), key=LEVELS.index
    )
    warnings = [f["kind"] for f in found if f["level"] == "warning"]
    assert warnings == ["unreadable", "patient_in_several_classes"]  # a training stops at the first
    assert {f["kind"] for f in found} == {
        "identical_across_splits", "patient_across_splits", "identical_across_classes", "class_too_small",
        "patient_in_several_classes", "unreadable",
    }  # fmt: skip
    left = inspection.without(set(inspection.errors))
    assert not left.errors and len(left.facts) == len(left.digests) == len(left.squares) == 72


# ---- what a file is


def test_facts_are_those_of_the_file_and_not_of_its_name(tmp_path):
    random = np.random.RandomState(0)
    grey = picture(random, 20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    grey.save(tmp_path / "a.png", exif=exif)
    grey.convert("RGB").save(tmp_path / "b.png", format="JPEG")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 9).save(tmp_path / "c.tif")
    Image.merge("RGBA", [grey] * 4).save(tmp_path / "d.webp")
    Image.new("1", (4, 3), 1).save(tmp_path / "e.png")
    Image.fromarray(np.full((3, 5), 0.25, np.float32)).save(tmp_path / "f.tif")
    (tmp_path / "g.png").write_bytes(b"")
    facts = inspect_images(sorted(tmp_path.iterdir()), None).facts
    assert facts.pop() is None
    assert [(f.format, f.mode, f.bits, f.width, f.height, f.constant) for f in facts] == [
        ("PNG", "L", 8, 10, 20, False),
        ("JPEG", "RGB", 8, 20, 10, False),
        ("TIFF", "I;16", 16, 20, 10, False),
        ("WEBP", "RGBA", 8, 20, 10, False),
        ("PNG", "1", 1, 4, 3, True),
        ("TIFF", "F", 32, 5, 3, True),
    ]


@pytest.mark.parametrize("place", [(0, 0), (39, 59), (20, 30)])
def test_one_other_pixel_makes_an_image_not_constant(tmp_path, place):
    colour = np.full((40, 60, 3), (1, 2, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "a.png")
    colour[place] = (1, 2, 4)
    Image.fromarray(colour).save(tmp_path / "b.png")
    found = inspect_images([tmp_path / "a.png", tmp_path / "b.png"], None)
    assert [f.constant for f in found.facts] == [True, False]


def test_dicom_facts(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    source = pydicom.data.get_testdata_file("CT_small.dcm")
    facts = inspect_images([Path(source)], None).facts[0]
    assert (facts.format, facts.mode, facts.bits) == ("DICOM", "MONOCHROME2", 16)
    assert (facts.width, facts.height) == (128, 128)


def test_measurements_keep_the_order_of_the_files(folder):
    files = scan_folder(folder).files()
    found = inspect_images([*files[:5], folder / "none.png"], None, lambda image: image.size)
    assert found.measured == [*(Image.open(file).size for file in files[:5]), None] and found.squares is None


# ---- shortcuts


def test_a_class_of_another_shape_is_given_away_and_only_it(folder):
    for file in (folder / "气胸").iterdir():
        image = Image.open(file)
        image.resize((round(image.height * 1.7), image.height)).save(file)
    result = check(folder, audit=True)
    found = kinds(result)
    shape = found["shortcut_shape"]
    assert shape["level"] == "danger" and shape["count"] == 1
    assert "tell 气胸 from the rest" in shape["message"] and "by patient" in shape["message"]
    assert re.match(
        r"气胸: AUC (1\.00|0\.9\d) against all others; .*aspect 1\.7 against ", shape["examples"][0]
    )
    assert "shortcut_format" not in found and "shortcut_brightness" not in found
    audit = result["shortcuts"]["shape"]
    assert audit["apart"] == {"气胸": ["正常", "肺炎"], "正常": ["气胸"], "肺炎": ["气胸"]}
    assert audit["balanced_accuracy"] > audit["luck"] > audit["chance"] == 1 / 3


def test_formats_and_exposure_give_classes_away(folder):
    for file in (folder / "正常").iterdir():
        Image.open(file).save(file.with_suffix(".jpg"), quality=95)
        file.unlink()
    for file in (folder / "肺炎").iterdir():
        Image.open(file).point(lambda value: value * 0.6).save(file)
    found = kinds(check(folder, None, audit=True))
    assert "format JPEG against PNG" in found["shortcut_format"]["examples"][0]
    assert "tell 正常 from the rest" in found["shortcut_format"]["message"]
    assert "tell 肺炎 from the rest" in found["shortcut_brightness"]["message"]
    assert "shortcut_shape" not in found
    assert "tell every class from the rest" in found["shortcut_everything"]["message"]
    assert found["shortcut_format"]["level"] == found["shortcut_brightness"]["level"] == "danger"


def test_two_sources_of_two_classes_each_are_told_as_what_they_are(tmp_path):
    random = np.random.RandomState(2)
    for name, width in (("a", 80), ("b", 80), ("c", 120), ("d", 120)):
        (tmp_path / name).mkdir()
        for i in range(20):
            picture(random, width, 80).save(tmp_path / name / f"{i}.png")
    shape = kinds(check(tmp_path, None, audit=True))["shortcut_shape"]
    assert shape["level"] == "danger" and shape["count"] == 4
    assert "can tell a from c, d; b from c, d: balanced accuracy over 4 classes 50.0%" in shape["message"]


def test_classes_of_few_patients_are_left_out_and_said(folder):
    images = scan_folder(folder)
    for file in sorted((folder / "气胸").iterdir())[4:]:
        file.unlink()
    result = check(folder, audit=True)
    note = kinds(result)["not_audited"]
    assert note["level"] == "note" and "气胸 (2)" in note["message"] and "leaves out" in note["message"]
    assert set(result["shortcuts"]["shape"]["auc"]) == set(images.classes) - {"气胸"}
    for file in sorted((folder / "正常").iterdir())[2 * LEAST_GROUPS - 2 :]:
        file.unlink()
    result = check(folder, audit=True)
    assert result["shortcuts"] == {} and "was skipped" in kinds(result)["not_audited"]["message"]


# ---- the command


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data.check", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8")


def test_the_command_prints_and_writes_the_same(folder, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("cwd")
    Image.open(folder / "正常" / "P003_0.png").save(folder / "肺炎" / "P003_5.png")
    (folder / "罕见").mkdir()
    for copy in ("罕见/P900_0.png", "loose.png", "正常/notes.txt"):
        shutil.copy(folder / "正常" / "P004_0.png", folder / copy)
    former = {"data_dir": "-", "findings": [], "shortcuts": {}, "summary": {}}
    (cwd / "data_check.json").write_text(json.dumps(former))
    done = run("--data-dir", folder, "--group-pattern", r"^(P\d+)_", cwd=cwd)
    assert done.returncode == 0, done.stderr
    written = json.loads((cwd / "data_check.json").read_text("utf-8"))
    said = re.findall(r"^(danger|warning|note): (.+)$", done.stdout, re.MULTILINE)
    assert said == [(f["level"], f["message"]) for f in written["findings"]]
    assert said[0][0] == "danger" and "正常/P003_0.png = 肺炎/P003_5.png" in done.stdout
    assert "  罕见: 1 image, 1 patient, " in done.stdout and "1 of 37 patients has images" in done.stdout
    assert not re.search(r"\b1 (images|patients|files)\b", done.stdout)


def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, tmp_path_factory, monkeypatch):
    out = tmp_path_factory.mktemp("out")
    (out / "empty.json").write_text("{}")
    (out / "unknown.json").write_text(json.dumps({"folds": [{"train": ["正常/none.png"], "val": []}]}))
    gone = f"names 1 image that is not in --data-dir {folder}"
    kept = {out / "a.csv": "path,group\n", out / "of_a_run.json": '{"findings": []}', out / "list.json": "[]"}
    for file, content in kept.items():
        file.write_text(content)
    both = ["正常/P000_0.png"]
    (out / "both.json").write_text(json.dumps({"folds": [{"train": both, "val": both}]}))
    for arguments, message in (
        (["--data-dir", out / "none"], "is not a folder"),
        (["--data-dir", folder, "--group-pattern", "("], "not a regular expression"),
        (["--data-dir", folder, "--groups-file", out / "none.csv"], "does not exist"),
        (["--data-dir", folder, "--splits", out / "none.json"], "does not exist"),
        (["--data-dir", folder, "--splits", out / "empty.json"], "holds no folds"),
        (["--data-dir", folder, "--splits", out / "unknown.json"], f"{gone}, such as 正常/none.png"),
        (["--data-dir", folder, "--splits", out / "both.json"], "1 image that trains and validates in"),
        (["--data-dir", folder, "--output", out / "none" / "x.json"], "cannot be written"),
        *((["--data-dir", folder, "--output", file], "was not written by this program") for file in kept),
        (["--group-patern", "x"], "did you mean '--group-pattern'"),
        ([], "--data-dir is required"),
    ):
        output = [] if "--output" in arguments else ["--output", out / "x.json"]
        assert main([*map(str, [*arguments, *output])]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and not (out / "x.json").exists()
    assert {file: file.read_text() for file in kept} == kept
    flags = ["--data-dir", "none", "--groups-file", "x.csv", "--splits", "s.json", "--group-pattern", "("]
    assert main([*flags, "--output", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()
    parts = ("none is not a folder", "exclude each other", "x.csv does not", "s.json does not",
             "cannot be written", "not a regular expression")  # fmt: skip
    assert len(said) == 6 and all(part in line for part, line in zip(parts, said, strict=True))
    monkeypatch.setattr("common.files.os.access", lambda *_: False)  # as in a folder that is only read
    assert main(["--data-dir", str(folder), "--output", str(out / "x.json")]) == 2
    assert f"cannot be written: {out} is no folder that may be written" in capsys.readouterr().err


def test_the_splits_of_a_run_are_read_by_path(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "splits.json"
    folds = [
        {"train": ["正常/P000_0.png", "肺炎/P100_0.png"], "val": ["正常/P000_1.png"]},
        {"train": ["正常/P000_1.png"], "val": ["肺炎/P100_0.png", "正常/P000_0.png"]},
    ]
    path.write_text(json.dumps({"folds": folds}), encoding="utf-8")
    images = scan_folder(folder)
    for split, fold in zip(read_splits(path, images), folds, strict=True):
        assert [images.paths[i] for i in split.train] == fold["train"]
        assert [images.paths[i] for i in split.val] == fold["val"]


def test_help_imports_nothing_heavy(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "data.check", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--groups-file" in done.stdout
    assert not re.search(r"\| +(torch|sklearn|scipy|imagehash)$", done.stderr, re.MULTILINE)


# ---- real films


def test_the_faults_of_the_real_films_are_found(shared_data):
    images = scan_folder(shared_data / "xray3")
    csv_path = shared_data / "xray3.groups.csv"
    patients = groups_from_file(images, csv_path)
    result = check_data(images, patients)
    found = kinds(result)
    assert (result["images"], result["patients"]) == (1124, 764)

    assert found["identical_within"]["count"] == 1
    assert found["identical_within"]["examples"] == [
        "No_findings/00002658_001.jpg = No_findings/00002658_002.jpg"
    ]
    with open(csv_path, encoding="utf-8-sig", newline="") as file:
        of_patient: dict[str, set[str]] = {}
        for row in csv.DictReader(file):
            of_patient.setdefault(row["group"], set()).add(row["label"])
    assert (
        found["patient_in_several_classes"]["count"] == sum(len(own) > 1 for own in of_patient.values()) == 21
    )
    # films all look alike; two developments of one film are one, and no film is taken for another patient's
    assert found["near_within"]["count"] == 1 and "near_across_patients" not in found
    assert "near_across_classes" not in found

    shape = found["shortcut_shape"]
    assert shape["level"] == "danger" and "tell Covid-19 from the rest" in shape["message"]
    assert result["shortcuts"]["shape"]["auc"]["Covid-19"] > 0.95
    assert max(result["shortcuts"]["shape"]["auc"][name] for name in ("No_findings", "Pneumonia")) < 0.7
    assert "shortcut_format" not in found  # all were saved again as grey JPEG
