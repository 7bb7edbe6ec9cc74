"""Every supported format becomes the right 8-bit RGB image; every other file is refused with its reason."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import images
from data.images import inspect_images, read_image, to_square
from data.pixels import UnreadableImage

RANDOM = np.random.RandomState(0)
COLOUR = RANDOM.randint(0, 256, (5, 7, 3)).astype(np.uint8)
GREY = RANDOM.randint(0, 256, (5, 7)).astype(np.uint8)
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # what a 12-bit detector gives


def read(path: Path) -> np.ndarray:
    image = read_image(path)
    grey = np.asarray(image.convert("RGB"))
    is_grey = (grey == grey[..., :1]).all()
    assert image.mode == ("L" if is_grey else "RGB")  # grey is one channel, however it was stored
    return grey


def saved(tmp_path: Path, image: Image.Image | np.ndarray, name: str, **options) -> np.ndarray:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(tmp_path / name, **options)
    return read(tmp_path / name)


def refusal(path: Path) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    assert str(caught.value) and str(path.parent) not in str(caught.value)
    return str(caught.value)


def grey_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def by_own_range(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return grey_rgb(np.rint(255 * (values - values.min()) / (values.max() - values.min())).astype(np.uint8))


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG written by hand: kinds that Pillow cannot write. `rows` begin with their filter byte."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# ---- Pillow's formats


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.png", {}),
        ("x.bmp", {}),
        ("x.tif", {}),
        ("x.TIFF", {"compression": "tiff_lzw"}),
        ("x.tiff", {"compression": "tiff_adobe_deflate"}),
        ("x.webp", {"lossless": True}),
    ],
)
def test_lossless_formats_give_the_very_pixels(tmp_path, name, options):
    assert np.array_equal(saved(tmp_path, COLOUR, name, **options), COLOUR)
    if not name.endswith("webp"):
        assert np.array_equal(saved(tmp_path, GREY, name, **options), grey_rgb(GREY))


@pytest.mark.parametrize("width", [5, 54, 56, 72, 105])  # rows of 16, 162.., 168, 216 and 316 bytes
@pytest.mark.parametrize("name", ["x.bmp", "x.tif", "x.png"])
def test_no_size_is_taken_for_16_bit_colour(tmp_path, name, width):
    pixels = RANDOM.randint(0, 256, (3, width, 3)).astype(np.uint8)
    assert np.array_equal(saved(tmp_path, pixels, name), pixels)


@pytest.mark.parametrize(
    "length", range(90, 170, 6)
)  # moves the TIFF directory, whose place Pillow keeps too
def test_no_compressed_tiff_is_taken_for_16_bit_colour(tmp_path, length):
    pixels = RANDOM.randint(0, 256, (1, length // 3, 3)).astype(np.uint8)
    assert np.array_equal(saved(tmp_path, pixels, "x.tif", compression="packbits"), pixels)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_lossy_formats_keep_the_colours(tmp_path, suffix):
    halves = np.zeros((32, 48, 3), np.uint8)
    halves[:16], halves[16:] = (200, 40, 30), (20, 60, 180)
    pixels = saved(tmp_path, halves, f"x.{suffix}", quality=95).astype(int)
    assert pixels.shape == halves.shape
    assert abs(pixels[:12] - (200, 40, 30)).max() <= 4 and abs(pixels[20:] - (20, 60, 180)).max() <= 4


def test_grey_jpeg(tmp_path):
    pixels = saved(tmp_path, np.full((16, 16), 77, np.uint8), "x.jpg")
    assert abs(pixels.astype(int) - 77).max() <= 1


def test_cmyk_jpeg(tmp_path):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # all magenta and yellow: red
    assert abs(saved(tmp_path, cmyk, "x.jpg", quality=100).astype(int) - (255, 0, 0)).max() <= 4


def test_one_bit_png(tmp_path):
    bits = GREY > 127
    assert np.array_equal(saved(tmp_path, Image.fromarray(bits), "x.png"), grey_rgb(bits * np.uint8(255)))


@pytest.mark.parametrize("transparent", [None, 2])
def test_palette_png(tmp_path, transparent):
    palette = np.array([(10, 20, 30), (255, 0, 0), (90, 200, 40), (1, 2, 3)], np.uint8)
    indices = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(palette.tobytes())
    image.putdata(indices.ravel().tolist())
    expected = palette[indices]
    if transparent is not None:
        expected[indices == transparent] = 0
    options = {} if transparent is None else {"transparency": transparent}
    assert np.array_equal(saved(tmp_path, image, "x.png", **options), expected)


def test_palette_with_graded_transparency(tmp_path):
    image = Image.fromarray(np.zeros((1, 2), np.uint8)).convert("P")
    image.putpalette(bytes((200, 100, 50, 200, 100, 50)))
    image.putdata([0, 1])
    pixels = saved(tmp_path, image, "x.png", transparency=bytes((255, 51)))
    assert abs(pixels[0].astype(int) - [(200, 100, 50), (40, 20, 10)]).max() <= 1


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.tif"])
def test_alpha_is_composed_on_black(tmp_path, name):
    alpha = np.array([[0, 51, 128, 255] * 2] * 8, np.uint8)
    rgb = np.full((8, 8, 3), (250, 100, 10), np.uint8)
    expected = np.rint(rgb * (alpha[:, :, None] / 255.0))
    options = {"lossless": True, "exact": True} if name == "x.webp" else {}
    pixels = saved(tmp_path, np.dstack([rgb, alpha]), name, **options)
    assert abs(pixels.astype(int) - expected).max() <= 1


def test_grey_alpha_png(tmp_path):
    grey, alpha = np.full((2, 3), 240, np.uint8), np.array([[0, 85, 255]] * 2, np.uint8)
    image = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    expected = grey_rgb(np.rint(grey * (alpha / 255.0)))
    assert abs(saved(tmp_path, image, "x.png").astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "key"), [(GREY, int(GREY[0, 0])), (COLOUR, tuple(map(int, COLOUR[0, 0])))]
)
def test_a_transparent_colour_becomes_black(tmp_path, pixels, key):
    expected = pixels.copy()
    expected[(pixels == key).reshape(*pixels.shape[:2], -1).all(-1)] = 0
    expected = expected if expected.ndim == 3 else grey_rgb(expected)
    assert np.array_equal(saved(tmp_path, pixels, "x.png", transparency=key), expected)


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
@pytest.mark.parametrize(
    "values", [RAMP, RAMP // 4 + 30000, (RAMP % 7) * 9362], ids=["12-bit", "narrow", "wide"]
)
def test_16_bit_grey_is_scaled_by_its_own_range(tmp_path, name, values):
    pixels = saved(tmp_path, values.astype(np.uint16), name)
    assert np.array_equal(pixels, by_own_range(values))
    assert pixels.min() == 0 and pixels.max() == 255
    if values is RAMP:  # convert("RGB") would leave 94 % of it white
        assert np.bincount(pixels[..., 0].ravel(), minlength=256).max() <= 17


def test_big_endian_16_bit_tiff(tmp_path):
    image = Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes())
    assert np.array_equal(saved(tmp_path, image, "x.tif"), by_own_range(RAMP))


@pytest.mark.parametrize("values", [RAMP.astype(np.int32) * 1000 - 5, RAMP.astype(np.float32) / 1e4 - 0.1])
def test_32_bit_tiff_is_scaled_by_its_own_range(tmp_path, values):
    assert np.array_equal(saved(tmp_path, values, "x.tif"), by_own_range(values))


def test_a_constant_16_bit_image_is_black(tmp_path):
    assert not saved(tmp_path, np.full((4, 4), 3000, np.uint16), "x.png").any()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_float_pixels_that_are_no_numbers_are_refused(tmp_path, wrong):
    values = np.ones((4, 4), np.float32)
    values[1, 2] = wrong
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert "not finite" in refusal(tmp_path / "x.tif")


UPRIGHT = {  # EXIF orientation -> what a viewer must do with the stored array
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: a[::-1, ::-1],
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp", "x.jpg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_honoured(tmp_path, name, orientation):
    stored = np.kron(COLOUR[:2, :3] // 2 + 60, np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"x.webp": {"lossless": True}, "x.jpg": {"quality": 100, "subsampling": 0}}.get(name, {})
    pixels = saved(tmp_path, stored, name, exif=exif, **options)
    expected = UPRIGHT[orientation](stored)
    assert pixels.shape == expected.shape
    assert abs(pixels.astype(int) - expected).max() <= (3 if name == "x.jpg" else 0)


def test_the_content_counts_and_not_the_suffix(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "x.jpg", format="PNG")
    Image.fromarray(RAMP).save(tmp_path / "y.jpeg", format="PNG")
    assert np.array_equal(read(tmp_path / "x.jpg"), COLOUR)
    assert np.array_equal(read(tmp_path / "y.jpeg"), by_own_range(RAMP))


def test_a_chinese_path(tmp_path):
    (tmp_path / "肺炎 病人").mkdir()
    assert np.array_equal(saved(tmp_path / "肺炎 病人", COLOUR, "图 1.png"), COLOUR)


def test_a_camera_jpeg_with_a_preview_gives_the_photograph(tmp_path):
    photo, preview = Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    pixels = saved(tmp_path, photo, "x.jpg", format="MPO", save_all=True, append_images=[preview])
    assert pixels.shape == (16, 16, 3) and abs(pixels.astype(int) - (200, 0, 0)).max() <= 3


# ---- refused


@pytest.mark.parametrize("name", ["x.tif", "x.webp", "x.png"])
def test_several_pages_or_frames_are_refused(tmp_path, name):
    pages = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR), Image.fromarray(COLOUR // 2)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    assert "holds 3 frames or pages" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.bmp", "x.tif"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path, name, share):
    noise = RANDOM.randint(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert "empty (0 bytes)" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"no image at all\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0"]
)
@pytest.mark.parametrize("name", ["x.png", "x.dcm"])
def test_text_and_bare_marks_are_refused(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert ("is no DICOM file" in refusal(tmp_path / name)) is (name == "x.dcm")


def test_what_is_no_file_is_refused(tmp_path):
    refusal(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    refusal(tmp_path / "folder.png")


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)], ids=["RGB", "RGBA", "LA"])
def test_16_bit_colour_png_is_refused(tmp_path, colour_type, channels):
    row = b"\0" + struct.pack(">H", 0x0123) * channels * 2
    (tmp_path / "x.png").write_bytes(png(2, 2, 16, colour_type, row * 2))
    assert "16-bit colour" in refusal(tmp_path / "x.png")


def test_hand_written_png_is_sound(tmp_path):
    """The same writer at 8 bits is read, so the refusals above are about the depth."""
    (tmp_path / "x.png").write_bytes(png(2, 1, 8, 2, b"\0" + bytes((1, 2, 3, 4, 5, 6))))
    assert read(tmp_path / "x.png").tolist() == [[[1, 2, 3], [4, 5, 6]]]


def tiff(pixels: np.ndarray, photometric: int) -> bytes:
    """A TIFF written by hand: kinds that Pillow cannot write. pixels: (H, W) or (H, W, n), little-endian."""
    height, width, *channels = pixels.shape
    n, bits, data = channels[0] if channels else 1, 8 * pixels.itemsize, pixels.tobytes()
    kind = 3 if pixels.dtype.kind == "f" else 1
    after = 8 + 2 + 10 * 12 + 4  # header, then a directory of ten entries
    depths = struct.pack("<H", bits) * n
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, n, bits if n == 1 else after),
        (259, 3, 1, 1),
    ]
    entries += [(262, 3, 1, photometric), (273, 4, 1, after + len(depths)), (277, 3, 1, n)]
    entries += [(278, 4, 1, height), (279, 4, 1, len(data)), (339, 3, 1, kind)]
    directory = struct.pack("<H", 10) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + depths + data


@pytest.mark.parametrize(("photometric", "channels"), [(2, 3), (5, 4)], ids=["RGB", "CMYK"])
def test_16_bit_colour_tiff_is_refused(tmp_path, photometric, channels):
    pixels = np.arange(24, dtype="<u2").reshape(2, -1, channels)
    (tmp_path / "x.tif").write_bytes(tiff(pixels, photometric))
    assert "16-bit colour" in refusal(tmp_path / "x.tif")


@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<f4"])
def test_a_tiff_whose_zero_is_white_is_no_negative(tmp_path, dtype):
    values = (RAMP // 16 if dtype == "<u1" else RAMP).astype(dtype)
    for photometric, name in enumerate(("white.tif", "black.tif")):
        (tmp_path / name).write_bytes(tiff(values, photometric))
    assert np.array_equal(read(tmp_path / "black.tif"), by_own_range(values))
    assert np.array_equal(read(tmp_path / "white.tif"), 255 - by_own_range(values))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 30_000])  # Pillow warns of the first and refuses the second
def test_a_decompression_bomb_is_refused(tmp_path, side):
    (tmp_path / "x.png").write_bytes(png(side, side, 8, 0, bytes(side + 1)))
    assert str(side) in refusal(tmp_path / "x.png") or "bomb" in refusal(tmp_path / "x.png")
    # many threads at once must not let one through
    files = [tmp_path / "x.png"] * 12
    assert len(inspect_images(files, 4).errors) == 12


# ---- whole folders


def test_inspection_names_every_bad_file_and_reads_the_others(tmp_path):
    files = [tmp_path / f"{i:02d}.png" for i in range(9)]
    for i, file in enumerate(files):
        Image.fromarray(np.full((6, 4, 3), 20 * i, np.uint8)).save(file)
    files[1].write_bytes(b"")
    files[4].write_bytes(b"text")
    files[8].unlink()
    found = inspect_images(files, 8)
    assert set(found.errors) == {1, 4, 8} and all(found.errors.values())
    assert "0 bytes" in found.errors[1]
    assert [i for i, digest in enumerate(found.digests) if not digest] == [1, 4, 8]
    assert found.squares.array.shape == (9, 8, 8, 3) and found.squares.array.dtype == np.uint8
    for i in (0, 2, 3, 5, 6, 7):
        assert (found.squares[i] == 20 * i).all()


def test_equal_pixels_have_equal_digests_whatever_the_file(tmp_path):
    names = ["a.png", "b.bmp", "c.tif"]
    for name in names:
        Image.fromarray(COLOUR).save(tmp_path / name)
    other = COLOUR.copy()
    other[4, 6, 2] ^= 1
    Image.fromarray(other).save(tmp_path / "d.png")
    Image.fromarray(COLOUR.reshape(7, 5, 3)).save(tmp_path / "e.png")  # the same bytes in another shape
    digests = inspect_images([tmp_path / name for name in [*names, "d.png", "e.png"]], 4).digests
    assert len(set(digests[:3])) == 1 and len(set(digests)) == 3


def test_images_that_do_not_fit_are_not_kept(tmp_path, monkeypatch):
    Image.fromarray(COLOUR).save(tmp_path / "x.png")
    files = [tmp_path / "x.png"] * 3
    monkeypatch.setattr(images, "MEMORY_FOR_IMAGES", 3 * 8 * 8 * 3)
    kept = inspect_images(files, 8)
    monkeypatch.setattr(images, "MEMORY_FOR_IMAGES", 3 * 8 * 8 * 3 - 1)
    left = inspect_images(files, 8)
    assert kept.squares is not None and left.squares is None
    assert np.array_equal(left.digests, kept.digests) and not left.errors


def test_inspection_keeps_what_reading_gives_later(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "x.png")
    kept = inspect_images([tmp_path / "x.png"], 16).squares[0]
    assert np.array_equal(kept, to_square(read_image(tmp_path / "x.png"), 16))


@pytest.mark.parametrize(("width", "height"), [(300, 100), (90, 400), (64, 64), (20, 16)])
def test_the_whole_image_stays_in_the_square(width, height):
    colours = np.array([[(250, 10, 10), (10, 250, 10)], [(10, 10, 250), (250, 250, 10)]])
    image = np.full((height, width, 3), 128, np.uint8)
    h, w = height // 5, width // 5
    image[:h, :w], image[:h, -w:], image[-h:, :w], image[-h:, -w:] = colours.reshape(4, 3)
    square = to_square(Image.fromarray(image), 40)
    assert square.shape == (40, 40, 3) and square.dtype == np.uint8
    corners = square[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
    assert abs(corners - colours.reshape(4, 3)).max() <= 12
    for rows in (slice(0, 5), slice(-5, None)):  # each marker keeps its fifth of each side
        for columns in (slice(0, 5), slice(-5, None)):
            assert (abs(square[rows, columns].astype(int) - 128).max(-1) > 80).all()
    assert abs(square[12:28, 12:28].astype(int) - 128).max() <= 12


def test_resizing_is_bicubic_and_smooths_what_it_makes_smaller():
    """How far an edge overshoots that is made larger tells the filter; fine lines made smaller turn grey."""
    edge = to_square(Image.fromarray(np.repeat([[60] * 4 + [190] * 4], 8, 0).astype(np.uint8)), 32)
    assert (int(edge.min()), int(edge.max())) == (50, 200)
    lines = to_square(Image.fromarray(np.tile([0, 255], (64, 32)).astype(np.uint8)), 8)
    assert abs(lines[:, 1:-1].astype(int) - 127).max() <= 4


def test_a_plain_image_gets_no_border():
    assert (to_square(Image.new("RGB", (50, 9), (3, 200, 77)), 32) == (3, 200, 77)).all()


@pytest.mark.parametrize("colour", [(10, 20, 10), (10, 10, 20)])
@pytest.mark.parametrize(("shape", "place"), [((5, 7), (0, 0)), ((5, 7), (4, 6)), ((300, 250), (299, 0))])
def test_one_coloured_pixel_makes_a_colour_image(tmp_path, shape, place, colour):
    pixels = grey_rgb(np.resize(GREY, shape))
    pixels[place] = colour
    assert np.array_equal(saved(tmp_path, pixels, "x.png"), pixels)


def test_reading_leaves_no_file_open(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    Image.fromarray(COLOUR).save(tmp_path / "x.png")
    before = len(os.listdir("/proc/self/fd"))
    keep = [read_image(tmp_path / "x.png") for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1 and len(keep) == 20
