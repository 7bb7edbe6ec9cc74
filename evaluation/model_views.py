"""The model at work, for the report: its most confident mistakes, and where it puts images and sentences."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.device import Hardware, choose_hardware
from common.errors import UserError, first_line
from data.images import read_image, to_square
from data.pixels import UnreadableImage
from data.shards import Member
from evaluation.heatmaps import heat_maps, overlay
from evaluation.results import Predictions
from evaluation.run_folder import RunFolder
from evaluation.trained import TrainedModel, load_trained

MOST_MISTAKES = 12
MOST_IN_MAP = 2000
PICTURE_SIDE = 224  # pixels of the longer side in the report
_BATCH = 8  # on a CPU larger ones only cost memory


@dataclass(frozen=True)
class Mistake:
    """A wrongly classified image. label, prediction: indices of classes; their probabilities beside them.

    picture, for_prediction, for_label: (h, w, 3) uint8, the image and its heat maps for both classes; None
    where they cannot be had.
    """

    path: str
    fold: int
    label: int
    prediction: int
    label_probability: float
    probability: float
    picture: np.ndarray | None = None
    for_prediction: np.ndarray | None = None
    for_label: np.ndarray | None = None


@dataclass(frozen=True)
class SpaceMap:
    """Images and class sentences on the two main axes of the images' unit vectors.

    points (N, 2) of the images `rows` (N,) of the predictions, sentences (C, 2), shares (2,) of the variance.
    n_images: how many of the fold there are; n_unreadable: how many of those drawn could not be read.
    """

    fold: int
    rows: np.ndarray
    points: np.ndarray
    sentences: np.ndarray
    shares: np.ndarray
    n_images: int
    n_unreadable: int


@dataclass(frozen=True)
class Views:
    """What could be seen, and in `problems` why the rest could not. facts: of the first model loaded."""

    mistakes: list[Mistake]
    n_mistakes: int
    space: SpaceMap | None
    facts: Mapping[str, Any] | None
    problems: list[str]


def look(run: RunFolder) -> Views:
    """Look through the models of the run, each loaded once. The map is of the first fold's model."""
    wanted = most_confident_mistakes(run.predictions)
    mistakes, problems, space, facts = [], [], None, None
    files = run.checkpoints()
    for fold, file in files.items():
        own = [mistake for mistake in wanted if mistake.fold == fold]
        if not own and fold != min(files):
            continue
        try:
            trained, features = _load(file, run)
        except UserError as error:
            problems.append(str(error))
            trained, features = None, None
        mistakes += _with_pictures(run, own, trained, features, problems)
        if trained is None:
            continue
        facts = facts or trained.facts
        if fold == min(files):
            space = space_map(run, trained, features, fold, problems)
    mistakes.sort(key=lambda mistake: -mistake.probability)
    n_mistakes = int((run.predictions.probs.argmax(1) != run.predictions.labels).sum())
    return Views(mistakes, n_mistakes, space, facts, list(dict.fromkeys(problems)))


def most_confident_mistakes(predictions: Predictions) -> list[Mistake]:
    """At most 12, the most confident first; without pictures yet."""
    p = predictions
    predicted = p.probs.argmax(1)
    wrong = np.flatnonzero(predicted != p.labels)
    wrong = wrong[np.argsort(-p.probs[wrong, predicted[wrong]], kind="stable")][:MOST_MISTAKES]
    return [
        Mistake(
            path=p.paths[i],
            fold=0 if p.folds is None else int(p.folds[i]),
            label=int(p.labels[i]),
            prediction=int(predicted[i]),
            label_probability=float(p.probs[i, p.labels[i]]),
            probability=float(p.probs[i, predicted[i]]),
        )
        for i in wrong
    ]


