"""Tar shards: all that a folder gives they give, whatever is in them, and what is wrong is said."""

import gzip
import io
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image, ImageOps
from pydicom.data import get_testdata_file
from quick import train
from webdataset import ShardWriter

import data.shards as shards
import evaluate_clip
from common.errors import UserError
from data import images
from data.cache import cache_file, inspect_cached
from data.check import main as check_main
from data.groups import groups_by_pattern, groups_from_file
from data.images import inspect_images, read_image
from data.inputs import list_images
from data.members import Member
from data.pixels import UnreadableImage
from data.scan import fingerprint, scan_folder
from data.shards import finder, is_shards, scan_images
from evaluation.report import write_report
from evaluation.results import read_predictions
from train_clip import main

NFC, NFD = "é", "e\u0301"


def pack(folder: Path, target: Path, per_shard: int = 10) -> Path:
    """The images of `folder` as webdataset writes them, in an order that is not the folder's."""
    target.mkdir()
    files = sorted(folder.rglob("*.*"), key=lambda file: file.name[::-1])
    with ShardWriter(str(target / "s-%06d.tar"), maxcount=per_shard, verbose=0) as writer:
        for file in files:
            key, suffix = file.relative_to(folder).as_posix().rsplit(".", 1)
            writer.write({"__key__": key, suffix: file.read_bytes(), "json": b"{}"})
    return target


def picture(grey: int = 0) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((9, 9), grey, np.uint8)).save(data, "PNG")
    return data.getvalue()


