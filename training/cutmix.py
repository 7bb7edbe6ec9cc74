"""CutMix (Yun et al. 2019, arXiv 1905.04899, with alpha 1): each image of a batch has a box of another in it,
and counts for both their classes. Which other is said here alone: the one opposite in its part of the batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from training.step import Criterion, all_parts


@dataclass(frozen=True)
class Box:
    """Where the images of a batch show another image instead. kept: share of the area that is their own."""

    rows: slice
    columns: slice
    kept: float

    def paste(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, S, S), each with the box of the image opposite: the first has the last one's, and so on."""
        pasted = images.clone()
        pasted[..., self.rows, self.columns] = images[..., self.rows, self.columns].flip(0)
        return pasted

    def pasted(self, view: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """What `view` gives, a part of the batch, with the boxes in it."""
        return lambda: self.paste(view())

    def divided(self, own: torch.Tensor, pasted: torch.Tensor) -> torch.Tensor:
        """A value by the images' own labels and one by those of their boxes, by their shares of the area."""
        return self.kept * own + (1 - self.kept) * pasted


def draw_box(probability: float, size: int, seed: int, step: int) -> Box | None:
    """In so many of the steps a box of a share of the area that is uniform in 0..1, about a uniform centre;
    what lies outside is cut off. The same for the same seed and step.
    """
    rng = np.random.default_rng([seed, step, 0, 2])
    if rng.random() >= probability:
        return None
    half = round(size * math.sqrt(rng.random()) / 2)
    top, left = (int(centre) - half for centre in rng.integers(size, size=2))
    rows, columns = (slice(max(0, low), min(size, low + 2 * half)) for low in (top, left))
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Box(rows, columns, 1 - area / size**2)


def opposite(n: int, most: int | None) -> torch.Tensor:
    """(n,): for each image of a batch the position of the one opposite in its part, parts as `parts_of` makes
    them.
    """
    return torch.cat([part.flip(0) for part in all_parts(n, most)])


def with_boxes(criterion: Criterion, box: Box, of_boxes: torch.Tensor) -> Criterion:
    """`criterion` for images with boxes of the labels `of_boxes` (B,). The gradient is that of targets
    divided between the two classes.
    """

    def of_both(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = zip(criterion(logits, labels), criterion(logits, of_boxes), strict=True)
        return tuple(box.divided(own, pasted) for own, pasted in pairs)

    return of_both
