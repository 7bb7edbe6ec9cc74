"""A trained model as files that need this program no more: ONNX, safetensors, and a model card.

Each function makes the bytes of one file; nothing is written before the ONNX file has given PyTorch's
answers.
"""

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import RunFailed, UserError, first_line
from evaluation.model_card import model_card
from evaluation.predict import class_logits
from evaluation.trained import TrainedModel

OPSET = 18  # what PyTorch's exporter writes natively, and every onnxruntime since 1.14 (2023) loads
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 3)
MOST_BYTES = 2**31 - 2**26  # an ONNX file is one message of less than 2 GiB
ONNX, WEIGHTS = "model.onnx", "model.safetensors"
FILES = {"onnx": (ONNX, f"{ONNX}.json"), "safetensors": (WEIGHTS, "config.json")}
CARD = "README.md"
_LIBRARIES = ("torch", "timm", "numpy", "pillow", "onnx", "onnxscript", "onnxruntime", "safetensors")
# Where files lie says nothing about the model, and the names may not be meant for others.
_PLACES = frozenset(
    {
        "data_dir", "output_dir", "val_dir", "groups_file", "class_texts_file", "cache_dir", "resume_from",
        "config_file", "config_index", "multi_config", "overwrite", "gpu_id", "num_workers", "fold",
    }
)  # fmt: skip


def exported_files(
    trained: TrainedModel, formats: Sequence[str], run: Mapping[str, Any]
) -> tuple[dict[str, bytes], float | None]:
    """File name -> content, and the largest difference of the ONNX file's answers from PyTorch's.

    trained: on the CPU. run: what is known of the run, see `evaluation.model_card`. Raises RunFailed when the
    ONNX file does not answer as PyTorch does.
    """
    files: dict[str, bytes] = {}
    difference = None
    if "onnx" in formats:
        files[ONNX] = onnx_file(trained)
        difference = check_onnx(files[ONNX], trained)
        record = {**description(trained), "files": {ONNX: sha256(files[ONNX])}}
        record["checked"] = {
            "against": f"PyTorch {torch.__version__}, float32",
            "batch_sizes": list(CHECKED_BATCHES),
            "largest_difference": difference,
        }
        files[f"{ONNX}.json"] = as_json(record)
    if "safetensors" in formats:
        files[WEIGHTS] = safetensors_file(trained)
        record = {**description(trained), "files": {WEIGHTS: sha256(files[WEIGHTS])}}
        record["tensors"] = (
            "image_tower.backbone.*: the image encoder; image_projection.weight (D, features); logit_scale: "
            "log of 1 / temperature; class_features (C, D), of unit length, in the order of classes"
        )
        files["config.json"] = as_json(record)
    files[CARD] = model_card(description(trained), run, tuple(files), difference).encode()
    return files, difference


