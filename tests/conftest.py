"""Shared by all tests: the torchvision workaround first, one thread, small made-up data."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for each other
# decoded images are kept under the user's folder of caches: not the one of whoever runs the tests
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="train_clip_tests_")

import common.torchvision_compat  # noqa: F401, I001

import atexit
import contextlib
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
torch.set_num_threads(1)
# Started in the background of a script, this process ignores Ctrl-C, and so would the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True)
def same_draws():
    """Each test draws the same weights and dropped paths, whichever tests ran before it in this process."""
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """Real images and stand-ins for downloads; absent outside the project's own machines."""
    if not (SHARED / "data").is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED / "data"


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory) -> Path:
    """Three classes with Chinese names, 12 patients x 2 images each; brightness gives the class away."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for c, name in enumerate(("正常", "肺炎", "气胸")):
        (root / name).mkdir()
        for i in range(24):
            grey = np.clip(random.normal(60 + 70 * c, 12, (40, 48)), 0, 255).astype(np.uint8)
            Image.fromarray(grey).save(root / name / f"P{c}{i // 2:02d}_{i % 2}.png")
    return root


@pytest.fixture(scope="module")
def quick_report():
    """Runs end without drawing: report.html is there and says nothing. test_report.py looks at real ones."""
    with _undrawn():
        yield


@contextlib.contextmanager
def _undrawn():
    from quick import write_nothing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.report.write_report", write_nothing)
        yield


@pytest.fixture(scope="session")
def finished(class_folder, tmp_path_factory) -> Path:
    """A finished single run of four epochs, split by patient. Not to be changed: copy it."""
    from quick import train

    output = tmp_path_factory.mktemp("runs") / "中文 run"
    with _undrawn():
        assert train(class_folder, output, "--epochs", 4, "--group-pattern", r"^(P\d+)_") == 0
    return output
