"""Files are written whole or not at all, JSON is read strictly, near names are offered."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import files
from common.errors import UserError, did_you_mean, shorten
from common.files import (
    path_cell,
    problems_of_cache_dir,
    read_json,
    text_cell,
    text_of_cell,
    unwritable,
    write_json,
    write_whole,
)


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read_json(path, "--config-file")
    assert str(caught.value).startswith(f"--config-file {path} ")
    return str(caught.value)


def test_a_cache_that_cannot_be_written_is_refused_unless_it_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # as on a disk that is only read
    (problem,) = problems_of_cache_dir(tmp_path / "c")
    assert problem.startswith(f"--cache-dir {tmp_path / 'c'} cannot be written: {tmp_path} is")
    assert problems_of_cache_dir(None) == []
    for kept in ("0123_224px.npy", "shards/0123.tar"):
        (tmp_path / kept).parent.mkdir(exist_ok=True)
        (tmp_path / kept).touch()
        assert problems_of_cache_dir(tmp_path) == []
        (tmp_path / kept).unlink()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no such folder")
def test_a_folder_that_gives_root_the_right_and_takes_no_file_is_told(tmp_path):
    assert unwritable(Path("/proc/new/folder")) == Path("/proc")
    assert unwritable(tmp_path / "new") is None and not list(tmp_path.iterdir())


def test_a_new_file_has_the_content_and_leaves_nothing_else(tmp_path):
    write_whole(tmp_path / "f.bin", lambda file: file.write(b"\x00\xff"))
    assert (tmp_path / "f.bin").read_bytes() == b"\x00\xff"
    assert [path.name for path in tmp_path.iterdir()] == ["f.bin"]


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "f.bin"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"ne")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]


def test_the_old_file_stands_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "f.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_whole(path, write)
    assert path.read_bytes() == b"new"


def test_json_comes_back_equal_and_readable(tmp_path):
    value = {"类别": ["肺炎", 1, 0.1, None, True], "nested": {"b": 1, "a": []}}
    write_json(tmp_path / "f.json", value)
    raw = (tmp_path / "f.json").read_bytes()
    assert json.loads(raw) == value and read_json(tmp_path / "f.json", "f") == value
    assert "肺炎".encode() in raw and not raw.startswith(b"\xef\xbb\xbf") and raw.endswith(b"\n")
    assert list(read_json(tmp_path / "f.json", "f")["nested"]) == ["b", "a"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_without_a_number_is_not_written(tmp_path, number):
    path = tmp_path / "f.json"
    path.write_text("{}")
    with pytest.raises(ValueError):
        write_json(path, {"loss": number})
    assert path.read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


def test_json_may_begin_with_a_bom(tmp_path):
    path = tmp_path / "f.json"
    path.write_bytes(b"\xef\xbb\xbf" + '{"类": 1}'.encode())
    assert read_json(path, "f") == {"类": 1}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"a": 1,}', "is not valid JSON"),
        (b"{} {}", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"lr": ' + b"1" * 5000 + b"}", "is not valid JSON"),
        (b'{"lr": NaN}', "NaN is no JSON number"),
        (b'{"lr": [-Infinity]}', "-Infinity is no JSON number"),
        (b'{"a": 1, "b": 2, "a": 1}', "repeats the key 'a'"),
        (b'{"x": {"a": 1, "b": 2, "a": 1, "b": 3}}', "repeats the key 'a', 'b'"),
        ('{"类": 1}'.encode("gbk"), "is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
    ],
    ids=[
        "empty", "open", "comma", "two", "deep", "digits", "nan", "infinity",
        "repeat", "nested", "gbk", "utf16",
    ],
)  # fmt: skip
def test_json_is_read_strictly(tmp_path, content, says):
    path = tmp_path / "f.json"
    path.write_bytes(content)
    assert says in refusal(path)


def test_json_equal_keys_in_different_objects_are_fine(tmp_path):
    path = tmp_path / "f.json"
    path.write_text('[{"a": 1}, {"a": {"a": 2}}]')
    assert read_json(path, "f") == [{"a": 1}, {"a": {"a": 2}}]


def test_json_that_is_missing_or_a_folder(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no.json")
    assert "cannot be read" in refusal(tmp_path)


def test_near_names_are_offered():
    assert did_you_mean("Resnet5O", ["resnet50", "vit"]) == " (did you mean 'resnet50'?)"
    flags = ["--img-size", "--config-file", "--config-index"]  # these two are half alike
    assert did_you_mean("--img-szie", flags) == " (did you mean '--img-size'?)"
    assert did_you_mean("zzz", ["resnet50", "vit"]) == ""
    assert did_you_mean("x", []) == ""


def test_long_lists_are_shortened_and_counted():
    assert shorten(["a", "b"], 2).split() == ["a", "b"]
    lines = shorten([str(i) for i in range(25)]).splitlines()
    assert [line.strip() for line in lines] == [*map(str, range(10)), "... and 15 more"]


def test_an_error_carries_all_its_problems():
    error = UserError("one", "two")
    assert error.problems == ("one", "two") and str(error) == "one\ntwo"


# ---- names in a CSV


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "＋"])
def test_no_cell_starts_a_formula_and_paths_stay_paths(start):
    assert text_cell(f"{start}x") == f"'{start}x"
    assert Path(path_cell(f"{start}x.png")) == Path(f"{start}x.png")
    assert path_cell(f"{start}x.png").startswith("./")
    assert text_cell(f"x{start}") == path_cell(f"x{start}") == f"x{start}"
    assert text_cell("") == ""


@given(st.text(st.sampled_from("='+-@\t＝ax一"), max_size=5))
def test_a_name_comes_back_from_its_cell(name):
    cell = text_cell(name)
    assert text_of_cell(cell) == name
    assert not cell.startswith(("=", "+", "-", "@", "\t", "＝"))