def tar_of(path: Path, *members: tuple[str, bytes], kind=tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def refusal(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        scan_images(source, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def packed(class_folder, tmp_path_factory) -> Path:
    return pack(class_folder, tmp_path_factory.mktemp("packed") / "分片")


# ---- the same as a folder


def test_shards_are_the_folder_they_were_made_of(class_folder, packed, tmp_path):
    own, other = scan_folder(class_folder), scan_images(packed)
    assert len(os.listdir(packed)) == 8
    assert other.paths == own.paths and other.classes == own.classes
    assert other.labels.tolist() == own.labels.tolist()
    assert other.notes == ("72 files that are no images are passed over (.json x 72)",)
    of_own, of_other = inspect_images(own.files(), 32), inspect_images(other.files(), 32)
    assert fingerprint(own, of_own.digests) == fingerprint(other, of_other.digests)
    assert np.array_equal(of_own.squares.array, of_other.squares.array) and of_own.facts == of_other.facts
    for mine, its in zip(other.without({0, 5}).files(), own.without({0, 5}).files(), strict=True):
        assert mine.open("rb").read() == its.read_bytes()
    pattern = r"^(P\d+)_"
    assert groups_by_pattern(own, pattern) == groups_by_pattern(other, pattern)
    (tmp_path / "g.csv").write_text("path,group\n" + "".join(f"{p},{p[:5]}\n" for p in own.paths), "utf-8")
    assert groups_from_file(own, tmp_path / "g.csv") == groups_from_file(other, tmp_path / "g.csv")


def test_a_run_on_shards_is_the_run_on_the_folder(class_folder, packed, tmp_path):
    """Bit for bit: weights, predictions, splits; and its report shows the pictures and their heat maps."""
    flags = ("--epochs", 2, "--group-pattern", r"^(P\d+)_")
    assert train(class_folder, tmp_path / "folder", *flags, "--no-cache") == 0
    assert train(packed, tmp_path / "shards", *flags) == 0
    own, other = (
        torch.load(tmp_path / name / "checkpoint_latest.pth", weights_only=True)
        for name in ("folder", "shards")
    )
    assert own["dataset_fingerprint"] == other["dataset_fingerprint"]
    assert all(torch.equal(own["model"][name], other["model"][name]) for name in own["model"])
    splits = [
        json.loads((tmp_path / name / "splits.json").read_text("utf-8")) for name in ("folder", "shards")
    ]
    assert splits[0]["folds"] == splits[1]["folds"]
    own, other = (read_predictions(tmp_path / name / "predictions.csv") for name in ("folder", "shards"))
    assert np.array_equal(own.probs, other.probs)
    html = (tmp_path / "shards" / "report.html").read_text("utf-8")
    assert "cannot be shown" not in html and "no map of embeddings" not in html
    assert html.count("data:image/jpeg") == (tmp_path / "folder" / "report.html").read_text("utf-8").count(
        "data:image/jpeg"
    )


def test_an_evaluations_report_finds_shards_that_were_fetched(class_folder, packed, tmp_path):
    assert train(class_folder, tmp_path / "run", "--epochs", 1) == 0
    shards = f"pipe:cat {packed}/s-{{000000..000007}}.tar"
    flags = ["--checkpoint", tmp_path / "run", "--data-dir", shards, "--cache-dir", tmp_path / "kept"]
    assert evaluate_clip.main([*map(str, flags), "--output-dir", str(tmp_path / "there")]) == 0
    html = (tmp_path / "there" / "report.html").read_text("utf-8")
    assert "cannot be shown" not in html and "no map of embeddings" not in html


def test_a_stopped_run_continues_and_folds_work(packed, tmp_path, quick_report, capsys):
    out = tmp_path / "cv"
    flags = ("--use-cv", "--n-splits", 2, "--epochs", 1, "--no-cache")
    assert train(packed, out, *flags, "--fold", 1) == 0
    assert train(packed, out, *flags) == 0
    assert len(read_predictions(out / "oof_predictions.csv").paths) == 72
    assert train(packed, tmp_path / "run", "--epochs", 1) == 0
    checkpoint = tmp_path / "run" / "checkpoint_latest.pth"
    typed = [
        "--resume-from",
        checkpoint,
        "--data-dir",
        packed,
        "--output-dir",
        tmp_path / "run",
        "--epochs",
        2,
    ]
    assert main([*map(str, typed)]) == 0
    assert "resuming after epoch 1 of 2" in capsys.readouterr().out


def test_a_report_is_made_though_the_shards_are_gone(packed, tmp_path, quick_report):
    shutil.copytree(packed, tmp_path / "shards")
    assert train(tmp_path / "shards", tmp_path / "run", "--epochs", 1) == 0
    shutil.rmtree(tmp_path / "shards")
    assert write_report(tmp_path / "run").exists()
    (tmp_path / "x.tar").write_bytes(b"no tar")
    assert not finder(tmp_path / "x.tar")("a/1.png").exists()


def test_data_check_reads_shards(class_folder, packed, tmp_path):
    for name, source in (("folder", class_folder), ("shards", packed)):
        assert check_main(["--data-dir", str(source), "--output", str(tmp_path / name)]) == 0
    own, other = (json.loads((tmp_path / name).read_text("utf-8")) for name in ("folder", "shards"))
    passed_over = [found for found in other["findings"] if found["kind"] == "passed_over"]
    assert len(passed_over) == 1 and own["summary"] == other["summary"]
    assert [f for f in other["findings"] if f not in passed_over] == own["findings"]


def test_the_cache_is_used_until_a_shard_changes(packed, tmp_path, monkeypatch):
    shutil.copytree(packed, tmp_path / "s")
    decoded = []
    read = images._read
    monkeypatch.setattr(images, "_read", lambda path: (decoded.append(path.path), read(path))[1])
    first = inspect_cached([scan_images(tmp_path / "s")], 32, tmp_path / "c")
    assert len(decoded) == 72 and isinstance(first.squares.array, np.memmap)
    decoded.clear()
    again = inspect_cached([scan_images(tmp_path / "s")], 32, tmp_path / "c")
    assert not decoded and np.array_equal(first.digests, again.digests)
    changed = tmp_path / "s" / "s-000003.tar"
    os.utime(changed, ns=(1, 1))
    with tarfile.open(changed) as tar:
        names = {name for name in tar.getnames() if name.endswith(".png")}
    inspect_cached([scan_images(tmp_path / "s")], 32, tmp_path / "c")
    assert set(decoded) == names and len(names) == 10


def test_dicom_in_shards_is_read_by_suffix_and_by_content(tmp_path):
    source = get_testdata_file("CT_small.dcm")
    content = Path(source).read_bytes()
    tar_of(
        tmp_path / "s.tar", ("a/x.dcm", content), ("a/1.2.840.7", content), ("a/1.2.840.8", picture()),
        ("a/notes", b"short"), ("b/1.png", picture()),
    )  # fmt: skip
    folder = scan_images(tmp_path / "s.tar")
    assert folder.paths == ("a/1.2.840.7", "a/x.dcm", "b/1.png") and "2 files" in folder.notes[0]
    for file in folder.files()[:2]:
        assert np.array_equal(read_image(file), read_image(Path(source)))
    assert pydicom.dcmread(source).Rows == read_image(folder.file(0)).height


def test_an_unchanged_shard_is_listed_once(packed, tmp_path, monkeypatch):
    shutil.copytree(packed, tmp_path / "s")
    walked, walk = [], tarfile.open
    monkeypatch.setattr(
        tarfile, "open", lambda path, *a, **k: (walked.append(path.name), walk(path, *a, **k))[1]
    )

    def scan():
        walked.clear()
        return scan_images(tmp_path / "s", cache_dir=tmp_path / "c")

    first = scan()
    assert len(walked) == 8
    again = scan()
    assert not walked and again.paths == first.paths and again.notes == first.notes
    assert np.array_equal(again.members.places, first.members.places)
    os.utime(tmp_path / "s" / "s-000003.tar", ns=(1, 1))
    assert scan().paths == first.paths and walked == ["s-000003.tar"]
    for file in (tmp_path / "c" / "shards").iterdir():
        assert file.stat().st_mode & 0o077 == 0
        file.write_bytes(file.read_bytes()[:-9])
    assert scan().paths == first.paths and len(walked) == 8
    (tmp_path / "no folder").write_bytes(b"")
    assert scan_images(tmp_path / "s", cache_dir=tmp_path / "no folder").paths == first.paths


# ---- where shards lie


@pytest.mark.parametrize("form", ["folder", "braces", "one after ::", "file URL"])
def test_the_ways_to_name_shards(packed, form):
    source = {
        "folder": packed, "braces": f"{packed}/s-{{000000..000007}}.tar",
        "one after ::": f"{packed}/s-{{000000..000003}}.tar::{packed}/s-{{000004..000007}}.tar",
        "file URL": f"file://{packed}/s-{{000000..000007}}.tar",
    }[form]  # fmt: skip
    assert is_shards(source) and len(scan_images(source, cache_dir=packed.parent / form).paths) == 72


def test_a_class_folder_that_holds_a_tar_is_a_folder(class_folder, tmp_path):
    shutil.copytree(class_folder, tmp_path / "d")
    tar_of(tmp_path / "d" / "backup.tar", ("a/1.png", picture()))
    assert not is_shards(tmp_path / "d") and len(scan_images(tmp_path / "d").paths) == 72
    assert "is not a folder" in refusal(tmp_path / "none")


def test_missing_shards_and_wrong_braces_are_named(packed):
    message = refusal(f"{packed}/s-{{000007..000009}}.tar")
    assert "2 of 3 shards do not exist" in message and "s-000009.tar" in message
    assert "more than" in refusal("/x/{0..999999999}.tar")


def test_what_is_fetched_is_kept_and_not_fetched_again(packed, tmp_path):
    source = f"pipe:cat {packed}/s-{{000000..000007}}.tar && echo >> {tmp_path}/fetched"
    folder = scan_images(source, cache_dir=tmp_path / "c")
    assert folder.paths == scan_images(packed).paths
    assert len((tmp_path / "fetched").read_text()) == 8
    assert scan_images(source, cache_dir=tmp_path / "c", fetch=False).paths == folder.paths
    assert len((tmp_path / "fetched").read_text()) == 8
    kept = list((tmp_path / "c" / "shards").iterdir())
    assert len(kept) == 16 and all(file.stat().st_mode & 0o077 == 0 for file in kept)
    assert "not kept" in refusal(source, cache_dir=tmp_path / "d", fetch=False)


@pytest.mark.parametrize(
    "source", ["pipe:cat {}/none.tar", "pipe:head -c 5000 {}/s-000000.tar; exit 3", "s3://b/x.tar"]
)
def test_a_fetch_that_fails_leaves_nothing(packed, tmp_path, source):
    message = refusal(source.format(packed), cache_dir=tmp_path / "c")
    assert "cannot be fetched" in message and ("pipe:aws s3 cp" in message) == source.startswith("s3")
    assert not list((tmp_path / "c" / "shards").iterdir())


def test_shards_are_not_fetched_onto_a_full_disk(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FREE_DISK", 2**62)
    assert "no room in" in refusal(f"pipe:cat {packed}/s-000000.tar", cache_dir=tmp_path / "c")
    assert not list((tmp_path / "c" / "shards").iterdir())


def test_no_command_of_a_checkpoint_is_run(class_folder, packed, tmp_path, quick_report, capsys):
    for path in class_folder.rglob("*.png"):  # other pictures than those to validate on
        own = tmp_path / "own" / path.relative_to(class_folder)
        own.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.mirror(Image.open(path)).save(own)
    source, cache_dir = f"pipe:echo >> {tmp_path}/ran; cat {packed}/s-{{000000..000007}}.tar", tmp_path / "c"
    run, flags = tmp_path / "run", ("--epochs", 1, "--cache-dir", cache_dir)
    assert train(tmp_path / "own", run, "--val-dir", source, *flags) == 0 and (tmp_path / "ran").exists()
    shutil.rmtree(cache_dir)
    (tmp_path / "ran").unlink()
    typed = [
        "--data-dir",
        tmp_path / "own",
        "--output-dir",
        run,
        "--resume-from",
        run / "checkpoint_latest.pth",
    ]
    assert main([*map(str, typed), "--epochs", "2"]) == 2
    assert "may be a command to run" in capsys.readouterr().err
    write_report(run)
    assert not (tmp_path / "ran").exists()
    assert main([*map(str, typed), "--epochs", "2", "--val-dir", source]) == 0 and (tmp_path / "ran").exists()


# ---- what is in them


def test_names_are_read_as_those_of_a_folder(tmp_path):
    long = "深" * 90 + "/" + "长" * 60 + ".png"
    members = [("b/1.png", picture()), (f"./{NFD}/2.PNG", picture()), (f"a/{long}", picture())]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        folder = scan_images(tar_of(tmp_path / "s.tar", *members, kind=kind))
        assert folder.classes == ("a", "b", NFC)
        assert folder.paths == (f"a/{long}", "b/1.png", f"{NFD}/2.PNG")


def test_what_is_no_image_of_a_class_is_passed_over(tmp_path):
    with tarfile.open(tar_of(tmp_path / "s.tar"), "w") as tar:
        names = [
            "a/1.png",
            "b/1.png",
            "loose.png",
            "../../x.png",
            "a/../b/2.png",
            "/etc/1.png",
            "a/t.cls",
            "a/m.pyd",
        ]
        for name in [*names, "a/.hidden.png", "__MACOSX/a/1.png", "a/.ipynb_checkpoints/1.png"]:
            member = tarfile.TarInfo(name)
            member.size = len(picture())
            tar.addfile(member, io.BytesIO(picture()))
        for name, kind in (
            ("a/link.png", tarfile.SYMTYPE),
            ("a/hard.png", tarfile.LNKTYPE),
            ("c", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a/1.png"
            tar.addfile(member)
    folder = scan_images(tmp_path / "s.tar")
    assert folder.paths == ("a/1.png", "b/1.png")
    loose, passed_over = folder.notes
    assert loose.startswith("1 image lies beside the class folders")
    for kind in ("absolute name or .. x 3", "link or device x 2", ".cls x 1", ".pyd x 1"):
        assert kind in passed_over


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's, beside our error
def test_unreadable_members_are_named(tmp_path):
    cut, bomb = picture()[:40], bytearray(picture())
    bomb[16:24] = (12_000).to_bytes(4, "big") * 2  # width and height, of which the checksum follows later
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    members = [("a/cut.png", cut), ("a/empty.png", b""), ("a/bomb.png", bytes(bomb)), ("b/1.png", picture())]
    folder = scan_images(tar_of(tmp_path / "s.tar", *members))
    found = inspect_images(folder.files(), 8)
    assert [folder.paths[i] for i in found.errors] == ["a/bomb.png", "a/cut.png", "a/empty.png"]
    bomb, cut, empty = found.errors.values()
    assert "12000 x 12000" in bomb and "0 bytes" in empty and "cut.png" in cut and "BytesIO" not in cut


def test_a_member_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    folder = scan_images(tar_of(tmp_path / "s.tar", ("a/1.png", picture()), ("b/1.png", picture())))
    monkeypatch.setattr(images, "MOST_BYTES", 10)
    monkeypatch.setattr(Member, "open", None)
    assert "more than 10" in inspect_images(folder.files(), 8).errors[0]


def test_an_image_of_a_changed_shard_is_not_another_image(tmp_path):
    path = tar_of(tmp_path / "s.tar", ("a/1.png", picture(1)), ("b/1.png", picture(2)))
    folder = scan_images(path)
    assert np.asarray(read_image(folder.file(1))).max() == 2
    tar_of(path, ("b/1.png", picture(2)), ("a/1.png", picture(1)))
    os.utime(path, ns=(1, 1))
    with pytest.raises(UnreadableImage, match=r"s\.tar has changed"):
        read_image(folder.file(1))


def test_one_name_in_two_shards_is_refused(tmp_path):
    for name in ("1.tar", "2.tar"):
        tar_of(tmp_path / name, ("a/1.png", picture()), (f"b/{name}.png", picture()))
    message = refusal(tmp_path)
    assert "1 names" in message and "a/1.png in" in message and "1.tar" in message and "2.tar" in message


def test_two_spellings_of_one_class_are_refused(tmp_path):
    path = tar_of(
        tmp_path / "s.tar", (f"{NFC}/1.png", picture()), (f"{NFD}/2.png", picture()), ("b/1.png", b"x")
    )
    assert "both read" in refusal(path)


def test_shards_without_class_folders_are_refused(tmp_path):
    assert "loose" in refusal(tar_of(tmp_path / "s.tar", ("1.png", picture()), ("1.cls", b"0")))


def test_names_that_are_no_utf8_are_refused(tmp_path):
    path = tar_of(
        tmp_path / "s.tar", ("XX/1.png", picture()), ("b/1.png", picture()), kind=tarfile.USTAR_FORMAT
    )
    raw = path.read_bytes()
    header = bytearray(raw[:512].replace(b"XX", "正".encode("gbk")))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + raw[512:])
    assert "not UTF-8" in refusal(path)


# ---- damaged shards


@pytest.mark.parametrize(
    "where", ["in a header", "in an image", "in another file", "after a member", "no end", "empty"]
)
def test_a_shard_that_ends_early_is_refused(tmp_path, where):
    path = tar_of(
        tmp_path / "s.tar", ("a/1.png", picture()), ("b/1.png", picture()), ("b/1.json", b"{}" * 300)
    )
    assert len(scan_images(path).paths) == 2
    with tarfile.open(path) as tar:
        _, second, third = tar.getmembers()
    length = {
        "in a header": third.offset + 100, "in an image": second.offset_data + 20, "empty": 0,
        "in another file": third.offset_data + 50, "after a member": second.offset,
        "no end": third.offset_data + 1024,
    }[where]  # fmt: skip
    path.write_bytes(path.read_bytes()[:length])
    message = refusal(path)
    assert "no whole tar file" in message and "copy it again" in message


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = tar_of(tmp_path / "s.tar", ("a/1.png", picture()), ("b/1.png", picture()), ("c/1.png", picture()))
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        raw[tar.getmembers()[2].offset + 3] ^= 1
    path.write_bytes(raw)
    assert "no whole tar file" in refusal(path)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_shard_is_refused_in_words(tmp_path, kind):
    with tarfile.open(tmp_path / "s.tar", f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("a/1.png"))
    assert "is compressed" in refusal(tmp_path / "s.tar")


@pytest.mark.parametrize("trick", ["long name", "sparse", "-512", "-1024", "-1536", "text"])
def test_headers_that_lie_are_refused(tmp_path, trick):
    """In tarfile a name of 10 GB fills the memory, and a negative size is followed for ever."""
    member = tarfile.TarInfo("a/1.png")
    if trick == "long name":
        member.type, member.size = tarfile.XHDTYPE, 10 * 2**30
    if trick == "sparse":
        member.type, member.size = tarfile.GNUTYPE_SPARSE, 2**40
    if trick.startswith("-"):
        member.pax_headers = {"size": trick}
    content = b"text " * 1000 if trick == "text" else member.tobuf(tarfile.PAX_FORMAT)
    good = tarfile.TarInfo("b/0.png").tobuf()
    (tmp_path / "s.tar").write_bytes((b"" if trick == "text" else good) + content + bytes(4096))
    message = refusal(tmp_path / "s.tar")
    assert "no whole tar file" in message and ("ends before it begins" in message) == trick.startswith("-")


def test_through_the_command_line(packed, tmp_path, capsys):
    for source in (tmp_path / "none.tar", tar_of(tmp_path / "s.tar", ("a/1.png", picture()))):
        assert main(["--data-dir", str(source), "--output-dir", str(tmp_path / "o")]) == 2
        assert "error: --data-dir" in capsys.readouterr().err
    other = tar_of(tmp_path / "v.tar", ("另/1.png", picture()), ("正常/1.png", picture()))
    assert train(packed, tmp_path / "o", "--val-dir", other) == 2
    assert "has classes that --data-dir lacks: 另" in capsys.readouterr().err


def test_nothing_beside_shards_is_left_out_in_silence(packed, tmp_path):
    """Not a compressed shard, nor what is no shard; and a folder beside them is named as the reason."""
    folder = tmp_path / "shards"
    shutil.copytree(packed, folder)
    (folder / "notes.txt").write_text("-")
    assert any(".txt x 1" in note for note in scan_images(folder).notes)
    last = sorted(folder.glob("*.tar"))[-1]
    Path(f"{last}.gz").write_bytes(gzip.compress(last.read_bytes()))
    last.unlink()
    assert "is compressed" in refusal(folder)
    assert "is compressed" in refusal(f"{last}.gz")
    (folder / "empty").mkdir()
    assert "tar shards are read where no folder lies beside them" in refusal(folder)


def test_tar_files_to_predict_on_are_refused_in_words(packed):
    for source in (packed, next(iter(sorted(packed.glob("*.tar"))))):
        with pytest.raises(UserError, match="for training only"):
            list_images(source)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def four_in(names, path, **pax):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(png(number)), pax
            tar.addfile(member, io.BytesIO(png(number)))
    return path


NAMES = ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]


def test_a_sparse_member_of_the_newer_kind_is_refused(tmp_path):
    """Its bytes lie elsewhere than its offset says: an image would be made of its neighbours'."""
    shard = four_in(NAMES, tmp_path / "s.tar", **{"GNU.sparse.map": "0,8", "GNU.sparse.size": "100"})
    assert "a sparse member" in refusal(shard)


def test_what_lies_behind_a_hole_is_not_left_out_in_silence(tmp_path):
    shard = four_in(NAMES, tmp_path / "s.tar")
    assert len(scan_images(shard).paths) == 4
    content = bytearray(shard.read_bytes())
    at = content.index(b"b/1.png")
    content[at : at + 512] = bytes(512)
    shard.write_bytes(content)
    assert "something behind its end" in refusal(shard)


def test_a_damaged_list_of_a_shard_is_made_anew(tmp_path):
    shard, cache = four_in(NAMES, tmp_path / "s.tar"), tmp_path / "cache"
    paths = tuple(scan_images(shard, cache_dir=cache).paths)
    (kept,) = cache.glob("shards/*.list")
    kept.write_bytes(kept.read_bytes().replace(b"a/1.png", b"b/1.png"))
    assert tuple(scan_images(shard, cache_dir=cache).paths) == paths


def test_a_shard_that_another_run_has_fetched_meanwhile_stays_as_it_is(tmp_path):
    """Replaced, it would have changed for the run that has it."""
    shard = four_in(NAMES, tmp_path / "s.tar")
    first = scan_images(f"pipe:cat {shard}", cache_dir=tmp_path / "one")
    (copy,) = (tmp_path / "one" / "shards").glob("*.tar")
    before = copy.stat()
    shards._keep(Path(shutil.copy(shard, tmp_path / "part")), copy)
    assert (copy.stat().st_ino, copy.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(inspect_images(first.files(), None).errors) == 0


def test_two_patterns_are_counted_by_themselves(tmp_path):
    source = f"{tmp_path}/a{{000..999}}.tar::{tmp_path}/b{{000..999}}.tar"
    assert "2000 of 2000 shards do not exist" in refusal(source)
    assert "more than 100000 shards" in refusal(f"{tmp_path}/{{-1..999999999}}.tar")


def test_a_url_has_one_cache_whatever_the_working_folder(tmp_path, monkeypatch):
    names = []
    for folder in (tmp_path, Path("/")):
        monkeypatch.chdir(folder)
        names.append(cache_file(tmp_path, 32, [Path("https://x.org/{0..9}.tar"), Path("pipe:cat x")]))
    assert names[0] == names[1]
