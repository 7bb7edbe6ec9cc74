"""Stopped by a signal, saved within an epoch, continued: the end is the same, bit for bit."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
import threading
import time

import pytest
import torch
from quick import train

import export_clip
import training.fit as fit_module
from common.run_files import find_checkpoints
from common.stopping import (
    Requests,
    Stoppable,
    Stopped,
    exit_code,
    sigterm_stops,
    stop_after_the_parent,
)
from evaluation.checkpoints import read_checkpoint, write_file
from evaluation.claim import claim_items
from evaluation.report_tables import facts
from evaluation.run_folder import read_run_folder
from evaluation.trained import load_trained
from train_clip import main

pytestmark = [
    pytest.mark.usefixtures("quick_report"),
    pytest.mark.skipif(os.name != "posix", reason="the signals are POSIX's"),
]
EPOCHS, STEPS = 2, 4  # an epoch has 57 images, 16 at most in a batch


def signal_at_steps(monkeypatch, numbers: dict[int, int]):
    """Send this process a signal in the middle of the given steps (from 0, over all epochs)."""
    count, computed = iter(range(10**6)), fit_module.loss_and_gradients

    def step(*arguments):
        number = numbers.get(next(count))
        if number:  # a terminal and a cluster send it to all processes of a job
            for process in [child.pid for child in multiprocessing.active_children()] + [os.getpid()]:
                os.kill(process, number)
        return computed(*arguments)

    monkeypatch.setattr(fit_module, "loss_and_gradients", step)


def contents(run):
    """All that must be equal at the end, with the times left out."""
    latest = read_checkpoint(run / "checkpoint_latest.pth")
    times = ("epoch_seconds", "images_per_second")
    return {
        "model": latest["model"],
        "moments": latest["optimizer"]["state"],
        "history": {key: values for key, values in latest["history"].items() if key not in times},
        "best": latest["best"],
        "rng": latest["rng"]["torch"],
        "predictions": (run / "predictions.csv").read_bytes(),
        "of best": read_checkpoint(run / "checkpoint_best.pth")["model"],
    }


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


FLAGS = [
    "--epochs",
    EPOCHS,
    "--image-encoder",
    "starnet_dual_pyramid_rcf",
    "--text-template",
    "一张{class_name}",
    "--use-weighted-sampling",
    "--logit-adjustment",
    "--cutmix-prob",
    0.5,
]


@pytest.fixture(scope="module")
def whole(quick_report, class_folder, tmp_path_factory):
    """An uninterrupted run; the image tower draws random depths."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(class_folder, out, *FLAGS) == 0
    return contents(out)


@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [(signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 0), (signal.SIGHUP, 129, 2)],
)
def test_stopped_within_an_epoch_and_continued_the_end_is_the_same(
    whole, class_folder, tmp_path, monkeypatch, capsys, number, code, workers
):
    out, flags = tmp_path / "a run", [*FLAGS, "--num-workers", workers, *(["--no-cache"] if workers else [])]
    if workers:
        monkeypatch.setattr("data.images.MEMORY_FOR_IMAGES", 0)  # so that there is something for them to do
    signal_at_steps(monkeypatch, {5: number})
    assert train(class_folder, out, *flags) == code
    monkeypatch.undo()
    streams = capsys.readouterr()
    assert "saving after step 2 of 4 of epoch 2" in streams.out
    assert "what was trained up to step 2 of epoch 2 is saved; to go on" in streams.err
    assert f"and --resume-from '{out / 'checkpoint_latest.pth'}'" in streams.err
    saved = read_checkpoint(out / "checkpoint_latest.pth")
    assert (saved["epoch"], saved["in_epoch"]["steps"]) == (1, 2)
    torch.manual_seed(999)  # a new process starts elsewhere in the random stream
    assert train(class_folder, out, *flags, "--resume-from", "auto") == 0
    assert "resuming in epoch 2 of 2, after 2 of 4 steps" in capsys.readouterr().out
    assert same(contents(out), whole)


