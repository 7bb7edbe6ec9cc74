"""Class folders, and what is passed over."""

import os
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from data.scan import ImageFolder, check_class_sizes, fingerprint, leads_to, scan_folder

NFC, NFD = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))


def fill(root: Path, *paths: str) -> Path:
    """Put an image at every path; a path that ends in "/" becomes an empty folder."""
    for path in paths:
        file = root / path
        if path.endswith("/"):
            file.mkdir(parents=True)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (2, 2)).save(file, format="PNG")
    return root


def folder_of(*paths: str) -> ImageFolder:
    classes = sorted({path.split("/")[0] for path in paths})
    labels = np.array([classes.index(path.split("/")[0]) for path in paths])
    return ImageFolder(Path("root"), tuple(classes), paths, labels, ())


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


# ---- class folders


def test_labels_index_the_sorted_classes(tmp_path):
    folder = scan_folder(fill(tmp_path, "肺炎/2.png", "正常/1.JPG", "肺炎/1.webp", "B/x.dcm", "a/x.TIFF"))
    assert folder.classes == ("B", "a", "正常", "肺炎")  # by code point: 正 U+6B63 < 肺 U+80BA
    assert folder.paths == ("B/x.dcm", "a/x.TIFF", "正常/1.JPG", "肺炎/1.webp", "肺炎/2.png")
    assert folder.labels.dtype == np.int64 and folder.labels.tolist() == [0, 1, 2, 3, 3]
    assert list(folder.files()) == [tmp_path / path for path in folder.paths]
    assert folder.notes == ()


@pytest.mark.parametrize("seed", range(4))
def test_order_does_not_come_from_the_file_system(tmp_path, monkeypatch, seed):
    fill(tmp_path, *(f"{c}/{n}.png" for c in "cab" for n in ("10", "9", "patient 1/2", "patient 1/1", "z/z")))
    fill(tmp_path, f"a/{NFD}.png", f"a/{NFC}.png", "c/Caf.png", "c/Cafz.png")
    (tmp_path / "a" / "link 2").symlink_to(tmp_path / "a" / "patient 1")
    for name in ("a/link 1", "a/link 3", "a/link 4", "a/z/link 5", "a/link 6"):
        (tmp_path / name).symlink_to(tmp_path / "b" / "z")
    expected = scan_folder(tmp_path)
    assert expected.paths[:2] == ("a/10.png", "a/9.png") and "a/link 1/z.png" in expected.paths

    scandir, listdir = os.scandir, os.listdir

    class Shuffled:
        def __init__(self, path="."):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name)
            random.Random(seed).shuffle(self.entries)

        def __iter__(self):
            return iter(self.entries)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Shuffled)
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(listdir(path), reverse=True))
    found = scan_folder(tmp_path)
    assert found.paths == expected.paths and found.classes == expected.classes


def test_decomposed_names_are_read_as_composed_ones(tmp_path):
    folder = scan_folder(fill(tmp_path, f"{NFD}/1.png", "b/1.png"))
    assert folder.classes == (NFC, "b")
    assert all(file.exists() for file in folder.files())  # the spelling on disk is kept for opening


def test_two_spellings_of_one_class_are_refused(tmp_path):
    fill(tmp_path, f"{NFD}/1.png", f"{NFC}/2.png", "b/1.png")
    if len(os.listdir(tmp_path)) == 2:
        pytest.skip("this file system keeps one spelling")
    assert f"two folders that both read {NFC!r}" in refusal(scan_folder, tmp_path)


def test_hidden_and_litter_entries_are_passed_over_in_silence(tmp_path):
    fill(tmp_path, "a/1.png", "b/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/a/1.png", ".git/1.png")
    fill(tmp_path, "a/.ipynb_checkpoints/1-checkpoint.png", "a/__MACOSX/1.png", "a/._1.png", "._loose.png")
    for litter in ("a/Thumbs.db", "a/.DS_Store", "b/desktop.ini", "Thumbs.db", ".DS_Store"):
        (tmp_path / litter).write_bytes(b"x")
    folder = scan_folder(tmp_path)
    assert folder.paths == ("a/1.png", "b/1.png")
    assert folder.notes == ()


def test_empty_folders_are_no_classes_and_named(tmp_path):
    fill(tmp_path, "a/1.png", "b/1.png", "empty/", "hollow/inner/")
    folder = scan_folder(tmp_path)
    assert folder.classes == ("a", "b")
    assert len(folder.notes) == 1 and folder.notes[0].endswith(": empty, hollow")


