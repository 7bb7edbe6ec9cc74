"""common/venv.sh: what it makes, what it completes, and that it removes nothing of the user's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "common" / "venv.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


@pytest.fixture
def program(tmp_path) -> Path:
    """A folder with venv.sh and a requirements file that asks for nothing."""
    folder = tmp_path / "the program 在"
    (folder / "common").mkdir(parents=True)
    shutil.copy(SCRIPT, folder / "common")
    (folder / "requirements.txt").touch()
    return folder


def set_up(program: Path, **variables: object) -> subprocess.CompletedProcess:
    own = {name: value for name, value in os.environ.items() if name != "VENV"}
    own |= {name: str(value) for name, value in {"PYTHON": sys.executable, **variables}.items()}
    return subprocess.run(
        ["bash", "-euc", 'source "$1/common/venv.sh"; ensure_venv requirements.txt', "bash", str(program)],
        cwd=program.parent,
        env=own,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def has_pip(venv: Path) -> bool:
    return subprocess.run([venv / "bin" / "python", "-c", "import pip"]).returncode == 0


def test_what_an_interruption_left_half_made_is_made_anew(program):
    venv = program / ".venv"
    interrupted = program / "python"
    interrupted.write_text('#!/bin/sh\ncase "$*" in *venv*) mkdir "$4"; touch "$4/half"; exit 1;; esac\n')
    interrupted.chmod(0o755)
    assert set_up(program, PYTHON=interrupted).returncode == 2
    assert (venv / "half").exists()
    done = set_up(program)
    assert (done.returncode, done.stderr) == (0, "")
    assert has_pip(venv) and not (venv / "half").exists()
    before = sorted(program.iterdir())
    (venv / "of the user").touch()
    assert set_up(program).stdout == ""
    assert sorted(program.iterdir()) == before and (venv / "of the user").exists()


def test_a_pip_that_is_half_there_is_made_anew(program):
    half = program / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", half], check=True)
    (site,) = half.glob("lib/python*/site-packages")
    (site / "pip").mkdir()
    (site / "pip" / "__init__.py").touch()
    (program / ".venv.begun").touch()
    (program / "requirements.txt").write_text("# nothing\n")
    assert set_up(program).returncode == 0
    assert (site / "pip" / "__main__.py").exists()


def test_an_environment_made_by_hand_after_an_interruption_is_kept(program):
    (program / ".venv.begun").touch()
    subprocess.run([sys.executable, "-m", "venv", program / ".venv"], check=True)
    (program / ".venv" / "of the user").touch()
    (program / "requirements.txt").write_text("pip\n")
    done = set_up(program)
    assert (done.returncode, done.stdout) == (0, "")  # nothing of what is there already
    assert (program / ".venv" / "of the user").exists() and not (program / ".venv.begun").exists()
    (program / "requirements.txt").write_text("pip==1\n")
    other = set_up(program, PIP_NO_INDEX=1)
    assert other.returncode == 2 and "installing requirements.txt" in other.stdout
    assert "could not install requirements.txt" in other.stderr


def test_a_folder_that_is_no_virtual_environment_is_left_as_it_is(program):
    thesis = program.parent / "thesis"
    (thesis / "bin").mkdir(parents=True)
    (thesis / "chapter 1").write_text("in the beginning")
    done = set_up(program, VENV="thesis")
    assert done.returncode == 2
    assert done.stderr.startswith("error: thesis is no virtual environment") and "VENV" in done.stderr
    assert (thesis / "chapter 1").read_text() == "in the beginning"


def test_a_virtual_environment_without_pip_gets_it_and_keeps_the_rest(program):
    venv = program / "made by uv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "of the user").touch()
    done = set_up(program, VENV=venv)
    assert (done.returncode, done.stderr) == (0, "")
    assert has_pip(venv) and (venv / "of the user").exists()
