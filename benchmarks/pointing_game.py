"""How often the heat map's peak falls inside the lesion: the pointing game on the demo set, as Markdown.

    python -m benchmarks.pointing_game --checkpoint RUN [RUN ...] --data-dir demo_data_synthetic

Only validation images with a lesion are counted, each by a model that was not trained on it: those of a run's
splits.json, in a cross-validation all of them. The map is that of the true class. "Within 3 %" also takes
peaks up to 3 % of the image's side outside the box: the paper's 15 pixels in pictures about 500 wide.

Three yardsticks: chance is a random point of the image, centre its middle. A map of h x w cells can only
peak at their centres, and a small box may hold none: "best possible" is the share of lesions that hold one.

Zhang et al. 2018, "Top-down Neural Attention by Excitation Backprop", arXiv 1608.00507.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.cli import Parser, exit_code_of
from common.errors import UserError
from common.files import MOST_OF_SPLITS, read_json
from common.run_files import find_checkpoints, fold_number
from data.demo import read_rows
from data.images import inspect_images
from data.scan import fingerprint, scan_folder
from evaluation.heatmaps import coarse_maps
from evaluation.intervals import bootstrap_weights, percentile_interval
from evaluation.trained import TrainedModel, load_trained

TOLERANCE = 0.03  # of the image's side
BATCH = 32
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of the image's width and height


@dataclass(frozen=True)
class Lesion:
    """One image with a lesion. path: relative to the data folder."""

    path: str
    label: str
    patient: str
    box: Box


@dataclass(frozen=True)
class Game:
    """One map against one box: each pair is (inside the box, within the tolerance) as 0 or 1, for chance as
    a share of the image. right: the model's answer was the true class.
    """

    lesion: Lesion
    peak: tuple[float, float]
    chance: tuple[float, float]
    centre: tuple[float, float]
    best_possible: tuple[float, float]
    right: bool


def read_lesions(folder: Path) -> list[Lesion]:
    """The rows of lesions.csv that have a box. Raises UserError when there is no such file."""
    if not (folder / "lesions.csv").is_file():
        raise UserError(
            f"--data-dir {folder} has no lesions.csv; give one made by python -m data.demo --output {folder}"
        )
    found = []
    for row in read_rows(folder):
        if row["x0"]:
            with Image.open(folder / row["path"]) as image:
                width, height = image.size
            x0, y0, x1, y1 = (int(row[key]) for key in ("x0", "y0", "x1", "y1"))
            box = (x0 / width, y0 / height, x1 / width, y1 / height)
            found.append(Lesion(row["path"], row["label"], row["group"], box))
    return found


def distance(x: np.ndarray | float, y: np.ndarray | float, box: Box) -> np.ndarray:
    """How far points lie outside the box, 0 inside; all in shares of the image's side."""
    x0, y0, x1, y1 = box
    return np.hypot(np.maximum(np.maximum(x0 - x, x - x1), 0), np.maximum(np.maximum(y0 - y, y - y1), 0))


def play(cells: np.ndarray, lesion: Lesion, right: bool) -> Game:
    """The lesion against a map of (h, w) cells. An empty map misses."""

    def verdict(distances: np.ndarray) -> np.ndarray:
        return np.stack([distances <= 0, distances <= TOLERANCE]).reshape(2, -1)

    def of_grid(height: int, width: int) -> np.ndarray:
        x, y = ((np.arange(n) + 0.5) / n for n in (width, height))
        return verdict(distance(x[None, :], y[:, None], lesion.box))

    hits = of_grid(*cells.shape)  # (2, h * w)
    return Game(
        lesion,
        peak=tuple(hits[:, cells.argmax()] * (cells.max() > 0)),
        chance=tuple(of_grid(256, 256).mean(1)),
        centre=tuple(verdict(distance(0.5, 0.5, lesion.box))[:, 0]),
        best_possible=tuple(hits.any(1)),
        right=right,
    )


def held_out(checkpoint: Path, facts: dict, data_fingerprint: str, data_dir: Path) -> frozenset[str]:
    """Paths of the images that validated this model. Raises UserError when they are not of `data_dir`."""
    folder = checkpoint.parent
    fold = fold_number(folder)
    splits = (folder.parent if fold else folder) / "splits.json"
    record = read_json(splits, "the run's splits.json", MOST_OF_SPLITS)
    if not facts["dataset_fingerprint"] == record["dataset_fingerprint"] == data_fingerprint:
        raise UserError(
            f"--checkpoint {checkpoint} was not trained on the images of --data-dir {data_dir}, so which of "
            "them it knows cannot be said; give the folder it was trained on"
        )
    return frozenset(record["folds"][fold - 1 if fold else 0]["val"])