def test_stopped_at_every_step_in_turn_the_end_is_the_same(
    whole, class_folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    for _ in range(EPOCHS * STEPS):
        signal_at_steps(monkeypatch, {0: signal.SIGTERM})
        assert train(class_folder, out, *FLAGS, "--resume-from", "auto") == 143
        assert "saved, and the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    assert read_checkpoint(out / "checkpoint_latest.pth")["in_epoch"]["steps"] == STEPS  # not yet validated
    assert train(class_folder, out, *FLAGS, "--resume-from", "auto") == 0
    assert same(contents(out), whole)


def test_stopped_in_validation_the_epoch_is_not_trained_again(whole, class_folder, tmp_path, monkeypatch):
    out, predict = tmp_path / "run", fit_module.predict_probs

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(*arguments)

    monkeypatch.setattr(fit_module, "predict_probs", stopped)
    assert train(class_folder, out, *FLAGS) == 143
    monkeypatch.undo()
    saved = read_checkpoint(out / "checkpoint_latest.pth")
    assert (saved["epoch"], saved["in_epoch"]["steps"]) == (0, STEPS)
    assert train(class_folder, out, *FLAGS, "--resume-from", "auto") == 0
    assert same(contents(out), whole)


def test_the_time_left_counts_what_an_epoch_took_before_it_was_resumed(
    class_folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    latest = out / "checkpoint_latest.pth"
    signal_at_steps(monkeypatch, {0: signal.SIGTERM})
    assert train(class_folder, out, *FLAGS) == 143
    monkeypatch.undo()
    saved = read_checkpoint(latest)
    saved["in_epoch"]["seconds"] = 7230.0
    write_file(latest, saved)
    capsys.readouterr()
    assert train(class_folder, out, *FLAGS, "--resume-from", "auto") == 0
    assert re.search(r"epoch 1/2 .*left 2 h 0\d min", capsys.readouterr().out)


@pytest.mark.parametrize("minutes", [0, 1e-6])
def test_saving_within_epochs_changes_nothing_and_what_is_saved_continues(
    whole, class_folder, tmp_path, monkeypatch, minutes
):
    out, write, saved = tmp_path / "run", fit_module.CheckpointWriter.write, []

    def noting(self, take, is_best, now):
        checkpoint = take()
        saved.append((checkpoint["epoch"], checkpoint["in_epoch"]["steps"]))
        write(self, take, is_best, now)

    monkeypatch.setattr(fit_module.CheckpointWriter, "write", noting)
    signal_at_steps(monkeypatch, {1: signal.SIGUSR1})
    assert train(class_folder, out, *FLAGS, "--save-every-minutes", minutes) == 0
    monkeypatch.undo()
    if minutes:
        assert saved == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0)]
    else:
        assert saved == [(0, 2), (1, 0), (2, 0)]  # after the signal, then at the ends
    assert same(contents(out), whole)