def space_map(
    run: RunFolder, trained: TrainedModel, features: torch.Tensor, fold: int, problems: list[str]
) -> SpaceMap | None:
    """PCA of one model's image embeddings (at most 2,000, drawn at random), and the sentences put into it."""
    p = run.predictions
    rows = np.arange(len(p.paths)) if p.folds is None else np.flatnonzero(p.folds == fold)
    n_images = len(rows)
    if n_images > MOST_IN_MAP:
        rows = np.sort(np.random.default_rng(0).choice(rows, MOST_IN_MAP, replace=False))
    n_drawn = len(rows)
    hardware = _hardware(run, trained.facts["config"]["use_amp"])  # as it was validated
    images, readable = _embed([run.image(p.paths[i]) for i in rows], trained, hardware)
    rows = rows[readable]
    if len(rows) < 3:
        problems.append(f"no map of embeddings: {len(rows)} of {n_images} images can be read in {run.images}")
        return None
    centre = images.mean(0)
    _, sizes, axes = np.linalg.svd(images - centre, full_matrices=False)
    plane = axes[:2].T  # (D, 2)
    return SpaceMap(
        fold,
        rows,
        (images - centre) @ plane,
        (features.cpu().double().numpy() - centre) @ plane,
        sizes[:2] ** 2 / max((sizes**2).sum(), 1e-30),
        n_images,
        n_drawn - len(rows),
    )


def _embed(
    files: list[Path | Member], trained: TrainedModel, hardware: Hardware
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (n, D) of the n files that can be read, and which those are (N,) bool.

    On a CPU one thread per batch, not one batch on all threads: beside other work, threads that wait
    for each other at every layer were measured to take four times as long.
    """

    def embed(batch: list[Path | Member]) -> tuple[torch.Tensor, list[bool]]:
        squares = [_square(file, trained.img_size) for file in batch]
        read = [square for square in squares if square is not None]
        vectors = torch.empty(0, trained.class_features.shape[1])
        if read:
            with torch.no_grad(), hardware.autocast():
                vectors = trained.model.encode_image(_batch(read, trained.device)).cpu()
        return vectors.double(), [square is not None for square in squares]

    batches = [files[start : start + _BATCH] for start in range(0, len(files), _BATCH)]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            vectors, readable = zip(*threads.map(embed, batches), strict=True)
    finally:
        torch.set_num_threads(n_threads)
    return torch.cat(vectors).numpy(), np.array([r for own in readable for r in own])


def _load(file: Path, run: RunFolder) -> tuple[TrainedModel, torch.Tensor]:
    """The model, and its class features (C, D) in the order of the predictions' columns."""
    trained = load_trained(file, _hardware(run, use_amp=False).device)
    missing = [name for name in run.predictions.classes if name not in trained.classes]
    if missing:
        raise UserError(f"{file} does not know the classes {', '.join(missing)} of the predictions")
    order = [trained.classes.index(name) for name in run.predictions.classes]
    return trained, trained.class_features[order]


def _hardware(run: RunFolder, use_amp: bool) -> Hardware:
    """The run's own GPU where this machine has it, else the CPU."""
    gpu = run.config.get("gpu_id", -1)
    has_gpu = torch.cuda.is_available() and gpu < torch.cuda.device_count()
    return choose_hardware(gpu if has_gpu else -1, use_amp)


def _with_pictures(
    run: RunFolder,
    mistakes: list[Mistake],
    trained: TrainedModel | None,
    features: torch.Tensor | None,
    problems: list[str],
) -> list[Mistake]:
    """The mistakes with what pictures can be had; why not the others is added to `problems`."""
    done, read = [], []
    for mistake in mistakes:
        try:
            image = read_image(run.image(mistake.path))
        except UnreadableImage as error:
            problems.append(f"{mistake.path} cannot be shown: {error}")
            done.append(mistake)
            continue
        small = image.convert("RGB")
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
        read.append((replace(mistake, picture=np.asarray(small)), image))
    if trained is None or not read:
        return done + [mistake for mistake, _ in read]

    squares = [to_square(image, trained.img_size) for _, image in read]
    targets = [m.prediction for m, _ in read] + [m.label for m, _ in read]
    try:
        heats = heat_maps(trained.model, _batch(squares * 2, trained.device), features, targets)
    except (UserError, torch.OutOfMemoryError) as error:
        problems.append(first_line(error))
        return done + [mistake for mistake, _ in read]
    for (mistake, _), square, *both in zip(
        read, squares, heats[: len(read)], heats[len(read) :], strict=True
    ):
        height, width, _ = mistake.picture.shape
        for_prediction, for_label = (
            np.asarray(Image.fromarray(overlay(square, heat)).resize((width, height))) for heat in both
        )
        done.append(replace(mistake, for_prediction=for_prediction, for_label=for_label))
    return done


def _square(file: Path | Member, size: int) -> np.ndarray | None:
    try:
        return to_square(read_image(file), size)
    except UnreadableImage:
        return None


def _batch(squares: list[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).to(device)  # (B, 3, S, S)
