"""Read one DICOM image as it is to be seen: rescaled, by its window or table, or in its palette's colours."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data.pixels import Stored, UnreadableImage, grey_if_grey, refuse_too_many_pixels, scale_to_8_bit
from data.scan import FORMAT_OF_SUFFIX, has_dicom_magic

if TYPE_CHECKING:
    import pydicom


def is_dicom(suffix: str, file: Path | io.BytesIO) -> bool:
    if FORMAT_OF_SUFFIX.get(suffix.lower()) == "DICOM":
        return True
    if isinstance(file, io.BytesIO):
        return has_dicom_magic(file)
    with open(file, "rb") as opened:
        return has_dicom_magic(opened)


def read_dicom(file: Path | io.BytesIO) -> tuple[Image.Image, Stored]:
    """The image, L where it is grey, else RGB, and what the file says of it. Raises UnreadableImage."""
    import pydicom

    if isinstance(file, io.BytesIO):
        with tempfile.NamedTemporaryFile(suffix=".dcm") as copy:  # pydicom reads a head by a file's name only
            copy.write(file.getvalue())
            copy.flush()
            return read_dicom(Path(copy.name))
    try:
        syntax = pydicom.filereader.read_file_meta_info(file).get("TransferSyntaxUID")
        if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:  # it unpacks to whatever size at once
            raise UnreadableImage("is a deflated DICOM file, which is not supported; save it undeflated")
        if syntax is None:
            raise UnreadableImage("DICOM: its head is damaged: it names no transfer syntax")
        with open(file, "rb") as opened:
            # what a crashed copy left empty reads as millions of elements of group 0
            dataset = pydicom.filereader.read_partial(opened, lambda tag, *_: tag.group < 8)
        refuse_too_many_pixels(int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0))
        frames = int(dataset.get("NumberOfFrames", 1) or 1)
        if frames != 1:
            raise UnreadableImage(f"holds {frames} frames; save each frame as its own file")
        stored = ("DICOM", str(dataset.get("PhotometricInterpretation")), int(dataset.get("BitsStored", 8)))
        pixels = dataset.pixel_array  # YBR is converted to RGB by pydicom
        if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
            pixels = _coloured(pixels, dataset)
        if pixels.ndim == 3:
            colour = pixels if pixels.dtype == np.uint8 else scale_to_8_bit(pixels)
            return grey_if_grey(Image.fromarray(colour)), stored
        return Image.fromarray(_shown(pixels, dataset)), stored
    except UnreadableImage:
        raise
    except pydicom.errors.InvalidDicomError:
        raise UnreadableImage("is no DICOM file, though its name says so; export it again") from None
    except Exception as error:  # pydicom raises many kinds; each means the file cannot be used
        raise UnreadableImage(f"DICOM: {type(error).__name__}: {error}") from None


def _shown(pixels: np.ndarray, dataset: "pydicom.Dataset") -> np.ndarray:
    """(H, W) uint8: how a grey DICOM of the stored values `pixels` (H, W) is to look. Changes `dataset`."""
    from pydicom.pixels import apply_modality_lut, apply_windowing

    values, padding = apply_modality_lut(pixels, dataset), _padding(pixels, dataset)
    table = (dataset.get("VOILUTSequence") or [{}])[0]
    if None not in (table.get("LUTDescriptor"), table.get("LUTData")):
        grey = _looked_up(values, table, dataset)
    elif None not in (dataset.get("WindowCenter"), dataset.get("WindowWidth")):
        # pydicom maps the window to what these say that values can be; a negative slope would turn it round
        dataset.BitsStored, dataset.PixelRepresentation, dataset.ModalityLUTSequence = 8, 0, []
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
        grey = scale_to_8_bit(apply_windowing(values, dataset), (0, 255))
    elif (bits := int(dataset.get("BitsStored") or 16)) <= 8 and not dataset.get("ModalityLUTSequence"):
        least = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
        ends = apply_modality_lut(np.array([least, least + 2**bits - 1]), dataset)
        grey = scale_to_8_bit(values, (ends.min(), ends.max()))  # 8 bits are grey as they are, as in a PNG
    else:
        picture = values[~padding]
        grey = scale_to_8_bit(values, (picture.min(), picture.max()) if picture.size else None)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey  # its largest value is black
    grey[padding] = 0
    return grey


def _padding(pixels: np.ndarray, dataset: "pydicom.Dataset") -> np.ndarray:
    """(H, W) bool: which of the stored values `pixels` (H, W) only fill the frame."""
    if dataset.get("PixelPaddingValue") is None or pixels.dtype.kind not in "iu":
        return np.zeros(pixels.shape, bool)
    given = [dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit")]
    ends = np.array([end for end in given if end is not None], np.int64)
    if pixels.dtype.itemsize == 2:  # a signed value is often written as an unsigned one
        ends = ends.astype(pixels.dtype)
    return (pixels >= ends.min()) & (pixels <= ends.max())


def _looked_up(values: np.ndarray, table: "pydicom.Dataset", dataset: "pydicom.Dataset") -> np.ndarray:
    """(H, W) uint8: the grey that an item of the VOI LUT sequence of `dataset` gives for `values` (H, W)."""
    _, first, bits = table.LUTDescriptor
    entries = _entries(table.LUTDescriptor, table.LUTData, dataset)
    places = (values.astype(np.int64) - first).clip(0, len(entries) - 1)
    used = int(entries.max()).bit_length()
    if not used <= bits < used + 4:  # some programs claim 16 for entries of 12 bits
        bits = used
    return scale_to_8_bit(entries, (0, 2**bits - 1))[places]


def _coloured(pixels: np.ndarray, dataset: "pydicom.Dataset") -> np.ndarray:
    """(H, W, 3) uint8: the colours that its palette gives for the stored values `pixels` (H, W)."""
    from pydicom.pixels import apply_color_lut

    descriptor = dataset.get("RedPaletteColorLookupTableDescriptor")  # that of green and blue is the same
    tables = [dataset.get(f"{name}PaletteColorLookupTableData") for name in ("Red", "Green", "Blue")]
    if descriptor is None or (None in tables and "SegmentedRedPaletteColorLookupTableData" not in dataset):
        raise UnreadableImage("DICOM: its palette is missing or not whole; save it as RGB")
    n, (_, first, bits) = _length(descriptor), descriptor
    places = (pixels.astype(np.int64) - first).clip(0, n - 1)
    if None not in tables:
        colours = np.stack([_entries(descriptor, data, dataset)[places] for data in tables], axis=-1)
    elif bits == 8 and n > 256:
        raise UnreadableImage(f"DICOM: its palette of {n} 8-bit entries is in segments; save it as RGB")
    else:  # in segments
        colours = apply_color_lut(places + first, dataset)
    return (colours >> (bits - 8) if colours.dtype == np.uint16 else colours).astype(np.uint8)


def _entries(
    descriptor: Sequence[int], data: bytes | int | Sequence[int], dataset: "pydicom.Dataset"
) -> np.ndarray:
    """(n,) uint8 or uint16: the entries of a table. pydicom's own functions count 8-bit entries in 8 bits, so
    that the 257th is the first.
    """
    n, bits = _length(descriptor), descriptor[2]
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if dataset.original_encoding[1] else ">u2")
    words = np.atleast_1d(data).astype("<u2")
    # 8-bit entries lie two in a word, or one as some programs write them; some claim 16 bits for them
    packed = len(words) < n and (bits == 8 or len(words) == (n + 1) // 2)
    entries = (words.view(np.uint8) if packed else words)[:n]
    if len(entries) < n:
        raise UnreadableImage(f"DICOM: its table has {len(entries)} entries of {n}")
    return entries


def _length(descriptor: Sequence[int]) -> int:
    return descriptor[0] % 2**16 or 2**16  # 0 stands for 65,536; a signed image's may be read as signed too
