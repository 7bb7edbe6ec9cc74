"""Decoded images on disk: the same pixels as the files, only what is new is decoded, no run ends over it."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quick import train

from data import cache
from data.cache import cache_file, inspect_cached
from data.images import inspect_images
from data.scan import ImageFolder

HERE = Path(__file__).resolve().parent
SIZE = 16


def folder_of(files) -> ImageFolder:
    root = files[0].parent
    return ImageFolder(root, ("一",), tuple(file.name for file in files), np.zeros(len(files), int), ())


def inspect(files, cache_dir, size=SIZE):
    return inspect_cached([folder_of(files)], size, cache_dir)


def the_file(tmp_path, size=SIZE) -> Path:
    return cache_file(tmp_path / "c", size, [tmp_path / "图像"])


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Nine images of several sizes and modes; one cannot be read."""
    folder = tmp_path / "图像"
    folder.mkdir()
    random = np.random.RandomState(0)
    found = []
    for i in range(8):
        shape = (20 + i, 30) if i % 2 else (25, 20 + i, 3)
        found.append(folder / f"{i}.png")
        Image.fromarray(random.randint(0, 256, shape).astype(np.uint8)).save(found[-1])
    found.insert(3, folder / "bad.png")
    found[3].write_bytes(b"no image")
    return found


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """Which files are decoded, in order."""
    done: list[Path] = []
    read_all = cache.read_all

    def noting(files, size):
        done.extend(files)
        return read_all(files, size)

    monkeypatch.setattr(cache, "read_all", noting)
    return done


def same(found, files) -> None:
    expected = inspect_images(files, SIZE)
    assert found.errors == expected.errors and np.array_equal(found.digests, expected.digests)
    assert found.facts == expected.facts and len(found.squares) == len(files)
    for i in range(len(files)):
        if i not in expected.errors:
            assert np.array_equal(found.squares[i], expected.squares[i])


def test_the_second_run_decodes_nothing_but_what_cannot_be_read(files, tmp_path, decoded):
    same(inspect(files, tmp_path / "c"), files)
    assert decoded == files
    decoded.clear()
    written = the_file(tmp_path).stat().st_ino
    same(inspect(files[:3], tmp_path / "c"), files[:3])
    same(inspect(files[::-2], tmp_path / "c"), files[::-2])  # fewer, in another order
    assert decoded == []
    found = inspect(files, tmp_path / "c")
    same(found, files)
    assert decoded == [files[3]] and isinstance(found.squares.array, np.memmap)
    assert the_file(tmp_path).stat().st_ino == written  # and it is not written again


def test_an_image_that_has_been_mended_is_found(files, tmp_path):
    inspect(files, tmp_path / "c")
    Image.new("RGB", (9, 9), (1, 2, 3)).save(files[3])
    found = inspect(files, tmp_path / "c")
    same(found, files)
    assert not found.errors and (found.squares[3] == (1, 2, 3)).all()


def test_a_run_on_some_of_the_images_keeps_the_others(files, tmp_path, decoded):
    good = files[:3] + files[4:]
    inspect(good, tmp_path / "c")
    Image.new("RGB", (9, 9), (1, 2, 3)).save(good[0])
    good[1].unlink()
    some = [good[0], good[4]]
    same(inspect(some, tmp_path / "c"), some)
    decoded.clear()
    left = [good[0], *good[2:]]
    same(inspect(left, tmp_path / "c"), left)
    assert decoded == []


@pytest.mark.parametrize("other", ["fewer", "another order"])
def test_images_are_not_mixed_up_when_another_run_writes_meanwhile(files, tmp_path, monkeypatch, other):
    write_whole, theirs = cache.write_whole, files[::-1] if other == "another order" else files[5:]

    def and_then_another(path, write):
        write_whole(path, write)
        monkeypatch.setattr(cache, "write_whole", write_whole)
        path.unlink()
        inspect(theirs, tmp_path / "c")

    monkeypatch.setattr(cache, "write_whole", and_then_another)
    same(inspect(files, tmp_path / "c"), files)


