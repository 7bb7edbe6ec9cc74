"""Names that are code, commands or escapes, and files made to fill the memory: they do no harm."""

import csv
import html.parser
import io
import json
import os
import re
import subprocess
import sys
import xml.dom.minidom
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import SecondaryCaptureImageStorage
from quick import train

import common.files
import data.inputs
from common.cli import as_program
from common.errors import UserError, shorten
from common.files import lines_of, printable, read_json
from data.check import main as check
from data.images import read_image
from data.pixels import UnreadableImage
from data.texts import class_sentences
from evaluate_clip import main as evaluate
from evaluation.results import read_predictions
from export_clip import main as export
from predict_clip import main as predict
from training.options import read_config_file

NAMES = (
    "<script>alert(1)", '"><img src=x onerror=alert(1)>', "=cmd()|calc!A1", "x..\\..\\y", "a\nb", "c\rd",
    "肺" * 80, "$x^2_{\\input{y}}%&#~", "\x1b[31mred", "-rf", "a\u202etxt.exe", "{{ 7 * 7 }}",
)  # fmt: skip
pytestmark = pytest.mark.skipif(os.name != "posix", reason="other file systems refuse most of these names")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """data: a folder for each name, its files named likewise; run: a finished run on it."""
    root = tmp_path_factory.mktemp("hostile")
    generator = np.random.default_rng(0)
    for c, name in enumerate(NAMES):
        (root / "data" / name).mkdir(parents=True)
        for i in range(4):
            grey = np.clip(generator.normal(20 + 20 * c, 8, (40, 40)), 0, 255).astype(np.uint8)
            Image.fromarray(grey).save(root / "data" / name / f"=1+{i}<b>\n&.png")
    assert train(root / "data", root / "run", "--epochs", 1) == 0
    return root


class Page(html.parser.HTMLParser):
    """The elements of a page, and what of them could run."""

    def __init__(self):
        super().__init__()
        self.tags, self.running = set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.running += [name for name, _ in attributes if name.startswith("on")]


def test_the_report_shows_every_name_and_runs_none(hostile):
    text = (hostile / "run" / "report.html").read_text("utf-8")
    page = Page()
    page.feed(text)
    assert "script" not in page.tags and not page.running
    assert "&lt;script&gt;alert(1)" in text and "{{ 7 * 7 }}" in text
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b[31mred" in text
    pictures = list((hostile / "run" / "figures").glob("*.svg"))
    assert len(pictures) > 5
    for picture in pictures:
        document = xml.dom.minidom.parse(str(picture))
        assert not document.getElementsByTagName("script")


def test_names_come_back_from_the_csv_and_no_cell_is_a_formula(hostile):
    predictions = read_predictions(hostile / "run" / "predictions.csv")
    assert predictions.classes == tuple(sorted(NAMES))
    assert all((hostile / "data" / path).is_file() for path in predictions.paths)
    for name in ("predictions.csv", "metrics_table.csv"):
        with open(hostile / "run" / name, encoding="utf-8-sig", newline="") as file:
            for row in csv.reader(file):
                texts = [cell for cell in row if not re.fullmatch(r"-?[\d.e+-]+", cell)]
                assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for cell in texts), row


def test_latex_gets_no_command_of_a_name(hostile):
    text = (hostile / "run" / "metrics_table.tex").read_text("utf-8")
    ours = (
        r"\\usepackage|\\begin|\\end|\\toprule|\\midrule|\\bottomrule|\\text\w+\{\}|\\\\|\\[%&$#_{}]|\$\\pm\$"
    )
    rest = re.sub(ours, "", re.sub(r"\\(begin|end)\{tabular\}(\{\w+\})?", "", re.sub("^%.*", "", text)))
    assert not re.search(r"[\\^~#%$_{}]", rest)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", text)
    assert text.count(r"\\") == 11 + len(NAMES) + 1  # each name is one row


