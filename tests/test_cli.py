"""The programs as a user starts them: processes, exit codes, messages, Ctrl-C."""

import contextlib
import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter
from torch.nn.init import constant_, zeros_

import evaluate_clip
import test_clip_model
import train_clip
from common.cli import exit_code_of
from common.files import write_whole
from evaluation.claim import claim_items
from evaluation.run_folder import read_run_folder
from models.clip import build_image_tower
from tests.quick import QUICK, quick_clip, train

ROOT = Path(__file__).resolve().parents[1]


def start(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def run(*arguments):
    process = start(*arguments)
    output, error = process.communicate(timeout=300)
    return process.returncode, output, error


def small(data, output, *more):
    return (
        "train_clip.py", "--data-dir", data, "--output-dir", output, "--text-encoder", "bert-tiny-bytes",
        "--img-size", "32", "--batch-size", "8", "--num-workers", "0", "--gpu-id", "-1", *more,
    )  # fmt: skip


def test_help_imports_nothing_heavy():
    code, output, _ = run("-X", "importtime", "train_clip.py", "--help")
    assert code == 0 and "--early-stopping-monitor" in output
    _, _, imports = run("-X", "importtime", "train_clip.py", "--help")
    assert not re.search(r"\| +(torch|timm|transformers|sklearn|numpy)$", imports, re.MULTILINE)


@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("train_clip", "torch"),
        ("predict_clip", "torch"),
        ("evaluate_clip", "torch"),
        ("generate_class_texts", "numpy"),
        ("data.check", "numpy"),
        ("data.demo", "numpy"),
        ("evaluation.report", "jinja2"),
    ],
)
def test_a_missing_package_is_said_in_one_line(program, package, class_folder, tmp_path):
    given = {
        "train_clip": ["--data-dir", class_folder, "--output-dir", tmp_path / "run"],
        "predict_clip": ["--checkpoint", __file__, "--input", class_folder, "--output", tmp_path / "p.csv"],
        "evaluate_clip": [
            "--checkpoint",
            __file__,
            "--data-dir",
            class_folder,
            "--output-dir",
            tmp_path / "e",
        ],
    }.get(program, [])
    without = f"import sys; sys.modules[{package!r}] = None; import {program}; sys.exit({program}.main())"
    code, _, error = run("-c", without, *given)
    assert code == 1 and "pip install -r requirements.txt" in error and len(error.splitlines()) == 1


def test_a_package_that_training_misses_at_its_end_is_said_with_how_to_go_on(
    class_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "evaluation.report", raising=False)
    monkeypatch.setattr("training.run.run", lambda *_: importlib.import_module("evaluation.report"))
    assert train(class_folder, tmp_path / "run", "--epochs", 1) == 1
    error = capsys.readouterr().err
    assert "has no package 'jinja2'" in error and "nothing was written yet" in error


BAD_DATA = [
    ([], "nowhere", "is not a folder"),
    ([], "empty", "at least two class folders"),
    (["--class-texts-file", "missing.json"], "good", "does not exist"),
    (["--text-template", "no braces"], "good", "lacks {class_name}"),
    (["--image-encoder", "resnet19"], "good", "did you mean 'resnet18'"),
    (["--gpu-id", "99"], "good", "--gpu-id 99 does not exist"),
    (["--group-pattern", "("], "good", "not a regular expression"),
    (["--resume-from", "missing.pth"], "good", "--resume-from missing.pth does not exist"),
    (["--resume-from", "auot"], "good", "--resume-from auot does not exist (did you mean 'auto'?)"),
    (["--use-cv", "--n-splits", "25"], "good", "25 folds need at least 25 images"),
    (["--image-encoder", "resnet18"], "good", "Ways out: (1)"),
]


@pytest.mark.parametrize(("flags", "data", "message"), BAD_DATA)
def test_bad_input_gets_one_clear_message_exit_code_2_and_writes_nothing(
    flags, data, message, class_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "empty").mkdir()
    folder = class_folder if data == "good" else tmp_path / data
    _, *arguments = map(str, small(folder, tmp_path / "out", *flags))
    assert train_clip.main(arguments) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("error: ") == 1 and message in error
    assert "read 72 images" not in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [[], ["--use-cv"]])
