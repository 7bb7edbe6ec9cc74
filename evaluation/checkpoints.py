"""Checkpoint files: their names, how they are written, how they are read without trusting them.

| file | content |
|---|---|
| checkpoint_latest.pth | everything that changes in training, after an epoch or in the middle of one |
| checkpoint_previous.pth | the latest before that, while the run lasts: what a damaged latest falls back to |
| checkpoint_best.pth | the best epoch's model, for use: no optimizer, no random states |
| frozen_text_tower.pth, frozen_image_tower.pth | a tower that does not change, once per run |

Every file holds a checksum of its content. Nothing is unpickled but tensors and plain values.
"""

import errno
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.checksum import checksum
from common.direct_file import DirectFile
from common.errors import UserError, why_not_loaded
from common.files import whole_file
from common.run_files import LATEST, frozen_beside, frozen_file

# 3 added the checksum and put frozen towers into files of their own; 4 has another checksum; 5 has the
# optimizer's state of those token embeddings alone that are trained
FORMAT = 5
READ = (FORMAT, 4, 3)
DAMAGED = "checkpoint_latest.pth.damaged"  # what a run found as its latest and could not read
TOWERS = ("image_tower", "text_tower")
NOT_FOR_USE = ("optimizer", "scheduler", "scaler", "rng", "in_epoch", "early_stopping")


def used_up(patience: int | None, epochs_without: int) -> bool:
    """Has a run gone so many epochs without improving that early stopping ends it?"""
    return patience is not None and epochs_without >= patience


def write_file(path: Path, content: Mapping[str, Any]) -> str:
    """Write tensors (on the CPU) and plain values with their checksum, whole or not at all. Returns that."""
    # Nothing checks zip's own sums when a file is read, and to compute them costs more than to write it.
    torch.serialization.set_crc32_options(False)
    own = checksum(dict(content))
    with whole_file(path) as new, DirectFile(new) as file:
        torch.save({**content, "checksum": own}, file)
    return own


