"""Read one image of any supported format as 8-bit RGB, and read a whole folder once to check it."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

# Images decoded once and kept in memory, at most this much; larger sets are read again every epoch.
MEMORY_FOR_IMAGES = 2 * 2**30
# A small file can claim any size ("decompression bomb"). This is Pillow's limit; Pillow itself only warns.
MOST_PIXELS = 2**30 // 4 // 3


class UnreadableImage(OSError):
    """The file is no image that can be read; the message says why."""


def scale_to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Map the image's own minimum..maximum to 0..255 (uint8, same shape). A constant image becomes zeros.

    Raises UnreadableImage when a pixel is not a finite number.
    """
    values = pixels.astype(np.float64)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UnreadableImage("holds pixels that are not finite numbers")
    if high == low:
        return np.zeros(values.shape, np.uint8)
    return np.rint((values - low) * (255.0 / (high - low))).astype(np.uint8)


def _read_dicom(path: Path) -> Image.Image:
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    try:
        dataset = pydicom.dcmread(path)
        frames = int(dataset.get("NumberOfFrames", 1) or 1)
        if frames != 1:
            raise UnreadableImage(f"holds {frames} frames; save each frame as its own file")
        pixels = dataset.pixel_array  # YBR is converted to RGB by pydicom
        if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset)
        if pixels.ndim == 3:
            return Image.fromarray(pixels if pixels.dtype == np.uint8 else scale_to_8_bit(pixels))
        pixels = scale_to_8_bit(apply_voi_lut(apply_modality_lut(pixels, dataset), dataset))
    except UnreadableImage:
        raise
    except Exception as error:  # pydicom raises many kinds; each means the file cannot be used
        raise UnreadableImage(f"DICOM: {type(error).__name__}: {error}") from None
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        pixels = 255 - pixels  # in MONOCHROME1 the largest value is black
    return Image.fromarray(pixels).convert("RGB")


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() in (".dcm", ".dicom"):
        return True
    with open(path, "rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def _has_16_bit_colour(image: Image.Image) -> bool:
    """Pillow keeps only the high byte of 16-bit colour, which makes 12-bit images black: better to say so."""
    arguments = [tile[3] for tile in getattr(image, "tile", [])]  # the raw mode, alone or first in a tuple
    rawmodes = [str(a[0] if isinstance(a, tuple) else a) for a in arguments]
    is_16_bit = any(rawmode.endswith((";16B", ";16L", ";16N")) for rawmode in rawmodes)
    return is_16_bit and image.mode in ("RGB", "RGBA", "LA", "CMYK")


def read_image(path: Path) -> Image.Image:
    """Read JPEG, PNG, BMP, TIFF, WebP or DICOM as an upright 8-bit RGB image.

    16-bit and float images are scaled by their own range; EXIF orientation is applied; transparency is
    composed on black; palettes are expanded. Raises UnreadableImage.
    """
    try:
        if _is_dicom(path):
            return _read_dicom(path)
        image = Image.open(path)
        if image.width * image.height > MOST_PIXELS:
            raise UnreadableImage(
                f"holds {image.width} x {image.height} pixels, more than {MOST_PIXELS} in all; shrink it"
            )
        # MPO is a camera's JPEG with further pictures behind the photograph, such as its preview.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise UnreadableImage(f"holds {image.n_frames} frames or pages; save each as its own file")
        if _has_16_bit_colour(image):
            raise UnreadableImage("16-bit colour is not supported; save it with 8 bits per channel")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            return Image.fromarray(scale_to_8_bit(np.asarray(image))).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
        return image.convert("RGB")
    except UnreadableImage:
        raise
    except Exception as error:  # a damaged file makes decoders raise anything from OSError to IndexError
        if path.exists() and path.stat().st_size == 0:
            raise UnreadableImage("the file is empty (0 bytes)") from None
        raise UnreadableImage(f"{type(error).__name__}: {error}".replace(str(path), path.name)) from None


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Resize the whole image to (size, size, 3) uint8. Nothing is cropped and no border is added."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Inspection:
    """What one reading of N files found.

    errors: index -> why the file cannot be read. digests: N hashes of the decoded pixels, "" where
    unreadable. pixels: (N, size, size, 3) uint8, or None when they would not fit MEMORY_FOR_IMAGES.
    """

    errors: dict[int, str]
    digests: list[str]
    pixels: np.ndarray | None


def inspect_images(files: Sequence[Path], size: int) -> Inspection:
    """Decode every file once: names all that cannot be read, before any training."""
    keep = len(files) * size * size * 3 <= MEMORY_FOR_IMAGES
    pixels = np.zeros((len(files), size, size, 3), np.uint8) if keep else None

    def inspect(i: int) -> tuple[str, str]:
        try:
            image = read_image(files[i])
        except UnreadableImage as error:
            return "", str(error)
        if pixels is not None:
            pixels[i] = to_square(image, size)
        digest = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()
        return digest, ""

    # Threads, not processes: decoding, resizing and hashing all run outside Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = tqdm(
            pool.map(inspect, range(len(files))),
            total=len(files), desc="reading images", unit="img", leave=False, disable=None,
        )  # fmt: skip
        results = list(jobs)
    errors = {i: why for i, (_, why) in enumerate(results) if why}
    return Inspection(errors, [digest for digest, _ in results], pixels)
