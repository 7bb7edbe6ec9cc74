"""A run that was stopped goes on: with which options, and what is refused."""

import contextlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from quick import Killed, history_of, quick_clip, raising_at, train

import training.fit as fit_module
from common.errors import UserError
from evaluation.checkpoints import read_checkpoint
from models.text_encoders import TextTower
from train_clip import main
from training import state as state_module
from training.options import make_config
from training.resume import config_of_resumed_run
from training.state import EarlyStopping

pytestmark = pytest.mark.usefixtures("quick_report")


@pytest.mark.parametrize(
    "flags",
    [
        ["--image-encoder", "starnet_dual_pyramid_rcf", "--num-workers", 2],  # random depth, loader processes
        ["--freeze-text-encoder", "--augmentation", "minimal"],
    ],
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(class_folder, tmp_path, monkeypatch, flags):
    flags = ["--epochs", 3, "--text-template", "一张{class_name}", *flags]
    assert train(class_folder, tmp_path / "whole", *flags) == 0

    killed_in_the_second_epoch, _ = raising_at(2, fit_module.validate)
    monkeypatch.setattr(fit_module, "validate", killed_in_the_second_epoch)
    with pytest.raises(Killed):
        train(class_folder, tmp_path / "cut", *flags)
    monkeypatch.undo()
    torch.manual_seed(999)  # a new process starts elsewhere in the random stream
    (tmp_path / "cut" / "history.json").unlink()  # as if killed between checkpoint and history
    latest = tmp_path / "cut" / "checkpoint_latest.pth"
    assert train(class_folder, tmp_path / "cut", *flags, "--resume-from", latest) == 0

    whole, cut = (read_checkpoint(tmp_path / name / "checkpoint_latest.pth") for name in ("whole", "cut"))
    assert all(torch.equal(whole["model"][name], cut["model"][name]) for name in whole["model"])
    timing = {"epoch_seconds", "images_per_second"}
    assert {k: v for k, v in whole["history"].items() if k not in timing} == {
        k: v for k, v in cut["history"].items() if k not in timing
    }
    assert whole["best"] == cut["best"] and whole["early_stopping"] == cut["early_stopping"]


def all_tokens_trained(monkeypatch):
    monkeypatch.setattr(TextTower, "train_only", lambda tower, tokens: None)


def test_a_run_that_trained_the_embeddings_of_all_tokens_goes_on(class_folder, tmp_path, monkeypatch):
    """As before format 5."""
    flags = ["--epochs", 2, "--weight-decay", 0.1]
    assert train(class_folder, tmp_path / "whole", *flags) == 0

    killed_in_the_second_epoch, _ = raising_at(2, fit_module.validate)
    with monkeypatch.context() as before:
        before.setattr(fit_module, "validate", killed_in_the_second_epoch)
        all_tokens_trained(before)
        before.setattr(state_module, "FORMAT", 4)
        with pytest.raises(Killed):
            train(class_folder, tmp_path / "cut", *flags)
    latest = tmp_path / "cut" / "checkpoint_latest.pth"
    state = torch.load(latest, weights_only=True)["optimizer"]["state"]
    assert (384, 128) in [own["exp_avg"].shape for own in state.values()]
    assert train(class_folder, tmp_path / "cut", *flags, "--resume-from", latest) == 0
    for key in ("train_loss", "val_loss"):
        assert history_of(tmp_path / "cut")[key] == pytest.approx(history_of(tmp_path / "whole")[key], 1e-5)


def one_token_replaced(monkeypatch):
    tokenize = TextTower.tokenize

    def another(tower, sentences):
        tokens, notes = tokenize(tower, sentences)
        return {**tokens, "input_ids": tokens["input_ids"].where(tokens["input_ids"] != 1, 2)}, notes

    monkeypatch.setattr(TextTower, "tokenize", another)


@pytest.mark.parametrize("change", [one_token_replaced, all_tokens_trained])
def test_an_optimizer_of_other_tokens_is_refused(class_folder, tmp_path, monkeypatch, capsys, change):
    """And the other way about."""
    out = tmp_path / "run"
    assert train(class_folder, out, "--epochs", 1) == 0
    with monkeypatch.context() as changed:
        change(changed)
        resumed = ["--epochs", 2, "--resume-from", out / "checkpoint_latest.pth"]
        assert train(class_folder, out, *resumed) == 2
        assert "had other tokens" in capsys.readouterr().err
        assert train(class_folder, out, "--epochs", 1, "--overwrite") == 0
    assert train(class_folder, out, *resumed) == 2
    assert "had other tokens" in capsys.readouterr().err


def test_resuming_takes_untyped_options_from_the_checkpoint(finished, class_folder, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    latest = copy / "checkpoint_latest.pth"
    code = main(
        [
            "--data-dir",
            str(class_folder),
            "--output-dir",
            str(copy),
            "--resume-from",
            str(latest),
            "--epochs",
            "5",
        ]
    )
    assert code == 0 and len(history_of(copy)["val_acc"]) == 5
    assert "--epochs 4 -> 5" in capsys.readouterr().out
    assert history_of(copy)["val_acc"][:4] == history_of(finished)["val_acc"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"random_state": 7}, "--random-state 7 does not fit.*which was trained with 0"),
        ({"preset": "small-data"}, "--preset small-data does not fit.*which was trained without it"),
        ({"freeze_text_encoder": True}, "^--freeze-text-encoder does not fit.*which was trained without it"),
        ({"freeze_image_encoder": False}, "^without --freeze-image-encoder does not.*was trained with it"),
        ({"logit_adjustment_tau": 0.5}, "tau 0.5 has no effect without --logit-adjustment"),
    ],
)
def test_what_a_resumed_run_cannot_take_is_refused(finished, typed, said):
    checkpoint = torch.load(finished / "checkpoint_latest.pth", weights_only=True)
    checkpoint["config"] |= {"random_state": 0, "freeze_image_encoder": "freeze_image_encoder" in typed}
    needed = {"data_dir": "d", "output_dir": "o", "resume_from": "latest.pth"}
    with pytest.raises(UserError, match=said):
        config_of_resumed_run(make_config({**needed, **typed}), checkpoint, typed)


