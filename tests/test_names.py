"""Names in one block: whatever a tuple of str gives, they give; and what a million images may take."""

import copy
import gc
import pickle
import tracemalloc
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.groups import groups_by_pattern, merge_groups
from data.images import Facts, Inspection, Reading
from data.loader import ImageDataset
from data.names import Names, all_but
from data.scan import Files, ImageFolder
from data.splits import splits_record

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(st.lists(TEXT, max_size=8), st.integers(-10, 10), st.slices(8))
def test_names_read_as_the_tuple_of_them(texts, index, part):
    names, expected = Names(texts), tuple(texts)
    assert len(names) == len(expected) and list(names) == list(expected)
    assert names == expected and expected == names and names != (*expected, "more")
    assert names[part] == expected[part]
    if -len(expected) <= index < len(expected):
        assert names[index] == expected[index] and names[np.int64(index)] == expected[index]
    else:
        with pytest.raises(IndexError):
            names[index]
    again = pickle.loads(pickle.dumps(names))  # as a process that is not forked gets them
    assert again == names == copy.deepcopy(names)


def test_a_name_is_not_taken_for_names():
    assert Names(["a", "b"]) != "ab"


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(UnicodeEncodeError):
        Names(["a", "\udcff"])


def test_files_of_two_folders_follow_each_other():
    of = ((Path("x"), Names(["a/1", "b/2"])), (Path("y"), ("a/1",)), (Path("z"), ()))
    files = Files([ImageFolder(root, ("a", "b"), paths, np.arange(len(paths)), ()) for root, paths in of])
    expected = [Path("x/a/1"), Path("x/b/2"), Path("y/a/1")]
    assert list(files) == expected and files[1:] == expected[1:] and files[-1] == expected[-1]
    for index in (3, -4):
        with pytest.raises(IndexError):
            files[index]


def test_all_but():
    assert all_but({1, 3}, 5).tolist() == [0, 2, 4] and all_but(set(), 2).tolist() == [0, 1]


def test_what_is_held_for_each_image_is_small():
    """As a run holds it from its scan to its last epoch: bytes for each image, of 20,000 different ones."""
    n = 20_000

    def readings():
        for i in range(n):
            yield Reading(f"{i:032x}", facts=Facts("JPEG", "L", 8, 1000 + i % 7, 900, False))

    tracemalloc.start()
    paths = Names(f"肺炎/医院{i % 50:03d}/P{i // 4:07d}_{i % 4}.png" for i in range(n))
    folder = ImageFolder(Path("图像"), ("肺炎",), paths, np.zeros(n, np.int64), ())
    inspection = Inspection.of(readings(), n, None)
    patients = groups_by_pattern(folder, r"^(P\d+)_")
    groups = merge_groups(inspection.digests, patients, folder.paths)
    record = splits_record([], folder.paths)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(folder.files()) == n and groups.max() == n // 4 - 1 and record["folds"] == []
    # name 45 and its end 8, label 8, digest 32, facts 8, patient 8 and a quarter of its name, group 8
    assert held / n < 145


def test_what_loading_processes_share_does_not_grow_with_the_images():
    """In Python objects, whose counts of references every process writes: a page is copied for each."""

    def n_objects(n):
        paths = Names(f"a/{i}.png" for i in range(n))
        folder = ImageFolder(Path("图像"), ("a",), paths, np.zeros(n, np.int64), ())
        todo, seen = [ImageDataset(folder.files(), folder.labels, 32)], {}
        while todo:
            one = todo.pop()
            if id(one) not in seen and not isinstance(one, type | ModuleType):
                seen[id(one)] = one
                todo += gc.get_referents(one)
        return len(seen)

    assert n_objects(1000) == n_objects(10)
