"""Class folders, what is passed over, and the patients that tie images together."""

import os
import random
import shutil
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from data.scan import (
    ImageFolder,
    check_class_sizes,
    fingerprint,
    groups_by_pattern,
    groups_from_file,
    leads_to,
    merge_groups,
    scan_folder,
)

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
        (("1.png", "2.png"), "found none (its images lie loose in the folder)"),
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


# ---- patients


def test_pattern_gives_its_first_group_and_sees_the_file_name_alone():
    folder = folder_of("P9_a/346_r.png", "P9_a/P8_x/346_l.png", "P9_b/263_l (2).png")
    assert groups_by_pattern(folder, r"^(\d+)_([lr])") == ["346", "346", "263"]
    assert "3 of 3" in refusal(groups_by_pattern, folder, r"(P\d)_")


def test_pattern_reads_both_spellings_as_one_patient():
    folder = folder_of(f"a/{NFC}_1.png", f"a/{NFD}_2.png")
    for spelling in (NFC, NFD):
        assert groups_by_pattern(folder, f"^({spelling})_") == [NFC, NFC]
    assert groups_by_pattern(folder, r"^(\w+)_\d") == [NFC, NFC]


@pytest.mark.parametrize("pattern", [r"(P\d+)_", r"(P\d+)?", r"(P?)", r"(P\d+)_|scan"])
def test_images_without_a_patient_are_named(pattern):
    message = refusal(groups_by_pattern, folder_of("a/P1_1.png", "b/scan.png", "b/Qscan.png"), pattern)
    assert "b/scan.png" in message and "b/Qscan.png" in message
    assert "2 of 3" in message and "a/P1_1.png" not in message


@pytest.mark.parametrize(("pattern", "says"), [("(P", "not a regular expression"), (r"P\d+", "parentheses")])
def test_a_useless_pattern_is_refused(pattern, says):
    assert says in refusal(groups_by_pattern, folder_of("a/P1.png"), pattern)


def csv_file(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "groups.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


TWO = folder_of("a/1.png", "b/x, 2.png")
ROWS = 'path,group\na/1.png,P1\n"b/x, 2.png",P2\n'


@pytest.mark.parametrize(
    "content",
    [
        ROWS,
        b"\xef\xbb\xbf" + ROWS.encode(),
        ROWS.replace("\n", "\r\n"),
        ROWS.replace("/", "\\"),
        ROWS.replace("a/1", "./a/1"),
        ROWS.replace("P1", " P1 "),
        ROWS + "c/not there.png,P3\n",
        ROWS + "\na/1.png,P1\n",  # a repeated row that says the same
        'group,age,path\nP2,70,"b/x, 2.png"\nP1,61,a/1.png\n',
        'path , group\n a/1.png ,P1\n"b/x, 2.png  ",P2 \n',
        ROWS + ",\n , \n,,\n",  # as Excel leaves them
    ],
    ids=[
        "plain", "bom", "crlf", "backslash", "dot", "blanks", "more", "repeated", "columns", "cells", "empty",
    ],
)  # fmt: skip
def test_csv_gives_each_image_its_patient(tmp_path, content):
    assert groups_from_file(TWO, csv_file(tmp_path, content)) == ["P1", "P2"]


def beside_each_other(*names: str) -> list[ImageFolder]:
    """Two folders that number their images alike, but for one image that the second lacks."""
    folders = [folder_of("A/1.png", "A/2.png", "B/1.png"), folder_of("A/1.png", "B/1.png")]
    return [replace(folder, root=Path("set") / name) for folder, name in zip(folders, names, strict=True)]


def test_the_names_of_two_folders_tell_their_images_apart(tmp_path):
    rows = ["tr/A/1.png,P1", "", "tr/B/1.png,P3"]
    one, two = beside_each_other("tr", "va")
    for front in ("tr/", ""):  # of the image that the other folder lacks
        rows[1] = f"{front}A/2.png,P2"
        content = ["path,group", *rows, "va/A/1.png,P8", "va/B/1.png,P9"]
        path = csv_file(tmp_path, "\n".join(content))
        assert groups_from_file(one, path, two) == ["P1", "P2", "P3"]
        assert groups_from_file(two, path, one) == ["P8", "P9"]


@pytest.mark.parametrize(
    ("rows", "names", "says"),
    [
        ("A/1.png,P1 A/2.png,P2 B/1.png,P3", "tr va", "tr/A/1.png and va/A/1.png:\n  A/1.png\n  B/1.png"),
        ("tr/A/1.png,P1 A/2.png,P2 B/1.png,P3", "tr va", "tr/B/1.png and va/B/1.png:\n  B/1.png"),
        ("x/A/1.png,P1 x/A/2.png,P2 x/B/1.png,P3", "x x", "rename one of the folders"),
    ],
)
def test_images_that_a_csv_does_not_tell_apart_are_named(tmp_path, rows, names, says):
    one, two = beside_each_other(*names.split())
    path = csv_file(tmp_path, "\n".join(("path,group", *rows.split())))
    message = refusal(groups_from_file, one, path, two)
    assert "of the same path in --val-dir" in message and says in message


def test_a_path_that_looks_like_one_with_the_folders_name_in_front_is_its_own_images(tmp_path):
    folder = replace(folder_of("A/A/x.png", "A/x.png", "B/y.png"), root=Path("set") / "A")
    path = csv_file(tmp_path, "path,group\nA/x.png,P1\nA/A/x.png,P2\nB/y.png,P3\n")
    assert groups_from_file(folder, path) == ["P2", "P1", "P3"]


def test_two_patients_of_one_path_are_refused_with_the_way_to_write_them(tmp_path):
    one, two = beside_each_other("tr", "va")
    path = csv_file(tmp_path, "path,group\nA/1.png,P1\nA/1.png,P4\n")
    assert "write tr/A/1.png and va/A/1.png" in refusal(groups_from_file, one, path, two)


def test_csv_knows_both_spellings(tmp_path):
    content = f"path,group\n{NFC}/{NFD}.png,{NFD}\n{NFC}/2.png,{NFC}\n"
    folder = folder_of(f"{NFD}/{NFC}.png", f"{NFD}/2.png")
    assert len(set(groups_from_file(folder, csv_file(tmp_path, content)))) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a/1.png,P1\nb/2.png,P2\n", "needs the columns path and group; its first line has a/1.png, P1"),
        ("path,groups\n", "its first line has path, groups; name its columns so"),
        ("path;group\na/1.png;P1\n", "its first line has path;group; separate the cells by commas"),
        ("path\tgroup\na/1.png\tP1\n", "separate the cells by commas"),
        ("path,group,path\n", "its first line has path, group, path"),
        ('path,group\n"a"/1.png,P1\n', "line 2: "),
        ("", "its first line has nothing"),
        ("path,group\na/1.png,P1\n", "no group for 1 of 2 images"),
        ("path,group\na/1.png,P1\n", "  b/x, 2.png"),
        ("path,group\n/data/a/1.png,P1\n", "relative to root, such as a/1.png"),
        (ROWS + "a/1.png,P7\n", "line 4: a/1.png is given two groups, 'P1' and 'P7'"),
        (ROWS + "\n\na/1.png,P7\n", "line 6: a/1.png is given two groups"),
        ("path,group\na/1.png,\n", "line 2: path or group is empty"),
        ("path,group\na/1.png\n", "line 2: path or group is empty"),
        ("path,group\na/1.png,  \n", "line 2: path or group is empty"),
        ("path,group\n,P1\n", "line 2: path or group is empty"),
        ("path,group\n肺/1.png,P1\n".encode("gbk"), "save it as UTF-8, in Excel"),
    ],
)
def test_csv_that_cannot_serve_is_refused(tmp_path, content, says):
    assert says in refusal(groups_from_file, TWO, csv_file(tmp_path, content))


