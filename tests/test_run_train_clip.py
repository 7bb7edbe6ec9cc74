"""run_train_clip.sh, with a stand-in for the interpreter that records what it is asked to train."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from training.config import Config
from training.options import make_config, options_from_flags, resolve_auto

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")

# Checks with -c run in the real interpreter. Of a training only the arguments are kept, separated by 0x1f;
# HANG: it says that it has started and stays; FAIL: the --config-index that fails.
INTERPRETER = r"""#!/usr/bin/env bash
if [ "$1" = -c ]; then
    if [ "$2" = "import pip" ]; then exit 0; fi
    if [ -n "${HANG:-}" ]; then echo "$COUNT"; exit; fi
    if [ "$4" != --output ]; then exec "$REAL" "$@"; fi # the demo is not drawn
fi
(IFS=$'\x1f'; printf '%s\n' "$*" >>"$STAGE/calls")
pwd >>"$STAGE/folders"
if [[ "$1" != */train_clip.py ]]; then exit 0; fi
if [ -n "${HANG:-}" ]; then echo $$ >"$STAGE/started"; exec sleep 600; fi
while [ $# -gt 0 ]; do
    if [ "$1" = --output-dir ]; then mkdir -p "$2"; echo old >"$2/leaderboard.csv"; fi
    if [ "$1" = --config-index ] && [ "$2" = "${FAIL:-}" ]; then exit 1; fi
    shift
done
exit "${CODE:-0}"
"""
TWO = "0 -1"  # which every machine has
ENTRIES = [
    {"image_encoder_name": "resnet18"},
    {"image_encoder_name": "vit"},
    {"image_encoder_name": "resnet50"},
]


class Stage:
    """A copy of the script in a folder without data, its virtual environment, and where it is called from."""

    def __init__(self, folder: Path):
        self.folder, self.project, self.cwd = folder, folder / "the project 在", folder / "elsewhere 在"
        (folder / "venv" / "bin").mkdir(parents=True)
        self.project.mkdir()
        self.cwd.mkdir()
        shutil.copy(ROOT / "run_train_clip.sh", self.project)
        for name in ("common", "data", "evaluation", "models", "training", "requirements.txt"):
            (self.project / name).symlink_to(ROOT / name)
        shutil.copy(ROOT / "requirements.txt", folder / "venv" / ".fits-requirements.txt")
        (folder / "venv" / "bin" / "python").write_text(INTERPRETER, encoding="utf-8")
        (folder / "venv" / "bin" / "python").chmod(0o755)

    def start(self, *flags: str, **variables: object) -> subprocess.Popen:
        own = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        own |= {"VENV": str(self.folder / "venv"), "REAL": sys.executable, "STAGE": str(self.folder)}
        own |= {"PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.Popen(
            ["bash", str(self.project / "run_train_clip.sh"), *flags],
            cwd=self.cwd,
            env=own | {name: str(value) for name, value in variables.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where pytest ignores it
        )

    def run(self, *flags: str, **variables: object) -> tuple[int, str, str]:
        process = self.start(*flags, **variables)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [line.split("\x1f") for line in lines]

    def called_in(self) -> set[str]:
        return set((self.folder / "folders").read_text(encoding="utf-8").splitlines())

    def trained(self) -> list[dict[str, str]]:
        """Per training: flag -> the word after it."""
        return [
            dict(zip(call, [*call[1:], ""], strict=True))
            for call in self.calls()
            if Path(call[0]) == self.project / "train_clip.py"
        ]

    def config_file(self, content: str) -> Path:
        path = self.cwd / "configs.json"
        path.write_text(content, encoding="utf-8")
        return path


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


def refused(stage: Stage, *flags: str, **variables: object) -> list[str]:
    """The lines of the refusal: all are errors, the exit code is 2, and nothing was trained."""
    code, _, err = stage.run(*flags, **variables)
    lines = err.splitlines()
    assert code == 2
    assert lines and all(line.startswith("error: ") for line in lines), err
    assert stage.calls() == []
    return lines


# One run


def test_without_data_the_demo_is_drawn_and_trained(stage):
    code, out, err = stage.run()
    assert (code, err) == (0, "")
    assert stage.called_in() == {str(stage.cwd)}
    _, code, *arguments = stage.calls()[0]
    assert "from data.demo import main" in code
    assert arguments == [str(stage.project), "--output", "demo_data_synthetic"]
    (flags,) = stage.trained()
    assert flags["--text-encoder"] == "bert-tiny-bytes"
    assert flags["--text-template"] == "这是一张{class_name}的胸部X光图像"
    assert flags["--group-pattern"] == r"^(P\d+)_"
    assert flags["--output-dir"] == "checkpoints/clip_models/demo"
    assert "That was the demo" in out


def test_paths_are_meant_from_where_the_command_is_given(stage):
    names = {"DATA_DIR": "images", "OUTPUT_DIR": "out", "GROUPS_FILE": "g.csv", "CLASS_TEXTS_FILE": "t.json"}
    code, out, _ = stage.run("--val-dir", "val", TEXT_ENCODER="mybert", **names)
    assert code == 0
    assert "demo" not in out
    (flags,) = stage.trained()
    for flag, path in (
        ("--data-dir", "images"),
        ("--output-dir", "out"),
        ("--groups-file", "g.csv"),
        ("--class-texts-file", "t.json"),
        ("--text-encoder", "mybert"),
        ("--val-dir", "val"),
    ):
        assert flags[flag] == path
    assert stage.called_in() == {str(stage.cwd)}


@pytest.mark.parametrize("shards", ["https://store.example/x-{000..009}.tar", "pipe:cat x.tar"])
def test_data_that_is_no_folder_is_named_as_it_is(stage, shards):
    assert stage.run(DATA_DIR=shards)[0] == 0
    assert stage.trained()[0]["--data-dir"] == shards


def test_single_label_data_is_looked_for_where_the_command_is_given(stage):
    (stage.cwd / "single_label_data").mkdir()
    code, out, _ = stage.run()
    assert (code, stage.trained()[0]["--data-dir"]) == (0, "single_label_data")
    assert "demo" not in out


def test_packages_of_the_user_are_not_taken_for_the_program_s(stage):
    for name in ("common", "training"):
        (stage.cwd / name).mkdir()
        (stage.cwd / name / "__init__.py").touch()
    stage.config_file(json.dumps(ENTRIES))
    assert stage.run(DATA_DIR="i", GPU_IDS=TWO, CONFIG_FILE="configs.json")[::2] == (0, "")
    assert len(stage.trained()) == 3


def test_the_training_s_exit_code_is_the_script_s(stage):
    assert stage.run(DATA_DIR="images", CODE=3)[0] == 3


def configs(stage: Stage) -> list[Config]:
    """What train_clip.py makes of each training's options, in the folder it is called in."""
    return [
        make_config(resolve_auto(options_from_flags(call[1:])))
        for call in stage.calls()
        if Path(call[0]).name == "train_clip.py"
    ]


@pytest.mark.parametrize("checkpoint", ["checkpoint_latest.pth", "checkpoint_previous.pth"])
def test_the_same_command_resumes_where_there_is_a_checkpoint(stage, monkeypatch, checkpoint):
    monkeypatch.chdir(stage.cwd)
    Path("out").mkdir()
    Path("out/config.json").write_text("{}")  # interrupted before the first epoch was over: nothing to resume
    for flags in ((), ("--overwrite",), ("--output-dir", "elsewhere"), ("--resume-from", "other.pth")):
        assert stage.run(*flags, DATA_DIR="images", OUTPUT_DIR="out")[0] == 0
    assert [config.resume_from for config in configs(stage)] == [None, None, None, "other.pth"]
    assert [config.overwrite for config in configs(stage)] == [False, True, False, False]
    for folder in ("out", "elsewhere"):
        Path(folder, checkpoint).touch()
    latest = [str(Path(folder, "checkpoint_latest.pth")) for folder in ("out", "elsewhere")]
    assert [config.resume_from for config in configs(stage)] == [latest[0], None, latest[1], "other.pth"]


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        ((), {"USE_CV": 1}),
        (("--use-cv",), {}),
        ((), {"CONFIG_FILE": "configs.json"}),
        ((), {"CONFIG_FILE": "configs.json", "GPU_IDS": TWO}),
        (("--overwrite",), {"CONFIG_FILE": "configs.json", "GPU_IDS": TWO}),
    ],
)
def test_what_continues_by_itself_is_given_no_checkpoint(stage, monkeypatch, flags, variables):
    monkeypatch.chdir(stage.cwd)
    stage.config_file(json.dumps(ENTRIES))
    Path("out").mkdir()
    Path("out/checkpoint_latest.pth").touch()
    assert stage.run(*flags, DATA_DIR="images", OUTPUT_DIR="out", **variables)[0] == 0
    found = configs(stage)
    assert len(found) == (3 if "GPU_IDS" in variables else 1)
    assert all(config.resume_from is None for config in found)
    assert all(config.overwrite == ("--overwrite" in flags) for config in found)


