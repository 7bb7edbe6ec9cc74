"""What an image looks like, and which images look the same, against brute force."""

import imagehash
import numpy as np
from PIL import Image

from data import looks
from data.looks import Look, look_at, near_pairs


def test_near_pairs_are_those_of_brute_force(monkeypatch):
    random = np.random.RandomState(1)
    monkeypatch.setattr(looks, "BLOCK", 16)
    bits = random.rand(100, 256) > 0.5
    thumbs = random.randint(0, 256, (100, 1024))
    for i in range(
        50, 100
    ):  # from none to twice as many bits as allowed, and thumbnails from equal to unlike
        bits[i] = bits[i - 50]
        bits[i, random.permutation(256)[: random.randint(0, 57)]] ^= True
        thumbs[i] = np.clip(thumbs[i - 50] + random.normal(0, random.uniform(0, 25), 1024), 0, 255)
    thumbs[7] = thumbs[57] = 9  # constant: correlated with nothing
    bits[57] = bits[7]
    given = [
        Look(0, 0, 0, np.packbits(b).tobytes(), t.astype(np.uint8).tobytes())
        for b, t in zip(bits, thumbs, strict=True)
    ]
    expected = set()
    for i in range(100):
        for j in range(i + 1, 100):
            distance = imagehash.ImageHash(bits[i].reshape(16, 16)) - imagehash.ImageHash(
                bits[j].reshape(16, 16)
            )
            if distance <= looks.NEAR_BITS and i != 7 and np.corrcoef(thumbs[i], thumbs[j])[0, 1] >= 0.9875:
                expected.add((i, j))
    found = [(int(i), int(j)) for a, b in near_pairs(given) for i, j in zip(a, b, strict=True)]
    assert 5 < len(expected) < 45 and sorted(found) == sorted(expected)


def test_a_look_is_the_grey_of_the_whole_and_of_the_border():
    levels = np.full((640, 640), 200, np.uint8)
    levels[:30], levels[-30:], levels[:, :30], levels[:, -30:] = 10, 10, 10, 10  # 3 of 64 on each side
    look = look_at(Image.fromarray(levels).convert("RGB"))
    assert abs(look.mean - levels.mean()) < 1 and abs(look.std - levels.std()) < 1
    assert look.border == 10 and len(look.hash) == 32 and len(look.thumbnail) == 1024
    for size in ((1, 1), (3, 900), (2000, 1)):
        assert abs(look_at(Image.new("RGB", size, (50, 50, 50))).mean - 50) < 1
