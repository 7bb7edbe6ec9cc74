"""Random changes of square images that a radiograph could have shown by itself, for a whole batch at once."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

PRESETS = ("none", "minimal", "standard")


class Augmentation:
    """Changes (B, 3, S, S) images, each by what `seed`, the epoch and its index say, whatever else is in the
    batch.

    none: nothing. minimal: shifts to 4 %. standard: rotation to 7 degrees, shifts to 5 %, zoom 0.95 to 1.1,
    brightness and contrast to 10 %. The latter two also mirror half of the images when `horizontal_flip`.
    Never a vertical flip, never a hue. Where the image ends, black comes in.

    The same in distribution as torchvision's RandomHorizontalFlip, RandomAffine and ColorJitter one after the
    other, but an image is resampled once, clipped once and never rounded.
    """

    def __init__(self, preset: str, horizontal_flip: bool, seed: int):
        if preset not in PRESETS:
            raise ValueError(f"unknown augmentation {preset!r}")
        self.preset, self.horizontal_flip, self.seed = preset, horizontal_flip, seed

    def draw(self, epoch: int, indices: Sequence[int], size: int) -> np.ndarray:
        """(B, 7): rotation clockwise in degrees, shifts right and down in whole pixels, zoom, brightness,
        contrast (1 leaves each as it is), and -1 where mirrored, else 1.
        """
        uniform = self._uniform(epoch, np.asarray(indices))
        standard = self.preset == "standard"
        shift = 0.05 if standard else 0.04
        low = np.array([-7, -shift * size, -shift * size, 0.95, 0.9, 0.9, -1])
        high = np.array([7, shift * size, shift * size, 1.1, 1.1, 1.1, 1])
        drawn = low + (high - low) * uniform
        drawn[:, 1:3] = drawn[:, 1:3].round()
        drawn[:, 6] = np.where(drawn[:, 6] < 0, -1, 1) if self.horizontal_flip else 1
        if not standard:
            drawn[:, [0, 3, 4, 5]] = [0, 1, 1, 1]
        return drawn

    def _uniform(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """(B, 7) in 0..1: of image i the numbers 7 i to 7 i + 6 of the epoch's stream."""
        # The sampler's order comes from [seed, epoch], which NumPy takes for [seed, epoch, 0].
        stream = np.random.Generator(np.random.PCG64([self.seed, epoch, 1]))
        uniform, at = np.empty((len(indices), 7)), 0
        for place in np.argsort(indices).tolist():
            start = 7 * int(indices[place])
            stream.bit_generator.advance(start - at)
            uniform[place], at = stream.random(7), start + 7
        return uniform

    def __call__(self, images: torch.Tensor, epoch: int, indices: Sequence[int]) -> torch.Tensor:
        """(B, 3, S, S) uint8 on any device -> 0..255 float32, on a CPU (B, 1, S, S) where all are grey,
        else (B, 3, S, S); "none" leaves `images` as they are.
        """
        if self.preset == "none":
            return images
        drawn = torch.from_numpy(self.draw(epoch, indices, images.shape[-1])).float()
        drawn = drawn.to(images.device, non_blocking=True)  # a GPU is not waited for
        images = images.contiguous()  # a channel's pixels side by side
        if images.is_cpu and _is_grey(images):
            images = images[:, :1]  # a third of the work
        # in bf16 the places that `resample` reads would be off by up to a pixel at 224 px
        with torch.autocast(images.device.type, enabled=False):
            images = resample(images, drawn)
            return change_colour(images, drawn[:, 4], drawn[:, 5]) if self.preset == "standard" else images


def _is_grey(images: torch.Tensor) -> bool:
    red, green, blue = images.unbind(dim=1)
    return torch.equal(red, green) and torch.equal(red, blue)


def resample(images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Mirror, then zoom and rotate about the centre, then shift: one bilinear resampling, 0..255 float32.

    images (B, C, S, S), drawn (B, 7) as `Augmentation.draw` gives it.
    """
    degrees, right, down, zoom, _, _, mirror = drawn.T.unsqueeze(-1)  # (B, 1) each
    radians = degrees * (math.pi / 180)
    cos, sin = radians.cos() / zoom, radians.sin() / zoom
    # Where an output pixel lies in the input, in units of half the side from the centre: a part that its
    # column gives and one that its row gives. As complex numbers, x + iy, a CPU adds them fifty times as fast
    # as F.affine_grid multiplies matrices.
    size = images.shape[-1]
    pixels = 2 * torch.arange(size, device=images.device) + 1 - size
    of_column = torch.complex(mirror * cos, -sin) * ((pixels - 2 * right) / size)  # (B, S)
    of_row = torch.complex(mirror * sin, cos) * ((pixels - 2 * down) / size)
    grid = torch.view_as_real(of_column.unsqueeze(1) + of_row.unsqueeze(2))  # (B, S, S, 2)
    return F.grid_sample(images.float(), grid, align_corners=False)


def change_colour(images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """Stretch about the image's mean grey by `contrast` (B,), then multiply by `brightness` (B,), in place.

    The other order gives the same but for what is clipped between the two. images (B, 3, S, S), or grey ones
    (B, 1, S, S), 0..255 float.
    """
    red, green, blue = images.mean(dim=(2, 3)).expand(-1, 3).T  # (B,) each
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    factor, offset = brightness * contrast, brightness * (1 - contrast) * grey
    return images.mul_(factor.view(-1, 1, 1, 1)).add_(offset.view(-1, 1, 1, 1)).clamp_(0, 255)
