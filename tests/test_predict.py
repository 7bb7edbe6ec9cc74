"""Prediction through predict_clip.py's own main(), with small runs trained for it."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_clip
from evaluation.checkpoints import read_checkpoint, write_file
from evaluation.predict import _Decoder, heat_map_name
from predict_clip import main

TRAIN = shlex.split(
    "--image-encoder timm:test_resnet --image-weights none --text-encoder bert-tiny-bytes --img-size 32 "
    "--epochs 1 --embed-dim 16 --batch-size 16 --num-workers 0 --gpu-id -1 --no-amp --learning-rate 3e-4"
)
CLASSES = sorted(("正常", "肺炎", "气胸"))


def train(data, output, *flags):
    command = ["--data-dir", str(data), "--output-dir", str(output), *TRAIN, *map(str, flags)]
    assert train_clip.main(command) == 0
    return output


def predict(checkpoints, source, output, *flags):
    checkpoints = checkpoints if isinstance(checkpoints, list) else [checkpoints]
    command = ["--checkpoint", *checkpoints, "--input", source, "--output", output, "--gpu-id", -1, *flags]
    if "--num-workers" not in flags:
        command += ["--num-workers", 0]
    return main([str(word) for word in command])


def rows_of(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def probs_of(rows, classes=CLASSES):
    return np.array([[float(row[f"prob_{name}"]) for name in classes] for row in rows])


@pytest.fixture(scope="module")
def folds(class_folder, tmp_path_factory):
    return train(class_folder, tmp_path_factory.mktemp("runs") / "交叉 cv", "--use-cv", "--n-splits", 2)


@pytest.fixture(scope="module")
def other_size(class_folder, tmp_path_factory):
    return train(class_folder, tmp_path_factory.mktemp("runs") / "48", "--img-size", 48)


@pytest.fixture
def pictures(class_folder, tmp_path):
    """A flat and nested folder of good and bad files, Chinese names among them."""
    root = tmp_path / "新 图像"
    shutil.copytree(class_folder / "正常", root / "二月" / "正常")
    shutil.copy(class_folder / "肺炎" / "P100_0.png", root / "丙.png")
    shutil.copy(class_folder / "肺炎" / "P100_0.png", root / "=1+1.png")
    (root / "空.png").write_bytes(b"")
    (root / "broken.jpg").write_bytes(b"no image")
    (root / "notes.docx").write_bytes(b"x")
    return root


# --- the numbers --------------------------------------------------------------------------------------------


def test_validation_images_get_the_probabilities_the_run_stored(folds, class_folder, tmp_path):
    for k in (1, 2):
        stored = rows_of(folds / f"fold_{k}" / "predictions.csv")
        images = tmp_path / f"{k}.txt"
        images.write_text("\n".join(str(class_folder / row["path"]) for row in stored), encoding="utf-8")
        assert predict(folds / f"fold_{k}", images, tmp_path / f"{k}.csv", "--batch-size", 7) == 0
        rows = rows_of(tmp_path / f"{k}.csv")
        assert len(rows) == 36 and [r["prediction"] for r in rows] == [r["prediction"] for r in stored]
        np.testing.assert_allclose(probs_of(rows), probs_of(stored), rtol=0, atol=1e-6)


def test_an_ensemble_is_the_mean_of_its_models_with_their_spread(folds, other_size, class_folder, tmp_path):
    single = [folds / "fold_1", folds / "fold_2", other_size / "checkpoint_best.pth"]
    each = []
    for i, checkpoint in enumerate(single):
        assert predict(checkpoint, class_folder, tmp_path / f"{i}.csv") == 0
        each.append(probs_of(rows_of(tmp_path / f"{i}.csv")))
        assert {row["spread"] for row in rows_of(tmp_path / f"{i}.csv")} == {""}
    assert predict([folds, other_size], class_folder, tmp_path / "all.csv") == 0
    rows = rows_of(tmp_path / "all.csv")
    mean = np.mean(each, axis=0)
    np.testing.assert_allclose(probs_of(rows), mean, atol=1e-6)
    best = mean.argmax(1)
    assert [row["prediction"] for row in rows] == [CLASSES[c] for c in best]
    np.testing.assert_allclose([float(r["probability"]) for r in rows], mean.max(1), atol=1e-6)
    of_best = np.array(each)[:, np.arange(len(best)), best]  # (3, N)
    np.testing.assert_allclose([float(r["spread"]) for r in rows], np.std(of_best, axis=0, ddof=1), atol=1e-6)


def test_columns_of_an_ensemble_are_matched_by_name(folds, class_folder, tmp_path):
    checkpoint = read_checkpoint(folds / "fold_1" / "checkpoint_latest.pth")
    turned = [2, 0, 1]
    checkpoint["classes"] = [checkpoint["classes"][c] for c in turned]
    checkpoint["class_features"] = checkpoint["class_features"][turned]
    write_file(tmp_path / "turned.pth", checkpoint)
    assert predict([folds / "fold_1", tmp_path / "turned.pth"], class_folder, tmp_path / "a.csv") == 0
    assert predict(folds / "fold_1", class_folder, tmp_path / "b.csv") == 0
    a, b = rows_of(tmp_path / "a.csv"), rows_of(tmp_path / "b.csv")
    np.testing.assert_allclose(probs_of(a), probs_of(b), atol=1e-7)
    assert max(float(row["spread"]) for row in a) < 1e-7


def test_new_sentences_are_scored_without_training(folds, class_folder, tmp_path, capsys):
    from evaluation.trained import load_trained

    trained = load_trained(folds / "fold_1" / "checkpoint_latest.pth", torch.device("cpu"), with_text=True)
    texts = {"积液": ["胸腔积液", "大量积液"], "=好": "肺野清晰"}
    end, other_end = os.pipe()  # as <(command) gives
    with open(other_end, "w", encoding="utf-8") as file:
        json.dump(texts, file)
    output = tmp_path / "zero.csv"
    flags = ["--class-texts-file", f"/dev/fd/{end}"]
    assert predict(folds / "fold_1", class_folder / "肺炎", output, *flags) == 0
    os.close(end)
    assert "zero-shot" in capsys.readouterr().out
    rows = rows_of(output)

    features = []
    with torch.no_grad():
        for own in (["胸腔积液", "大量积液"], ["肺野清晰"]):
            each = [trained.model.encode_text(trained.model.text_tower.tokenize([s])[0]) for s in own]
            mean = torch.cat(each).mean(0)
            features.append(mean / mean.norm())
        images = [
            np.asarray(Image.open(class_folder / "肺炎" / row["path"]).convert("RGB").resize((32, 32), 3))
            for row in rows
        ]
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        cosine = trained.model.encode_image(images) @ torch.stack(features).T
        expected = (cosine.double() * trained.model.logit_scale.exp()).softmax(1)
    np.testing.assert_allclose(probs_of(rows, ["积液", "=好"]), expected, atol=1e-5)
    assert {row["prediction"] for row in rows} <= {"积液", "'=好"}


def test_the_runs_own_sentences_given_again_change_nothing(folds, class_folder, tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({name: name for name in CLASSES}), encoding="utf-8")
    assert predict(folds / "fold_1", class_folder, tmp_path / "a.csv", "--class-texts-file", path) == 0
    assert predict(folds / "fold_1", class_folder, tmp_path / "b.csv") == 0
    a, b = rows_of(tmp_path / "a.csv"), rows_of(tmp_path / "b.csv")
    np.testing.assert_allclose(probs_of(a), probs_of(b), atol=1e-6)


# --- input and rows -----------------------------------------------------------------------------------------


def test_a_folder_with_bad_files_gives_a_row_each_in_sorted_order(folds, pictures, tmp_path, capsys):
    output = tmp_path / "结果" / "predictions.csv"
    assert predict(folds / "fold_1", pictures, output, "--batch-size", 2, "--num-workers", 2) == 0
    assert output.read_bytes().startswith(b"\xef\xbb\xbf")
    rows = rows_of(output)
    paths = [row["path"].removeprefix("./") for row in rows]
    assert paths == sorted(paths) and len(rows) == 24 + 4 and "二月/正常/P000_0.png" in paths
    assert list(rows[0]) == ["path", "prediction", "probability", "spread",
                             *(f"prob_{name}" for name in CLASSES), "error"]  # fmt: skip
    bad = {row["path"]: row for row in rows if row["error"]}
    assert set(bad) == {"空.png", "broken.jpg"} and "empty (0 bytes)" in bad["空.png"]["error"]
    for row in rows:
        numbers = [row[key] for key in row if key not in ("path", "spread", "error")]
        assert all(numbers) != bool(row["error"]) and (pictures / row["path"]).exists()
        if not row["error"]:
            probs = probs_of([row])[0]
            assert row["prediction"] == CLASSES[probs.argmax()] and probs.sum() == pytest.approx(1)
            assert float(row["probability"]) == probs.max()
    said = capsys.readouterr().out
    assert "predicted 26 of 28" in said and "2 images have no prediction" in said and "空.png" in said
    assert ".docx x 1" in said


def test_a_text_list_keeps_its_order_repeats_and_missing_files(folds, pictures, tmp_path):
    lines = [
        "\ufeff丙.png", "", "  二月\\正常\\P001_0.png ", str(pictures / "丙.png"), "没有.png", "二月",
        "丙.png", "a\x00b.png", "a\x00b/丙.png", "肺" * 100 + ".png",
    ]  # fmt: skip
    (pictures / "list.TXT").write_bytes("\r\n".join(lines).encode())
    assert predict(folds / "fold_1", pictures / "list.TXT", tmp_path / "p.csv", "--batch-size", 3) == 0
    rows = rows_of(tmp_path / "p.csv")
    assert [row["path"] for row in rows] == [
        "丙.png", "二月\\正常\\P001_0.png", str(pictures / "丙.png"), "没有.png", "二月", "丙.png",
        "a\\x00b.png", "a\\x00b/丙.png", "肺" * 100 + ".png",
    ]  # fmt: skip
    assert [bool(row["error"]) for row in rows] == [False, False, False, True, True, False, True, True, True]
    assert "no such file" in rows[3]["error"] and "folder" in rows[4]["error"]
    np.testing.assert_allclose(probs_of([rows[2], rows[5]]), probs_of([rows[0]] * 2), atol=1e-6)


def test_a_csv_list_is_read_by_its_column_and_takes_what_we_wrote(folds, pictures, tmp_path):
    (pictures / "list.csv").write_text(
        'no,path\n1,丙.png\n\n2,"=1+1.png"\n', encoding="utf-8-sig"
    )  # a blank line in it
    assert predict(folds / "fold_1", pictures / "list.csv", pictures / "out.csv") == 0
    rows = rows_of(pictures / "out.csv")
    assert [row["path"] for row in rows] == ["丙.png", "./=1+1.png"]
    assert predict(folds / "fold_1", pictures / "out.csv", tmp_path / "again.csv") == 0
    assert rows_of(tmp_path / "again.csv") == rows


def test_a_single_image_and_exit_code_1_when_nothing_could_be_predicted(folds, pictures, tmp_path):
    assert predict(folds / "fold_1", pictures / "丙.png", tmp_path / "a.csv") == 0
    assert len(rows_of(tmp_path / "a.csv")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names in Unicode")
def test_a_name_that_is_not_utf8_is_a_row_with_its_error(folds, pictures, tmp_path):
    name = os.fsencode(pictures / "丙.png").replace("丙".encode(), "丙".encode("gbk"))
    shutil.copy(pictures / "丙.png", name)
    assert predict(folds / "fold_1", pictures, tmp_path / "a.csv") == 0
    (row,) = [row for row in rows_of(tmp_path / "a.csv") if "not UTF-8" in row["error"]]
    assert row["path"] == "\\udcb1\\udcfb.png"


def test_a_file_that_may_not_be_looked_at_is_not_called_missing(tmp_path, monkeypatch):
    def denied(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", denied)  # which pathlib and os.path ask
    monkeypatch.setattr(Path, "stat", denied)
    (error,) = _Decoder(tmp_path, [32]).__getitems__(["a.png"]).errors
    assert "Permission denied" in error


@pytest.mark.parametrize("what", ["images", "model"])
def test_where_nothing_is_predicted_no_file_is_written_and_a_former_one_stays(
    what, folds, class_folder, pictures, tmp_path, capsys
):
    checkpoint = read_checkpoint(folds / "fold_1" / "checkpoint_latest.pth")
    checkpoint["model"]["image_projection.weight"][:] = float("nan")
    write_file(tmp_path / "nan.pth", checkpoint)
    good = folds / "fold_1", class_folder / "正常"
    model, source, why = {
        "images": (good[0], pictures / "空.png", "empty (0 bytes)"),
        "model": (tmp_path / "nan.pth", good[1], "not a finite number"),
    }[what]
    output, maps = tmp_path / "a.csv", tmp_path / "maps"
    for before in (None, b"good"):
        if before:
            output.write_bytes(before)
        assert predict(model, source, output, "--heatmaps", maps, "--overwrite") == 1
        said = capsys.readouterr().out
        assert f"so {output} was not written" in said and "one row per image" not in said
        assert ("of 1 image in" in said) == (what == "images")
        assert why in said and not maps.exists() and not list(tmp_path.glob(".*"))
        assert (output.read_bytes() if output.exists() else None) == before
    output.unlink()
    assert predict(*good, output, "--heatmaps", maps) == 0


def test_an_image_whose_answer_is_not_finite_has_an_error_and_no_heat_map(folds, tmp_path, monkeypatch):
    from evaluation.predict import Ensemble

    probs_of_images = Ensemble.probs

    def without_the_first(self, images):
        probs = probs_of_images(self, images)
        probs[-1, 0] = np.nan
        return probs

    monkeypatch.setattr(Ensemble, "probs", without_the_first)
    for name in "ab":
        Image.new("L", (40, 40)).save(tmp_path / f"{name}.png")
    (tmp_path / "list.txt").write_text("a.png\nb.png")
    output, maps = tmp_path / "p.csv", tmp_path / "maps"
    assert predict(folds / "fold_1", tmp_path / "list.txt", output, "--heatmaps", maps) == 0
    assert ["not a finite number" in row["error"] for row in rows_of(output)] == [True, False]
    assert [path.name[-5:] for path in maps.iterdir()] == ["b.png"]


def test_processes_and_batches_change_no_number(folds, class_folder, tmp_path):
    assert predict(folds, class_folder, tmp_path / "a.csv", "--num-workers", 2, "--batch-size", 5) == 0
    assert predict(folds, class_folder, tmp_path / "b.csv", "--batch-size", 64) == 0
    a, b = rows_of(tmp_path / "a.csv"), rows_of(tmp_path / "b.csv")
    assert [row["path"] for row in a] == [row["path"] for row in b]
    np.testing.assert_allclose(probs_of(a), probs_of(b), atol=1e-6)


def warned_of(capsys):
    return re.findall(r"holds images of (.*), which the model was trained or valid", capsys.readouterr().out)


def test_training_images_are_warned_about(folds, class_folder, pictures, tmp_path, capsys):
    around = tmp_path / "around"
    around.mkdir()
    (around / "link").symlink_to(class_folder)
    (tmp_path / "list.txt").write_text(f"{pictures / '丙.png'}\naround\\link\\正常\\P000_0.png\n", "utf-8")
    (tmp_path / "others.txt").write_text(f"{pictures / '丙.png'}\n{class_folder.parent / 'x.png'}\n", "utf-8")
    image = class_folder / "正常" / "P000_0.png"
    for source, known in (
        (class_folder, True), (class_folder / "正常", True), (image, True), (tmp_path / "list.txt", True),
        (class_folder.parent, True), (pictures, False), (tmp_path / "others.txt", False),
    ):  # fmt: skip
        predict(folds / "fold_1", source, tmp_path / "p.csv", "--overwrite")
        assert warned_of(capsys) == [str(class_folder.resolve())] * known, source


def test_validation_folders_and_addresses_of_shards_are_looked_at_too(
    folds, class_folder, pictures, tmp_path, capsys
):
    checkpoint = read_checkpoint(folds / "fold_1" / "checkpoint_latest.pth")
    for data_dir in ("pipe:cat x.tar", "https://x.org/{0..9}.tar", "肺" * 200, str(class_folder)):
        checkpoint["config"] |= {"data_dir": data_dir, "val_dir": str(pictures)}
        write_file(tmp_path / "m.pth", checkpoint)
        assert predict(tmp_path / "m.pth", pictures, tmp_path / "p.csv", "--overwrite") == 0
        assert warned_of(capsys) == [str(pictures.resolve())]


# --- heat maps ----------------------------------------------------------------------------------------------


def test_heat_maps_are_one_picture_per_predicted_image(folds, other_size, pictures, tmp_path):
    maps = tmp_path / "热图"
    flags = ["--heatmaps", maps, "--batch-size", 5]
    assert predict([folds / "fold_1", other_size], pictures, tmp_path / "p.csv", *flags) == 0
    rows = rows_of(tmp_path / "p.csv")
    expected = [
        heat_map_name(i, row["prediction"], row["path"]) for i, row in enumerate(rows, 1) if not row["error"]
    ]
    assert sorted(p.name for p in maps.iterdir()) == expected
    for row, name in zip((row for row in rows if not row["error"]), expected, strict=True):
        width, height = Image.open(pictures / row["path"]).size
        scale = 512 / max(width, height)  # all are small: enlarged, whole, in their own shape
        assert Image.open(maps / name).size == (round(width * scale), round(height * scale))
    picture = np.asarray(Image.open(maps / expected[-1]).convert("RGB")).astype(int)
    assert np.ptp(picture, axis=2).max() > 0  # the grey image got colour


def test_names_of_heat_maps_are_unique_short_and_safe():
    assert heat_map_name(7, "正常", 'a/b\\c:*?"<>|\n.png') == "000007_正常_a_b_c.png"
    assert heat_map_name(7, "../..", "../../x.png") == "000007__x.png"
    assert len(os.fsencode(heat_map_name(1234567, "炎" * 300, "肺" * 300 + ".png"))) < 255


def test_an_ensembles_heat_map_is_the_mean_of_its_models_maps(folds, class_folder):
    from common.run_files import find_checkpoints
    from evaluation.heatmaps import heat_maps
    from evaluation.predict import Ensemble
    from evaluation.trained import load_trained

    models = [load_trained(path, torch.device("cpu")) for path in find_checkpoints(folds)]
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    targets = torch.tensor([0, 1, 2])
    expected = np.mean([heat_maps(m.model, images, m.class_features, targets) for m in models], axis=0)
    found = Ensemble(models).heat_maps({32: images}, targets)
    np.testing.assert_allclose(found, expected, atol=1e-6)


# --- cells --------------------------------------------------------------------------------------------------


# --- bad input ----------------------------------------------------------------------------------------------


def test_every_mistake_is_said_at_once(tmp_path, capsys):
    flags = ["--imput", "x", "--batch-size", "0", "--num-workers", "two", "--gpu-id", "-2", "stray"]
    assert main(flags) == 2
    error = capsys.readouterr().err
    for part in ("--imput (did you mean '--input'", "'stray'", "--checkpoint is required",
                 "--output is required", "--batch-size must be", "--num-workers must be",
                 "--gpu-id must be"):  # fmt: skip
        assert part in error
    flags = ["--class-texts-file", tmp_path / "t.json", "--heatmaps", __file__]
    assert predict([tmp_path / "a", tmp_path / "b"], tmp_path / "in", tmp_path / "p.txt", *flags) == 2
    error = capsys.readouterr().err
    for part in ("a does not exist", "b does not exist", "in does not exist", "p.txt must end in .csv",
                 "t.json does not exist", "is a file"):  # fmt: skip
        assert part in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--checkpoint": "nowhere"}, "does not exist"),
        ({"--checkpoint": "pictures"}, "holds no checkpoint_latest.pth; give the folder of a finished run"),
        ({"--checkpoint": "full"}, "checkpoint_best.pth, the model of its best epoch"),
        ({"--checkpoint": "丙.png"}, "is damaged or no checkpoint"),
        ({"--input": "nowhere"}, "--input"),
        ({"--input": "empty"}, "holds no images"),
        ({"--input": "empty.txt"}, "names no image"),
        ({"--input": "empty.csv"}, "names no image"),
        ({"--input": "gbk.txt"}, "is not UTF-8"),
        ({"--input": "pipe"}, "save a list as .txt or .csv"),  # as <(command) gives
        ({"--input": "no_path.csv"}, "first line has Path, x; give each once, by that name"),
        ({"--input": "hole.csv"}, "line 3: path is empty"),
        ({"--output": "exists.csv"}, "--overwrite to replace it"),
        ({"--output": "p.txt"}, "must end in .csv"),
        ({"--output": "folder.csv"}, "is a folder"),
        ({"--output": "丙.png/p.csv"}, "no folder that may be written"),
        ({"--input": "good.csv", "--output": "good.csv"}, "is the list given as --input"),
        ({"--heatmaps": "丙.png"}, "is a file"),
        ({"--heatmaps": "pictures"}, "lies in --input"),
        ({"--output": "m.csv", "--heatmaps": "m.csv"}, "stands where --output will be a file"),
        ({"--output": "m.csv", "--heatmaps": "empty/../m.csv/maps"}, "stands where --output will be a file"),
        ({"--heatmaps": "full", "--input": "empty.txt"}, "is not empty"),
        ({"--class-texts-file": "nowhere.json"}, "does not exist"),
        ({"--class-texts-file": "one.json"}, "at least two"),
        ({"--class-texts-file": "same.json"}, "share the sentence"),
        ({"--class-texts-file": "hollow.json"}, "empty sentence"),
        ({"--gpu-id": "99"}, "--gpu-id 99 does not exist"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(change, message, folds, pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "full" / "checkpoint_best.pth").touch()
    pictures = pictures.rename(tmp_path / "pictures")
    shutil.copy(pictures / "丙.png", tmp_path)
    for name, content in {
        "empty.txt": "\n \n",
        "empty.csv": "path\n",
        "no_path.csv": "Path,x\na,b\n",
        "hole.csv": "path,n\na,1\n,2\n",
        "exists.csv": "",
        "good.csv": "path\n丙.png\n",
        "one.json": '{"a": "b"}',
        "same.json": '{"a": "x", "b": "x"}',
        "hollow.json": '{"a": "x", "b": " "}',
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "gbk.txt").write_bytes("肺炎.png".encode("gbk"))
    os.mkfifo(tmp_path / "pipe")
    options = {"--checkpoint": folds / "fold_1", "--input": pictures, "--output": tmp_path / "p.csv"}
    for flag, value in change.items():
        options[flag] = value if flag == "--gpu-id" else tmp_path / value
    before = sorted(tmp_path.rglob("*"))
    assert main([str(word) for pair in options.items() for word in pair]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_models_of_other_classes_do_not_mix(folds, class_folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(class_folder, data)
    (data / "气胸").rename(data / "积液")
    other = train(data, tmp_path / "other")
    assert predict([folds, other], class_folder, tmp_path / "p.csv") == 2
    error = capsys.readouterr().err
    assert re.search(r"only \S+.* has 气胸", error) and re.search(r"only \S+other\S+ has 积液", error)


def test_a_checkpoint_given_twice_counts_once(folds, class_folder, tmp_path, capsys):
    twice = [folds / "fold_1", folds / "fold_1" / "checkpoint_latest.pth"]
    assert predict(twice, class_folder, tmp_path / "p.csv") == 0
    assert "1 checkpoint is given twice" in capsys.readouterr().out
    assert {row["spread"] for row in rows_of(tmp_path / "p.csv")} == {""}


def test_an_interrupted_prediction_leaves_the_old_file(folds, class_folder, tmp_path, monkeypatch):
    import evaluation.predict as module

    output = tmp_path / "p.csv"
    assert predict(folds / "fold_1", class_folder, output) == 0
    before = output.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_rows", interrupted)
    assert predict(folds / "fold_1", class_folder, output, "--overwrite") == 130
    assert output.read_bytes() == before and sorted(tmp_path.iterdir()) == [output]


def test_help_imports_nothing_heavy():
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-X", "importtime", "predict_clip.py", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "--heatmaps" in done.stdout
    assert not re.search(r"\| +(torch|timm|transformers|sklearn|numpy)$", done.stderr, re.MULTILINE)


def test_no_batch_is_kept_so_memory_does_not_grow(folds, class_folder, tmp_path, monkeypatch):
    import evaluation.predict as module

    rows, pixels, alive = module._rows, [], []

    def watched(batch, *arguments):
        alive.append(sum(reference() is not None for reference in pixels))
        pixels.append(weakref.ref(batch.images[32]))
        return rows(batch, *arguments)

    monkeypatch.setattr(module, "_rows", watched)
    assert predict(folds / "fold_1", class_folder, tmp_path / "p.csv", "--batch-size", 4) == 0
    assert len(alive) == 18 and max(alive) <= 1


def test_the_precision_is_the_one_the_model_was_validated_in(
    folds, class_folder, tmp_path, monkeypatch, capsys
):
    import common.device

    monkeypatch.setattr(common.device, "_cpu_has_bf16", lambda: True)
    checkpoint = read_checkpoint(folds / "fold_1" / "checkpoint_latest.pth")
    assert predict(folds / "fold_1", class_folder / "肺炎", tmp_path / "a.csv") == 0  # trained with --no-amp
    assert "float32" in capsys.readouterr().out
    checkpoint["config"]["use_amp"] = True
    write_file(tmp_path / "amp.pth", checkpoint)
    assert predict(tmp_path / "amp.pth", class_folder / "肺炎", tmp_path / "b.csv") == 0
    assert "bfloat16" in capsys.readouterr().out
    assert predict(tmp_path / "amp.pth", class_folder / "肺炎", tmp_path / "c.csv", "--no-amp") == 0
    assert "float32" in capsys.readouterr().out
    a, b, c = (rows_of(tmp_path / f"{name}.csv") for name in "abc")
    assert a == c and a != b
