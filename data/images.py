"""Read one image of any supported format as 8-bit RGB, and read a whole folder once to check it."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

# Images decoded once and kept in memory, at most this much; larger sets are read again every epoch.
MEMORY_FOR_IMAGES = 2 * 2**30
# A small file can claim any size ("decompression bomb"). This is Pillow's limit; Pillow itself only warns.
MOST_PIXELS = 2**30 // 4 // 3


class UnreadableImage(OSError):
    """The file is no image that can be read; the message says why."""


@dataclass(frozen=True)
class Facts:
    """What a readable file is.

    format: by content, not by suffix, as Pillow names it, or "DICOM". mode: Pillow's mode, or the
    photometric interpretation of a DICOM. bits: per channel as stored. width, height: pixels of the upright
    image. constant: True when all pixels have one colour.
    """

    format: str
    mode: str
    bits: int
    width: int
    height: int
    constant: bool


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


# What the file itself says: format, mode, bits per channel.
_Stored = tuple[str, str, int]


def _read_dicom(path: Path) -> tuple[Image.Image, _Stored]:
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    try:
        dataset = pydicom.dcmread(path)
        frames = int(dataset.get("NumberOfFrames", 1) or 1)
        if frames != 1:
            raise UnreadableImage(f"holds {frames} frames; save each frame as its own file")
        stored = ("DICOM", str(dataset.get("PhotometricInterpretation")), int(dataset.get("BitsStored", 8)))
        pixels = dataset.pixel_array  # YBR is converted to RGB by pydicom
        if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset)
        if pixels.ndim == 3:
            return Image.fromarray(pixels if pixels.dtype == np.uint8 else scale_to_8_bit(pixels)), stored
        pixels = scale_to_8_bit(apply_voi_lut(apply_modality_lut(pixels, dataset), dataset))
    except UnreadableImage:
        raise
    except Exception as error:  # pydicom raises many kinds; each means the file cannot be used
        raise UnreadableImage(f"DICOM: {type(error).__name__}: {error}") from None
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        pixels = 255 - pixels  # in MONOCHROME1 the largest value is black
    return Image.fromarray(pixels).convert("RGB"), stored


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


def _stored_bits(mode: str) -> int:
    return 16 if ";16" in mode else {"1": 1, "I": 32, "F": 32}.get(mode, 8)


def read_image(path: Path) -> Image.Image:
    """Read JPEG, PNG, BMP, TIFF, WebP or DICOM as an upright 8-bit RGB image.

    16-bit and float images are scaled by their own range; EXIF orientation is applied; transparency is
    composed on black; palettes are expanded. Raises UnreadableImage.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[Image.Image, _Stored]:
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
        stored = (image.format or "", image.mode, _stored_bits(image.mode))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(scale_to_8_bit(np.asarray(image)))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return image.convert("RGB"), stored
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
    unreadable. pixels: (N, size, size, 3) uint8, or None when not asked for or when they would not fit
    MEMORY_FOR_IMAGES. facts: N, None where unreadable. measured: N results of `measure`, None where
    unreadable; empty without it.
    """

    errors: dict[int, str]
    digests: list[str]
    pixels: np.ndarray | None
    facts: list[Facts | None] = field(default_factory=list)
    measured: list[Any] = field(default_factory=list)

    def without(self, dropped: set[int]) -> "Inspection":
        keep = [i for i in range(len(self.digests)) if i not in dropped]
        return Inspection(
            {new: self.errors[i] for new, i in enumerate(keep) if i in self.errors},
            [self.digests[i] for i in keep],
            self.pixels[keep] if self.pixels is not None else None,
            [self.facts[i] for i in keep] if self.facts else [],
            [self.measured[i] for i in keep] if self.measured else [],
        )


def inspect_images(
    files: Sequence[Path], size: int | None, measure: Callable[[Image.Image], Any] | None = None
) -> Inspection:
    """Decode every file once: names all that cannot be read, before any training.

    size: edge of the squares to keep, or None to keep none. `measure` is called with every decoded image
    (upright 8-bit RGB), from several threads at once.
    """
    keep = size is not None and len(files) * size * size * 3 <= MEMORY_FOR_IMAGES
    pixels = np.zeros((len(files), size, size, 3), np.uint8) if keep else None

    def inspect(i: int) -> tuple[str, str, Facts | None, Any]:
        try:
            image, stored = _read(files[i])
        except UnreadableImage as error:
            return "", str(error), None, None
        if pixels is not None:
            pixels[i] = to_square(image, size)
        raw = image.tobytes()
        digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
        digest.update(raw)
        # Every pixel equals the next; the comparison ends at the first that does not.
        constant = memoryview(raw)[3:] == memoryview(raw)[:-3]
        facts = Facts(*stored, image.width, image.height, constant)
        return digest.hexdigest(), "", facts, measure(image) if measure else None

    # Threads, not processes: decoding, resizing and hashing all run outside Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = tqdm(
            pool.map(inspect, range(len(files))),
            total=len(files), desc="reading images", unit="img", leave=False, disable=None,
        )  # fmt: skip
        results = list(jobs)
    return Inspection(
        {i: why for i, (_, why, _, _) in enumerate(results) if why},
        [digest for digest, _, _, _ in results],
        pixels,
        [facts for _, _, facts, _ in results],
        [measured for _, _, _, measured in results] if measure else [],
    )