def test_nested_folders_belong_to_the_class_at_the_top(tmp_path):
    folder = scan_folder(fill(tmp_path, "a/P1/left/1.png", "a/P1/right/1.png", "a/0.png", "b/P1/1.png"))
    assert folder.paths == ("a/0.png", "a/P1/left/1.png", "a/P1/right/1.png", "b/P1/1.png")
    assert folder.labels.tolist() == [0, 0, 0, 1]


def test_links_in_a_circle_end_and_repeat_no_image(tmp_path):
    fill(tmp_path, "a/1.png", "a/sub/2.png", "b/1.png")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a" / "sub")
    (tmp_path / "a" / "sub" / "loop").symlink_to(tmp_path / "a" / "sub")
    assert scan_folder(tmp_path).paths == ("a/1.png", "a/sub/2.png", "b/1.png")


def test_a_link_upwards_brings_no_images_of_other_classes(tmp_path):
    root = fill(tmp_path / "set", "a/1.png", "b/1.png")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "higher").symlink_to(tmp_path)
    (root / "whole").symlink_to(root)
    folder = scan_folder(root)
    assert folder.classes == ("a", "b") and folder.paths == ("a/1.png", "b/1.png")


def test_links_to_folders_elsewhere_are_followed(tmp_path):
    elsewhere = fill(tmp_path / "store", "1.png", "deep/2.png")
    root = fill(tmp_path / "set", "a/1.png")
    (root / "b").symlink_to(elsewhere)
    assert scan_folder(root).paths == ("a/1.png", "b/1.png", "b/deep/2.png")


def test_files_that_are_no_images_are_counted_by_kind(tmp_path):
    fill(tmp_path, "a/1.png", "b/1.png")
    for name in ("a/report.txt", "deep.TXT", "b/README", "a/scan.nii.gz", "说明.txt"):
        (tmp_path / name).write_text("no image")
    folder = scan_folder(tmp_path)
    assert folder.paths == ("a/1.png", "b/1.png")
    assert len(folder.notes) == 1
    assert folder.notes[0].startswith("5 files") and ".txt x 3" in folder.notes[0]
    assert "no suffix x 1" in folder.notes[0] and ".gz x 1" in folder.notes[0]


def test_dicom_is_known_by_its_mark_when_the_name_does_not_tell(tmp_path):
    fill(tmp_path, "a/1.png", "b/1.png")
    for name in ("a/IM000001", "b/1.2.840.10008.5.1"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + bytes(8))
    for name in ("a/notes", "b/log.1", "a/tiny"):
        (tmp_path / name).write_bytes(b"x" * (2 if name == "a/tiny" else 200))
    folder = scan_folder(tmp_path)
    assert folder.paths == ("a/1.png", "a/IM000001", "b/1.2.840.10008.5.1", "b/1.png")
    assert folder.notes[0].startswith("3 files")


def test_a_list_of_dicom_files_is_no_image(tmp_path):
    fill(tmp_path, "a/1.png", "b/1.png", "b/DICOMDIR/2.png")  # a folder of that name is one like others
    for name in ("a/DICOMDIR", "b/dicomdir"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + bytes(8))
    folder = scan_folder(tmp_path)
    assert folder.paths == ("a/1.png", "b/1.png", "b/DICOMDIR/2.png")
    assert folder.notes == ("2 files that are no images are passed over (DICOMDIR x 2)",)


