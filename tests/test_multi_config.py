"""Several configurations in one command: what is typed and what the file says, the leaderboard, failures."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from quick import quick_clip

import training.begin as begin
from common.errors import UserError
from train_clip import main
from training.cross_validation import METRICS
from training.leaderboard import print_leaderboard
from training.multi_config import read_entries
from training.options import make_config

pytestmark = pytest.mark.usefixtures("quick_report")


def typed_for(entries, folder):
    """The options that have `entries` trained from a file in `folder`."""
    file = folder / "c.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    out = str(folder / "out")
    return {"data_dir": "d", "output_dir": out, "multi_config": True, "config_file": str(file)}


def test_a_typed_preset_wins_over_the_file(tmp_path, capsys):
    """As typed options do; a preset in the file does not win over what its own entry says."""
    own = {"augmentation": "standard", "epochs": 3, "logit_adjustment": True}
    entries = [own, {"preset": "small-data", "cutmix_prob": 1}, {}]
    typed = typed_for(entries, tmp_path)
    plain = [entry.config for entry in read_entries(make_config(typed), typed)]
    assert [c.augmentation for c in plain] == ["standard", "minimal", "standard"]
    assert [c.cutmix_prob for c in plain] == [0, 1, 0] and capsys.readouterr().out == ""

    typed |= {"preset": "small-data", "logit_adjustment": False}
    configs = [entry.config for entry in read_entries(make_config(typed), typed)]
    for config in configs:
        found = (config.augmentation, config.cutmix_prob, config.logit_adjustment)
        assert found == ("minimal", 0.5, False)
    assert configs[0].epochs == 3
    assert capsys.readouterr().out.splitlines() == [
        f"note: {typed} on the command line wins over {own} in the file"
        for typed, own in (
            ("--augmentation minimal by --preset small-data", "'standard'"),
            ("without --logit-adjustment", "true"),
            ("--cutmix-prob 0.5 by --preset small-data", "1"),
        )
    ]


def test_an_entry_that_several_processes_cannot_train_is_refused_with_its_number(tmp_path, monkeypatch):
    entries = [{"batch_size": 2}, {"compile": True}, {"preset": "small-data", "batch_size": 3}]
    typed = typed_for(entries, tmp_path)
    monkeypatch.setattr(begin, "n_processes", lambda: 2)
    with pytest.raises(UserError) as refused:
        read_entries(make_config(typed), typed)
    second, third = refused.value.problems
    assert "entry 2: --compile was never tried with several processes" in second
    assert "entry 3: --cutmix-prob of --preset small-data pairs images within a process" in third


def test_weights_and_gpus_of_an_entry_are_missed_before_any_is_trained(tmp_path):
    entries = [{"image_weights": "no.pth"}, {"name": "done", "text_weights": "no", "gpu_id": 999}]
    typed = typed_for(entries, tmp_path)
    with pytest.raises(UserError) as refused:
        read_entries(make_config(typed), typed)
    first, *second = refused.value.problems
    assert "entry 1: --image-weights no.pth does not exist" in first
    assert "entry 2: --text-weights no does not exist" in second[0]
    assert "entry 2: --gpu-id 999 does not exist" in second[1]
    (tmp_path / "out" / "02_done").mkdir(parents=True)
    (tmp_path / "out" / "02_done" / "report.html").touch()  # so its weights are not read again
    with pytest.raises(UserError) as refused:
        read_entries(make_config(typed), typed)
    assert refused.value.problems == (first,)
    typed["overwrite"] = True
    with pytest.raises(UserError) as refused:
        read_entries(make_config(typed), typed)
    assert refused.value.problems == (first, *second)


@pytest.mark.parametrize(
    ("n_images", "entries", "said"),
    [
        (1, [{"val_dir": "v"}, {}, {"epochs": 2}], "entry 2, 3: every class needs at least 2 images"),
        (3, [{"group_pattern": r"^(X)"}, {}], "entry 1: --group-pattern '^(X)' matches no patient in 6 of 6"),
        (3, [{}, {"group_pattern": r"^(P)"}], "entry 2: to split by patient every class needs at least 2"),
        (3, [{"val_dir": "v", "group_pattern": r"^(P)"}, {"groups_file": "c.json"}], "entry 2: --groups"),
        (3, [{"use_cv": True, "n_splits": 3}, {"use_cv": True}], "entry 2: 5 folds need at least 5 images"),
        (3, [{"use_cv": True, "n_splits": 2, "group_pattern": r"^(P\d)"},
             {"use_cv": True, "n_splits": 3, "group_pattern": r"^(P\d+)_"}],
         "entry 1: to split by patient every class needs at least 2 patients"),
        (3, 2 * [{"image_encoder_name": "resnt18"}], "--config-file c.json, entry 1, 2: unknown"),
    ],
)  # fmt: skip
def test_what_the_names_of_images_show_is_refused_before_any_entry_is_trained(
    tmp_path, monkeypatch, capsys, n_images, entries, said
):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path("d", name).mkdir(parents=True)
        for i in range(n_images):
            Path("d", name, f"P1{i}_.png").touch()
    typed_for(entries, tmp_path)
    assert main(["--data-dir", "d", "--output-dir", "o", "--multi-config", "--config-file", "c.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("error: ") == 1
    assert not Path("o").exists()


def test_a_pipe_that_an_entry_names_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    typed = typed_for([{"class_texts_file": str(pipe)}, {}, {"groups_file": str(pipe)}], tmp_path)
    with pytest.raises(UserError) as refused:
        read_entries(make_config(typed), typed)
    first, third = refused.value.problems
    assert f"entry 1: --class-texts-file {pipe} is a pipe" in first
    assert f"entry 3: --groups-file {pipe} is a pipe" in third


def test_several_configurations_rank_the_good_report_the_broken_and_skip_the_finished(
    class_folder, tmp_path, capsys
):
    entries = [
        {
            "name": "坏 / 的",
            "img_size": 40,
            "image_encoder_name": "starnet_dual_pyramid_rcf",
            "use_cv": False,
            "n_splits": 5,
            "epochs": 1,
        },
        {
            "image_encoder_name": "timm:test_resnet",
            "epochs": 1,
            "preset": "small-data",
            "augmentation": "standard",  # the default, and not the preset's
            "cutmix_prob": 1,
        },
        {"image_encoder_name": "timm:test_resnet", "epochs": 1, "use_cv": True, "n_splits": 2},
    ]
    (tmp_path / "c.json").write_text(json.dumps(entries), encoding="utf-8")
    flags = "--image-weights none --text-encoder bert-tiny-bytes --embed-dim 16 --num-workers 0 --img-size 32"
    command = ["--data-dir", str(class_folder), "--output-dir", str(tmp_path / "out"), "--multi-config",
               "--config-file", str(tmp_path / "c.json"), *flags.split()]  # fmt: skip
    assert main([*command, "--image-encoder", "nothing"]) == 2  # a typed flag wins; refused before any starts
    capsys.readouterr()
    os.mkfifo(tmp_path / "texts.json")
    assert main([*command, "--class-texts-file", str(tmp_path / "texts.json")]) == 2
    assert "is a pipe, which can be read only once" in capsys.readouterr().err
    assert main(command) == 0  # the typed --img-size 32 wins over the broken entry's 40
    assert "--img-size 32 on the command line wins over 40" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out" / "01_坏-的")

    command = command[:-2]
    entries[1] |= {"img_size": 32}
    entries[2] |= {"img_size": 32, "image_encoder_name": "timm:test_resnext"}
    (tmp_path / "c.json").write_text(json.dumps(entries), encoding="utf-8")
    assert main(command) == 2  # before any starts
    error = capsys.readouterr().err
    assert re.search(r"entry 1: --img-size 40: .* needs a multiple of 32", error)
    assert re.search("entry 3: timm knows no model 'test_resnext' .did you mean 'test_resnet'", error)

    (tmp_path / "damaged.pth").touch()
    entries[0] |= {"img_size": 32, "text_weights": str(tmp_path / "damaged.pth")}
    entries[2] |= {"image_encoder_name": "timm:test_resnet"}
    (tmp_path / "c.json").write_text(json.dumps(entries), encoding="utf-8")
    assert main(command) == 1
    output = capsys.readouterr().out
    assert output.count("finished already") == 2 and "cannot be read as weights" in output
    assert "last epoch, mean ± sample standard deviation over folds, percent" in output
    board = json.loads((tmp_path / "out" / "leaderboard.json").read_text("utf-8"))
    assert [row["status"] for row in board] == ["finished", "finished", "failed"]
    assert [row["rank"] for row in board] == [1, 2, None]
    by_entry = {row["entry"]: row for row in board}
    used = json.loads((tmp_path / "out" / by_entry[2]["folder"] / "config.json").read_text("utf-8"))
    assert (used["logit_adjustment"], used["cutmix_prob"]) == (True, 1)  # by the preset; by the entry itself
    recipe = {"preset", "augmentation", "logit_adjustment", "cutmix_prob"}
    assert recipe <= set(used["changed_options"]) and "weight_decay" not in used["changed_options"]
    assert by_entry[2]["folds"] == 1 and by_entry[2]["val_acc_std_sample"] is None
    summary = json.loads((tmp_path / "out" / by_entry[3]["folder"] / "cv_summary.json").read_text("utf-8"))
    assert by_entry[3]["val_acc_mean"] == pytest.approx(summary["last_epoch"]["val_acc"]["mean"])
    expected = sum(p.numel() for p in quick_clip().parameters()) / 1e6
    assert by_entry[2]["million_parameters"] == pytest.approx(expected)


def test_the_leaderboard_says_that_seconds_are_no_zero_minutes_and_an_error_s_whole_first_line(capsys):
    row = {f"{key}_{part}": None for key in METRICS for part in ("mean", "std_sample")}
    row |= {"rank": 1, "status": "finished", "folder": "01", "against_first": "first", "images_per_second": 9}
    row |= {f"{key}_mean": 50 for key in METRICS} | {"million_parameters": 1}
    failed = [row | {"status": "failed", "error": error} for error in ("x" * 500, "y\n  z")]
    print_leaderboard([{**row, "minutes": 0.04}, {**row, "minutes": 0.06}, *failed], Path("out"))
    _, *lines, long, short, _, _ = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[-3] for line in lines[1:]] == ["<0.1", "0.1"]
    assert [long.split()[-1], short.split()[-1]] == ["x" * 500, "y"]
    print_leaderboard([{**row, "minutes": 1}, *failed], Path("out"))
    assert "noise" not in capsys.readouterr().out  # there is nothing to compare
