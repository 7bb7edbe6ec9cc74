"""The patients, the pixels and the names that tie images together."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scan import NFC, NFD, folder_of, refusal

from data.groups import groups_by_pattern, groups_from_file, merge_groups
from data.scan import ImageFolder


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
        ("path,groups\n", "its first line has path, groups; give each once, by that name"),
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
