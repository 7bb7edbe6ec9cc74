"""What may go on in a folder that holds something already, and what is refused; each through main()."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from quick import QUICK, train

from common.errors import UserError, all_of
from evaluation.checkpoints import read_checkpoint, write_file
from evaluation.trained import load_trained
from train_clip import main
from training import begin, cross_validation, outputs
from training.dataset import patients_of, scan
from training.options import make_config, options_from_flags, refuse_without_effect

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("quick_report")


def compare(data, output, file, *flags):
    quick = ["--data-dir", data, "--output-dir", output, *QUICK, "--epochs", 1, *flags]
    return main([*map(str, quick), "--multi-config", "--config-file", str(file)])


@pytest.fixture(scope="module")
def two_entries(class_folder, tmp_path_factory, quick_report):
    """A finished comparison of two entries, the first with sentences of its own, and what made it."""
    root = tmp_path_factory.mktemp("compare")
    shutil.copytree(class_folder, root / "data")
    texts = root / "texts.json"
    texts.write_text(json.dumps({"正常": "一", "肺炎": "二", "气胸": "三"}), encoding="utf-8")
    file = root / "entries.json"
    file.write_text(json.dumps([{"class_texts_file": str(texts)}, {"name": "🫁"}]), encoding="utf-8")
    assert compare(root / "data", root / "out", file) == 0
    return root


def test_finished_entries_are_passed_over_and_ranked_with_paired_tests(two_entries, capsys):
    assert compare(two_entries / "data", two_entries / "out", two_entries / "entries.json") == 0
    said = capsys.readouterr().out
    assert said.count("finished already") == 2 and "\nlast epoch, percent\n" in said
    comparison = json.loads((two_entries / "out" / "comparison.json").read_text("utf-8"))
    assert len(comparison["pairs"]) == 1 and comparison["pairs"][0]["n_images"] > 0
    assert (two_entries / "out" / "02_unnamed").is_dir()
    tex = (two_entries / "out" / "leaderboard.tex").read_text("utf-8")
    assert tex.count(r"\\") == 3 and r"\toprule" in tex and r"& balanced (\%) &" in tex
    assert r"with the 95 \% interval over images. Beyond" in tex


def test_finished_entries_of_other_images_or_sentences_are_refused(two_entries, tmp_path, capsys):
    shutil.copytree(two_entries, tmp_path / "copy")
    root = tmp_path / "copy"
    file = root / "entries.json"
    next((root / "data" / "正常").iterdir()).rename(root / "data" / "正常" / "new.png")
    assert compare(root / "data", root / "out", file) == 2
    assert "1 are new to it and 1 are gone" in capsys.readouterr().err

    (two_entries / "texts.json").write_text(json.dumps({"正常": "别的"}), encoding="utf-8")
    try:
        assert compare(two_entries / "data", root / "out", file) == 2
        assert "class sentences have changed" in capsys.readouterr().err
    finally:
        texts = {"正常": "一", "肺炎": "二", "气胸": "三"}
        (two_entries / "texts.json").write_text(json.dumps(texts), encoding="utf-8")


@pytest.mark.parametrize(
    ("left", "error"),
    [
        (None, "history.json"),
        ('{"train_loss": [1.0], "train_acc": [50.0]}', "its results are damaged (KeyError: 'val_loss')"),
    ],
)
def test_a_finished_entry_that_lost_something_does_not_take_the_others_along(
    two_entries, tmp_path, left, error
):
    shutil.copytree(two_entries / "out", tmp_path / "out")
    history = tmp_path / "out" / "02_unnamed" / "history.json"
    history.unlink()
    if left:
        history.write_text(left)
    assert compare(two_entries / "data", tmp_path / "out", two_entries / "entries.json") == 0
    rows = json.loads((tmp_path / "out" / "leaderboard.json").read_text("utf-8"))
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert error in rows[1]["error"]


def test_stopped_before_its_first_epoch_ended_the_same_command_works(class_folder, finished, tmp_path):
    for name in ("config.json", "splits.json", "data_check.json"):
        shutil.copy(finished / name, tmp_path / name)
    assert train(class_folder, tmp_path, "--epochs", 1) == 0


def test_a_run_beside_others_leaves_their_folders_alone(class_folder, finished, tmp_path):
    other = tmp_path / "fold_a"  # no fold: a run that is called so
    shutil.copytree(finished, other)
    (other / ".lock").touch()
    assert train(class_folder, tmp_path, "--epochs", 1) == 0
    assert {path.name for path in finished.iterdir()} <= {path.name for path in other.iterdir()}


@pytest.mark.parametrize("name", ["config.json", "splits.json", "data_check.json"])
@pytest.mark.parametrize("cross_validation", [[], ["--use-cv", "--n-splits", 2]])
def test_the_file_of_another_program_is_not_taken_for_the_beginning_of_a_run(
    class_folder, tmp_path, capsys, name, cross_validation
):
    theirs = tmp_path / name
    theirs.write_text('{"architectures": ["BertModel"]}')
    assert train(class_folder, tmp_path, "--epochs", 1, *cross_validation) == 2
    assert f"--output-dir {tmp_path} holds" in capsys.readouterr().err
    assert theirs.read_text() == '{"architectures": ["BertModel"]}'


def test_overwrite_leaves_folders_of_the_user_alone(class_folder, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    mine = tmp_path / "out" / "fold_1" / "scan.png"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    assert train(class_folder, tmp_path / "out", "--epochs", 1, "--overwrite") == 0
    assert mine.read_bytes() == b"mine"


def test_results_do_not_go_into_the_data_folder(class_folder, capsys):
    for output in (class_folder, class_folder / "runs"):  # its figures would be a class of the next run
        assert train(class_folder, output, "--overwrite") == 2
        assert "give results a folder elsewhere" in capsys.readouterr().err


def test_a_patient_in_both_folders_is_refused(class_folder, tmp_path, capsys):
    shutil.copytree(class_folder, tmp_path / "val")
    flags = ["--val-dir", tmp_path / "val", "--group-pattern", r"^(P\d+)_"]
    assert train(class_folder, tmp_path / "out", *flags) == 2
    assert "36 patients have images in --data-dir and in --val-dir" in capsys.readouterr().err


def test_two_folders_that_number_their_images_alike_share_a_table_of_patients(tmp_path):
    for part in ("train", "val"):
        for name in ("a/1", "b/1"):
            (tmp_path / part / name).parent.mkdir(parents=True)
            (tmp_path / part / f"{name}.png").touch()
    table = tmp_path / "patients.csv"
    options = {"data_dir": str(tmp_path / "train"), "val_dir": str(tmp_path / "val"), "output_dir": "-"}
    config = make_config({**options, "groups_file": str(table)})
    table.write_text("path,group\ntrain/a/1.png,P1\ntrain/b/1.png,P2\nval/a/1.png,P3\nval/b/1.png,P4\n")
    assert patients_of(config, *scan(config)) == ["P1", "P2", "P3", "P4"]
    table.write_text("path,group\na/1.png,P1\nb/1.png,P2\n")
    with pytest.raises(UserError, match=r"write train/a/1\.png and val/a/1\.png"):
        patients_of(config, *scan(config))


def test_what_a_checkpoint_does_not_fit_is_said_before_images_are_read(
    class_folder,
    finished,
    tmp_path,
    capsys,
):
    latest = finished / "checkpoint_latest.pth"
    cases = [
        (["--epochs", 3], latest, "has 4 epochs behind it"),
        (["--text-template", "另{class_name}"], latest, "other sentences for"),
    ]
    fold = read_checkpoint(latest)
    fold["config"]["use_cv"] = True
    write_file(tmp_path / "fold.pth", fold)
    cases.append(([], finished / "checkpoint_best.pth", "holds a model for use"))
    cases.append(([], tmp_path / "fold.pth", "is of a fold"))
    cases.append(([], tmp_path, "is a folder without a checkpoint_latest.pth; give a run's folder"))
    for flags, checkpoint, message in cases:
        assert train(class_folder, tmp_path / "out", "--resume-from", checkpoint, *flags) == 2
        streams = capsys.readouterr()
        assert message in streams.err and "read 72 images" not in streams.out
    (tmp_path / "texts.json").write_text(json.dumps({"肺炎": "肺炎影像", "气胸": "气胸影像"}))
    for name in ("正常", "肺炎"):
        shutil.copytree(class_folder / name, tmp_path / "two" / name)
    with_file = read_checkpoint(latest)
    with_file["config"]["class_texts_file"] = str(tmp_path / "texts.json")
    write_file(tmp_path / "file.pth", with_file)
    assert train(tmp_path / "two", tmp_path / "out", "--resume-from", tmp_path / "file.pth") == 2
    said = capsys.readouterr().err
    assert "trained on the classes 正常, 气胸, 肺炎; --data-dir has 正常, 肺炎" in said
    assert "no class" not in said


def test_a_run_resumed_in_another_folder_brings_its_best_epoch(class_folder, finished, tmp_path):
    flags = ["--resume-from", finished, "--epochs", 4]  # the run's folder stands for its latest
    assert train(class_folder, tmp_path / "out", *flags, "--group-pattern", r"^(P\d+)_") == 0
    best = (finished / "checkpoint_best.pth").read_bytes()
    assert (tmp_path / "out" / "checkpoint_best.pth").read_bytes() == best


def test_a_run_resumed_in_another_folder_that_saved_nothing_there_goes_on_there(
    class_folder, finished, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    flags = ["--epochs", 5, "--resume-from"]

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr("training.fit.loss_and_gradients", out_of_memory)
    assert train(class_folder, out, *flags, finished / "checkpoint_latest.pth") == 1
    monkeypatch.undo()
    assert train(class_folder, out, *flags, "auto") == 0
    assert len(json.loads((out / "history.json").read_text())["val_acc"]) == 5


def test_a_run_that_is_ended_where_it_stands_leaves_a_model_that_knows_it(class_folder, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    latest = torch.load(out / "checkpoint_latest.pth", weights_only=True)
    latest.pop("checksum")
    latest["config"]["epochs"] = 9  # it was stopped after 4 of them
    write_file(out / "checkpoint_latest.pth", latest)
    assert load_trained(out / "checkpoint_latest.pth", torch.device("cpu")).facts["epoch_is"] == "unfinished"
    assert train(class_folder, out, "--resume-from", "auto", "--epochs", 4) == 0
    assert load_trained(out / "checkpoint_latest.pth", torch.device("cpu")).facts["epoch_is"] == "last"


def test_results_of_the_shorter_run_do_not_lie_beside_the_longer_ones_weights(
    class_folder, finished, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    shutil.copytree(finished, out)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.run.write_results", killed)
    assert train(class_folder, out, "--resume-from", out, "--epochs", 5) == 130
    assert "saved, and the same command continues" in capsys.readouterr().err
    left = {path.name for path in out.iterdir()}
    assert not left & {"metrics.json", "predictions.csv", "report.html"} and "checkpoint_latest.pth" in left


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--use-cv", "--val-ratio", "0.3"], "--val-ratio"),
        (["--val-dir", "v", "--val-ratio", "0.3"], "--val-ratio"),
        (["--logit-adjustment-tau", "1"], "--logit-adjustment-tau"),
    ],
)
def test_typed_options_without_effect_are_refused(flags, named):
    typed = options_from_flags(["--data-dir", "d", "--output-dir", "o", *flags])
    with pytest.raises(UserError, match=f"{named} has no effect"):
        refuse_without_effect(typed, make_config(typed))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n-splits", "3"], "--n-splits has no effect without --use-cv"),
        (["--n-splits", "3", "--resume-from", "r"], "--n-splits has no effect without --use-cv"),
        (["--n-splits", "3", "--use-cv"], ""),
        (
            ["--early-stopping-min-delta", "0.1"],
            "--early-stopping-min-delta has no effect without --early-stopping-patience",
        ),
        (["--early-stopping-min-delta", "0.1", "--early-stopping-patience", "3"], ""),
    ],
)
def test_what_the_guide_gives_beside_what_it_needs_is_noted_without_it(flags, said, capsys):
    typed = options_from_flags(["--data-dir", "d", "--output-dir", "o", *flags])
    refuse_without_effect(typed, make_config(typed))
    out = capsys.readouterr().out
    assert said in out if said else not out


def test_a_configuration_from_python_is_checked_too():
    with pytest.raises(UserError) as refused:
        make_config({"data_dir": "d", "output_dir": "o", "epoch": 3, "loss": "x", "batch_size": 10**400})
    assert "unknown key 'epoch' (did you mean 'epochs'" in str(refused.value) and "'loss'" in str(
        refused.value
    )


def test_a_full_disk_is_an_os_error_that_leaves_the_old_file(tmp_path):
    target = tmp_path / "checkpoint.pth"
    target.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_file(target, {"tensor": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def held_by_another_process(folder, tmp_path) -> subprocess.Popen:
    """A process that holds the folder until its input is closed."""
    code = (
        "import sys, pathlib; from training.outputs import locked\n"
        f"with locked(pathlib.Path({str(folder)!r})): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.skipif(os.name != "posix", reason="the lock is POSIX's")
def test_two_runs_do_not_share_a_folder_and_a_dead_one_lets_go(quick_report, class_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(class_folder, out, "--epochs", 1) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    first = held_by_another_process(out, tmp_path)
    try:
        for flags in ([], ["--overwrite"], ["--resume-from", "auto"]):
            capsys.readouterr()
            assert train(class_folder, out, "--epochs", 2, *flags) == 2
            said, error = capsys.readouterr()
            assert f"in use by another run (process {first.pid} on" in error and "results" not in error
            assert "resuming" not in said
        after = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
        assert {**after, ".lock": b""} == {**before, ".lock": b""}
    finally:
        first.kill()
        first.communicate()
    assert train(class_folder, out, "--epochs", 2, "--overwrite") == 0


@pytest.mark.skipif(os.name != "posix", reason="the lock is POSIX's")
@pytest.mark.parametrize(("silent_seconds", "waits"), [(0.1, 1), (60, 0)])
def test_it_is_said_when_another_run_keeps_the_folder_long(
    tmp_path, monkeypatch, capsys, silent_seconds, waits
):
    monkeypatch.setattr(outputs, "SILENT_SECONDS", silent_seconds)
    first = contextlib.ExitStack()
    first.enter_context(outputs.locked(tmp_path))
    threading.Timer(0.5, first.close).start()
    with outputs.locked(tmp_path, wait=True):
        said = capsys.readouterr().out
    assert said.count(f"in use by another run (process {os.getpid()} on") == said.count("waiting") == waits


def test_a_folder_in_use_is_told_from_others_though_there_are_more_mistakes():
    """An entry of a comparison writes no failure into it."""

    def refuses(kind):
        raise kind("no")

    for kinds in ([UserError, outputs.InUse], [outputs.InUse, UserError]):
        with pytest.raises(outputs.InUse, match="no\nno"):
            all_of(*(partial(refuses, kind) for kind in kinds))


@pytest.mark.skipif(os.name != "posix", reason="the lock is POSIX's")
def test_the_same_comparison_once_more_does_not_spoil_the_one_that_runs(two_entries, tmp_path, capsys):
    shutil.copytree(two_entries / "out", tmp_path / "out")
    entry = tmp_path / "out" / "02_unnamed"
    (entry / "report.html").unlink()  # the entry is in its last epoch
    arguments = [two_entries / "data", tmp_path / "out", two_entries / "entries.json"]
    first = held_by_another_process(entry, tmp_path)
    try:
        assert compare(*arguments) == 1
        assert "02_unnamed is in use by another run" in capsys.readouterr().out
    finally:
        first.kill()
        first.communicate()
    (entry / "report.html").write_text("-")
    assert compare(*arguments) == 0
    rows = json.loads((tmp_path / "out" / "leaderboard.json").read_text("utf-8"))
    assert [row["status"] for row in rows] == ["finished", "finished"]


def test_an_entry_that_failed_before_anything_was_trained_may_be_mended(two_entries, tmp_path, monkeypatch):
    file, data = tmp_path / "entries.json", two_entries / "data"

    def entries(decay):
        file.write_text(json.dumps([{"name": "good"}, {"name": "mended", "weight_decay": decay}]))

    def diverges(*_, **__):
        raise UserError("lower --learning-rate")

    entries(1e-2)
    assert compare(data, tmp_path / "out", file, "--config-index", 1) == 0
    monkeypatch.setattr("training.one_split.fit", diverges)
    assert compare(data, tmp_path / "out", file) == 1
    monkeypatch.undo()
    finished = (tmp_path / "out" / "01_good" / "history.json").read_bytes()
    entries(1e-4)
    assert compare(data, tmp_path / "out", file) == 0
    assert (tmp_path / "out" / "01_good" / "history.json").read_bytes() == finished
    record = json.loads((tmp_path / "out" / "02_mended" / "config.json").read_text("utf-8"))
    assert record["weight_decay"] == 1e-4


def test_a_changed_option_of_a_finished_entry_is_refused_with_the_way_out(two_entries, tmp_path, capsys):
    file = tmp_path / "entries.json"
    first = json.loads((two_entries / "entries.json").read_text("utf-8"))[0]
    file.write_text(json.dumps([first, {"name": "🫁", "save_best": False}]), "utf-8")
    assert compare(two_entries / "data", two_entries / "out", file) == 2
    error = capsys.readouterr().err
    assert "entry 2: " in error and "--no-save-best not given there, given now" in error
    assert "with --config-index N it replaces entry N alone" in error


@pytest.mark.skipif(os.name != "posix", reason="the lock is POSIX's")
def test_a_fold_in_training_is_left_alone(quick_report, class_folder, tmp_path, capsys):
    out, flags = tmp_path / "out", ["--epochs", 1, "--use-cv", "--n-splits", 2]
    (out / "fold_2").mkdir(parents=True)
    other_job = held_by_another_process(out / "fold_2", tmp_path)
    try:
        assert train(class_folder, out, *flags, "--fold", 1) == 0  # other folds may be trained meanwhile
        before = {
            file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != ".lock"
        }
        assert train(class_folder, out, *flags, "--overwrite", "--random-state", 2) == 2
        assert all(file.read_bytes() == content for file, content in before.items())
        capsys.readouterr()
        assert train(class_folder, out, *flags, "--fold", 2) == 2
        assert "fold_2 is in use by another run" in capsys.readouterr().err
    finally:
        other_job.kill()
        other_job.communicate()
    assert train(class_folder, out, *flags, "--fold", 2) == 0


@pytest.mark.parametrize("others", [["--random-state", 2], ["--loss", "ce"]])
def test_folds_that_start_together_with_other_options_are_not_mixed(
    class_folder, tmp_path, monkeypatch, capsys, others
):
    """The second job starts, and trains its fold, while the first reads its images."""
    out, flags = tmp_path / "out", ["--epochs", 1, "--use-cv", "--n-splits", 2]
    read = begin.read_images

    def meanwhile(*arguments, **options):
        monkeypatch.undo()
        assert train(class_folder, out, *flags, "--fold", 1) == 0
        return read(*arguments, **options)

    monkeypatch.setattr(begin, "read_images", meanwhile)
    assert train(class_folder, out, *flags, "--fold", 2, *others) == 2
    assert f"{others[0]} " in capsys.readouterr().err
    before = (out / "config.json").read_bytes(), (out / "splits.json").read_bytes()
    assert train(class_folder, out, *flags, "--fold", 2) == 0
    assert before == ((out / "config.json").read_bytes(), (out / "splits.json").read_bytes())


@pytest.mark.parametrize("moment", ["once its splits are read", "before its fold is locked"])
def test_a_folder_that_another_run_has_taken_is_left_to_it(
    class_folder, tmp_path, monkeypatch, capsys, moment
):
    """A single run replaces the beginning of a cross-validation, which no checkpoint or lock keeps yet."""
    out, flags = tmp_path / "out", ["--epochs", 1, "--use-cv", "--n-splits", 2]
    locked, files = cross_validation.locked, {}

    def take_it(*_):
        monkeypatch.undo()
        assert train(class_folder, out, "--epochs", 1) == 0
        files.update({file: file.read_bytes() for file in out.rglob("*") if file.name != ".lock"})

    @contextlib.contextmanager
    def locking(folder, wait=False):
        with locked(folder, wait):
            yield
        take_it()

    def killed(*_, **__):
        raise KeyboardInterrupt

    if moment == "once its splits are read":  # by a job that goes on with what another had begun
        monkeypatch.setattr(cross_validation, "train_on_split", killed)
        assert train(class_folder, out, *flags) == 130
        monkeypatch.setattr(cross_validation, "print_findings", take_it)
    else:
        monkeypatch.setattr(cross_validation, "locked", locking)
    assert train(class_folder, out, *flags) == 2
    error = capsys.readouterr().err
    assert "holds a run with other options" in error or "taken by another run" in error
    assert all(file.read_bytes() == content for file, content in files.items()) and files


def test_folds_of_two_splits_make_no_summary(class_folder, tmp_path, capsys):
    flags = ["--epochs", 1, "--use-cv", "--n-splits", 2]
    for name, seed in (("out", 1), ("other", 2)):
        assert train(class_folder, tmp_path / name, *flags, "--fold", 1, "--random-state", seed) == 0
    shutil.copytree(tmp_path / "other" / "fold_1", tmp_path / "out" / "fold_2")
    assert train(class_folder, tmp_path / "out", *flags, "--random-state", 1) == 1
    assert "do not predict each image once" in capsys.readouterr().err
    assert not (tmp_path / "out" / "cv_summary.json").exists()


def test_what_a_killed_writer_left_is_removed(quick_report, class_folder, tmp_path):
    (tmp_path / "out" / "figures").mkdir(parents=True)
    left_over = tmp_path / "out" / ".checkpoint_latest.pth.123.abc.tmp"
    of_a_picture = tmp_path / "out" / "figures" / ".roc.svg.123.abc.tmp"
    for file in (left_over, of_a_picture):
        file.write_bytes(b"half")
    assert train(class_folder, tmp_path / "out", "--epochs", 1) == 0
    assert not left_over.exists() and not of_a_picture.exists()


def test_auto_starts_where_there_is_nothing_and_continues_where_there_is_something(
    class_folder, tmp_path, capsys
):
    out, flags = tmp_path / "out", ["--resume-from", "auto"]
    assert train(class_folder, out, "--epochs", 1, *flags) == 0
    assert "resuming" not in capsys.readouterr().out
    assert train(class_folder, out, "--epochs", 2, *flags) == 0
    assert "resuming after epoch 1 of 2" in capsys.readouterr().out
    assert train(class_folder, out, "--epochs", 2, *flags) == 0
    assert "resuming after epoch 2 of 2: it is trained to its end already" in capsys.readouterr().out
    assert train(class_folder, tmp_path / "whole", "--epochs", 2) == 0
    histories = [json.loads((folder / "history.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert len(histories[0]["val_acc"]) == len(histories[1]["val_acc"]) == 2
    assert main(["--data-dir", str(class_folder), "--output-dir", str(out), "--overwrite", *flags]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_auto_changes_nothing_where_the_same_command_continues(class_folder, tmp_path, capsys):
    flags = ["--epochs", 1, "--use-cv", "--n-splits", 2, "--resume-from", "auto"]
    assert train(class_folder, tmp_path / "out", *flags) == 0
    assert train(class_folder, tmp_path / "out", *flags) == 0
    assert "fold 1 of 2 is finished already" in capsys.readouterr().out


def test_what_jobs_of_several_folds_share_is_written_by_one_at_a_time(class_folder, tmp_path, monkeypatch):
    """A job removes what killed ones left half-written, so it must never meet another's file half-written."""
    out, write, alone = tmp_path / "out", os.replace, []

    def noting(source, target):
        if Path(target).parent in (out, out / "figures"):
            code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
            held = subprocess.run([sys.executable, "-c", code, out / ".lock"], stderr=subprocess.DEVNULL)
            alone.append((Path(target).name, held.returncode != 0))
        write(source, target)

    monkeypatch.setattr(os, "replace", noting)
    flags = ["--epochs", 1, "--use-cv", "--n-splits", 2, "--freeze-text-encoder"]
    assert train(class_folder, out, *flags, "--fold", 1) == 0
    left_over = out / ".cv_summary.json.123.abc.tmp"
    left_over.write_bytes(b"half")
    assert train(class_folder, out, *flags, "--fold", 2) == 0
    assert not left_over.exists()
    assert {name for name, _ in alone} > {"config.json", "frozen_text_tower.pth", "cv_summary.json"}
    assert all(held for _, held in alone), alone