def test_all_that_is_wrong_whatever_the_images_is_said_at_once(kind, tmp_path, capsys):
    no_texts, long_name = tmp_path / "list.json", f"{'no' * 200}.csv"
    no_texts.write_text("[]")
    given = {
        "--cache-dir": f"{__file__}/c", "--data-dir": "no-images", "--image-weights": "no.pth",
        "--text-template": "胸片", "--image-encoder": "resnet20", "--text-encoder": "bert",
    }  # fmt: skip
    if kind:
        given |= {"--class-texts-file": no_texts, "--group-pattern": "(P"}
    else:
        given |= {"--class-texts-file": "no.json", "--groups-file": long_name, "--val-dir": "no-more"}
    _, *arguments = small("-", f"{__file__}/out", *(word for pair in given.items() for word in pair), *kind)
    assert train_clip.main(list(map(str, arguments))) == 2
    errors = capsys.readouterr().err.splitlines()
    for flag, value in {**given, "--output-dir": f"{__file__}/out"}.items():
        named = f"unknown {flag[2:].replace('-', ' ')}" if flag.endswith("encoder") else flag
        said = rf"error: {named} '?{re.escape(str(value))}"
        assert sum(re.match(said, line) is not None for line in errors) == 1, flag


@pytest.mark.slow
def test_bad_input_ends_the_program_with_exit_code_2(tmp_path):
    code, output, error = run(*small(tmp_path / "nowhere", tmp_path / "out"))
    assert code == 2 and "is not a folder" in error and "Traceback" not in error and not output


@pytest.mark.slow
def test_ctrl_c_says_how_to_continue_and_the_resumed_run_is_whole(
    class_folder, tmp_path, quick_report, capsys
):
    output = tmp_path / "run"
    process = start(
        "train_clip.py", "--data-dir", class_folder, "--output-dir", output, *QUICK, "--epochs", "40"
    )
    for line in process.stdout:
        if line.startswith("epoch  2/40"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    latest = output / "checkpoint_latest.pth"
    assert f"--resume-from {latest}" in error
    done = len(json.loads((output / "history.json").read_text("utf-8"))["val_acc"])
    assert 2 <= done < 40
    assert train(class_folder, output, "--epochs", done + 2, "--resume-from", latest) == 0
    said = capsys.readouterr().out
    assert re.search(rf"resuming (in epoch {done + 1}|after epoch {done}) of {done + 2}\b", said)
    history = json.loads((output / "history.json").read_text("utf-8"))
    assert {len(values) for values in history.values()} == {done + 2}


def test_a_folder_with_results_is_not_touched_without_being_told(
    class_folder, finished, tmp_path, quick_report, monkeypatch, capsys
):
    out = tmp_path / "一 run"  # what is printed of it can be copied into a shell
    shutil.copytree(finished, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    none = tmp_path / "none"
    with monkeypatch.context() as patch:
        patch.setattr("data.shards.scan_folder", None)  # of a large folder on a network disk it takes minutes
        flags = ["--epochs", 1, "--val-dir", none, "--groups-file", none]
        assert train(class_folder, out, *flags) == 2
    error = capsys.readouterr().err
    assert "holds a run's results" in error and "--overwrite" in error
    assert f"--resume-from '{out}/checkpoint_latest.pth' to continue it" in error
    assert f"--val-dir {none} is not a folder" in error and f"--groups-file {none} does not exist" in error
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert train(class_folder, out, "--epochs", 1, "--overwrite") == 0
    assert f"predict_clip.py --checkpoint '{out}' --input" in capsys.readouterr().out


def test_unreadable_images_are_all_named_or_left_out(class_folder, tmp_path, quick_report, capsys):
    data = tmp_path / "data"
    shutil.copytree(class_folder, data)
    empty = [f"zero{i:02}.png" for i in range(21)]
    for name in empty:
        (data / "正常" / name).write_bytes(b"")
    whole = (data / "肺炎" / "P100_0.png").read_bytes()
    (data / "肺炎" / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert train(data, tmp_path / "run", "--epochs", 1) == 2
    error = capsys.readouterr().err
    assert "22 of 94 images" in error and "zero20.png" in error and "cut.png" in error
    assert f"(python -m data.check --data-dir {data} --output FILE.json names every one" in error
    assert train(data, tmp_path / "run", "--epochs", 1, "--skip-unreadable") == 0
    evaluated = ["--checkpoint", str(tmp_path / "run"), "--data-dir", str(data), "--output-dir"]
    evaluated += [str(tmp_path / "evaluated"), "--gpu-id", "-1", "--num-workers", "0", "--skip-unreadable"]
    assert evaluate_clip.main(evaluated) == 0
    assert capsys.readouterr().out.count("left out 22 unreadable images") == 2
    for folder in (tmp_path / "run", tmp_path / "evaluated"):
        run_folder = read_run_folder(folder)
        named = next(found for found in run_folder.check["findings"] if found["kind"] == "unreadable")
        names = [example.split(": ")[0] for example in named["examples"]]
        assert names == [*(f"正常/{name}" for name in empty), "肺炎/cut.png"]
        assert "empty (0 bytes)" in named["examples"][0]
        assert "excluded: 22 unreadable images" in claim_items(run_folder, None, 0)[34].answer


@pytest.mark.slow
def test_model_check_passes_for_good_encoders_and_fails_for_a_broken_one():
    code, output, _ = run("test_clip_model.py", "resnet18", "starnet_dual_pyramid_rcf", "bert-tiny-bytes")
    assert code == 0 and "3 passed, 0 failed" in output
    assert test_clip_model.main(["resnet19"]) == 2
    assert test_clip_model.main(["timm:nothing"]) == 1


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda tower: None, "1 passed, 0 failed"),
        (lambda tower: tower.register_parameter("spare", Parameter(torch.ones(1))), "gradient, first spare"),
        (lambda tower: constant_(next(tower.parameters()), torch.nan), "FAILED: UserError: features (2, "),
        (lambda tower: setattr(tower, "num_features", 7), "expected finite (2, 7)"),
    ],
)
def test_model_check_refuses_a_tower_without_gradient_numbers_or_its_size(broken, said, monkeypatch, capsys):
    def build(*arguments):
        tower = build_image_tower(*arguments)
        broken(tower)
        return tower

    monkeypatch.setattr("models.clip.build_image_tower", build)
    assert test_clip_model.main(["timm:test_resnet"]) == (said != "1 passed, 0 failed")
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("learns", [True, False])
def test_model_check_trains_a_whole_model(learns, monkeypatch, capsys):
    def build(*arguments, **options):
        model = quick_clip()
        if not learns:
            zeros_(model.image_projection.weight).requires_grad_(False)
        return model

    monkeypatch.setattr("models.clip.build_clip", build)
    monkeypatch.setattr(test_clip_model, "IMAGE_SIZE", 32)
    for kind in ("IMAGE", "TEXT"):  # no encoder by itself
        monkeypatch.setattr(f"models.registry.{kind}_ENCODERS", {})
    assert test_clip_model.main([]) == (not learns)
    assert ("FAILED: UserError: the model does not learn" in capsys.readouterr().out) is not learns


