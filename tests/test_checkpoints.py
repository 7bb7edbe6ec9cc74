"""How checkpoints are written and read: whole, checked, beside training, the best never behind the latest."""

import contextlib
import copy
import json
import os
import pickle
import re
import shutil
import signal
import struct
import threading
import weakref
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from quick import a_checkpoint, train

from common.checksum import checksum
from common.errors import RunFailed, UserError
from evaluation.checkpoints import FORMAT, NOT_FOR_USE, read_checkpoint, write_file
from evaluation.trained import load_trained
from models.text_encoders import build_text_tower
from training import fit as fit_module
from training import state as state_module
from training.resume import read_to_resume
from training.state import CheckpointWriter, TrainState, write_checkpoint

NAMES = ("checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_best.pth")


def checkpoint(epoch: int) -> dict:
    model, config = {"w": torch.full((3,), float(epoch))}, {"img_size": 32, "embed_dim": 4}
    history = {"val_acc": [1.0] * epoch}
    of_training = {name: {} for name in (*NOT_FOR_USE, "best")} | {"in_epoch": {"steps": 0}}
    features = torch.eye(4)[:2]
    return a_checkpoint("ab", features, model, config, epoch=epoch, history=history, **of_training)


def leaves(value, name="") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, own in value.items():
            yield from leaves(own, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, own in enumerate(value):
            yield from leaves(own, f"{name}.{i}")
    else:
        yield name, value


def epochs_in(folder) -> list[int | None]:
    """Of the latest, the one before and the best."""
    files = [folder / name for name in NAMES]
    return [read_checkpoint(file)["epoch"] if file.exists() else None for file in files]


@pytest.mark.parametrize("links", [True, False])
def test_the_best_and_the_one_before_stay_when_the_latest_is_replaced(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError(95, "no links here")))
    before = None
    for epoch, is_best in ((1, True), (2, False), (3, True), (4, False)):
        write_checkpoint(tmp_path, checkpoint(epoch), checkpoint(epoch) if is_best else None)
        best = epoch if is_best else epoch - 1
        assert epochs_in(tmp_path) == [epoch, before, best]
        assert len(json.loads((tmp_path / "history.json").read_text())["val_acc"]) == epoch
        before = epoch
    assert len(list(tmp_path.iterdir())) == 4  # nothing temporary is left


@pytest.mark.parametrize(
    ("killed_at", "best", "left"),
    [
        *((0, 2, [1, None, 1]), (1, 2, [1, None, 2]), (2, 2, [1, None, 2]), (3, 2, [1, 1, 2])),
        *((4, 2, [2, 1, 2]), (2, None, [1, 1, 1]), (3, None, [2, 1, None])),
    ],
)
def test_killed_between_two_files_each_is_whole_and_the_best_the_newer(
    tmp_path, monkeypatch, killed_at, best, left
):
    """Or, where a new best is not kept, the old one until the latest knows of it."""
    write_checkpoint(tmp_path, checkpoint(1), checkpoint(1))
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(target.name)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, checkpoint(2), checkpoint(best) if best else {})
    assert epochs_in(tmp_path) == left