@pytest.mark.parametrize("value", ["1", "true", "YES", "On"])
def test_use_cv_on(stage, value):
    assert stage.run(DATA_DIR="images", USE_CV=value, N_SPLITS="3")[0] == 0
    (flags,) = stage.trained()
    assert "--use-cv" in flags
    assert flags["--n-splits"] == "3"


@pytest.mark.parametrize("value", ["0", "False", "no", "OFF", ""])
def test_use_cv_off(stage, value):
    assert stage.run(DATA_DIR="images", USE_CV=value)[0] == 0
    assert "--use-cv" not in stage.trained()[0]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"USE_CV": "ture"}, "USE_CV"),
        ({"USE_CV": " "}, "USE_CV"),
        ({"GPU_IDS": " "}, "GPU_IDS"),
        ({"GPU_IDS": " ", "CONFIG_FILE": "configs.json"}, "GPU_IDS"),
        ({"GPU_IDS": "0 x"}, "GPU_IDS"),
        ({"GPU_IDS": "cuda:0"}, "GPU_IDS"),
        ({"GPU_IDS": "0 1"}, "CONFIG_FILE"),
    ],
)
def test_variables_that_cannot_be_meant(stage, variables, named):
    stage.config_file(json.dumps(ENTRIES))
    (line,) = refused(stage, DATA_DIR="images", **variables)
    assert named in line