@pytest.mark.parametrize(
    ("stopped_early", "typed", "said"),
    [
        (False, {"early_stopping_patience": 1}, "so --early-stopping-patience 1 would.*more --epochs and a"),
        (False, {"loss": "ce", "batch_size": 16, "augmentation": "none"},
         "end, so --loss ce, --augmentation none would change nothing .* leave them out, or give more --epo"),
        (False, {"early_stopping_patience": 9}, "so --early-stopping-patience 9 would change nothing"),
        (False, {"loss": "ce", "epochs": 5}, None),
        (False, {"batch_size": 8, "use_amp": True}, "so --batch-size 8, .* would change nothing"),
        (False, {"save_best": False, "num_workers": 3, "n_splits": 3}, None),
        (True, {"epochs": 9, "loss": "ce"}, "so --epochs 9, --loss ce would.*give a larger --early-"),
        (True, {"early_stopping_patience": 1}, "so --early-stopping-patience 1 would change nothing"),
        (True, {"epochs": 9, "loss": "ce", "early_stopping_patience": 3}, None),
    ],
)  # fmt: skip
def test_options_of_training_are_refused_where_nothing_is_left_to_train(
    finished, capsys, stopped_early, typed, said
):
    checkpoint = torch.load(finished / "checkpoint_latest.pth", weights_only=True)
    checkpoint["early_stopping"]["epochs_without"] = 2
    if stopped_early:
        checkpoint["config"] |= {"epochs": 8, "early_stopping_patience": 2}
    needed = {"data_dir": "d", "output_dir": "o", "resume_from": "latest.pth"}
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        config_of_resumed_run(make_config({**needed, **typed}), checkpoint, typed)
    assert ("resuming with changed" in capsys.readouterr().out) is (said is None)


def test_options_that_a_checkpoint_of_an_earlier_version_lacks_were_the_defaults(finished, capsys):
    checkpoint = torch.load(finished / "checkpoint_latest.pth", weights_only=True)
    needed = {"data_dir": "d", "output_dir": "o", "resume_from": "latest.pth"}
    checkpoint["epoch"] = 3  # at its end options of training are refused
    typed = {"embed_dim": 512, "loss": "unicl", "grad_clip": 2.0, "use_amp": False, "save_best": False}
    checkpoint["config"] = {n: v for n, v in checkpoint["config"].items() if n not in typed}
    config = config_of_resumed_run(make_config({**needed, **typed}), checkpoint, typed)
    changes = "--grad-clip 1.0 -> 2.0, --no-amp not given -> given, --no-save-best not given -> given"
    assert f"resuming with changed options: {changes}\n" in capsys.readouterr().out
    assert (config.embed_dim, config.grad_clip, config.use_amp) == (512, 2.0, False)


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no checkpoint of this program"):
        read_checkpoint(tmp_path / "x.pth")