def games_of(trained: TrainedModel, lesions: Sequence[Lesion], squares: np.ndarray) -> Iterator[Game]:
    """squares (N, S, S, 3) uint8 of the N lesions."""
    for start in range(0, len(lesions), BATCH):
        batch = lesions[start : start + BATCH]
        images = torch.from_numpy(squares[start : start + BATCH]).permute(0, 3, 1, 2).to(trained.device)
        labels = [trained.classes.index(lesion.label) for lesion in batch]
        with torch.no_grad():
            answers = (trained.model.encode_image(images) @ trained.class_features.T).argmax(1).tolist()
        maps = coarse_maps(trained.model, images, trained.class_features, labels).cpu().numpy()
        for lesion, cells, label, answer in zip(batch, maps, labels, answers, strict=True):
            yield play(cells, lesion, label == answer)


def play_run(run: Path, data_dir: Path, lesions: Sequence[Lesion]) -> tuple[str, str, list[Game]]:
    """The image encoder, the run's name, and a game for each lesion of the validation images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder, games, encoder = scan_folder(data_dir), [], ""
    index, inspection = {path: i for i, path in enumerate(folder.paths)}, None
    for checkpoint in find_checkpoints(run):
        trained = load_trained(checkpoint, device)
        encoder = trained.facts["config"]["image_encoder_name"]
        if inspection is None:  # all folds of a run have one image size
            inspection = inspect_images(folder.files(), trained.img_size)
        known = held_out(checkpoint, trained.facts, fingerprint(folder, inspection.digests), data_dir)
        own = [lesion for lesion in lesions if lesion.path in known]
        squares = inspection.squares[[index[lesion.path] for lesion in own]]
        games += games_of(trained, own, squares)
    if not games:
        raise UserError(f"--checkpoint {run}: no validation image has a lesion")
    return encoder, run.name, games


def _hits(games: Sequence[Game], which: int) -> str:
    if not games:
        return "none"
    hits = sum(game.peak[which] for game in games)
    return f"{hits:.0f}/{len(games)} ({hits / len(games):.0%})"


def _shares(games: Sequence[Game], name: str) -> str:
    inside, within = np.mean([getattr(game, name) for game in games], axis=0)
    return f"{inside:.0%} / {within:.0%}"


def interval(games: Sequence[Game]) -> str:
    """95 % of the share of peaks in the box, bootstrapped over patients."""
    hits = np.array([game.peak[0] for game in games], float)
    _, patients = np.unique([game.lesion.patient for game in games], return_inverse=True)
    samples = [weights @ hits / weights.sum(1) for weights in bootstrap_weights(patients, 2000, seed=0)]
    found = percentile_interval(np.concatenate(samples))
    return f", {found[0]:.0%} to {found[1]:.0%}" if found else ""


def table(runs: Sequence[tuple[str, str, Sequence[Game]]]) -> str:
    """Markdown for (encoder, run, games): a line for each class, and one for all with an interval."""
    head = (
        "encoder", "run", "class", "images", "peak in the box", "within 3 %", "chance (in / within)",
        "centre", "best possible", "rightly classified: peak in the box", "within 3 %",
    )  # fmt: skip
    lines = [head, ("---",) * 3 + ("---:",) * 8]
    for encoder, run, games in runs:
        labels = list(dict.fromkeys(game.lesion.label for game in games))
        for label in [*labels, None]:
            own = [game for game in games if label in (None, game.lesion.label)]
            right = [game for game in own if game.right]
            more = interval(own) if label is None else ""
            lines.append(
                (
                    encoder, run, label or "all", len(own), _hits(own, 0) + more, _hits(own, 1),
                    *(_shares(own, name) for name in ("chance", "centre", "best_possible")),
                    _hits(right, 0), _hits(right, 1),
                )
            )  # fmt: skip
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Play all runs and print the table. Returns the exit code: 0 done, 2 bad input."""

    def program() -> int:
        parser = Parser(prog="python -m benchmarks.pointing_game", description=__doc__)
        parser.add_argument("--checkpoint", type=Path, nargs="+", help="folders of runs, or checkpoint files")
        parser.add_argument("--data-dir", type=Path, help="the demo set that they were trained on")
        options = parser.read(
            sys.argv[1:] if arguments is None else arguments, ["--checkpoint", "--data-dir"]
        )
        lesions = read_lesions(options.data_dir)
        print(table([play_run(run, options.data_dir, lesions) for run in options.checkpoint]))
        print("\nAll: with the 95 % interval of the share in the box, bootstrapped over patients.")
        return 0

    return exit_code_of(program, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
