"""Class probabilities of images: the one path for validation, test and prediction.

`predict_probs` takes a loader of labelled images. `predict_files` takes files: it decodes them in processes,
lets one or several models answer, and writes rows as they come, so that no number of images fills the memory.
"""

import contextlib
import csv
import io
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from common.distributed import gathered
from common.errors import UserError, first_line, listed
from common.files import path_cell, text_cell, writable, write_whole
from common.progress import progress
from data.images import read_image, to_square
from data.inputs import ImageList
from data.loader import loading_processes, read_ahead, refuse_small_shared_memory
from data.pixels import UnreadableImage
from evaluation.trained import TrainedModel
from models.clip import CLIPModel


def class_logits(
    model: CLIPModel, class_features: torch.Tensor, images: torch.Tensor, autocast: torch.autocast
) -> torch.Tensor:
    """`CLIPModel.logits` of images (B, 3, S, S), on the model's device, and class features (C, D): (B, C).

    The model is left in the mode it was given in; give it in evaluation mode.
    """
    with autocast:
        image_features = model.encode_image(images)  # (B, D)
    return model.logits(image_features, class_features)


@torch.no_grad()
def predict_probs(
    model: CLIPModel,
    class_features: torch.Tensor,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    autocast: torch.autocast,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax of `class_logits` over the C classes, in the loader's order: (N, C) float64 and labels (N,).

    Of several processes each computes its share of every batch, and all get the whole.
    """
    logits, labels = [], []
    for images, batch_labels, _ in progress(loader, "validating"):
        own = class_features.new_empty(0, len(class_features))
        if len(images):  # a small batch may leave some processes without
            own = class_logits(model, class_features, images.to(device, non_blocking=True), autocast)
        logits.append(gathered(own, len(batch_labels)))
        labels.append(batch_labels)
    return torch.cat(logits).double().softmax(dim=1).cpu().numpy(), torch.cat(labels).numpy()


class Decoded(NamedTuple):
    """A batch of files. errors: one per name, "" for the b that were read. images: size -> (b, 3, size, size)
    uint8 of those.
    """

    names: list[str]
    errors: list[str]
    images: dict[int, torch.Tensor]


class _Decoder(Dataset):
    """Reads a list of names, each file once, at every size asked for."""

    def __init__(self, root: Path, sizes: Sequence[int]):
        self.root, self.sizes = root, sizes

    def __getitems__(self, names: list[str]) -> Decoded:
        errors: list[str] = []
        squares: dict[int, list[np.ndarray]] = {size: [] for size in self.sizes}
        for name in names:
            path = _path_of(self.root, name)
            try:
                name.encode()
                image = read_image(path)
                of_sizes = [to_square(image, size) for size in self.sizes]
            except UnicodeEncodeError:
                errors.append("the file's name is not UTF-8; rename it")
            except Exception as error:  # whatever it is, the other images are still wanted
                errors.append(_why_unreadable(path, error))
            else:
                errors.append("")
                for size, square in zip(self.sizes, of_sizes, strict=True):
                    squares[size].append(square)
        # a view: channels last, as the image tower wants it
        images = {
            size: torch.from_numpy(np.stack(own)).permute(0, 3, 1, 2) for size, own in squares.items() if own
        }
        return Decoded(names, errors, images)


def _path_of(root: Path, name: str) -> Path:
    path = root / name
    # a list may come from Windows; but here a folder may also be called so
    return root / name.replace("\\", "/") if os.sep == "/" and not os.path.exists(path) else path


def _why_unreadable(path: Path, error: Exception) -> str:
    # os.path, not Path: it answers for any name; where looking is not allowed there may be a file
    if not os.path.exists(path) and not isinstance(error.__context__, PermissionError):
        return f"there is no such file as {path}"
    if os.path.isdir(path):
        return "it is a folder, not an image"
    return (
        str(error) if isinstance(error, UnreadableImage) else f"{type(error).__name__}: {first_line(error)}"
    )


def decode(
    images: ImageList, sizes: Sequence[int], batch_size: int, num_workers: int, pin_memory: bool
) -> Iterator[Decoded]:
    """The batches in the order of the input; at most two per process are decoded ahead."""
    workers = loading_processes(num_workers) if len(images.names) > 1 else 0
    # few images are shared out among the processes all the same
    batch_size = min(batch_size, math.ceil(len(images.names) / max(1, workers)))
    starts = range(0, len(images.names), batch_size)
    refuse_small_shared_memory(workers, batch_size, *sizes)
    batches = (images.names[i : i + batch_size] for i in starts)
    return iter(read_ahead(_Decoder(images.root, sizes), batches, workers, pin_memory))


class Ensemble:
    """One or several models that score the same C classes; their probabilities are averaged.

    classes: in the first model's order. Raises UserError when the models do not have the same classes.
    """

    def __init__(self, models: Sequence[TrainedModel]):
        self.models = models
        self.classes = models[0].classes
        for other in models[1:]:
            _refuse_other_classes(models[0], other)
        # columns by name: each model's class features in the order of the first one's classes
        self.features = [m.class_features[[m.classes.index(c) for c in self.classes]] for m in models]
        self.sizes = sorted({model.img_size for model in models})
        self.device = models[0].device

    @torch.no_grad()
    def probs(self, images: dict[int, torch.Tensor]) -> np.ndarray:
        """Size -> (B, 3, size, size) uint8, to (M, B, C) float64, one (B, C) per model."""
        images = {size: batch.to(self.device, non_blocking=True) for size, batch in images.items()}
        each = [
            class_logits(m.model, features, images[m.img_size], m.autocast).double().softmax(dim=1)
            for m, features in zip(self.models, self.features, strict=True)
        ]
        return torch.stack(each).cpu().numpy()

    def heat_maps(self, images: dict[int, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """(B, S, S) of the classes `targets` (B,), the mean over the models, at the first one's size S."""
        from evaluation.heatmaps import heat_maps

        size = self.models[0].img_size
        total = 0
        for m, features in zip(self.models, self.features, strict=True):
            batch = images[m.img_size].to(self.device, non_blocking=True)
            maps = torch.as_tensor(heat_maps(m.model, batch, features, targets.to(self.device)))
            if m.img_size != size:
                maps = F.interpolate(maps[:, None], (size, size), mode="bilinear", antialias=True)[:, 0]
            total = total + maps
        return (total / len(self.models)).cpu()


def _refuse_other_classes(first: TrainedModel, other: TrainedModel) -> None:
    only_first = [name for name in first.classes if name not in other.classes]
    only_other = [name for name in other.classes if name not in first.classes]
    if only_first or only_other:
        sides = [
            f"only {path} has {listed(names)}"
            for path, names in ((first.path, only_first), (other.path, only_other))
            if names
        ]
        raise UserError(
            f"--checkpoint {other.path} has other classes than {first.path} ({'; '.join(sides)}), so their "
            "probabilities cannot be averaged; give models of the same classes"
        )


@dataclass
class Tally:
    """What went into a file of predictions. counts, confidences (C,): images predicted as a class, and the
    sum of their probabilities. failures: name and error of the first ten.
    """

    counts: np.ndarray
    confidences: np.ndarray
    n_failed: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _NothingPredicted(Exception):
    """Ends the writing of a file of errors alone, so that none is left."""


def predict_files(
    images: ImageList,
    ensemble: Ensemble,
    output: Path,
    *,
    batch_size: int,
    num_workers: int,
    heat_map_dir: Path | None = None,
) -> Tally:
    """Write one row per image to the CSV `output`, in the order of the input, and heat maps where asked for.

    Columns: path, prediction, probability, spread, prob_<class> ..., error. probability is the predicted
    class's; spread its sample standard deviation over the models, empty for one. A file that cannot be read
    is a row with its error and no numbers. UTF-8 with BOM; the file appears when it is whole, and not where
    no image at all could be predicted: one that was there stays.
    """
    tally = Tally(np.zeros(len(ensemble.classes), np.int64), np.zeros(len(ensemble.classes)))
    started = time.monotonic()

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = csv.writer(text)
        names = [f"prob_{name}" for name in ensemble.classes]
        rows.writerow(["path", "prediction", "probability", "spread", *names, "error"])
        pin_memory = ensemble.device.type == "cuda"
        batches = decode(images, ensemble.sizes, batch_size, num_workers, pin_memory)
        number = 0
        with progress(total=len(images.names), desc="predicting", unit="img") as bar:
            for batch in batches:
                probs = ensemble.probs(batch.images) if batch.images else np.empty((1, 0, 1))
                rows.writerows(_rows(batch, probs, ensemble.classes, tally))
                if heat_map_dir is not None and batch.images:
                    _write_heat_maps(heat_map_dir, number, batch, images.root, ensemble, probs)
                number += len(batch.names)
                bar.update(len(batch.names))
        text.detach()  # the file stays open: write_whole flushes and renames it
        if not tally.counts.any():
            raise _NothingPredicted

    with contextlib.suppress(_NothingPredicted):
        write_whole(output, write)
    tally.seconds = time.monotonic() - started
    return tally


def _rows(
    batch: Decoded, probs: np.ndarray, classes: Sequence[str], tally: Tally
) -> Iterator[list[str | float]]:
    """The cells of each file of the batch; `tally` counts them. probs: (M, b, C)."""
    of_image = iter(probs.transpose(1, 0, 2))  # (M, C) each
    for name, error in zip(batch.names, batch.errors, strict=True):
        own = None if error else next(of_image)
        if own is not None and not np.isfinite(own).all():
            own, error = None, "the model's answer is not a finite number"
        if own is None:
            tally.n_failed += 1
            if len(tally.failures) < 10:
                tally.failures.append(writable(f"{name}: {error}"))
            yield [path_cell(name), "", "", "", *[""] * len(classes), text_cell(error)]
            continue
        mean = own.mean(0)
        c = int(mean.argmax())
        spread = float(own[:, c].std(ddof=1)) if len(own) > 1 else ""
        tally.counts[c] += 1
        tally.confidences[c] += mean[c]
        yield [path_cell(name), text_cell(classes[c]), float(mean[c]), spread, *mean.tolist(), ""]


def heat_map_name(number: int, predicted: str, name: str) -> str:
    """Unique by the image's number, readable by its predicted class and its path, and safe on every file
    system.
    """

    def safe(text: str) -> str:
        return re.sub(r'[\x00-\x1f<>:"/\\|?*]+', "_", writable(text)).strip(" ._")

    # file systems allow 255 bytes
    of_class = safe(predicted).encode()[:90].decode(errors="ignore")
    of_path = safe(os.path.splitext(name)[0]).encode()[-120:].decode(errors="ignore")
    return f"{number:06d}_{of_class}_{of_path}.png"


def _picture(path: Path, square: np.ndarray) -> Image.Image:
    """The image itself, whole, its longer side of 512 to 1024 pixels; the model's square of it where the file
    has gone meanwhile.
    """
    try:
        image = read_image(path)
    except UnreadableImage:
        image = Image.fromarray(square)
    longest = max(image.size)
    scale = min(max(longest, 512), 1024) / longest
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def _write_heat_maps(
    folder: Path, first: int, batch: Decoded, root: Path, ensemble: Ensemble, probs: np.ndarray
) -> None:
    """One overlay per predicted image: its class. first: the number of the batch's first file. probs:
    (M, b, C). The folder is made for the first picture.
    """
    from evaluation.heatmaps import overlay

    predictions, finite = probs.mean(0).argmax(1), np.isfinite(probs).all((0, 2))
    if not finite.any():
        return
    folder.mkdir(parents=True, exist_ok=True)
    maps = ensemble.heat_maps(batch.images, torch.from_numpy(predictions))
    squares = batch.images[ensemble.models[0].img_size].permute(0, 2, 3, 1).numpy()  # (b, S, S, 3)
    read = [i for i, error in enumerate(batch.errors) if not error]
    of_each = zip(read, predictions, finite, squares, maps.numpy(), strict=True)
    for i, target, is_predicted, square, heat in of_each:
        if not is_predicted:
            continue
        picture = _picture(_path_of(root, batch.names[i]), square)
        heat = np.asarray(Image.fromarray(heat).resize(picture.size, Image.Resampling.BILINEAR))
        picture = Image.fromarray(overlay(np.asarray(picture), heat))
        path = folder / heat_map_name(first + i + 1, ensemble.classes[target], batch.names[i])
        write_whole(path, lambda file, picture=picture: picture.save(file, "PNG"))