def test_predictions_heat_maps_and_exports_stay_in_their_folders(hostile, tmp_path, capsys):
    texts = {
        "../../x": "一",
        "=cmd()": "二",
        "<script>": "三",
        "a\nb": "四",
        "长" * 300: "五",
        "CON": "六",
        "a/b": "七",
    }
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    before = sorted(path.name for path in tmp_path.parent.iterdir())
    command = ["--checkpoint", hostile / "run", "--input", hostile / "data", "--output", tmp_path / "p.csv"]
    command += [
        "--class-texts-file",
        tmp_path / "texts.json",
        "--heatmaps",
        tmp_path / "maps",
        "--gpu-id",
        -1,
    ]
    assert predict([*map(str, command)]) == 0
    assert export(["--checkpoint", str(hostile / "run"), "--output-dir", str(tmp_path / "e")]) == 0
    assert sorted(path.name for path in tmp_path.parent.iterdir()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"texts.json", "p.csv", "maps", "e"}
    assert len(list((tmp_path / "maps").iterdir())) == 4 * len(NAMES)  # all of them read, "\\" and all
    with open(tmp_path / "p.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [f"prob_{name}" for name in texts] == [key for key in rows[0] if key.startswith("prob_")]
    card = (tmp_path / "e" / "README.md").read_text("utf-8")
    assert not re.search(r"(?<!\\)<(script|img)", card) and "\x1b" not in card
    assert "\x1b" not in capsys.readouterr().out


def test_no_name_begins_a_line(tmp_path, capsys):
    for n, name in ((9, "a\nerror: all is lost"), (3, "c\rerror: run it")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(n):
            Image.new("L", (40, 20 + 20 * (n == 9)), 25 * i).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "empty\nerror: and so on").mkdir()
    assert train(tmp_path / "data", tmp_path / "run", "--epochs", 1) == 0
    data = ["--data-dir", str(tmp_path / "data")]
    with as_program():
        assert check(data) == 0
        run = ["--checkpoint", str(tmp_path / "run")]
        assert predict([*run, "--input", str(tmp_path / "data"), "--output", str(tmp_path / "p.csv")]) == 0
        (tmp_path / "data" / "a\nerror: all is lost").rename(tmp_path / "data" / "b\nerror: so it is")
        assert evaluate([*run, *data, "--output-dir", str(tmp_path / "new")]) == 2
    said = "".join(capsys.readouterr())
    assert "a\\nerror: all is lost: 9 images" in said and "c\\rerror: run it" in said
    assert "--rename b\\nerror: so it is=CLASS" in said
    assert not re.search(r"^(?!error: .*so it is)error", said, re.MULTILINE)


def test_control_characters_reach_no_terminal(capsys):
    with as_program():
        print("a\x1b[2Jb\u202ec\x9bd\te")
        print("x\x07", file=sys.stderr)
        print("evil\rread 9 images")
        sys.stderr.write("\r 50 %\r")  # as a progress bar does
    streams = capsys.readouterr()
    assert streams.out == "a\\x1b[2Jb\\u202ec\\x9bd\te\nevil\\rread 9 images\n"
    assert streams.err == "x\\x07\n\r 50 %\r"
    assert printable("肺炎 é 🫁\n") == "肺炎 é 🫁\n"
    assert shorten(["a\nb"]) == "  a\\nb"


# --- files made to fill the memory --------------------------------------------------------------------------


def test_large_json_is_refused_unread(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('{"正常": "x"}', encoding="utf-8")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UserError, match="at most 8 are read"):
        read_json(tmp_path / "a.json", "texts", 8)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(common.files, "MOST_LINE_LETTERS", 100)
    (tmp_path / "a.txt").write_text("x.png\n" + "y" * 1000, encoding="utf-8")
    with open(tmp_path / "a.txt") as file, pytest.raises(UserError, match="line 2: longer than 100 letters"):
        list(lines_of(file, "the list"))
    for name in ("a.txt", "a.csv"):
        (tmp_path / name).write_text("path\n" + "y" * 1000, encoding="utf-8")
        with pytest.raises(UserError, match="longer than 100"):
            data.inputs.list_images(tmp_path / name)


def test_very_many_unknown_keys_are_a_few_messages(tmp_path):
    many = {f"key {i}": "x" for i in range(100_000)}
    with pytest.raises(UserError) as refused:
        class_sentences(("正常", "肺炎"), many)
    assert len(refused.value.problems) == 11 and "99990 more keys" in refused.value.problems[-1]
    (tmp_path / "c.json").write_text(json.dumps([many]), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        read_config_file(tmp_path / "c.json")
    assert len(refused.value.problems) == 21 and "99980 more keys" in refused.value.problems[-1]
    (tmp_path / "c.json").write_text(json.dumps([{}] * 1001), encoding="utf-8")
    with pytest.raises(UserError, match="1001 configurations, more than 1000"):
        read_config_file(tmp_path / "c.json")


@pytest.mark.parametrize("name", ["\ud800", "a\0b"])
def test_a_class_name_that_no_file_can_hold_is_refused(name):
    with pytest.raises(UserError, match="is no text"):
        class_sentences(("正常", "肺炎"), {name: "x"})


def test_postscript_called_png_runs_no_program(tmp_path, monkeypatch):
    """Pillow would hand it to Ghostscript."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **_: started.append(command))
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **_: started.append(command))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(UnreadableImage, match="cannot identify"):
        read_image(tmp_path / "a.png")
    assert not started


def dicom_head(syntax="1.2.840.10008.1.2.1", side=4) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, "1.2"
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.Rows = dataset.Columns = side
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_deflated_dicom_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    (tmp_path / "a.dcm").write_bytes(dicom_head("1.2.840.10008.1.2.1.99"))
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("it was unpacked"))
    monkeypatch.setattr(zlib, "decompressobj", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(UnreadableImage, match="deflated DICOM"):
        read_image(tmp_path / "a.dcm")


def test_a_dicom_of_huge_dimensions_is_refused_by_its_header(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom_head(side=65535))
    with pytest.raises(UnreadableImage, match="65535 x 65535 pixels"):
        read_image(tmp_path / "a.dcm")


def test_a_pipe_called_png_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="no file but a pipe"):
        read_image(tmp_path / "a.png")


def test_a_huge_file_is_refused_by_its_size(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.write(b"\xff\xd8\xff\xe0")
        file.truncate(2**30)  # sparse
    with pytest.raises(UnreadableImage, match="holds 1073741824 bytes"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("head", [b"", dicom_head()])
def test_a_dicom_of_zeros_is_refused_without_reading_them_all(tmp_path, head, monkeypatch):
    """What a crashed copy leaves: zeros, which are millions of empty elements."""
    with open(tmp_path / "a.dcm", "wb") as file:
        file.write(head or bytes(128) + b"DICM")
        file.truncate(2**28)
    seen, element = [], pydicom.filereader.RawDataElement
    monkeypatch.setattr(
        pydicom.filereader, "RawDataElement", lambda *a, **k: seen.append(1) or element(*a, **k)
    )
    with pytest.raises(UnreadableImage, match="DICOM"):
        read_image(tmp_path / "a.dcm")
    assert len(seen) < 100


def test_a_config_file_runs_no_command(class_folder, tmp_path, capsys):
    ran, file = tmp_path / "ran", tmp_path / "entries.json"
    for before in ("pipe:", "file://pipe:", "x.tar::pipe:", "{pi,x}pe:"):
        file.write_text(json.dumps([{"val_dir": f"{before}touch {ran}; cat x.tar"}]), encoding="utf-8")
        assert train(class_folder, tmp_path / "out", "--multi-config", "--config-file", file) == 2
        assert "may be a command to run" in capsys.readouterr().err and not ran.exists()
