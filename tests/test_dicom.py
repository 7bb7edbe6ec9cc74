"""DICOM files: rescaling, windows and tables, inverted grey, colour, compression, and what is refused."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from data.images import read_image
from data.pixels import UnreadableImage

RANDOM = np.random.RandomState(0)
COLOUR = RANDOM.randint(0, 256, (5, 7, 3)).astype(np.uint8)
GREY = RANDOM.randint(0, 256, (5, 7)).astype(np.uint8)
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # what a 12-bit detector gives


def read(path: Path) -> np.ndarray:
    image = read_image(path).convert("RGB")
    return np.asarray(image)


def refusal(path: Path) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    assert str(caught.value) and str(path.parent) not in str(caught.value)
    return str(caught.value)


def by_own_range(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    grey = np.rint(255 * (values - values.min()) / (values.max() - values.min())).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def dicom(path: Path, pixels: np.ndarray, photometric: str = "MONOCHROME2", **attributes) -> Path:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("name", ["x.dcm", "x.DICOM", "IM0001", "1.2.840.5"])
def test_dicom_grey_is_scaled_by_its_own_range(tmp_path, name):
    assert np.array_equal(read(dicom(tmp_path / name, RAMP)), by_own_range(RAMP))


def test_monochrome1_is_the_inverse_of_monochrome2(tmp_path):
    plain, inverse = (read(dicom(tmp_path / f"{p}.dcm", RAMP, p)) for p in ("MONOCHROME2", "MONOCHROME1"))
    assert np.array_equal(plain, by_own_range(RAMP)) and np.array_equal(inverse, 255 - plain)


def window(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """The LINEAR function of DICOM PS3.3 C.11.2.1.2, to 0..255."""
    return np.clip(((values - (center - 0.5)) / (width - 1) + 0.5) * 255, 0, 255)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_the_voi_window_is_applied_to_rescaled_values(tmp_path, photometric):
    path = dicom(
        tmp_path / "x.dcm", RAMP.astype(np.int16), photometric,
        RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400,
    )  # fmt: skip
    expected = window(RAMP * 2.0 - 1024, 40, 400)
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    pixels = read(path)[..., 0].astype(float)
    assert abs(pixels - expected).max() <= 1
    assert 3500 < ((pixels == 0) | (pixels == 255)).sum() < 4000  # 200 of 4096 values lie inside


def test_8_bit_grey_is_as_in_a_png(tmp_path):
    dull = GREY // 4 + 60
    Image.fromarray(dull).save(tmp_path / "x.png")
    assert np.array_equal(read(dicom(tmp_path / "x.dcm", dull)), read(tmp_path / "x.png"))
    assert np.array_equal(read(dicom(tmp_path / "x.dcm", dull, "MONOCHROME1"))[..., 0], 255 - dull)
    wide = dicom(tmp_path / "wide.dcm", dull.astype(np.uint16), BitsStored=8, HighBit=7)
    assert np.array_equal(read(wide)[..., 0], dull)
    negative = dicom(tmp_path / "x.dcm", dull, RescaleSlope=-1, RescaleIntercept=255)
    assert np.array_equal(read(negative)[..., 0], 255 - dull)
    signed = dicom(tmp_path / "x.dcm", (dull.astype(int) - 128).astype(np.int8))
    assert np.array_equal(read(signed)[..., 0], dull)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(
    ("value", "limit", "filled"),
    [
        (-2000, None, [-2000]),
        (63536, None, [-2000]),  # -2000 without its sign
        (-2000, -1500, [-2000, -1500]),
        (4000, 3000, [3000, 3999]),
    ],
)
def test_padding_is_black_and_scales_nothing(tmp_path, photometric, value, limit, filled):
    picture = RAMP[:40].astype(np.int16)
    pixels = picture.copy()
    pixels[0, : len(filled)] = filled
    options = {"PixelPaddingValue": value} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
    path = dicom(tmp_path / "x.dcm", pixels, photometric, RescaleSlope=2, RescaleIntercept=9)
    dataset = pydicom.dcmread(path)
    for name, number in options.items():
        dataset.add_new(name, "SS" if number < 0 else "US", number)
    dataset.save_as(path)
    expected = np.rint(255 * (picture - float(len(filled))) / (picture.max() - len(filled))).clip(0)
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    expected[0, : len(filled)] = 0
    assert np.array_equal(read(path)[..., 0], expected)


def test_padding_of_16_bits_in_an_image_of_8_is_none_of_its_pixels(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = dicom(tmp_path / "x.dcm", pixels)
    for value in (63536, 65535, 4095):
        dataset = pydicom.dcmread(path)
        dataset.add_new("PixelPaddingValue", "US", value)
        dataset.save_as(path)
        assert np.array_equal(read(path)[..., 0], pixels)


def test_padding_is_black_where_its_sign_must_be_looked_up(tmp_path):
    pixels = np.arange(-128, 128, dtype=np.int32).reshape(16, 16)
    path = dicom(tmp_path / "x.dcm", pixels, WindowCenter=-64, WindowWidth=256)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    dataset.add_new("PixelPaddingValue", "SS", -1)
    dataset.save_as(path, implicit_vr=True)
    grey = read(path)[..., 0].ravel()
    assert grey[127] == 0 and grey[126] and grey[128]


def test_an_image_that_is_all_padding_is_black(tmp_path):
    assert not read(dicom(tmp_path / "y.dcm", np.full((4, 4), 7, np.uint16), PixelPaddingValue=7)).any()


def test_the_first_of_several_windows_is_used(tmp_path):
    path = dicom(tmp_path / "x.dcm", RAMP, WindowCenter=[1000, 3000], WindowWidth=[500, 100])
    assert abs(read(path)[..., 0] - window(RAMP.astype(float), 1000, 500)).max() <= 1


def test_a_negative_slope_inverts(tmp_path):
    path = dicom(tmp_path / "x.dcm", RAMP.astype(np.int16), RescaleSlope=-1, RescaleIntercept=0)
    assert np.array_equal(read(path), by_own_range(-RAMP.astype(float)))


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("signed", [False, True])
def test_a_window_after_a_negative_slope_keeps_large_values_white(tmp_path, photometric, signed):
    """PS3.3 C.11.2: the window is over the rescaled values, here 4095 - stored; its greatest are white."""
    bits = 16 if signed else 12
    path = dicom(
        tmp_path / "x.dcm", RAMP.astype(np.int16) if signed else RAMP, photometric, BitsStored=bits,
        HighBit=bits - 1, RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=2048, WindowWidth=4096,
    )  # fmt: skip
    expected = window(4095.0 - RAMP, 2048, 4096)
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    pixels = read(path)[..., 0]
    assert abs(pixels - expected).max() <= 0.5
    assert {pixels[0, 0], pixels[-1, -1]} == {0, 255}


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_window_gives_the_same_grey_whatever_else_the_image_holds(tmp_path, function):
    values = np.arange(1900, 2100, dtype=np.uint16).reshape(10, 20)
    options = {"WindowCenter": 2048, "WindowWidth": 4096, "VOILUTFunction": function}
    part = read(dicom(tmp_path / "part.dcm", values, **options))
    whole = read(dicom(tmp_path / "whole.dcm", RAMP, **options))
    assert np.array_equal(part.reshape(-1, 3), whole.reshape(-1, 3)[1900:2100])
    if function == "LINEAR":
        assert abs(part[..., 0] - window(values.astype(float), 2048, 4096)).max() <= 0.5
        assert part.min() == 118 and part.max() == 131


@pytest.mark.parametrize(("value", "grey"), [(3000, 255), (900, 0)])
def test_an_image_beyond_its_window_is_white_or_black(tmp_path, value, grey):
    pixels = np.full((4, 4), value, np.uint16)
    assert (read(dicom(tmp_path / "x.dcm", pixels, WindowCenter=1500, WindowWidth=1000)) == grey).all()
    path = dicom(tmp_path / "x.dcm", pixels, "MONOCHROME1", WindowCenter=1500, WindowWidth=1000)
    assert (read(path) == 255 - grey).all()


def test_a_window_after_a_modality_table(tmp_path):
    modality = table([0, 100, 1000, 4000])
    modality.ModalityLUTType = "US"
    stored = np.array([[0, 1], [2, 3]], np.uint16)
    options = {"ModalityLUTSequence": [modality], "WindowCenter": 500, "WindowWidth": 1000}
    expected = window(np.array([[0.0, 100], [1000, 4000]]), 500, 1000)
    assert abs(read(dicom(tmp_path / "x.dcm", stored, **options))[..., 0] - expected).max() <= 0.5


def table(entries: list[int] | bytes, first: int = 0, bits: int = 16, n: int | None = None) -> Dataset:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries) if n is None else n, first, bits], entries
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW" if isinstance(entries, bytes) else "US"
    return item


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_a_voi_table_is_applied(tmp_path, photometric):
    stored = np.array([[0, 1], [2, 3]], np.uint8)
    path = dicom(tmp_path / "x.dcm", stored, photometric, VOILUTSequence=[table([0, 60000, 20000, 65535])])
    expected = np.rint(np.array([[0, 60000], [20000, 65535]]) / 65535 * 255)
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    assert np.array_equal(read(path)[..., 0], expected)


def test_a_voi_table_is_scaled_by_its_depth(tmp_path):
    stored = np.array([[1, 1], [2, 2]], np.uint16)
    path = dicom(tmp_path / "x.dcm", stored, VOILUTSequence=[table([0, 1023, 2047, 4095], bits=12)])
    assert read(path)[..., 0].tolist() == [[64, 64], [127, 127]]  # 1023 and 2047 of 4095


@pytest.mark.parametrize("claimed", [16, 8])
def test_a_voi_table_that_is_not_as_deep_as_it_claims_is_scaled_by_what_it_holds(tmp_path, claimed):
    voi = table(np.arange(4096)[::-1].tolist(), bits=claimed)
    grey = read(dicom(tmp_path / "x.dcm", RAMP, VOILUTSequence=[voi]))[..., 0]
    assert np.array_equal(grey, np.rint((4095 - RAMP) / 4095 * 255))


@pytest.mark.parametrize("stored_as", ["words", "packed words", "bytes"])
def test_a_voi_table_of_8_bit_entries_may_have_more_than_256(tmp_path, stored_as):
    entries = (np.arange(4096) // 16).astype(np.uint8)  # of a 12-bit image its high byte
    data = {
        "words": entries.tolist(),
        "packed words": entries.view("<u2").tolist(),
        "bytes": entries.tobytes(),
    }[stored_as]
    path = dicom(tmp_path / "x.dcm", RAMP, VOILUTSequence=[table(data, bits=8, n=4096)])
    assert np.array_equal(read(path)[..., 0], RAMP // 16)


@pytest.mark.parametrize(("bits", "n"), [(16, 5), (8, 5)])
def test_a_voi_table_that_is_cut_is_refused(tmp_path, bits, n):
    stored = np.array([[0, 1]], np.uint16)
    path = dicom(tmp_path / "x.dcm", stored, VOILUTSequence=[table([0, 255], bits=bits, n=n)])
    assert f"entries of {n}" in refusal(path)


def test_a_table_of_8_bit_entries_may_be_filled_up_behind_them(tmp_path):
    entries = RANDOM.randint(0, 256, 250).astype(np.uint8)
    stored = np.arange(250, dtype=np.uint8).reshape(10, 25)
    voi = table(entries.tobytes() + bytes(6), bits=8, n=250)
    path = dicom(tmp_path / "x.dcm", stored, VOILUTSequence=[voi])
    assert np.array_equal(read(path)[..., 0], entries[stored])
    colours = palette(np.stack([entries] * 3, axis=1), 8, words=False)
    colours |= {name: value + bytes(6) for name, value in colours.items() if name.endswith("Data")}
    path = dicom(tmp_path / "y.dcm", stored, "PALETTE COLOR", **colours)
    assert np.array_equal(read(path)[..., 0], entries[stored])


def test_values_outside_a_voi_table_take_its_ends(tmp_path):
    stored = np.array([[0, 99, 100], [101, 102, 65535]], np.uint16)
    path = dicom(tmp_path / "x.dcm", stored, VOILUTSequence=[table([10, 20, 30], first=100, bits=8)])
    assert read(path)[..., 0].tolist() == [[10, 10, 10], [20, 30, 30]]
    options = {"RescaleSlope": 0.5, "RescaleIntercept": -40, "VOILUTSequence": [table([10, 20, 30], 0, 8)]}
    path = dicom(tmp_path / "y.dcm", np.array([[0, 80], [82, 84]], np.uint16), **options)
    assert read(path)[..., 0].tolist() == [[10, 10], [20, 30]]


def test_rgb_dicom(tmp_path):
    assert np.array_equal(read(dicom(tmp_path / "x.dcm", COLOUR, "RGB")), COLOUR)


def test_rgb_dicom_by_planes(tmp_path):
    planes = np.ascontiguousarray(COLOUR.transpose(2, 0, 1)).tobytes()
    path = dicom(tmp_path / "x.dcm", COLOUR, "RGB", PlanarConfiguration=1, PixelData=planes)
    assert np.array_equal(read(path), COLOUR)


def test_ybr_dicom_becomes_rgb(tmp_path):
    ybr = np.asarray(Image.fromarray(np.full((4, 4, 3), (200, 40, 30), np.uint8)).convert("YCbCr"))
    assert abs(read(dicom(tmp_path / "x.dcm", ybr, "YBR_FULL")).astype(int) - (200, 40, 30)).max() <= 2


def palette(colours: np.ndarray, bits: int, words: bool = True, first: int = 0) -> dict:
    """Attributes of a palette of `colours` (n, 3), one entry in each word, or in each byte."""
    attributes = {}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        data = colours[:, channel].astype("<u2" if words else np.uint8).tobytes()
        attributes[f"{name}PaletteColorLookupTableDescriptor"] = [len(colours) % 2**16, first, bits]
        attributes[f"{name}PaletteColorLookupTableData"] = data + bytes(len(data) % 2)
    return attributes


def test_palette_dicom_is_expanded(tmp_path):
    colours = np.array([(0, 0, 0), (255, 0, 0), (90, 200, 40), (255, 255, 255)])
    indices = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)
    path = dicom(tmp_path / "x.dcm", indices, "PALETTE COLOR", **palette(colours * 257, 16))
    assert np.array_equal(read(path), colours[indices])


@pytest.mark.parametrize("bits", [8, 16])
def test_a_16_bit_palette_keeps_its_colours(tmp_path, bits):
    """Dark colours stay dark; 8-bit entries may lie in 16 bits each."""
    colours = np.array([(10, 20, 30), (90, 5, 40)])
    indices = np.array([[0, 1], [1, 0]], np.uint8)
    entries = colours * 256 + 77 if bits == 16 else colours
    path = dicom(tmp_path / "x.dcm", indices, "PALETTE COLOR", **palette(entries, bits))
    assert np.array_equal(read(path), colours[indices])


@pytest.mark.parametrize(
    ("n", "words", "bits", "first"),
    [
        (4096, False, 8, 0),
        (4096, True, 8, 0),
        (2**16, False, 8, 0),
        (300, False, 8, 1000),
        (256, False, 8, 1000),  # values of more bits than the entries
        (255, False, 8, 0),
        (256, False, 16, 0),  # by its length it is no 16-bit palette
        (4096, False, 8, -2048),
    ],
)
def test_a_palette_of_8_bit_entries_may_have_any_length(tmp_path, n, words, bits, first):
    """Values below and above it take the colours of its ends."""
    colours = RANDOM.randint(0, 256, (n, 3))
    stored = np.arange(4096).reshape(64, 64) - (2048 if first < 0 else 0)
    stored = stored.astype(np.int16 if first < 0 else np.uint16)
    path = dicom(tmp_path / "x.dcm", stored, "PALETTE COLOR", **palette(colours, bits, words, first))
    assert np.array_equal(read(path), colours[(stored.astype(int) - first).clip(0, n - 1)])


@pytest.mark.parametrize("missing", ["Descriptor", "Data", "BluePaletteColorLookupTableData", "Table"])
def test_a_palette_that_is_not_whole_is_said_in_plain_words(tmp_path, missing):
    tables = palette(np.zeros((4, 3)), 8)
    given = {name: value for name, value in tables.items() if missing not in name}
    message = refusal(dicom(tmp_path / "x.dcm", np.zeros((4, 4), np.uint8), "PALETTE COLOR", **given))
    assert "palette" in message and "Error" not in message


@pytest.mark.parametrize("n", [8, 300])
def test_a_palette_in_segments_is_expanded_or_refused(tmp_path, n):
    """PS3.3 C.7.9.2: three entries as they are (0), then five more to 90 in equal steps (1)."""
    tables = {}
    for name in ("Red", "Green", "Blue"):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [n, 0, 8]
        tables[f"Segmented{name}PaletteColorLookupTableData"] = bytes([0, 3, 7, 30, 40, 1, 5, 90])
    path = dicom(tmp_path / "x.dcm", np.array([[0, 1, 2], [7, 8, 263]], np.uint16), "PALETTE COLOR", **tables)
    if n == 8:
        assert read(path)[..., 0].tolist() == [[7, 30, 40], [90, 90, 90]]
    else:
        assert "segments" in refusal(path)


def test_compressed_dicom(tmp_path):
    dataset = pydicom.dcmread(dicom(tmp_path / "x.dcm", RAMP))
    dataset.compress(RLELossless, encoding_plugin="pydicom")
    dataset.save_as(tmp_path / "rle.dcm")
    assert np.array_equal(read(tmp_path / "rle.dcm"), by_own_range(RAMP))

    colour = np.full((16, 16, 3), (200, 40, 30), np.uint8)
    Image.fromarray(colour).save(tmp_path / "x.jpg", quality=95)
    dataset = pydicom.dcmread(dicom(tmp_path / "x.dcm", colour, "YBR_FULL_422"))
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([(tmp_path / "x.jpg").read_bytes()])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "jpeg.dcm")
    assert abs(read(tmp_path / "jpeg.dcm").astype(int) - colour).max() <= 4


def test_multi_frame_dicom_is_refused(tmp_path):
    frames = np.stack([GREY] * 3)
    path = dicom(tmp_path / "x.dcm", GREY, NumberOfFrames=3, PixelData=frames.tobytes())
    assert "holds 3 frames" in refusal(path)
    one = dicom(tmp_path / "one.dcm", GREY, NumberOfFrames=1)
    assert np.array_equal(read(one)[..., 0], GREY)


@pytest.mark.parametrize("damage", ["cut", "no pixels", "empty"])
def test_damaged_dicom_is_refused(tmp_path, damage):
    path = dicom(tmp_path / "x.dcm", RAMP)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4000])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        dataset = pydicom.dcmread(path)
        del dataset.PixelData
        dataset.save_as(path)
    refusal(path)
