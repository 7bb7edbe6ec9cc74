"""Checkpoint files: their names, how they are written, how they are read without trusting them.

| file | content |
|---|---|
| checkpoint_latest.pth | everything that changes in training, after an epoch or in the middle of one |
| checkpoint_previous.pth | the latest before that, while the run lasts: what a damaged latest falls back to |
| checkpoint_best.pth | the best epoch's model, for use: no optimizer, no random states |
| frozen_text_tower.pth, frozen_image_tower.pth | a tower that does not change, once per run |

Every file holds a checksum of its content. Nothing is unpickled but tensors and plain values.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, first_line
from common.files import whole_file

FORMAT = 3  # 3 added the checksum and put frozen towers into files of their own
LATEST, PREVIOUS, BEST = "checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
TOWERS = ("image_tower", "text_tower")
NOT_FOR_USE = ("optimizer", "scheduler", "scaler", "rng", "in_epoch", "early_stopping")
_NEEDED = ("config", "classes", "class_texts", "class_features", "model", "frozen", "history", "epoch")


def frozen_file(tower: str) -> str:
    return f"frozen_{tower}.pth"


def checksum(value: Any) -> str:
    """SHA-256 over the tensors (type, shape, numbers) and plain values of nested dicts and lists."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(part, dict):
            digest.update(f"dict{len(part)}".encode())
            for key, own in part.items():
                digest.update(f"{key!r}:".encode())
                add(own)
        elif isinstance(part, (list, tuple)):
            digest.update(f"{'list' if isinstance(part, list) else 'tuple'}{len(part)}".encode())
            for own in part:
                add(own)
        elif part is None or isinstance(part, (bool, int, float, str)):
            digest.update(f"{part!r};".encode("utf-8", "surrogatepass"))
        else:
            raise TypeError(f"a checkpoint holds no {type(part).__name__}")

    add(value)
    return digest.hexdigest()


def write_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors (on the CPU) and plain values with their checksum, whole or not at all."""
    # Nothing checks zip's own sums when a file is read, and to compute them costs more than to write it.
    torch.serialization.set_crc32_options(False)
    with whole_file(path) as new:
        torch.save({**content, "checksum": checksum(dict(content))}, new)


def _read_file(path: Path) -> dict[str, Any]:
    """Raises many kinds of exceptions for a damaged or foreign file."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, which torch.save does not do")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError("it has no format")
    if content["format"] != FORMAT:
        raise ValueError(f"it is of format {content['format']!r}; this version reads {FORMAT}")
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
        raise UserError(f"{option} {path} does not exist; give a run's {LATEST}")
    checkpoint = _read(path, f"{option} {path}", advice)
    missing = [key for key in _NEEDED if key not in checkpoint]
    if missing:
        raise UserError(f"{option} {path} is no checkpoint of this program (it lacks {', '.join(missing)})")
    for tower, wanted in checkpoint["frozen"].items():
        if tower == "text_tower" and not with_text:
            continue
        beside, above = (folder / frozen_file(tower) for folder in (path.parent, path.parent.parent))
        file = beside if beside.is_file() or not above.is_file() else above
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
    except Exception as error:  # a damaged or foreign file raises many kinds
        raise UserError(
            f"{named} is damaged or no checkpoint of this program ({first_line(error)}); {advice}"
        ) from None


def write_frozen_tower(folder: Path, tower: str, weights: Mapping[str, torch.Tensor]) -> str:
    """Keep a tower that does not change in `folder`, unless it is there. Returns the checksum of the file.

    Raises UserError when the folder holds another one: checkpoints there may need it.
    """
    content = {"format": FORMAT, "tower": dict(weights)}
    own, file = checksum(content), folder / frozen_file(tower)
    if not file.exists():
        write_file(file, content)
    elif checksum(_read(file, str(file), "remove it to start anew")) != own:
        raise UserError(
            f"{file} holds other weights than those of this run, and checkpoints there may need them; use "
            "another --output-dir, or --overwrite to start anew"
        )
    return own