def test_the_checksum_tells_any_two_contents_apart():
    base = {"a": torch.zeros(4), "b": [1, 2.0, "x", None, True], "c": {"d": torch.tensor(3)}}
    others = [
        base | {"a": torch.tensor([0, 0, 0, 1e-45])},
        base | {"a": torch.zeros(2, 2)},
        base | {"a": torch.zeros(4, dtype=torch.int32)},
        base | {"b": [1, 2.0, "x", None, 1]},
        base | {"b": [1, 2, "x", None, True]},
        base | {"b": (1, 2.0, "x", None, True)},
        base | {"c": {"e": torch.tensor(3)}},
        {**base, "z": None},
    ]
    sums = [checksum(one) for one in (base, *others)]
    assert len(set(sums)) == len(sums)
    # as the version that wrote format 3 computed it
    of_format_3 = {"format": 3, "model": {"w": torch.arange(6.0).reshape(2, 3)}, "epoch": 1}
    assert checksum(of_format_3) == "f1844596a862e085b1873b6117f0c6573d2bd9da761b297e5b2b04d1e442bd0c"
    numbers = torch.tensor([1.5, -2.0])
    content = b"dict2'format':4;'w':torch.float32(2,)" + struct.pack("<2f", 1.5, -2.0)
    assert checksum({"format": 4, "w": numbers}) == xxhash.xxh3_128_hexdigest(content)
    channels_last = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    assert checksum(copy.deepcopy(base)) == sums[0]
    assert checksum({"w": channels_last}) == checksum({"w": channels_last.contiguous()})


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def test_one_flipped_bit_of_the_weights_is_found(tmp_path):
    write_file(tmp_path / "c.pth", checkpoint(3) | {"model": {"w": torch.full((1000,), 1.2345)}})
    data = (tmp_path / "c.pth").read_bytes()
    middle = data.index(torch.full((1000,), 1.2345).numpy().tobytes()) + 2000
    (tmp_path / "c.pth").write_bytes(flipped(data, middle))
    assert torch.load(tmp_path / "c.pth", weights_only=True)["epoch"] == 3  # PyTorch does not see it
    with pytest.raises(UserError, match="its checksum is wrong"):
        read_checkpoint(tmp_path / "c.pth")