def test_imports_between_packages_run_one_way():
    allowed = {
        "common": {"common"},
        "data": {"common", "data"},
        "models": {"common", "models"},
        "evaluation": {"common", "data", "models", "evaluation"},
        "training": {"common", "data", "models", "evaluation", "training"},
    }
    for package, may in allowed.items():
        for file in (ROOT / package).glob("*.py"):
            found = set(re.findall(r"^\s*(?:from|import) (\w+)", file.read_text("utf-8"), re.MULTILINE))
            assert not (found & set(allowed)) - may, f"{file} imports {(found & set(allowed)) - may}"


@pytest.mark.slow
@pytest.mark.parametrize("first_page", [False, True])
def test_no_network_is_noticed_within_ten_seconds_even_when_the_hub_never_answers(tmp_path, first_page):
    """A socket that accepts and says nothing, for endpoint and mirror alike; or nothing beyond the first
    page, as a proxy may.
    """
    import socket

    opened = []

    def answer_first_pages(server):
        with contextlib.suppress(OSError):  # the test is over
            while True:
                opened.append(server.accept()[0])
                if opened[-1].recv(1000).split()[1:2] in ([b"/"], [b"/mirror"]):
                    opened[-1].sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as silent:
        if first_page:
            threading.Thread(target=answer_first_pages, args=[silent], daemon=True).start()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = (
            "import time, models.weights as w; w.MIRROR = w.MIRROR and '" + endpoint + "/mirror'\n"
            "from common.errors import UserError\n"
            "started = time.monotonic()\n"
            "try: w.fetch_from_hub(['a/b'], ['*'], ['*'], '--image-weights')\n"
            "except UserError as e: print(time.monotonic() - started)\n"
        )
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split()[-1]) < 10 and time.monotonic() - started < 60


def test_output_into_a_program_that_ends_is_said_in_words(class_folder, tmp_path):
    process = start(*small(class_folder, tmp_path / "run", "--image-weights", "none", "--epochs", "50"))
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=300) == 1
    assert "has ended (as head does" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "error, said",
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "has ended (as head does"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk of {}/a.csv (No space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "{}/a.csv (Disk quota exceeded); make room there, or"),
    ],
)
def test_a_closed_pipe_and_a_full_disk_read_alike_in_the_other_programs(error, said, tmp_path, capsys):
    def refuse(file):
        raise error

    assert exit_code_of(lambda: write_whole(tmp_path / "a.csv", refuse), "nothing was written") == 1
    assert said.format(tmp_path) in capsys.readouterr().err
