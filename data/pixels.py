"""What every way of reading an image needs, whatever its format."""

import numpy as np
from PIL import Image

AT_ONCE = 2**16  # pixels: copies that stay in the cache, where those of a large image would fill the memory
# A small file can claim any size ("decompression bomb"). This is Pillow's limit; Pillow itself only warns.
MOST_PIXELS = 2**30 // 4 // 3

# What the file itself says: format, mode, bits per channel.
Stored = tuple[str, str, int]


class UnreadableImage(OSError):
    """The file is no image that can be read; the message says why."""


def refuse_too_many_pixels(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UnreadableImage(f"holds {width} x {height} pixels, more than {MOST_PIXELS} in all; shrink it")


def scale_to_8_bit(pixels: np.ndarray, ends: tuple[float, float] | None = None) -> np.ndarray:
    """Map `ends`, or the image's own minimum and maximum, to 0 and 255 (uint8, same shape), and what lies
    beyond to the nearer of them. Where the two are equal all becomes zeros.

    Raises UnreadableImage when a pixel is not a finite number.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UnreadableImage("holds pixels that are not finite numbers")
    low, high = ends or (low, high)
    scaled = np.zeros(pixels.shape, np.uint8)
    if high > low:
        flat, target = pixels.reshape(-1), scaled.reshape(-1)
        for start in range(0, len(flat), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            target[part] = np.rint(
                (flat[part].astype(np.float64).clip(low, high) - low) * (255 / (high - low))
            )
    return scaled


def grey_if_grey(image: Image.Image) -> Image.Image:
    """An RGB image whose three channels are equal as the one channel it is, which is quicker to work on."""
    rows = max(1, AT_ONCE // image.width)
    middle = image.height // 2  # one row tells most colour images
    for top, bottom in ((middle, middle + 1), *((y, y + rows) for y in range(0, image.height, rows))):
        part = image.crop((0, top, image.width, min(bottom, image.height)))
        first, *others = (channel.tobytes() for channel in part.split())
        if any(other != first for other in others):
            return image
    return image.getchannel(0)
