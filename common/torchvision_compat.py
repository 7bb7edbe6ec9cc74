"""Import this before torchvision (or timm, which imports it).

torchvision's wheel on PyPI is built for CUDA. Beside a CPU-only PyTorch its compiled part cannot be loaded,
and `import torchvision` then fails because two operators it describes were never declared. Transforms and
models need neither operator, so declaring their schemas is enough. On an install that fits this module does
nothing.
"""

import importlib.util
from pathlib import Path

import torch

_OPERATORS = ("nms", "qnms")


def _compiled_part_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # not installed: let its import say so
    for library in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return True


if not _compiled_part_loads():
    _library = torch.library.Library("torchvision", "DEF")  # must stay referenced, or the schemas vanish
    for _name in _OPERATORS:
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
