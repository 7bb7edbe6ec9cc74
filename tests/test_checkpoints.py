"""How an epoch's files are written: beside the next epoch, whole, the best one never behind the latest."""

import copy
import json
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from quick import train

from common.errors import RunFailed
from training import fit as fit_module
from training import state as state_module
from training.state import write_checkpoint


def checkpoint(epoch: int) -> dict:
    return {"epoch": epoch, "history": {"val_acc": [1.0] * epoch}, "model": torch.full((3,), float(epoch))}


def leaves(value, name="") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, own in value.items():
            yield from leaves(own, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, own in enumerate(value):
            yield from leaves(own, f"{name}.{i}")
    else:
        yield name, value


def epochs_in(folder) -> dict[str, int]:
    names = ("checkpoint_latest.pth", "checkpoint_best.pth")
    return {name: torch.load(folder / name, weights_only=True)["epoch"] for name in names}


@pytest.mark.parametrize("links", [True, False])
def test_the_best_stays_when_the_latest_is_replaced(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError(95, "no links here")))
    for epoch, is_best in ((1, True), (2, False), (3, True), (4, False)):
        write_checkpoint(tmp_path, checkpoint(epoch), is_best)
        best = epoch if is_best else epoch - 1
        assert epochs_in(tmp_path) == {"checkpoint_latest.pth": epoch, "checkpoint_best.pth": best}
        assert len(json.loads((tmp_path / "history.json").read_text())["val_acc"]) == epoch
    assert len(list(tmp_path.iterdir())) == 3  # nothing temporary is left


def test_killed_between_the_two_the_best_is_the_newer(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, checkpoint(1), True)
    replace = os.replace

    def killed(source, target):
        if target.name == "checkpoint_latest.pth":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, checkpoint(2), True)
    assert epochs_in(tmp_path) == {"checkpoint_latest.pth": 1, "checkpoint_best.pth": 2}


def test_what_is_written_is_the_moment_it_was_taken(quick_report, class_folder, tmp_path, monkeypatch):
    """Training goes on while a checkpoint is written; a slow disk must not mix two epochs."""
    taken, epoch_two, one_epoch = [], threading.Event(), fit_module.train_one_epoch

    def noting(state, *args, **options):
        row = one_epoch(state, *args, **options)
        if state.epoch == 1:
            epoch_two.set()
        return row

    def slow(folder, now, is_best):
        before = copy.deepcopy(now)
        taken.append(before)
        assert epoch_two.wait(60)  # the first is not written before the second epoch is over
        for (name, value), (_, old) in zip(leaves(now), leaves(before), strict=True):
            assert torch.equal(value, old) if isinstance(value, torch.Tensor) else value == old, name
        write_checkpoint(folder, now, is_best)

    monkeypatch.setattr(state_module, "write_checkpoint", slow)
    monkeypatch.setattr(fit_module, "train_one_epoch", noting)
    assert train(class_folder, tmp_path / "out", "--epochs", 2) == 0
    stored = torch.load(tmp_path / "out" / "checkpoint_latest.pth", weights_only=True)
    assert stored["epoch"] == 2 and len(taken) == 2
    for part in ("model", "optimizer"):
        first, second, in_file = (dict(leaves(one[part])) for one in (*taken, stored))
        tensors = [name for name, value in second.items() if isinstance(value, torch.Tensor)]
        assert all(torch.equal(in_file[name], second[name]) for name in tensors)
        assert any(not torch.equal(first[name], second[name]) for name in tensors)


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_disk_that_fills_ends_the_run_and_leaves_the_last_good_files(
    quick_report, class_folder, tmp_path, monkeypatch, capsys, epochs
):
    save, calls = torch.save, []

    def full_after_one(*args, **options):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return save(*args, **options)

    monkeypatch.setattr(state_module.torch, "save", full_after_one)
    assert train(class_folder, tmp_path / "out", "--epochs", epochs) == 1  # also where it is the last epoch's
    assert "No space left on device" in capsys.readouterr().err
    assert epochs_in(tmp_path / "out") == {"checkpoint_latest.pth": 1, "checkpoint_best.pth": 1}
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_a_failed_write_is_said_also_when_training_fails_meanwhile(
    quick_report, class_folder, tmp_path, monkeypatch, capsys
):
    one_epoch = fit_module.train_one_epoch

    def failing(state, *args, **options):
        if state.epoch == 1:
            raise RunFailed("the loss is not finite")
        return one_epoch(state, *args, **options)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fit_module, "train_one_epoch", failing)
    monkeypatch.setattr(state_module.torch, "save", full)
    assert train(class_folder, tmp_path / "out", "--epochs", 3) == 1
    assert "No space left on device" in capsys.readouterr().err