def test_csv_that_is_missing_is_refused(tmp_path):
    assert "does not exist" in refusal(groups_from_file, TWO, tmp_path / "no.csv")
    assert "is a folder" in refusal(groups_from_file, TWO, tmp_path)


def test_groups_join_patients_through_equal_pixels():
    #                       0    1    2    3    4    5
    patients = ["P1", "P2", "P3", "P3", "P4", "P2"]
    groups = merge_groups(["x", "y", "x", "z", "w", "y"], patients, "abcdef")
    first, second, third = {groups[i] for i in (0, 2, 3)}, {groups[i] for i in (1, 5)}, {groups[4]}
    assert len(first) == len(second) == len(third) == 1 and len(first | second | third) == 3


def test_no_groups_where_nothing_ties_images():
    assert merge_groups(np.array([b"x", b"y", b"z"]), None, "abc") is None
    assert merge_groups(np.array([b"x", b"y"]), ["P1", "P2"], "ab").tolist() == [0, 1]
    assert merge_groups(np.array([b"x", b"y", b"x"]), None, "abc").tolist() == [0, 1, 0]


def test_a_name_in_two_formats_ties_images_of_one_folder():
    paths = ["甲/Y92.jpg", "甲/Y92.PNG", "乙/Y92.png", "甲/1.2.840", "甲/1.2.841", "甲/Y92"]
    assert merge_groups(np.arange(6), None, paths).tolist() == [0, 0, 1, 2, 3, 0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=16),
    st.booleans(),
)
def test_groups_equal_the_brute_force_closure(pairs, with_patients):
    digests, patients = [f"d{d}" for d, _, _ in pairs], [f"P{p}" for _, p, _ in pairs]
    names = [name for _, _, name in pairs]
    n = len(pairs)
    tied = np.eye(n, dtype=bool)
    for i in range(n):
        for j in range(n):
            tied[i, j] |= digests[i] == digests[j] or (with_patients and patients[i] == patients[j])
            tied[i, j] |= names[i] == names[j]
    for k in range(n):  # Warshall's transitive closure
        tied |= tied[:, k, None] & tied[None, k]
    paths = [f"甲/{name}{('.png', '.jpg')[i % 2]}" for i, name in enumerate(names)]
    groups = merge_groups(np.array(digests, "S"), patients if with_patients else None, paths)
    if groups is None:
        assert not with_patients and np.array_equal(tied, np.eye(n, dtype=bool))
    else:
        assert np.array_equal(groups[:, None] == groups[None], tied)
        assert set(groups) == set(range(groups.max() + 1))


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="such names are refused there")
def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path):
    for name in ("正常".encode("gbk"), b"other"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        with open(os.path.join(folder, b"1.png"), "wb"):
            pass
    with pytest.raises(UserError, match="not UTF-8"):
        scan_folder(tmp_path)