def as_json(record: Any) -> bytes:
    return (json.dumps(record, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode()


def sha256(content: bytes) -> dict[str, str | int]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def description(trained: TrainedModel) -> dict[str, Any]:
    """What is needed to use or to rebuild the model: architecture, classes, sentences, preprocessing."""
    config, tower = trained.facts["config"], trained.model.image_tower
    return {
        "schema": 1,
        "classes": list(trained.classes),
        "class_texts": {name: list(own) for name, own in trained.class_texts.items()},
        "image_encoder_name": config["image_encoder_name"],
        "text_encoder_name": _without_folders("text_encoder_name", config["text_encoder_name"]),
        "img_size": trained.img_size,
        "embed_dim": trained.class_features.shape[1],
        "num_features": tower.num_features,
        "temperature": float(torch.exp(-trained.model.logit_scale.detach())),
        "epoch": trained.facts["epoch"],
        "input": {
            "name": "images",
            "shape": ["N", 3, trained.img_size, trained.img_size],
            "dtype": "float32",
            "range": [0, 255],
            "channels": "RGB",
        },
        "outputs": {
            "probs": {
                "shape": ["N", len(trained.classes)],
                "meaning": "softmax over classes, in their order",
            },
            "image_features": {"shape": ["N", trained.class_features.shape[1]], "meaning": "unit length"},
        },
        "preprocessing": preprocessing(trained),
        "training_options": {
            name: _without_folders(name, value) for name, value in config.items() if name not in _PLACES
        },
        "changed_on_resume": trained.facts.get("changed_on_resume", []),
        "versions": {"python": platform.python_version(), **{n: metadata.version(n) for n in _LIBRARIES}},
    }


def preprocessing(trained: TrainedModel) -> dict[str, Any]:
    """From a file to the input `images`, step by step, as training, validation and prediction do it."""
    tower, size = trained.model.image_tower, trained.img_size
    return {
        "1_read": "JPEG, PNG, BMP, TIFF, WebP or DICOM of one frame, no 16-bit colour; EXIF orientation is "
        "applied; palettes are expanded; transparency is composed on black",
        "2_to_8_bit": "grey of more than 8 bits, and float: (pixel - minimum) * 255 / (maximum - minimum) of "
        "this image, rounded half to even; a constant image is 0. 8 bits stay as they are. DICOM: modality "
        "LUT, VOI LUT, then this scaling (for grey of any depth), then 255 - pixel for MONOCHROME1",
        "3_colour": "RGB; grey is repeated in all three channels",
        "4_resize": f"the whole image to {size} x {size} pixels, whatever its aspect; nothing is cropped or "
        "padded; bicubic with antialiasing on 8-bit pixels: Pillow's Image.resize(size, Resampling.BICUBIC)",
        "5_layout": f"float32 (N, 3, {size}, {size}), values 0 to 255, not divided",
        "6_normalisation": "inside the ONNX graph, per channel: (pixel / 255 - mean) / std; do not repeat it",
        "mean": list(tower.mean),
        "std": list(tower.std),
    }


def _without_folders(option: str, value: Any) -> Any:
    """Of an option that may be a path the path's last part; a hub's id such as hfl/some-model stays whole."""
    is_path = option in ("image_weights", "text_weights") and isinstance(value, str)
    if option == "text_encoder_name":  # os.path, not Path: it answers for any name
        is_path = os.path.isabs(value) or value.count("/") > 1 or "\\" in value or os.path.exists(value)
    return PureWindowsPath(value).name if is_path else value  # it takes both kinds of slashes


class _Graph(nn.Module):
    """What the ONNX file computes: images (N, 3, S, S) float32 0..255 -> probs (N, C), features (N, D)."""

    def __init__(self, trained: TrainedModel):
        super().__init__()
        self.model = trained.model
        self.register_buffer("class_features", trained.class_features)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image_features = self.model.encode_image(images)
        return self.model.logits(image_features, self.class_features).softmax(dim=1), image_features


@torch.no_grad()
def onnx_file(trained: TrainedModel) -> bytes:
    """Image tower, projection, class features and softmax as one graph for any number of images.

    The class names are in its metadata, as JSON under "classes". Raises UserError when it is too large.
    """
    weights = sum(t.numel() * t.element_size() for t in trained.model.state_dict().values())
    if weights > MOST_BYTES:
        raise UserError(
            f"the model holds {weights / 2**30:.1f} GiB and an ONNX file at most 2; use --format safetensors"
        )
    graph = _Graph(trained).eval()
    example = torch.zeros(2, 3, trained.img_size, trained.img_size)
    graph(example)  # what a tower computes once and keeps must be real numbers, not the exporter's stand-ins
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about PyTorch's own insides
            program = torch.onnx.export(
                graph, (example,), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=["images"], output_names=["probs", "image_features"],
                dynamic_shapes={"images": {0: torch.export.Dim("N")}},
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise RunFailed(
            f"the image encoder {trained.facts['config']['image_encoder_name']} cannot be written as ONNX: "
            f"{first_line(error)}; use --format safetensors"
        ) from None
    proto = program.model_proto
    for node in proto.graph.node:  # they would tell where on this machine the program lies
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for key, value in (("classes", list(trained.classes)), ("img_size", trained.img_size)):
        proto.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    return proto.SerializeToString()


@torch.no_grad()
def check_onnx(content: bytes, trained: TrainedModel) -> float:
    """The largest difference of onnxruntime's answers from PyTorch's, of images of several kinds.

    Raises RunFailed when it is above TOLERANCE, or when onnxruntime cannot run the file.
    """
    import onnxruntime

    largest = 0.0
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        for batch in CHECKED_BATCHES:
            images = example_images(batch, trained.img_size)
            found = session.run(["probs", "image_features"], {"images": images.numpy()})
            off = torch.autocast("cpu", enabled=False)
            logits = class_logits(trained.model, trained.class_features, images, off)
            expected = (logits.double().softmax(1), trained.model.encode_image(images))
            for ours, theirs in zip(expected, found, strict=True):
                gap = np.abs(ours.numpy() - theirs).max() if ours.shape == theirs.shape else np.inf
                largest = max(largest, float(gap) if np.isfinite(gap) else np.inf)
    except Exception as error:  # onnxruntime has its own kinds
        raise RunFailed(f"onnxruntime cannot run the exported model: {first_line(error)}") from None
    if largest > TOLERANCE:
        raise RunFailed(
            f"the exported model does not answer as PyTorch does: they differ by {largest:.2e}, and "
            f"{TOLERANCE:g} is allowed; use --format safetensors, and report it with the image encoder's name"
        )
    return largest


def example_images(count: int, size: int) -> torch.Tensor:
    """(count, 3, size, size) float32 whole numbers 0..255: seeded noise, then a smooth and a flat image."""
    random = torch.Generator().manual_seed(count)
    noise = torch.rand((count, 3, size, size), generator=random)
    coarse = torch.rand((count, 3, 4, 4), generator=random)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    flat = noise.mean((2, 3), keepdim=True).expand_as(noise)
    kinds = torch.stack([noise, smooth, flat])  # (3, count, 3, size, size)
    return torch.stack([kinds[i % 3, i] for i in range(count)]).mul(255).round()


def safetensors_file(trained: TrainedModel) -> bytes:
    """The tensors of the image tower, its projection and the scale, and class_features; see "tensors" in the
    config.json beside it.
    """
    from safetensors.torch import save

    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format)  # a copy: none may share its memory
        for name, value in trained.model.state_dict().items()
        if not name.startswith("text_")
    }
    tensors["class_features"] = trained.class_features.clone()
    return save(
        tensors, metadata={"format": "pt", "classes": json.dumps(trained.classes, ensure_ascii=False)}
    )