def test_learning_rate_typed_on_resume_is_used(finished, class_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    latest = copy / "checkpoint_latest.pth"
    flags = ["--epochs", 6, "--learning-rate", 1e-5, "--warmup-epochs", 0, "--resume-from", latest]
    assert train(class_folder, copy, *flags) == 0
    # half a cosine over 24 steps, new layers at ten times the typed rate, read after step 20
    assert history_of(copy)["lr"][4] == pytest.approx(1e-4 * 0.5 * (1 + np.cos(np.pi * 19 / 24)))


def test_what_the_checkpoint_knows_is_not_refused_before_it_is_read(finished, class_folder, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    base = ["--data-dir", str(class_folder), "--output-dir", str(copy)]
    base += ["--resume-from", str(copy / "checkpoint_latest.pth")]
    assert main([*base, "--warmup-epochs", "4"]) == 2
    assert "--warmup-epochs 4 must be less than --epochs 4" in capsys.readouterr().err
    assert main([*base, "--group-pattern", r"^(P\d\d)"]) == 2
    out, error = capsys.readouterr()
    assert "resuming with changed options" not in out  # of what is then refused
    assert "the split differs" in error and "version began the run with an image in two formats" in error


def resume(run, data, *flags):
    latest = run / "checkpoint_latest.pth"
    return main(
        ["--data-dir", str(data), "--output-dir", str(run), "--resume-from", str(latest), *map(str, flags)]
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", 0.5],
        ["--image-weights", "pretrained"],
        ["--freeze-image-encoder"],
        ["--early-stopping-monitor", "val_loss"],
        ["--embed-dim", 8],
    ],
)
def test_options_that_cannot_change_in_mid_run_are_refused_and_nothing_is_written(
    finished, class_folder, tmp_path, capsys, flags
):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    assert resume(copy, class_folder, "--epochs", 5, *flags) == 2
    assert f"{flags[0]} " in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


def test_another_batch_size_on_resume_keeps_the_place_in_the_schedule(finished, class_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    assert resume(copy, class_folder, "--epochs", 8, "--batch-size", 32, "--warmup-epochs", 0) == 0
    # two steps an epoch: the last step of epoch 5 is the tenth of 16
    assert history_of(copy)["lr"][4] == pytest.approx(3e-3 * 0.5 * (1 + np.cos(np.pi * 9 / 16)))


def test_another_val_dir_on_resume_is_refused(class_folder, tmp_path, capsys):
    for k in (1, 2):
        for name in ("正常", "肺炎", "气胸"):
            (tmp_path / f"v{k}" / name).mkdir(parents=True)
            Image.new("L", (20, 20), 40 * k).save(tmp_path / f"v{k}" / name / "a.png")
    run = tmp_path / "run"
    assert train(class_folder, run, "--epochs", 1, "--val-dir", tmp_path / "v1") == 0
    assert resume(run, class_folder, "--epochs", 2, "--val-dir", tmp_path / "v2") == 2
    assert "have changed since" in capsys.readouterr().err


def test_a_run_without_a_scaler_can_be_resumed_with_one(finished):
    from training.state import TrainState

    checkpoint = read_checkpoint(finished / "checkpoint_latest.pth")
    assert checkpoint["scaler"] == {}
    model = quick_clip()
    optimizer = torch.optim.AdamW(model.parameters())
    of_the_model = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "trained_tokens": None}
    checkpoint |= of_the_model
    for group in optimizer.param_groups:
        group |= {"peak_lr": 1.0}
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    state = TrainState(model, optimizer, scaler, EarlyStopping("val_acc", None, 0.0), 4, 16, 1)
    state.restore(checkpoint, "x")
    assert (state.epoch, state.step) == (4, 16) and scaler.get_scale() == 2**16
    used = torch.amp.GradScaler("cpu", init_scale=8.0)  # a scaler begins anew at 65536 and finds its way down
    state.restore({**checkpoint, "scaler": used.state_dict()}, "x")
    assert scaler.get_scale() == 8