@pytest.mark.parametrize("gpus", ["2", "2,2", " 2 ", "2 02", "-1"])
def test_one_gpu(stage, gpus):
    stage.config_file(json.dumps(ENTRIES))
    assert stage.run(DATA_DIR="images", GPU_IDS=gpus, CONFIG_FILE="configs.json")[0] == 0
    (flags,) = stage.trained()
    assert flags["--gpu-id"] == gpus.replace(",", " ").split()[0]
    assert flags["--config-file"] == "configs.json"
    assert "--multi-config" in flags
    assert "--image-encoder" not in flags


# Side by side


@pytest.mark.parametrize(
    ("content", "gpus", "named"),
    [
        (None, TWO, ["configs.json"]),
        ('{"image_encoder_name": "resnet18"}', TWO, ["array"]),
        ('[{"image_encoder_name": "resnet81"}, {"warmup_epochs": 200}]', TWO, ["entry 1", "entry 2"]),
        ("[{}]", "0 998 999", ["--gpu-id 998 does not exist", "--gpu-id 999 does not exist"]),
    ],
)
def test_every_entry_and_gpu_is_checked_before_a_job_starts(stage, content, gpus, named):
    if content is not None:
        stage.config_file(content)
    lines = refused(stage, DATA_DIR="images", GPU_IDS=gpus, OUTPUT_DIR="out", CONFIG_FILE="configs.json")
    assert len(lines) == len(named)
    assert all(name in line for name, line in zip(named, lines, strict=True))
    assert not (stage.cwd / "out").exists()


@pytest.mark.parametrize("flags", [("--gpu-id", "1"), ("--config-index=2",), ("--output-dir", "x")])
def test_what_the_script_gives_each_job_cannot_be_given_for_all(stage, flags):
    stage.config_file(json.dumps(ENTRIES))
    (line,) = refused(stage, *flags, DATA_DIR="images", GPU_IDS="0 1", CONFIG_FILE="configs.json")
    assert flags[0].split("=")[0] in line


def test_each_entry_is_trained_once_and_the_leaderboard_made_at_the_end(stage):
    stage.config_file(json.dumps([{**ENTRIES[0], "epochs": 7}, *ENTRIES[1:]]))
    code, out, err = stage.run(
        "--loss", "ce", DATA_DIR="i", GPU_IDS=TWO.replace(" ", ","), OUTPUT_DIR="out",
        CONFIG_FILE="configs.json", EPOCHS=5, FAIL=2,
    )  # fmt: skip
    assert code == 1
    assert "configuration 2 failed" in out
    assert err.splitlines() == ["note: --epochs 5 on the command line wins over 7 in the file"]
    trained = stage.trained()
    assert Counter(flags["--config-index"] for flags in trained) == {"1": 1, "2": 1, "3": 1}
    for flags in trained:
        assert (flags["--epochs"], flags["--loss"]) == ("5", "ce")
        assert flags["--gpu-id"] in TWO.split()
    assert sorted(path.name for path in (stage.cwd / "out" / "logs").iterdir()) == [
        f"entry_{i}.log" for i in (1, 2, 3)
    ]
    rows = (stage.cwd / "out" / "leaderboard.csv").read_text(encoding="utf-8-sig").splitlines()
    assert len(rows) == 1 + 3, "not the one that a job wrote"
    assert "03_resnet50_bert-base-chinese: not finished" in out


# Signals


def read_pids(fifo: int, count: int) -> list[int]:
    found = b""
    while found.count(b"\n") < count:
        assert select.select([fifo], [], [], 60)[0], f"{count} trainings were to start, seen: {found!r}"
        found += os.read(fifo, 100)
    return [int(line) for line in found.split()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("gpus", ["0", "0 1"])
def test_no_training_outlives_the_script(stage, gpus, number, code):
    count = len(gpus.split())
    os.mkfifo(stage.folder / "started")
    fifo = os.open(stage.folder / "started", os.O_RDWR)
    pids = []
    try:
        config = {} if count == 1 else {"CONFIG_FILE": stage.config_file("[]")}
        process = stage.start(DATA_DIR="i", OUTPUT_DIR="out", GPU_IDS=gpus, HANG=1, COUNT=3, **config)
        pids = read_pids(fifo, count)
        assert all(is_alive(pid) for pid in pids)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert not any(is_alive(pid) for pid in pids)
        assert len(stage.trained()) == count, "none is started afterwards"
        assert sorted(flags["--gpu-id"] for flags in stage.trained()) == gpus.split()
        assert number == signal.SIGHUP or "the same command" in err
    finally:
        os.close(fifo)
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)