def test_only_new_and_changed_files_are_decoded(files, tmp_path, decoded):
    good = files[:3] + files[4:]
    inspect(good[:-1], tmp_path / "c")
    decoded.clear()
    Image.new("RGB", (9, 9), (1, 2, 3)).save(good[1])
    os.utime(good[2], ns=(1, 1))  # touched: another file may have been put in its place
    same(inspect(good, tmp_path / "c"), good)
    assert decoded == [good[1], good[2], good[-1]]


def test_data_folders_and_sizes_do_not_mix(files, tmp_path):
    names = {cache_file(tmp_path, size, [Path(name)]) for size in (16, 32) for name in ("a", "b")}
    assert len(names) == 4
    for size in (16, 32):
        assert inspect(files, tmp_path / "c", size).squares[0].shape == (size, size, 3)


def test_squares_that_were_made_in_another_way_are_not_used(files, tmp_path, decoded, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(cache, "MADE_BY", f"{cache.MADE_BY}; otherwise")
        inspect(files, tmp_path / "c")
    decoded.clear()
    same(inspect(files, tmp_path / "c"), files)
    assert decoded == files


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "other squares", "flipped"])
def test_a_damaged_cache_is_made_anew(files, tmp_path, damage, capsys):
    inspect(files, tmp_path / "c")
    path = the_file(tmp_path)
    whole = path.read_bytes()
    if damage == "other squares":
        inspect(files, tmp_path / "c", 8)
        shutil.copy(the_file(tmp_path, 8), path)
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut": whole[: len(whole) // 2],
                "text": b"x" * len(whole),
                "flipped": whole[:-60] + bytes(52) + whole[-8:],
            }[damage]
        )
    capsys.readouterr()
    same(inspect(files, tmp_path / "c"), files)
    assert "damaged" in capsys.readouterr().out
    assert len(path.read_bytes()) == len(whole)


def test_without_room_images_are_kept_in_memory_and_it_is_said(files, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=cache.FREE_DISK + 9 * SIZE * SIZE * 3 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = inspect(files, tmp_path / "c")
    same(found, files)
    assert not isinstance(found.squares.array, np.memmap)
    assert "no cache" in capsys.readouterr().out and not list((tmp_path / "c").iterdir())
    usage = usage._replace(free=usage.free + 1)
    assert isinstance(inspect(files, tmp_path / "c").squares.array, np.memmap)


def test_a_disk_that_fills_while_it_is_written_leaves_the_old_cache(files, tmp_path, monkeypatch, capsys):
    inspect(files[:5], tmp_path / "c")
    before = the_file(tmp_path).read_bytes()
    read_all = cache.read_all

    def full_after_one(files, size):
        for reading in read_all(files, size):
            yield reading
            if size is not None:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "read_all", full_after_one)
    same(inspect(files, tmp_path / "c"), files)
    assert "No space left" in capsys.readouterr().out
    assert the_file(tmp_path).read_bytes() == before and len(list((tmp_path / "c").iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_no_reason_to_stop(files, tmp_path, capsys):
    (tmp_path / "c").write_text("a file")
    same(inspect(files, tmp_path / "c"), files)
    assert "no cache" in capsys.readouterr().out


def test_several_runs_may_build_it_at_once(files, tmp_path):
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: inspect(files, tmp_path / "c")}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for one in found.values():
        same(one, files)
    assert [p.name for p in (tmp_path / "c").iterdir()] == [the_file(tmp_path).name]


def test_a_run_keeps_what_it_has_mapped_when_another_replaces_it(files, tmp_path):
    first = inspect(files, tmp_path / "c")
    before = first.squares[list(range(9))]
    for file in files[:3]:
        Image.new("RGB", (9, 9)).save(file)
    inspect(files[:2], tmp_path / "c")
    assert np.array_equal(first.squares[list(range(9))], before)


def test_what_a_killed_run_left_is_removed_when_it_is_old(files, tmp_path):
    path = the_file(tmp_path)
    path.parent.mkdir()
    old, young = (path.with_name(f".{path.name}.{i}.x.tmp") for i in (1, 2))
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (1, 1))
    inspect(files, tmp_path / "c")
    assert not old.exists() and young.exists()
    other = path.with_name(".0123456789abcdef_224px.npy.3.x.tmp")  # of another folder or size
    other.write_bytes(b"half")
    os.utime(other, (1, 1))
    inspect(files, tmp_path / "c")  # nothing is built
    assert not other.exists() and young.exists()