def test_a_broken_link_stops_nothing(tmp_path):
    fill(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nowhere")
    folder = scan_folder(tmp_path)
    assert folder.paths == ("a/1.png", "b/1.png")
    assert folder.notes[0].startswith("1 file that is")


def test_a_link_to_itself_is_as_a_broken_one(tmp_path):
    fill(tmp_path, "a/1.png", "b/1.png")
    for link in ("a/self", "b/self.png", "self"):
        (tmp_path / link).symlink_to(Path(link).name)
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    folder = scan_folder(tmp_path)
    assert folder.paths == ("a/1.png", "b/1.png", "b/gone.png", "b/self.png")  # read and named later
    assert folder.notes == ("2 files that are no images are passed over (no suffix x 2)",)


def test_what_may_not_be_looked_at_is_no_broken_link():
    def refused() -> bool:
        raise PermissionError(13, "Permission denied", "b")

    with pytest.raises(PermissionError):
        leads_to(refused)


def test_loose_images_are_told(tmp_path):
    folder = scan_folder(fill(tmp_path, "a/1.png", "b/1.png", "loose.png", "loose.jpg"))
    assert folder.paths == ("a/1.png", "b/1.png")
    assert len(folder.notes) == 1 and folder.notes[0].startswith("2 images lie beside the class folders")


def test_a_file_that_may_not_be_read_is_refused_only_where_it_could_be_an_image_of_a_class(
    tmp_path, monkeypatch
):
    def refused(path, *_):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("data.scan.open", refused, raising=False)
    fill(tmp_path, "a/1.png", "b/1.png", "loose")
    assert scan_folder(tmp_path).notes == ("1 file that is no image is passed over (no suffix x 1)",)
    fill(tmp_path, "a/2")
    assert refusal(scan_folder, tmp_path) == f"--data-dir: no permission to read {tmp_path}/a/2"


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        ((), "found none"),
        (("1.png", "2.png"), "none (its images lie loose in it; if it is the folder of one class, give"),
        (("a/1.png", "b/"), "found only 'a'"),
        (("a/1.png", "b/x.txt"), "found only 'a'"),
    ],
)
def test_fewer_than_two_classes_are_refused(tmp_path, paths, says):
    message = refusal(scan_folder, fill(tmp_path, *paths))
    assert "at least two class folders" in message and says in message and str(tmp_path) in message


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (("train", "val", "test"), "--data-dir {0}/train; for training with --val-dir {0}/val"),
        (("Training", "VALIDATION"), "{0}/Training; for training with --val-dir {0}/VALIDATION"),
        (("Train", "testing"), "such as --data-dir {0}/Train"),
        (("val", "test"), "such as --data-dir {0}/test"),
        (("train", "valid"), "--data-dir {0}/train; for training with --val-dir {0}/valid"),
        (("train",), "such as --data-dir {0}/train"),
    ],
)
def test_parts_of_a_data_set_are_no_classes(tmp_path, parts, says):
    fill(tmp_path, *(f"{part}/{c}/1.png" for part in parts for c in "ab"))
    assert refusal(scan_folder, tmp_path).endswith(says.format(tmp_path))


def test_a_class_may_be_called_as_a_part_of_a_data_set(tmp_path):
    assert scan_folder(fill(tmp_path, "test/1.png", "control/1.png")).classes == ("control", "test")
    shutil.rmtree(tmp_path / "control")  # to evaluate on, one class is enough
    assert scan_folder(tmp_path, at_least=1).classes == ("test",)


def test_a_missing_folder_is_refused_by_the_name_of_its_option(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        assert refusal(scan_folder, path, "--val-dir").startswith(f"--val-dir {path} is not a folder")


def test_without_drops_images_and_keeps_classes():
    folder = folder_of("a/1.png", "a/2.png", "b/1.png", "b/2.png").without({0, 3})
    assert folder.paths == ("a/2.png", "b/1.png") and folder.labels.tolist() == [0, 1]
    assert folder.without({0}).classes == ("a", "b")


def test_small_classes_are_all_named():
    folder = folder_of("a/1.png", "b/1.png", "b/2.png", "c/1.png")
    check_class_sizes(folder, 1, "to train on")
    message = refusal(check_class_sizes, folder, 2, "to train on")
    assert "a: 1" in message and "c: 1" in message and "b: 2" not in message
    assert "b: 0" in refusal(check_class_sizes, folder.without({1, 2}), 1, "to train on")


def test_fingerprint_follows_content_and_not_place_or_spelling():
    folder = folder_of("a/1.png", f"b/{NFC}.png")
    digests = np.array([b"d1", b"d2"])
    moved = ImageFolder(Path("other"), folder.classes, ("a/1.png", f"b/{NFD}.png"), folder.labels, ("note",))
    assert fingerprint(folder, digests) == fingerprint(moved, digests)
    others = [
        fingerprint(folder, np.array([b"d1", b"d3"])),
        fingerprint(folder, digests[::-1]),
        fingerprint(folder_of("a/1.png", "b/2.png"), digests),
        fingerprint(folder_of("a/1.png", f"c/{NFC}.png"), digests),
        fingerprint(folder.without({0}), digests[1:]),
    ]
    assert len({fingerprint(folder, digests), *others}) == 6


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="such names are refused there")
def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path):
    for name in ("正常".encode("gbk"), b"other"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        with open(os.path.join(folder, b"1.png"), "wb"):
            pass
    with pytest.raises(UserError, match="not UTF-8"):
        scan_folder(tmp_path)
