import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from quick import a_checkpoint

from benchmarks import pointing_game
from benchmarks.pointing_game import Lesion, distance, held_out, interval, main, play, read_lesions, table
from common.errors import UserError
from common.files import read_json
from data.demo import make_demo
from data.images import inspect_images
from data.scan import fingerprint, scan_folder
from evaluation.checkpoints import read_checkpoint, write_file
from models.clip import build_clip

LESION = Lesion("肺炎/P001_1.png", "肺炎", "P001", (0.1, 0.2, 0.4, 0.45))


def cells(side, at=None):
    values = np.full((side, side), 0.2 if at else 0.0)
    if at:
        values[at] = 0.9
    return values


def test_distance_is_that_to_the_nearest_point_of_the_box():
    box = (0.2, 0.3, 0.5, 0.6)
    assert distance(0.3, 0.4, box) == distance(0.2, 0.6, box) == 0
    assert distance(0.1, 0.4, box) == pytest.approx(0.1)
    assert distance(0.53, 0.64, box) == pytest.approx(0.05)


def test_a_peak_counts_inside_the_box_or_near_it():
    # the cells of a 4 x 4 map have their middles at 0.125, 0.375, 0.625, 0.875
    assert play(cells(4, (1, 1)), LESION, True).peak == (1, 1)
    assert play(cells(4, (1, 0)), LESION, True).peak == (1, 1)
    assert play(cells(4, (0, 1)), LESION, True).peak == (0, 0)  # 0.075 above
    near = dataclasses.replace(LESION, box=(0.1, 0.15, 0.4, 0.35))
    assert play(cells(4, (1, 1)), near, True).peak == (0, 1)  # 0.025 below
    assert play(cells(4), LESION, True).peak == (0, 0)  # an empty map has no peak, not one in the first cell
    assert play(cells(4), dataclasses.replace(LESION, box=(0, 0, 1, 1)), True).peak == (0, 0)


def test_the_yardsticks():
    game = play(cells(4, (0, 0)), LESION, True)
    assert game.chance[0] == pytest.approx(0.3 * 0.25, abs=0.005)
    dilated = 0.3 * 0.25 + 2 * 0.03 * (0.3 + 0.25) + np.pi * 0.03**2
    assert game.chance[1] == pytest.approx(dilated, abs=0.005)
    assert game.centre == (0, 0) and game.best_possible == (1, 1)
    small = dataclasses.replace(LESION, box=(0.45, 0.45, 0.52, 0.52))
    game = play(cells(4, (1, 1)), small, True)
    assert game.centre == (1, 1) and game.best_possible == (0, 0)  # no cell's middle is in that box


def test_boxes_become_shares_of_the_image(tmp_path):
    (tmp_path / "肺炎").mkdir()
    Image.new("L", (200, 100)).save(tmp_path / "肺炎" / "a.png")
    lines = "path,label,group,x0,y0,x1,y1\n肺炎/a.png,肺炎,P1,20,20,80,45\n正常/b.png,正常,P2,,,,\n"
    (tmp_path / "lesions.csv").write_text(lines, "utf-8-sig")
    assert read_lesions(tmp_path) == [Lesion("肺炎/a.png", "肺炎", "P1", (0.1, 0.2, 0.4, 0.45))]
    with pytest.raises(UserError, match=r"no lesions\.csv"):
        read_lesions(tmp_path / "肺炎")


def test_the_table_counts_by_class_and_only_the_rightly_classified():
    other = dataclasses.replace(LESION, label="结节", patient="P002")
    games = [
        play(cells(4, (1, 1)), LESION, True),
        play(cells(4, (3, 3)), LESION, False),
        play(cells(4, (3, 3)), other, False),
    ]
    _, _, pneumonia, nodule, every = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table([("resnet18", "我的", games)]).splitlines()
    )
    assert pneumonia[:6] == ["resnet18", "我的", "肺炎", "2", "1/2 (50%)", "1/2 (50%)"]
    assert pneumonia[9:] == ["1/1 (100%)", "1/1 (100%)"] and nodule[9:] == ["none", "none"]
    assert every[2:4] == ["all", "3"] and every[4].startswith("1/3 (33%)") and every[9] == "1/1 (100%)"