def test_only_its_owner_may_look_into_it(files, tmp_path):
    if os.name != "posix":
        pytest.skip("POSIX permissions")
    inspect(files, tmp_path / "c")
    assert (tmp_path / "c").stat().st_mode & 0o077 == 0
    (tmp_path / "open").mkdir(mode=0o777)
    inspect(files, tmp_path / "open")
    assert next((tmp_path / "open").iterdir()).stat().st_mode & 0o077 == 0


def test_a_run_ends_the_same_with_the_cache_new_or_old_or_none(quick_report, class_folder, tmp_path, capsys):
    flags = ["--epochs", 1, "--augmentation", "standard"]
    runs = {
        "new": ["--cache-dir", tmp_path / "c"],
        "old": ["--cache-dir", tmp_path / "c"],
        "none": ["--no-cache"],
    }
    weights = {}
    for name, own in runs.items():
        assert train(class_folder, tmp_path / name, *flags, *own) == 0
        said = capsys.readouterr().out
        assert ("decoding 72 images into the cache" in said) == (name == "new")
        assert ("in the cache" in said) == (name != "none") and ("kept in memory" in said) == (name == "none")
        weights[name] = torch.load(tmp_path / name / "checkpoint_latest.pth", weights_only=True)
    for other in ("old", "none"):
        for key, value in weights["new"]["model"].items():
            assert torch.equal(value, weights[other]["model"][key])
        assert weights[other]["dataset_fingerprint"] == weights["new"]["dataset_fingerprint"]
    assert len(list((tmp_path / "c").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--no-cache", "--cache-dir", "c"], "--cache-dir has no effect with --no-cache"),
        (["--cache-dir", "DATA/cache"], "give the cache a folder elsewhere"),
        (
            ["--cache-dir", f"{HERE}/../tests/test_cache.py/c"],
            f"cannot be written: {HERE}/test_cache.py is no folder that may be written",
        ),
    ],
)
def test_what_the_cache_options_cannot_mean_is_refused(class_folder, tmp_path, capsys, flags, said):
    flags = [flag.replace("DATA", str(class_folder)) for flag in flags]
    assert train(class_folder, tmp_path / "out", *flags) == 2
    assert said in capsys.readouterr().err
    assert not (class_folder / "cache").exists()


def test_the_cache_may_be_given_up_or_taken_up_on_resume(quick_report, class_folder, tmp_path, capsys):
    data, out, cache = class_folder, tmp_path / "out", tmp_path / "cache"
    assert train(data, out, "--epochs", 1, "--cache-dir", cache) == 0
    for epochs, flags, said in (
        (2, ["--no-cache"], "kept in memory"),
        (3, [], "kept in memory"),
        (4, ["--cache-dir", cache], "in the cache"),
        (5, [], "in the cache"),
    ):
        capsys.readouterr()
        latest = out / "checkpoint_latest.pth"
        assert train(data, out, "--epochs", epochs, "--resume-from", latest, *flags) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("damage", [b"\x00", b"\xff"])
def test_damaged_squares_are_decoded_anew_and_never_used(files, tmp_path, damage, capsys):
    inspect(files, tmp_path / "c")
    content = bytearray(the_file(tmp_path).read_bytes())
    middle = 128 + 4 * SIZE * SIZE * 3 + 100  # in the fifth square, behind NumPy's header
    content[middle : middle + 50] = damage * 50
    the_file(tmp_path).write_bytes(content)
    capsys.readouterr()
    same(inspect(files, tmp_path / "c"), files)
    assert "1 image damaged in the cache" in capsys.readouterr().out
    same(inspect(files, tmp_path / "c"), files)
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.7, 0.98, 1])
def test_a_damaged_record_is_not_believed(files, tmp_path, place, capsys):
    inspect(files, tmp_path / "c")
    content = bytearray(the_file(tmp_path).read_bytes())
    start = 128 + len(files) * SIZE * SIZE * 3
    content[start + int(place * (len(content) - start - 1))] ^= 1
    the_file(tmp_path).write_bytes(content)
    capsys.readouterr()
    same(inspect(files, tmp_path / "c"), files)
    assert "damaged" in capsys.readouterr().out