class Hostile:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['HOSTILE_MARK']}",)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    monkeypatch.setenv("HOSTILE_MARK", str(mark))
    torch.save({"format": FORMAT, "model": Hostile()}, tmp_path / "zip.pth")
    torch.save(
        {"format": FORMAT, "model": Hostile()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Hostile()))
    for name in ("zip", "old", "raw"):
        with pytest.raises(UserError, match="damaged or no checkpoint") as refused:
            read_checkpoint(tmp_path / f"{name}.pth")
        assert "weights_only" not in str(refused.value)  # PyTorch's advice to trust the file
    assert not mark.exists()


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    """A few kilobytes of zip can hold gigabytes of zeros."""
    torch.serialization.set_crc32_options(True)  # zipfile checks them
    torch.save(checkpoint(1), tmp_path / "c.pth")
    with (
        zipfile.ZipFile(tmp_path / "c.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, bytes(10**7) if name.endswith("data/0") else plain.read(name))
    with pytest.raises(UserError, match="compressed"):
        read_checkpoint(tmp_path / "bomb.pth")


def test_an_older_format_is_named(tmp_path):
    torch.save(checkpoint(1) | {"format": 2}, tmp_path / "old.pth")
    with pytest.raises(UserError, match=r"of format 2; this version reads 3, 4, 5 *\)"):
        read_checkpoint(tmp_path / "old.pth")


@pytest.mark.parametrize(
    "own",
    [
        {"config": {}}, {"config": {"img_size": 10**9}}, {"classes": 3}, {"classes": ["a", "a"]},
        {"class_texts": {"a": ["x"]}}, {"class_features": torch.eye(3)[:2]}, {"class_features": None},
        {"class_features": torch.eye(4)}, {"model": {"w": 3}}, {"frozen": ["a"]}, {"frozen": {"../x": "y"}},
        {"history": []}, {"epoch": "x"}, {"epoch": -1}, {"in_epoch": []}, {"in_epoch": {"steps": "many"}},
        {"pretrained": {}}, {"dataset_fingerprint": 3}, {"early_stopping": {"epochs_without": "x"}},
        {"changed_on_resume": [3]},
    ],
)  # fmt: skip
def test_a_strangers_checkpoint_of_another_form_is_refused(tmp_path, own):
    """Its checksum is right: anybody can compute that."""
    write_file(tmp_path / "c.pth", checkpoint(1) | own)
    (name,) = own
    with pytest.raises(UserError, match=rf"another form: .*{name}"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize(
    "own",
    [{"data_dir": "a\0b"}, {"data_dir": "a\ud800"}, {"val_dir": 5}, {"early_stopping_patience": "x"}],
)
def test_options_that_no_run_can_have_are_refused(tmp_path, own):
    content = checkpoint(1)
    config = content["config"] | {"temperature": 0.1, "use_amp": False}
    write_file(tmp_path / "c.pth", content | {"config": config})
    read_checkpoint(tmp_path / "c.pth")
    write_file(tmp_path / "c.pth", content | {"config": config | own})
    (name,) = own
    with pytest.raises(UserError, match=rf"another form: config\.{name}\)"):
        read_checkpoint(tmp_path / "c.pth")


def test_a_few_bytes_that_stand_for_very_many_are_refused(tmp_path):
    doubled = [1]
    for _ in range(40):
        doubled = [doubled, doubled]
    for value, message in (
        (torch.zeros(1).expand(10**6, 10**6), "larger than its numbers"),
        (doubled, "too many parts"),
    ):
        torch.save(checkpoint(1) | {"history": {"val_acc": value}}, tmp_path / "c.pth")
        assert (tmp_path / "c.pth").stat().st_size < 10_000
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), PermissionError(13, "no"), MemoryError()]
)
def test_what_may_be_whole_is_not_called_damaged(tmp_path, monkeypatch, error):
    """A disk that stumbles once must not make a run go on from an older checkpoint."""
    for epoch in (1, 2):
        write_checkpoint(tmp_path, checkpoint(epoch), None)

    def stumble(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", stumble)
    with pytest.raises(type(error)):
        read_to_resume(tmp_path / "checkpoint_latest.pth")


@pytest.mark.parametrize("harm", ["truncated", "gone", "flipped"])
def test_a_damaged_latest_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, harm):
    for epoch in (1, 2):
        write_checkpoint(tmp_path, checkpoint(epoch), None)
    latest = tmp_path / "checkpoint_latest.pth"
    data = latest.read_bytes()
    latest.unlink()
    if harm != "gone":  # a flip in the zip directory may harm nothing
        at = data.index(b"epoch")
        latest.write_bytes(data[: len(data) // 2] if harm == "truncated" else flipped(data, at))
    content, file = read_to_resume(latest)
    assert content["epoch"] == 1 and file.name == "checkpoint_previous.pth"
    assert "going on from the one before it" in capsys.readouterr().out
    with pytest.raises(UserError):  # not so for use: it would be another model than the one asked for
        read_checkpoint(latest)
    (tmp_path / "checkpoint_previous.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"latest[\s\S]*checkpoint_previous\.pth is damaged"):
        read_to_resume(latest)


def test_what_stands_beside_a_damaged_checkpoint_is_named(tmp_path):
    write_checkpoint(tmp_path, checkpoint(1), checkpoint(1))
    latest, best = (tmp_path / f"checkpoint_{name}.pth" for name in ("latest", "best"))
    latest.write_bytes(latest.read_bytes()[:100])
    for said, read in (
        (
            "(it was cut short, or is not of the form that torch.save writes)",
            partial(load_trained, device=torch.device("cpu")),
        ),
        (f"another one, such as {best}, which", partial(load_trained, device=torch.device("cpu"))),
        (f"{best} beside it is a model for use", read_to_resume),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            read(latest)


def test_a_run_whose_latest_is_damaged_ends_as_if_it_were_not(
    quick_report, class_folder, finished, tmp_path, monkeypatch
):
    flags = ["--epochs", 4, "--group-pattern", r"^(P\d+)_"]
    out = tmp_path / "out"
    one_epoch = fit_module.train_one_epoch

    def killed(state, *args):
        if state.epoch == 3:
            raise KeyboardInterrupt
        return one_epoch(state, *args)

    monkeypatch.setattr(fit_module, "train_one_epoch", killed)
    assert train(class_folder, out, *flags) == 130
    monkeypatch.undo()
    latest = out / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:-1000])
    assert train(class_folder, out, *flags, "--resume-from", latest.resolve()) == 0
    assert (out / "checkpoint_latest.pth.damaged").exists()
    ends = [read_checkpoint(run / "checkpoint_latest.pth") for run in (out, finished)]
    assert all(torch.equal(ends[0]["model"][name], value) for name, value in ends[1]["model"].items())
    assert not (out / "checkpoint_previous.pth").exists()  # a finished run leaves two


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("kept", ["", "checkpoint_best.pth"])
def test_killed_before_the_first_checkpoint_the_same_command_starts_again(
    quick_report, class_folder, tmp_path, capsys, kept, epoch
):
    out, flags = tmp_path / "out", ["--freeze-text-encoder", "--epochs", 1, "--resume-from", "auto"]
    assert train(class_folder, out, *flags) == 0
    assert "no checkpoint" not in capsys.readouterr().out
    start = {"config.json", "splits.json", "data_check.json", "frozen_text_tower.pth", kept}
    for path in out.iterdir():
        if path.is_file() and path.name not in start:
            path.unlink()
    other = ["--embed-dim", 8] if epoch else []  # nothing keeps the start of another run
    assert train(class_folder, out, *flags, *other) == 0
    assert f"note: {out} holds no checkpoint to resume from" in capsys.readouterr().out
    assert read_checkpoint(out / "checkpoint_latest.pth")["epoch"] == 1


def test_the_best_model_of_a_longer_run_is_not_taken_for_the_leavings_of_a_start(
    class_folder, tmp_path, capsys
):
    """Someone kept it and threw the rest away."""
    write_file(tmp_path / "checkpoint_best.pth", checkpoint(3))
    for name in ("config.json", "splits.json"):
        (tmp_path / name).write_text("{}")
    before = (tmp_path / "checkpoint_best.pth").read_bytes()
    assert train(class_folder, tmp_path, "--epochs", 1, "--resume-from", "auto") == 2
    assert "holds a run's results" in capsys.readouterr().err
    assert (tmp_path / "checkpoint_best.pth").read_bytes() == before


# --- frozen towers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen_run(quick_report, class_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("frozen") / "run"
    assert train(class_folder, out, "--epochs", 2, "--freeze-text-encoder", "--embed-dim", 8) == 0
    return out


def test_a_frozen_tower_is_stored_once_and_comes_back_whole(frozen_run):
    raw = torch.load(frozen_run / "checkpoint_latest.pth", weights_only=True)
    assert not any(name.startswith("text_tower") for name in raw["model"])
    for name in ("checkpoint_latest.pth", "checkpoint_best.pth"):
        trained = load_trained(frozen_run / name, torch.device("cpu"), with_text=True)
        stored = torch.load(frozen_run / "frozen_text_tower.pth", weights_only=True)["tower"]
        weights = trained.model.state_dict()
        assert len(stored) == sum(name.startswith("text_tower") for name in weights)
        assert all(torch.equal(weights[name], value) for name, value in stored.items())
        # the sentences encoded anew are those that training used
        features, _ = trained.features_of(trained.class_texts)
        assert torch.allclose(features, trained.class_features, atol=1e-6)


def test_images_can_be_classified_without_the_frozen_text_tower_sentences_cannot(frozen_run, tmp_path):
    shutil.copy(frozen_run / "checkpoint_latest.pth", tmp_path / "model.pth")
    assert load_trained(tmp_path / "model.pth", torch.device("cpu")).classes
    with pytest.raises(UserError, match=r"frozen_text_tower\.pth; put that file"):
        load_trained(tmp_path / "model.pth", torch.device("cpu"), with_text=True)


def test_the_towers_of_a_run_with_one_frozen_can_start_another(frozen_run, tmp_path):
    fold = tmp_path / "cv" / "fold_1" / "checkpoint_latest.pth"
    fold.parent.mkdir(parents=True)
    shutil.copy(frozen_run / fold.name, fold)
    with pytest.raises(UserError, match=r"frozen text tower.*frozen_text_tower\.pth; put that file"):
        build_text_tower("bert-tiny-bytes", str(fold))
    shutil.copy(frozen_run / "frozen_text_tower.pth", fold.parent.parent)
    trained = load_trained(frozen_run / fold.name, torch.device("cpu"), with_text=True)
    frozen = trained.model.text_tower.state_dict()
    for path in (frozen_run / "checkpoint_latest.pth", frozen_run / "frozen_text_tower.pth", fold):
        torch.manual_seed(1)
        tower = build_text_tower("bert-tiny-bytes", str(path))
        assert all(torch.equal(value, frozen[name]) for name, value in tower.state_dict().items())


@pytest.mark.parametrize("form", [3, 4])
def test_a_run_of_a_format_before_goes_on(frozen_run, class_folder, tmp_path, quick_report, form):
    """Its frozen tower stays, since checkpoints name its sum."""
    old = tmp_path / "old"
    shutil.copytree(frozen_run, old)
    tower = torch.load(old / "frozen_text_tower.pth", weights_only=True) | {"format": form}
    tower.pop("checksum")
    write_file(old / "frozen_text_tower.pth", tower)
    for name in ("checkpoint_latest.pth", "checkpoint_best.pth"):
        content = torch.load(old / name, weights_only=True)
        content.pop("checksum")
        write_file(old / name, content | {"format": form, "frozen": {"text_tower": checksum(tower)}})
    of_before = (old / "frozen_text_tower.pth").read_bytes()
    moved, best = tmp_path / "elsewhere", (old / "checkpoint_best.pth").read_bytes()

    assert load_trained(old / "checkpoint_best.pth", torch.device("cpu"), with_text=True)
    assert train(class_folder, old, "--epochs", 3, "--embed-dim", 8, "--resume-from", "auto") == 0
    latest = read_checkpoint(old / "checkpoint_latest.pth")
    assert (latest["format"], latest["epoch"]) == (FORMAT, 3)
    assert (old / "frozen_text_tower.pth").read_bytes() == of_before
    kept = build_text_tower("bert-tiny-bytes", str(old / "checkpoint_latest.pth")).state_dict()
    assert all(torch.equal(value, latest["model"][f"text_tower.{name}"]) for name, value in kept.items())

    flags = ["--epochs", 3, "--embed-dim", 8, "--resume-from", old / "checkpoint_latest.pth"]
    (old / "checkpoint_best.pth").write_bytes(best)
    assert train(class_folder, moved, *flags) == 0
    for name in ("checkpoint_latest.pth", "checkpoint_best.pth"):
        assert load_trained(moved / name, torch.device("cpu"), with_text=True)


@pytest.mark.parametrize("wrong", [{"format": torch.zeros(2, 3)}, {"tower": {"w": torch.zeros(1).expand(9)}}])
def test_a_strangers_frozen_tower_is_refused_as_weights(frozen_run, tmp_path, wrong):
    copied = tmp_path / "copied"
    shutil.copytree(frozen_run, copied)
    torch.save({"format": FORMAT, "tower": {"w": torch.zeros(1)}} | wrong, copied / "frozen_text_tower.pth")
    with pytest.raises(
        UserError, match=r"frozen_text_tower\.pth (cannot be read as weights|is of another run)"
    ):
        build_text_tower("bert-tiny-bytes", str(copied / "checkpoint_latest.pth"))


def test_the_frozen_tower_of_another_run_is_refused(frozen_run, class_folder, tmp_path, capsys):
    copied = tmp_path / "copied"
    shutil.copytree(frozen_run, copied)
    other = torch.load(copied / "frozen_text_tower.pth", weights_only=True)
    other.pop("checksum")
    next(iter(other["tower"].values())).add_(1)
    write_file(copied / "frozen_text_tower.pth", other)
    with pytest.raises(UserError, match="of another run"):
        read_checkpoint(copied / "checkpoint_latest.pth")
    with pytest.raises(UserError, match="of another run"):
        build_text_tower("bert-tiny-bytes", str(copied / "checkpoint_latest.pth"))
    (copied / "checkpoint_latest.pth").unlink()
    flags = ["--freeze-text-encoder", "--embed-dim", 8, "--epochs", 1]
    assert train(class_folder, copied, *flags, "--overwrite") == 0  # all that the old run wrote goes
    assert read_checkpoint(copied / "checkpoint_latest.pth")["epoch"] == 1


def test_the_folds_of_a_cross_validation_share_one_frozen_tower(class_folder, tmp_path, quick_report):
    out = tmp_path / "cv"
    flags = ["--use-cv", "--n-splits", 2, "--epochs", 1, "--freeze-image-encoder"]
    assert train(class_folder, out, *flags, "--fold", 2) == 0
    assert train(class_folder, out, *flags) == 0
    assert (out / "frozen_image_tower.pth").exists() and not list(out.glob("fold_*/frozen_*"))
    one, two = (
        load_trained(out / f"fold_{k}" / "checkpoint_latest.pth", torch.device("cpu")) for k in (1, 2)
    )
    first, second = one.model.image_tower.state_dict(), two.model.image_tower.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# --- beside training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu_id", [-1, pytest.param(0, marks=pytest.mark.gpu)])
def test_what_is_written_is_the_moment_it_was_taken(
    quick_report, class_folder, tmp_path, monkeypatch, gpu_id
):
    """Training goes on while a checkpoint is written; a slow disk must not mix two epochs."""
    taken, epoch_two, one_epoch = [], threading.Event(), fit_module.train_one_epoch
    checkpoint_of, timed = TrainState.checkpoint, CheckpointWriter._timed

    def taking(state, facts):
        taken.append(copy.deepcopy(checkpoint_of(state, facts)))
        return checkpoint_of(state, facts)

    def noting(state, *args):
        row = one_epoch(state, *args)
        if state.epoch == 1:
            epoch_two.set()
        return row

    def slow(writer, now, best):
        assert epoch_two.wait(60)  # the first is not written, nor fetched, before the second epoch is over
        return timed(writer, now, best)

    def comparing(folder, now, best):
        for (name, value), (_, old) in zip(leaves(now), leaves(taken[now["epoch"] - 1]), strict=True):
            assert torch.equal(value, old.cpu()) if isinstance(value, torch.Tensor) else value == old, name
        write_checkpoint(folder, now, best)

    monkeypatch.setattr(TrainState, "checkpoint", taking)
    monkeypatch.setattr(CheckpointWriter, "_timed", slow)
    monkeypatch.setattr(state_module, "write_checkpoint", comparing)
    monkeypatch.setattr(fit_module, "train_one_epoch", noting)
    assert train(class_folder, tmp_path / "out", "--epochs", 2, "--gpu-id", gpu_id) == 0
    stored = torch.load(tmp_path / "out" / "checkpoint_latest.pth", weights_only=True)
    assert stored["epoch"] == 2 and len(taken) == 2
    for part in ("model", "optimizer"):
        first, second, in_file = (dict(leaves(one[part])) for one in (*taken, stored))
        tensors = [name for name, value in second.items() if isinstance(value, torch.Tensor)]
        assert all(torch.equal(in_file[name], second[name].cpu()) for name in tensors)
        assert any(not torch.equal(first[name], second[name]) for name in tensors)


@pytest.mark.parametrize("error", [None, RunFailed("the loss is not finite")])
def test_writing_takes_a_two_hundredth_of_the_time_and_what_is_held_comes_at_the_end(
    tmp_path, monkeypatch, error
):
    clock, written = SimpleNamespace(now=100.0), []

    def write(folder, latest, best):
        written.append((clock.now - 100, latest["epoch"], best and best["epoch"]))

    class AtOnce(contextlib.nullcontext):
        def submit(self, call, *arguments):
            done = Future()
            done.set_result(call(*arguments))
            return done

    cost = iter(range(100))  # a second of the processor each
    monkeypatch.setattr(state_module, "write_checkpoint", write)
    monkeypatch.setattr(state_module, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(
        state_module, "time", SimpleNamespace(monotonic=lambda: clock.now, thread_time=lambda: next(cost))
    )
    with contextlib.suppress(RunFailed), CheckpointWriter(tmp_path, torch.device("cpu"), True) as writer:
        for epoch, at, is_best in (
            (1, 0, True), (2, 30, True), (3, 199, False), (4, 201, False), (5, 210, True), (6, 220, False),
        ):  # fmt: skip
            clock.now = 100.0 + at
            writer.write(partial(dict, epoch=epoch), is_best, now=False)
        writer.write(partial(dict, epoch=7), False, now=True)  # a signal
        clock.now += 1
        writer.write(partial(dict, epoch=8), True, now=False)
        if error:
            raise error
    assert written == [(0, 1, 1), (201, 4, 2), (220, 7, 5), (221, 8, 8)]


@pytest.mark.parametrize("save_best", [True, False])
def test_what_is_replaced_is_let_go_before_it_is_copied_anew(tmp_path, monkeypatch, save_best):
    """So that a run's state is held once and not twice; of an older best epoch the model alone."""
    monkeypatch.setattr(state_module, "write_checkpoint", lambda *_: None)
    # it stands still, so that after the first none is due
    clock = SimpleNamespace(monotonic=lambda: 0.0, thread_time=count().__next__)
    monkeypatch.setattr(state_module, "time", clock)
    held = {}

    def take(epoch):
        alive = [name for name, kept in held.items() if kept() is not None]
        assert alive == (["model 2"] if epoch in (3, 4) and save_best else []), epoch
        model, moments = torch.zeros(3), torch.zeros(3)
        if epoch > 1:  # the first is being written
            held.update({f"model {epoch}": weakref.ref(model), f"moments {epoch}": weakref.ref(moments)})
        return {"epoch": epoch, "model": model, "optimizer": moments}

    with CheckpointWriter(tmp_path, torch.device("cpu"), save_best) as writer:
        for epoch, is_best in ((1, True), (2, True), (3, False), (4, False), (5, True)):
            writer.write(partial(take, epoch), is_best, now=False)


def test_a_signal_while_the_last_is_awaited_loses_nothing_that_is_held(
    quick_report, class_folder, tmp_path, monkeypatch
):
    """A slow disk is still at the first epoch when the last has ended."""
    training_is_over, one_epoch = threading.Event(), fit_module.train_one_epoch

    def slow(folder, latest, best):
        if latest["epoch"] == 1:
            assert training_is_over.wait(60)
            os.kill(os.getpid(), signal.SIGTERM)
        write_checkpoint(folder, latest, best)

    def noting(state, *args):
        row = one_epoch(state, *args)
        if state.epoch == 2:
            threading.Timer(2, training_is_over.set).start()
        return row

    monkeypatch.setattr(state_module, "write_checkpoint", slow)
    monkeypatch.setattr(fit_module, "train_one_epoch", noting)
    out = tmp_path / "out"
    assert train(class_folder, out, "--epochs", 3, "--early-stopping-monitor", "val_loss") == 143
    latest, best = (read_checkpoint(out / f"checkpoint_{name}.pth") for name in ("latest", "best"))
    assert (latest["epoch"], latest["in_epoch"]["steps"]) == (3, 0)
    assert best["epoch"] == latest["best"]["epoch"] > 1


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_disk_that_fills_ends_the_run_and_leaves_the_last_good_files(
    quick_report, class_folder, tmp_path, monkeypatch, capsys, epochs
):
    save, calls = torch.save, []

    def full_after_the_first_epoch(*args, **options):
        calls.append(1)
        if len(calls) > 2:  # its best and its latest
            raise OSError(28, "No space left on device")
        return save(*args, **options)

    monkeypatch.setattr(torch, "save", full_after_the_first_epoch)
    assert train(class_folder, tmp_path / "out", "--epochs", epochs) == 1  # also where it is the last epoch's
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "up to the end of epoch 1 is saved, any training after it is lost; to go on" in said
    latest, _, best = epochs_in(tmp_path / "out")
    assert latest == best == 1
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_a_failed_write_is_said_also_when_training_fails_meanwhile(
    quick_report, class_folder, tmp_path, monkeypatch, capsys
):
    one_epoch = fit_module.train_one_epoch

    def failing(state, *args):
        if state.epoch == 1:
            raise RunFailed("the loss is not finite")
        return one_epoch(state, *args)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fit_module, "train_one_epoch", failing)
    monkeypatch.setattr(torch, "save", full)
    assert train(class_folder, tmp_path / "out", "--epochs", 3) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "nothing was saved yet" in said


def test_too_full_a_disk_is_said_before_images_are_read(class_folder, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**8))
    assert train(class_folder, tmp_path / "out", "--epochs", 1, "--image-encoder", "resnet18") == 2
    streams = capsys.readouterr()
    # resnet18 and a tiny text tower, 47 MB: three latest with two moments each, two best
    assert "checkpoints will need about 5" in streams.err and "100 MB are free" in streams.err
    assert "counting the copies kept while they are replaced" in streams.err
    assert "read 72 images" not in streams.out and not (tmp_path / "out").exists()