def test_another_batch_size_or_order_is_refused_within_an_epoch_only(
    class_folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    signal_at_steps(monkeypatch, {5: signal.SIGTERM})
    assert train(class_folder, out, "--epochs", 2) == 143
    monkeypatch.undo()
    assert train(class_folder, out, "--epochs", 2, "--batch-size", 32, "--resume-from", "auto") == 2
    error = capsys.readouterr().err
    assert "--batch-size may change between two epochs only" in error and "2 of 4 steps of epoch 2" in error
    assert train(class_folder, out, "--use-weighted-sampling", "--resume-from", "auto") == 2
    assert "--use-weighted-sampling may change between two epochs only" in capsys.readouterr().err
    assert train(class_folder, out, "--epochs", 1, "--resume-from", "auto") == 2
    assert "has 2 epochs behind it" in capsys.readouterr().err


def test_an_epoch_that_was_begun_is_trained_to_its_end_where_a_new_patience_is_used_up(
    class_folder, tmp_path, monkeypatch, capsys
):
    out, flags = tmp_path / "run", ["--epochs", 4, "--early-stopping-min-delta", 1e6]
    signal_at_steps(monkeypatch, {9: signal.SIGTERM})
    assert train(class_folder, out, *flags) == 143
    monkeypatch.undo()
    assert train(class_folder, out, "--early-stopping-patience", 1, "--resume-from", "auto") == 0
    assert "stopped early" in capsys.readouterr().out
    (latest,) = find_checkpoints(out)
    facts = load_trained(latest, torch.device("cpu")).facts
    assert (facts["epoch"], facts["epoch_is"]) == (3, "last")
    assert facts["changed_on_resume"] == [
        "after step 2 of epoch 3: --early-stopping-patience 1 (before: not given)"
    ]


def test_a_model_saved_within_an_epoch_is_not_used(class_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    signal_at_steps(monkeypatch, {5: signal.SIGTERM})
    assert train(class_folder, out, "--epochs", 2) == 143
    monkeypatch.undo()
    (latest,) = find_checkpoints(out)
    with pytest.raises(Exception, match=r"in the middle of epoch 2 .*, or give .*checkpoint_best"):
        load_trained(latest, torch.device("cpu"))
    assert load_trained(out / "checkpoint_best.pth", torch.device("cpu")).facts["epoch"] == 1


def test_a_stopped_cross_validation_continues_within_the_epoch(class_folder, tmp_path, monkeypatch, capsys):
    flags = ["--use-cv", "--n-splits", 2, "--epochs", 2, "--batch-size", 12]  # 36 images a fold: 3 steps
    assert train(class_folder, tmp_path / "whole", *flags) == 0
    signal_at_steps(monkeypatch, {7: signal.SIGTERM})
    assert train(class_folder, tmp_path / "cut", *flags) == 143
    monkeypatch.undo()
    assert "the same command continues" in capsys.readouterr().err
    assert train(class_folder, tmp_path / "cut", *flags) == 0
    assert "resuming in epoch 1 of 2, after 2 of 3 steps" in capsys.readouterr().out
    for name in ("cv_summary.json", "oof_predictions.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- the parts ----------------------------------------------------------------------------------------------


def test_a_stopped_entry_continues_with_validation_images_that_a_typed_command_fetches(
    class_folder, tmp_path, monkeypatch
):
    data = shutil.copytree(class_folder, tmp_path / "data")
    with tarfile.open(tmp_path / "val.tar", "w") as shard:
        for name in ("正常", "肺炎", "气胸"):
            picture = next((data / name).iterdir())
            shard.add(picture, f"{name}/1.png")
            picture.unlink()
    file = tmp_path / "entries.json"
    file.write_text(json.dumps([{"name": "a"}]))
    flags = ["--epochs", 2, "--multi-config", "--config-file", file]
    flags += ["--val-dir", f"pipe:cat {tmp_path}/val.tar"]
    signal_at_steps(monkeypatch, {5: signal.SIGTERM})
    assert train(data, tmp_path / "out", *flags) == 143
    monkeypatch.undo()
    assert train(data, tmp_path / "out", *flags) == 0
    history = json.loads((tmp_path / "out" / "01_a" / "history.json").read_text())
    assert len(history["val_acc"]) == 2


def test_one_stop_may_be_several_signals_but_ctrl_c_after_a_while_does_not_wait(monkeypatch, capfd):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(KeyboardInterrupt) as stopped, Requests(0) as requests:
        assert not requests.to_save()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):  # a terminal, a script, a cluster
            os.kill(os.getpid(), number)
            assert requests.to_save() and requests.stop == signal.SIGINT
        assert capfd.readouterr().err == "\nstopping after this step\n"
        not_at_once = True
        now[0] = 103.0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C was waited for")
    assert not_at_once and not isinstance(stopped.value, Stopped)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_what_is_said_to_a_closed_terminal_ends_no_run():
    """Under a terminal whose other end has gone every write fails."""
    outside, inside = os.openpty()
    process = os.fork()
    if not process:
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(inside, stream)
            os.close(outside)
            os.close(inside)
            with Requests(0) as requests:
                os.kill(os.getpid(), signal.SIGSTOP)
                os.kill(os.getpid(), signal.SIGHUP)
                os.write(1, b"saving")
                code = 0 if requests.stop == signal.SIGHUP else 1
        finally:
            os._exit(code)  # whatever happens, no second pytest goes on from here
    os.close(inside)
    os.waitpid(process, os.WUNTRACED)
    os.close(outside)
    os.kill(process, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_processes_that_load_images_outlive_a_stop_but_not_for_long():
    """They are needed for the step that is finished, and must not be waited for at the end."""
    context = multiprocessing.get_context("fork")
    ready, say = context.Pipe()

    def work():
        stop_after_the_parent()
        say.send(None)
        signal.pause()
        signal.pause()

    process = context.Process(target=work, daemon=True)
    process.start()
    ready.recv()
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 0


def test_what_a_shell_lets_a_background_job_ignore_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Requests(0) as requests:
            os.kill(os.getpid(), signal.SIGINT)
            assert requests.stop is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_where_there_is_nothing_to_save_the_save_signal_ends_nothing():
    with sigterm_stops():
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
    assert exit_code(stopped.value) == 143 and exit_code(KeyboardInterrupt()) == 130


def test_a_stop_is_not_forgotten_at_the_end_of_the_block():
    with pytest.raises(Stopped), Requests(0):
        os.kill(os.getpid(), signal.SIGTERM)


def test_iteration_ends_when_asked_and_has_a_length():
    with pytest.raises(Stopped), Requests(0) as requests:
        items = Stoppable([1, 2, 3], requests)
        assert len(items) == 3
        for item in items:
            assert item == 1
            os.kill(os.getpid(), signal.SIGTERM)


def test_saving_is_due_after_the_time_and_not_again_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    requests, never = Requests(60), Requests(0)
    now[0] = 159.9
    assert not requests.to_save()
    now[0] = 160.0
    assert requests.to_save() and not never.to_save()
    requests.saved()
    assert not requests.to_save()


def test_outside_the_main_thread_training_does_without_signals():
    done = []

    def work():
        with Requests(0) as requests:
            done.append(requests.to_save())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [False]


def test_options_changed_on_resume_are_recorded_with_the_epoch_and_over_further_resumes(
    finished, class_folder, tmp_path, monkeypatch
):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    saved = torch.load(copy / "checkpoint_latest.pth", weights_only=True)
    del saved["checksum"], saved["changed_on_resume"]  # of an earlier version
    write_file(copy / "checkpoint_latest.pth", saved)

    def recorded():
        record = json.loads((copy / "config.json").read_text("utf-8"))["changed_on_resume"]
        assert record == read_checkpoint(copy / "checkpoint_latest.pth")["changed_on_resume"]
        return record

    first = "after epoch 4: --epochs 6 (before: 4), --loss ce (before: unicl)"
    signal_at_steps(monkeypatch, {2: signal.SIGTERM})
    command = ["--data-dir", str(class_folder), "--output-dir", str(copy), "--resume-from", "auto"]
    assert main([*command, "--epochs", "6", "--loss", "ce", "--num-workers", "1"]) == 143
    monkeypatch.undo()
    assert recorded() == [first]
    assert main([*command, "--logit-adjustment"]) == 0
    second = "after step 3 of epoch 5: --logit-adjustment (before: not given)"
    assert recorded() == [first, second]
    run = read_run_folder(copy)
    assert ["Changed on resuming 续训时的改动", f"{first}; {second}"] in facts(run, run.config)["rows"]
    assert f"changed on resuming: {first}; {second}." in claim_items(run, run.config, 0)[24].answer
    card = tmp_path / "exported" / "README.md"
    command = ["--checkpoint", str(copy), "--output-dir", str(card.parent), "--format", "safetensors"]
    assert export_clip.main(command) == 0
    assert f"was resumed: {first}; {second}." in card.read_text("utf-8")
