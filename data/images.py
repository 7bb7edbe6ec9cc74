"""Read one image of any supported format as 8-bit RGB, and read a whole folder once to check it."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

from common.progress import progress
from data.dicom import is_dicom, read_dicom
from data.members import Member
from data.names import all_but
from data.pixels import Stored, UnreadableImage, grey_if_grey, refuse_too_many_pixels, scale_to_8_bit

# Images decoded once and kept in memory, at most this much; larger sets are read again every epoch.
MEMORY_FOR_IMAGES = 2 * 2**30
READ_AHEAD = 2**27  # bytes of decoded squares that may wait for their turn, and 1,024 squares at the most
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow's others, as PostScript, run other programs
DIGEST_BYTES = 16
MOST_BYTES = 2**29  # so many pixels of 32 bits, and headers


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


def _has_16_bit_colour(image: Image.Image) -> bool:
    """Pillow keeps only the high byte of 16-bit colour, which makes 12-bit images black: better to say so."""
    arguments = [tile[3] for tile in getattr(image, "tile", [])]  # the raw mode, alone or first in a tuple
    rawmodes = [str(a[0] if isinstance(a, tuple) else a) for a in arguments]
    is_16_bit = any(rawmode.endswith((";16B", ";16L", ";16N")) for rawmode in rawmodes)
    return is_16_bit and image.mode in ("RGB", "RGBA", "LA", "CMYK")


def _stored_bits(mode: str) -> int:
    return 16 if ";16" in mode else {"1": 1, "I": 32, "F": 32}.get(mode, 8)


def read_image(path: Path | Member) -> Image.Image:
    """Read JPEG, PNG, BMP, TIFF, WebP or DICOM as an upright 8-bit image: L where it is grey, else RGB.

    16-bit and float images are scaled by their own range, DICOM by its window or table where it has one; EXIF
    orientation is applied; transparency is composed on black; palettes are expanded. Raises UnreadableImage.
    """
    return _read(path)[0]


def _read(path: Path | Member) -> tuple[Image.Image, Stored]:
    opened = path
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("is no file but a pipe, a device or the like")
        if status.st_size > MOST_BYTES:
            raise UnreadableImage(f"holds {status.st_size} bytes, more than {MOST_BYTES}; shrink it")
        if not status.st_size:
            raise UnreadableImage("the file is empty (0 bytes)")
        if not isinstance(path, Path):
            opened = path.open("rb")  # all of it, once
        if is_dicom(path.suffix, opened):
            return read_dicom(opened)
        image = Image.open(opened, formats=FORMATS)
        refuse_too_many_pixels(image.width, image.height)
        # MPO is a camera's JPEG with further pictures behind the photograph, such as its preview.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise UnreadableImage(f"holds {image.n_frames} frames or pages; save each as its own file")
        if _has_16_bit_colour(image):
            raise UnreadableImage("16-bit colour is not supported; save it with 8 bits per channel")
        stored = (image.format or "", image.mode, _stored_bits(image.mode))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I") or image.mode == "F":
            zero_is_white = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
            image = Image.fromarray(scale_to_8_bit(np.asarray(image)))
            if zero_is_white:  # of 8 bits and fewer Pillow sees to it
                image = ImageOps.invert(image)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        if image.mode in ("L", "1"):
            return image.convert("L"), stored
        return grey_if_grey(image if image.mode == "RGB" else image.convert("RGB")), stored
    except UnreadableImage:
        raise
    except Exception as error:  # a damaged file makes decoders raise anything from OSError to IndexError
        said = f"{type(error).__name__}: {error}"
        for written in (repr(opened), str(path)):
            said = said.replace(written, path.name)
        raise UnreadableImage(said) from None


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Resize the whole image to (size, size, 3) uint8. Nothing is cropped and no border is added."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))


class Squares:
    """N images, decoded and resized: rows of an array (M, S, S, 3) uint8 in memory or in a mapped file.

    rows (N,): the row of each image; None where they are the array's own.
    """

    def __init__(self, array: np.ndarray, rows: np.ndarray | None = None):
        self.array, self.rows = array, np.arange(len(array)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """(S, S, 3) for one index, a new (B, S, S, 3) for several."""
        return self.array[self.rows[indices]]


@dataclass(frozen=True)
class Reading:
    """What one file is found to be. error: why it cannot be read, and nothing else is known then.

    digest: a hash of the decoded pixels. square: (size, size, 3) uint8, where asked for.
    """

    digest: str = ""
    error: str = ""
    facts: Facts | None = None
    square: np.ndarray | None = None
    measured: Any = None


@dataclass(frozen=True)
class Inspection:
    """What one reading of N files found.

    errors: index -> why the file cannot be read. digests (N,): hashes of the decoded pixels as 32 bytes of
    text, b"" where unreadable. squares: N, or None when not asked for or when they would not fit
    MEMORY_FOR_IMAGES. facts: N, None where unreadable; equal ones are one object. measured: N results of
    `measure`, None where unreadable; empty without it.
    """

    errors: dict[int, str]
    digests: np.ndarray
    squares: Squares | None
    facts: list[Facts | None] = field(default_factory=list)
    measured: list[Any] = field(default_factory=list)

    @classmethod
    def of(
        cls, readings: Iterable[Reading], n: int, squares: Squares | None, measured: bool = False
    ) -> "Inspection":
        """Of `n` readings, none of which is kept: of a million images they would take a gigabyte."""
        found = cls({}, np.zeros(n, f"S{2 * DIGEST_BYTES}"), squares)
        same: dict[Facts | None, Facts | None] = {}
        for i, reading in enumerate(readings):
            if reading.error:
                found.errors[i] = reading.error
            found.digests[i] = reading.digest
            found.facts.append(same.setdefault(reading.facts, reading.facts))
            if measured:
                found.measured.append(reading.measured)
        return found

    def reading(self, index: int, square: np.ndarray) -> Reading:
        error = self.errors.get(int(index), "")
        return Reading(
            self.digests[index].decode(), error, self.facts[index], square=None if error else square
        )

    def take(self, indices: np.ndarray) -> "Inspection":
        """Of the files `indices` (n,), in that order."""
        kept = indices.tolist()
        return Inspection(
            {new: self.errors[i] for new, i in enumerate(kept) if i in self.errors},
            self.digests[indices],
            None if self.squares is None else Squares(self.squares.array, self.squares.rows[indices]),
            [self.facts[i] for i in kept] if self.facts else [],
            [self.measured[i] for i in kept] if self.measured else [],
        )

    def without(self, dropped: set[int]) -> "Inspection":
        return self.take(all_but(dropped, len(self.digests)))

    def keys(self) -> np.ndarray:
        """(N,) int64 by which images can be found again, all of them readable: half of each digest."""
        return np.frombuffer(bytes.fromhex(self.digests.tobytes().decode()), "<i8")[::2].copy()


def read_all(
    files: Sequence[Path], size: int | None, measure: Callable[[Image.Image], Any] | None = None
) -> Iterator[Reading]:
    """A Reading of each file in turn, decoded by several threads, with a progress bar.

    size: edge of the square to make, or None for none. `measure` is called with every decoded image (see
    `read_image`), in those threads.
    """

    def read(file: Path) -> Reading:
        try:
            image, stored = _read(file)
        except UnreadableImage as error:
            return Reading(error=str(error))
        raw = image.tobytes()
        digest = hashlib.blake2b(repr((image.size, image.mode)).encode(), digest_size=DIGEST_BYTES)
        digest.update(raw)
        # Every pixel equals the next; the comparison ends at the first that does not.
        depth = len(image.getbands())
        constant = memoryview(raw)[depth:] == memoryview(raw)[:-depth]
        return Reading(
            digest.hexdigest(),
            facts=Facts(*stored, image.width, image.height, constant),
            square=None if size is None else to_square(image, size),
            measured=measure(image) if measure else None,
        )

    # Threads, not processes: decoding, resizing and hashing all run outside Python's lock.
    bar = progress(total=len(files), desc="reading images", unit="img")
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        block = max(16, min(1024, READ_AHEAD // (3 * (size or 1) ** 2)))
        for start in range(0, len(files), block):
            for reading in pool.map(read, files[start : start + block]):
                bar.update()
                yield reading


def inspect_images(
    files: Sequence[Path], size: int | None, measure: Callable[[Image.Image], Any] | None = None
) -> Inspection:
    """Decode every file once: names all that cannot be read, before any training.

    size: edge of the squares to keep in memory, or None to keep none. `measure`: see `read_all`.
    """
    keep = size is not None and len(files) * size * size * 3 <= MEMORY_FOR_IMAGES
    array = np.zeros((len(files), size, size, 3), np.uint8) if keep else None

    def readings() -> Iterator[Reading]:
        for i, reading in enumerate(read_all(files, size if keep else None, measure)):
            if reading.square is not None:
                array[i] = reading.square
            yield reading

    squares = None if array is None else Squares(array)
    return Inspection.of(readings(), len(files), squares, measure is not None)
