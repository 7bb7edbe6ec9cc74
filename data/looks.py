"""What an image looks like in a few numbers, and which images look the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from common.progress import progress

# Two images look the same when at most NEAR_BITS of their 256-bit hashes differ and their thumbnails
# correlate by NEAR_CORRELATION. The usual 64 bits are too few for chest films: of 1,124 real ones (630,390
# pairs), unrelated ones came as near as 4 bits. With 256 bits they stay 54 or more apart, and every 10 bits
# less leave a tenth of the pairs, so 10,000 films should give less than one false pair at 28. The same film
# was within 14 bits after JPEG quality 30 or shrinking to half, and 95 in 100 within 28 after 15 to 20 %
# more brightness or contrast. Smooth drawn phantoms came as near as 16 bits unrelated; there the
# correlation decides: unrelated ones reached 0.986, the same one saved again 0.998. Cropping by 3 % makes
# another image.
HASH_SIDE = 16
NEAR_BITS = 28
NEAR_CORRELATION = 0.9875
BLOCK = 256


@dataclass(frozen=True)
class Look:
    """mean, std, border: grey levels, 0..255, of the whole image and of its outer twentieth on each side.
    hash: 32 bytes, the perceptual hash (pHash). thumbnail: 1,024 bytes, 32 x 32 grey.
    """

    mean: float
    std: float
    border: float
    hash: bytes
    thumbnail: bytes


def look_at(image: Image.Image) -> Look:
    """Measure an 8-bit image, L or RGB. Safe to call from several threads."""
    from imagehash import phash

    # Whole pixels are averaged first, which is many times faster than resizing a large image finely.
    factor = max(1, min(image.size) // 128)
    grey = image.reduce(factor).convert("L")
    square = grey.resize((64, 64), Image.Resampling.BOX)
    levels = np.asarray(square, np.float64)
    inner = levels[3:-3, 3:-3]
    border = (levels.sum() - inner.sum()) / (levels.size - inner.size)
    bits = phash(grey, hash_size=HASH_SIDE).hash
    return Look(
        float(levels.mean()), float(levels.std()), float(border),
        np.packbits(bits).tobytes(), square.reduce(2).tobytes(),
    )  # fmt: skip


def near_pairs(looks: Sequence[Look]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of images that look the same, as index arrays (a, b) with a < b, a block at a time.

    All pairs are compared, 256 images against the rest at a time, so memory grows with N alone. Half of the
    bits rule out nearly all pairs: 10,000 images take about two seconds.
    """
    words = np.frombuffer(b"".join(look.hash for look in looks), np.uint64).reshape(len(looks), -1)  # (N, 4)
    thumbs = np.frombuffer(b"".join(look.thumbnail for look in looks), np.uint8).reshape(len(looks), -1)
    starts = range(0, len(looks), BLOCK)
    for start in progress(starts, "comparing images"):
        block, rest = words[start : start + BLOCK], words[start:]
        differing = sum(
            np.bitwise_count(block[:, None, w] ^ rest[None, :, w]) for w in (0, 1)
        )  # (B, R) uint8
        a, b = np.nonzero(differing <= NEAR_BITS)
        a, b = a[a < b], b[a < b]
        near = np.bitwise_count(block[a] ^ rest[b]).sum(1) <= NEAR_BITS
        a, b = start + a[near], start + b[near]
        for part in range(0, len(a), 4096):  # 4,096 pairs of thumbnails at a time: 32 MB
            i, j = a[part : part + 4096], b[part : part + 4096]
            same = _correlation(thumbs[i], thumbs[j]) >= NEAR_CORRELATION
            if same.any():
                yield i[same], j[same]


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(K,) Pearson correlation of the rows of two (K, P) arrays; 0 where a row is constant."""
    a, b = (x - x.mean(1, keepdims=True, dtype=np.float32) for x in (a, b))
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), size, out=np.zeros_like(size), where=size > 0)
