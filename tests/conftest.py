"""Shared by all tests: the torchvision workaround first, one thread, small made-up data."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for each other

import common.torchvision_compat  # noqa: F401, I001

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
SHARED = Path(__file__).resolve().parents[2] / "shared"


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