def test_the_interval_draws_patients_not_images():
    def games(patients):
        hits = [play(cells(4, (1, 1) if i % 2 else (3, 3)), LESION, True) for i in patients]
        return [
            dataclasses.replace(g, lesion=dataclasses.replace(LESION, patient=str(i)))
            for g, i in zip(hits, patients, strict=True)
        ]

    def width(text):
        low, high = (int(word.strip("% ,")) for word in text.split(" to "))
        return high - low

    assert width(interval(games([*range(4)] * 10))) > 2 * width(interval(games(range(40))))
    assert interval(games([1, 3, 5])) == ""  # nothing varies


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo") / "set", patients=24, size=128)


@pytest.fixture
def run(demo, tmp_path):
    """What a run leaves behind, with random weights: the last 9 patients' images validate."""
    folder = scan_folder(demo)
    found = fingerprint(folder, inspect_images(folder.files(), 32).digests)
    torch.manual_seed(0)
    options = {"img_size": 64, "embed_dim": 16, "temperature": 0.1, "image_weights": "none"}
    model = build_clip("resnet18", None, **options)
    features, config = torch.eye(16)[: len(folder.classes)], {"img_size": 64, "embed_dim": 16}
    checkpoint = a_checkpoint(folder.classes, features, model.state_dict(), config, dataset_fingerprint=found)
    val = [path for path in folder.paths if path.split("/")[1] >= "P016"]
    train = [path for path in folder.paths if path not in val]
    write_run(tmp_path / "run", checkpoint, found, [{"train": train, "val": val}])
    return tmp_path / "run"


def write_run(folder, checkpoint, found, folds):
    folder.mkdir()
    write_file(folder / "checkpoint_latest.pth", checkpoint)
    (folder / "splits.json").write_text(json.dumps({"dataset_fingerprint": found, "folds": folds}), "utf-8")


def test_a_run_is_played_on_its_own_validation_images(demo, run, capsys, monkeypatch):
    with open(run / "splits.json", "a") as file:
        file.write(" " * 10**6)
    monkeypatch.setattr(read_json, "__defaults__", (10**6,))  # splits may be larger than other files
    assert main(["--checkpoint", str(run), "--data-dir", str(demo)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (fold,) = json.loads((run / "splits.json").read_text("utf-8"))["folds"]
    with_lesion = [path for path in fold["val"] if not path.startswith("正常")]
    every = next(line for line in lines if "| all |" in line)
    assert f"| resnet18 | run | all | {len(with_lesion)} |" in every
    assert {line.split("|")[3].strip() for line in lines[2:6]} == {"肺炎", "气胸", "肺结节", "all"}


def test_each_fold_is_played_on_its_own_images(demo, run, tmp_path):
    record = json.loads((run / "splits.json").read_text("utf-8"))
    (first,) = record["folds"]
    folds = [first, {"train": first["val"], "val": first["train"]}]
    checkpoint = read_checkpoint(run / "checkpoint_latest.pth")
    write_run(tmp_path / "cv", checkpoint, record["dataset_fingerprint"], folds)
    (tmp_path / "cv" / "checkpoint_latest.pth").unlink()
    (tmp_path / "cv" / "cv_summary.json").write_text("{}")
    for number in (1, 2):
        folder = tmp_path / "cv" / f"fold_{number}"
        folder.mkdir()
        write_file(folder / "checkpoint_latest.pth", checkpoint)
        (folder / "predictions.csv").write_text("")
    lesions = read_lesions(demo)
    _, _, games = pointing_game.play_run(tmp_path / "cv", demo, lesions)
    assert sorted(game.lesion.path for game in games) == sorted(lesion.path for lesion in lesions)
    facts = {"dataset_fingerprint": record["dataset_fingerprint"]}
    second = tmp_path / "cv" / "fold_2" / "checkpoint_latest.pth"
    assert held_out(second, facts, facts["dataset_fingerprint"], demo) == set(first["train"])


def test_another_set_of_images_is_refused(run, tmp_path, capsys):
    other = make_demo(tmp_path / "other", patients=24, size=128, seed=7)
    assert main(["--checkpoint", str(run), "--data-dir", str(other)]) == 2
    assert "was not trained on the images of" in capsys.readouterr().err
    assert main(["--checkpoint", str(run)]) == 2