def _read_file(path: Path) -> dict[str, Any]:
    """Raises many kinds of exceptions for a damaged or foreign file."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, which torch.save does not do")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError("it has no format")
    if content["format"] not in READ:
        known = ", ".join(map(str, sorted(READ)))
        raise ValueError(f"it is of format {content['format']!r}; this version reads {known}")
    if content.pop("checksum", None) != checksum(content):
        raise ValueError("its checksum is wrong: it was changed after it was written")
    return content


def read_checkpoint(
    path: Path,
    option: str = "--resume-from",
    advice: str = "give another one",
    *,
    with_text: bool = True,
) -> dict[str, Any]:
    """Load a checkpoint of this program on the CPU, with its frozen towers from their files beside it or one
    folder above. Without `with_text` a frozen text tower is left out of "model".

    Raises UserError when a file is missing, truncated, damaged, or not one of ours.
    """
    if not path.is_file():
        wrong = "is a folder; give the file in it," if path.is_dir() else "does not exist; give a run's"
        raise UserError(f"{option} {path} {wrong} {LATEST}")
    checkpoint = _read(path, f"{option} {path}", advice)
    wrong = _wrong_parts(checkpoint)
    if wrong:
        raise UserError(
            f"{option} {path} is no checkpoint of this program (it lacks, or has in another form: "
            f"{', '.join(wrong)})"
        )
    for tower, wanted in checkpoint["frozen"].items():
        if tower == "text_tower" and not with_text:
            continue
        file = frozen_beside(path, tower)
        if not file.is_file():
            raise UserError(
                f"{option} {path} was trained with a frozen {tower.replace('_', ' ')}, which is kept once "
                f"in {file.name}; put that file of the run beside it"
            )
        content = _read(file, f"{file}, which belongs to {path},", "restore it")
        if checksum(content) != wanted:
            raise UserError(f"{file} is of another run than {path}; put the file of that run beside it")
        checkpoint["model"] |= content["tower"]
    return checkpoint


def _read(path: Path, named: str, advice: str) -> dict[str, Any]:
    try:
        return _read_file(path)
    except MemoryError:
        raise
    except Exception as error:  # a damaged or foreign file raises many kinds
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # zip's places outside the file
            raise  # the disk or the rights: the file may be whole
        advice = f"; {advice}" if advice else ""
        raise UserError(
            f"{named} is damaged or no checkpoint of this program ({why_not_loaded(error)}){advice}"
        ) from None


def _wrong_parts(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of what a checkpoint lacks or holds in a form that its users do not expect."""
    config, classes, features = (checkpoint.get(key) for key in ("config", "classes", "class_features"))
    config = config if isinstance(config, dict) else {}
    begun = checkpoint.get("in_epoch", {"steps": 0})
    stopping, patience = checkpoint.get("early_stopping", {}), config.get("early_stopping_patience")
    keys = checkpoint.get("image_keys")  # versions before 2026-11-28 kept none

    def texts(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)

    def path(value: Any) -> bool:  # one that the system can look for
        return isinstance(value, str) and not re.search("[\0\ud800-\udc7f\udd00-\udfff]", value)

    def whole(value: Any, low: int, high: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    def tensors(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(own, torch.Tensor) for own in value.values())

    right = {
        **{f"config.{key}": isinstance(config.get(key), str)
           for key in ("image_encoder_name", "text_encoder_name")},
        "config.data_dir": path(config.get("data_dir")),
        "config.val_dir": config.get("val_dir") is None or path(config["val_dir"]),
        "config.img_size": whole(config.get("img_size"), 32, 4096),
        "config.embed_dim": whole(config.get("embed_dim"), 2, 8192),
        "config.temperature": isinstance(config.get("temperature"), (int, float))
        and 0 < config["temperature"] <= 1,
        "config.use_amp": isinstance(config.get("use_amp"), bool),
        "classes": texts(classes) and len(set(classes)) == len(classes),
        "epoch": whole(checkpoint.get("epoch"), 0, 10**9),
        "in_epoch": isinstance(begun, dict) and whole(begun.get("steps"), 0, 10**12),
        "config.early_stopping_patience": patience is None or whole(patience, 1, 10**9),
        "early_stopping": isinstance(stopping, dict) and whole(stopping.get("epochs_without", 0), 0, 10**9),
        "model": tensors(checkpoint.get("model")),
        "frozen": isinstance(checkpoint.get("frozen"), dict)
        and all(tower in TOWERS and isinstance(own, str) for tower, own in checkpoint["frozen"].items()),
        "history": isinstance(checkpoint.get("history"), dict)
        and all(isinstance(own, list) for own in checkpoint["history"].values()),
        **{key: isinstance(checkpoint.get(key), str) for key in ("dataset_fingerprint", "split_fingerprint")},
        "changed_on_resume": checkpoint.get("changed_on_resume", []) == []
        or texts(checkpoint["changed_on_resume"]),
        "image_keys": keys is None
        or (isinstance(keys, torch.Tensor) and keys.dtype == torch.int64 and keys.ndim == 1),
        "pretrained": isinstance(checkpoint.get("pretrained"), dict)
        and all(isinstance(checkpoint["pretrained"].get(side), list) for side in ("image", "text")),
    }  # fmt: skip
    if right["classes"]:
        own = checkpoint.get("class_texts")
        right["class_texts"] = isinstance(own, dict) and all(texts(own.get(name)) for name in classes)
        if right["in_epoch"] and not begun["steps"]:  # within an epoch there are none
            right["class_features"] = isinstance(features, torch.Tensor) and (
                features.shape == (len(classes), config.get("embed_dim")) and features.is_floating_point()
            )
    return [name for name, is_right in right.items() if not is_right]


def write_frozen_tower(
    folder: Path, tower: str, weights: Mapping[str, torch.Tensor], known_as: str | None
) -> str:
    """Keep a tower that does not change in `folder`, unless it is there; in the format in which `known_as` is
    its checksum, if there is one. Returns the checksum of the file.

    Raises UserError when the folder holds another one: checkpoints there may need it.
    """
    content, file = {"format": FORMAT, "tower": dict(weights)}, folder / frozen_file(tower)
    if not file.exists():
        forms = [content | {"format": form} for form in READ] if known_as else []
        return write_file(file, next((form for form in forms if checksum(form) == known_as), content))
    there = _read(file, str(file), "remove it to start anew")
    own = checksum(there)
    if checksum(content | {"format": there["format"]}) != own:
        raise UserError(
            f"{file} holds other weights than those of this run, and checkpoints there may need them; use "
            "another --output-dir, or --overwrite to start anew"
        )
    return own
