"""Rotten and hostile files, thousands of them, each to be read or refused with one message; Markdown rows.

    python -m benchmarks.torture_files --times 2000     # of each kind; some 10 minutes

Images: of every format and mode that is read, made small, with flipped bits, cut off, with a header of noise,
spliced with another format, and with huge dimensions. Bombs: as large as is allowed, in few bytes.
Checkpoints: a run's own with wrong bytes, or with a right checksum over wrong content, for use and to resume.
JSON: class texts and --config-file, mutated as text and as trees. Each kind is read in a process of its own,
whose peak memory is what counts; a read that takes over 10 s or raises anything but the one refusal is a
failure.
"""

import contextlib
import copy
import io
import json
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import common.torchvision_compat  # noqa: F401
import train_clip
from benchmarks.torture import SMALL, make_images
from common.checksum import checksum
from common.cli import Parser, exit_code_of
from common.errors import RunFailed, UserError
from data.images import read_image
from data.pixels import UnreadableImage
from data.texts import class_sentences, read_texts
from evaluation.checkpoints import read_checkpoint, write_file
from evaluation.trained import load_trained
from models.clip import ClassSentences
from training.config import Config
from training.optim import parameter_groups
from training.options import make_config, read_config_file
from training.resume import config_of_resumed_run, read_to_resume
from training.state import EarlyStopping, TrainState

SLOWEST_SECONDS, MOST_MEGABYTES = 10, 2000
HUGE = (0, 1, 7, 65535, 65536, 2**31 - 1, 2**32 - 1)
DIMENSIONS = {".png": (16, 20), ".bmp": (18, 22), ".webp": (26, 28)}  # where width and height stand


# --- the files ----------------------------------------------------------------------------------------------


def seeds_of_images() -> Iterator[tuple[str, bytes]]:
    """(suffix, content) of whole images."""
    generator = np.random.default_rng(0)
    grey = generator.integers(0, 255, (40, 56), dtype=np.uint8)
    colour = generator.integers(0, 255, (40, 56, 3), dtype=np.uint8)
    deep = generator.integers(0, 4095, (40, 56), dtype=np.uint16)
    kinds = [
        (".png", grey, {}), (".png", colour, {}), (".png", deep, {}), (".jpg", grey, {}),
        (".jpg", colour, {}), (".jpg", colour, {"progressive": True}), (".bmp", grey, {}),
        (".bmp", colour, {}), (".webp", colour, {}), (".webp", colour, {"lossless": True}),
        (".tif", grey, {}), (".tif", deep, {}),
        *((".tif", colour, {"compression": how}) for how in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
        (".tif", grey.astype(np.float32), {}),
    ]  # fmt: skip
    for suffix, pixels, options in kinds:
        yield suffix, _saved(Image.fromarray(pixels), suffix, options)
    yield ".png", _saved(Image.fromarray(colour).convert("P"), ".png", {})
    yield ".png", _saved(Image.fromarray(colour).convert("RGBA"), ".png", {})
    yield ".png", _saved(Image.fromarray(grey).convert("1"), ".png", {})
    yield ".tif", _saved(Image.fromarray(grey).convert("1"), ".tif", {"compression": "group4"})
    yield ".jpg", _saved(Image.fromarray(colour).convert("CMYK"), ".jpg", {})
    for compressed in (False, True):
        yield ".dcm", _dicom(deep, compressed)


def _saved(image: Image.Image, suffix: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper()), **options)
    return file.getvalue()


def _dicom(pixels: np.ndarray, compressed: bool) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = pixels.tobytes()
    if compressed:
        dataset.compress(RLELossless)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def mutated(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """Flipped bits, a cut, noise, zeros, a repeated part, or the rest of another file."""
    content, how = bytearray(data), draw.randrange(7)
    at, length = draw.randrange(len(content)), draw.randrange(1, 200)
    if how == 0:
        for _ in range(draw.choice((1, 2, 8, 50))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == 1:
        del content[at:]
    elif how == 2:
        content[: draw.randrange(4, 64)] = draw.randbytes(draw.randrange(4, 64))
    elif how == 3:
        content[at : at + length] = draw.randbytes(length)
    elif how == 4:
        content[at : at + length] = bytes(length)
    elif how == 5:
        content[at:at] = content[at : at + length] * draw.choice((1, 3, 50))
    else:
        content[at:] = other[draw.randrange(len(other)) :]
    return bytes(content)


def with_huge_dimensions(suffix: str, data: bytes, draw: random.Random) -> bytes:
    """Another width or height in the header, where the format's own sums still fit."""
    content = bytearray(data)
    value = draw.choice(HUGE)
    if suffix == ".jpg":
        at = next(i for i in range(len(content)) if content[i] == 0xFF and content[i + 1] in (0xC0, 0xC2))
        struct.pack_into(">H", content, at + draw.choice((5, 7)), min(value, 65535))
    elif suffix == ".tif":
        (offset,) = struct.unpack_from("<I", content, 4)
        (count,) = struct.unpack_from("<H", content, offset)
        entries = [offset + 2 + 12 * i for i in range(count)]
        struct.pack_into("<I", content, draw.choice(entries) + 8, value)
    elif suffix == ".dcm":
        tag = content.index(draw.choice((b"\x28\x00\x10\x00", b"\x28\x00\x11\x00")))
        struct.pack_into("<H", content, tag + 8, min(value, 65535))
    elif suffix == ".webp":
        struct.pack_into("<H", content, draw.choice(DIMENSIONS[suffix]), min(value, 65535))
    else:
        struct.pack_into(">I" if suffix == ".png" else "<I", content, draw.choice(DIMENSIONS[suffix]), value)
        if suffix == ".png":
            struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
    return bytes(content)


# --- one kind of file, read in this process -----------------------------------------------------------------


def images(times: int, draw: random.Random, folder: Path) -> Iterator[Callable[[], object]]:
    seeds = list(seeds_of_images())
    for i in range(times):
        suffix, data = draw.choice(seeds)
        if draw.random() < 0.25:
            data = with_huge_dimensions(suffix, data, draw)
        else:
            data = mutated(data, draw, draw.choice(seeds)[1])
        path = folder / f"{i}{suffix}"
        path.write_bytes(data)
        yield lambda path=path: read_image(path)


def bombs(times: int, draw: random.Random, folder: Path) -> Iterator[Callable[[], object]]:
    """Small files that are as large as is allowed, and a little larger."""
    for side in (9400, 9500):
        for mode in ("1", "L", "P", "RGB", "RGBA", "I;16"):
            path = folder / f"{side}{mode[0]}{len(mode)}.png"
            Image.new(mode, (side, side)).save(path)
            yield lambda path=path: read_image(path)


def checkpoints(times: int, draw: random.Random, folder: Path) -> Iterator[Callable[[], object]]:
    """Half of them with wrong bytes, half with a right checksum over wrong content, for use and to resume."""
    run = folder / "run"
    make_images(folder / "data")
    command = ["--data-dir", str(folder / "data"), "--output-dir", str(run), *SMALL, "--epochs", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        if train_clip.main(command):
            raise RunFailed("no checkpoint to start from")
    whole = run / "checkpoint_latest.pth"
    data, content = whole.read_bytes(), read_checkpoint(whole)
    wanted = checksum(content)
    model = load_trained(whole, torch.device("cpu"), with_text=True).model
    model.text_tower.train_only(ClassSentences(model, content["class_texts"]).tokens)
    state = TrainState(
        model,
        torch.optim.AdamW(parameter_groups(model, learning_rate=1e-4, new_lr_ratio=1, text_lr_ratio=1,
                                           weight_decay=0.1), fused=True),
        torch.amp.GradScaler("cpu", enabled=False), EarlyStopping("val_acc", None, 0.0), 6, 6, 1,
    )  # fmt: skip

    def read(path: Path) -> None:
        if checksum(read_checkpoint(path)) != wanted:
            raise AssertionError("accepted with another content")

    def use(path: Path) -> None:
        load_trained(path, torch.device("cpu"))
        checkpoint, _ = read_to_resume(path)
        with contextlib.redirect_stdout(io.StringIO()):
            config_of_resumed_run(
                Config(resume_from=str(path)), checkpoint, {"data_dir": "a", "output_dir": "b"}
            )
        state.restore(checkpoint, path)

    odd = [None, True, -1, 10**30, float("nan"), "x", [], {}, [{}], torch.zeros(1), torch.zeros(2, 3, 4)]
    for i in range(times):
        path = folder / f"{i}.pth"
        if i % 2:
            path.write_bytes(mutated(data, draw, draw.randbytes(1000)))
        else:
            write_file(path, changed(content, draw, odd))
        act = read if i % 2 else use
        yield lambda path=path, act=act: act(path)
        path.unlink()


def changed(tree: Any, draw: random.Random, odd: Sequence[Any]) -> Any:
    """`tree` with one to three parts, at any depth, replaced or left out."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randrange(1, 4)):
        node = tree
        while isinstance(node, (dict, list)) and node:
            key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
            if not isinstance(node[key], (dict, list)) or not node[key] or draw.random() < 0.3:
                if isinstance(node, dict) and draw.random() < 0.2:
                    del node[key]
                else:
                    node[key] = copy.deepcopy(draw.choice(odd))
                break
            node = node[key]
    return tree


def jsons(times: int, draw: random.Random, folder: Path) -> Iterator[Callable[[], object]]:
    texts = {"正常": "一张正常的胸片", "肺炎": ["一张肺炎的胸片", "肺炎"], "气胸": "气胸"}
    entries = [{"name": "a", "image_encoder_name": "resnet18", "epochs": 3, "use_cv": True}, {"img_size": 64}]

    def read_sentences(path: Path) -> None:
        class_sentences(tuple(texts), *read_texts(path))

    def read_entries(path: Path) -> None:
        for entry in read_config_file(path):
            make_config(
                {
                    **vars(Config(data_dir="a", output_dir="b")),
                    **{k: v for k, v in entry.items() if k != "name"},
                }
            )

    for i in range(times):
        value, read = draw.choice(((texts, read_sentences), (entries, read_entries)))
        path = folder / f"{i}.json"
        path.write_bytes(mutated_json(value, draw))
        yield lambda path=path, read=read: read(path)


def mutated_json(value: Any, draw: random.Random) -> bytes:
    odd = [None, True, -1, 1e999, 10**400, "", "\ud800", "a" * 10**6, [], {}, [[]], {"": ""}, 0.5, "‮", "=x()"]
    how = draw.randrange(8)
    if how < 3:
        return mutated(json.dumps(value, ensure_ascii=False).encode(), draw, draw.randbytes(100))
    if how == 3:
        return b"[" * draw.choice((10, 10**5)) + b"]" * draw.choice((10, 10**5))
    if how == 4:
        number = draw.choice((1000, 10**6))
        return ("{" + ",".join(f'"{k}":""' for k in range(number)) + "}").encode()
    if how == 5:
        pair = draw.choice(('"正常":"x"', '"epochs":1'))
        return ("[{" + ",".join([pair] * draw.choice((2, 10**5))) + "}]").encode()
    tree = changed(value, draw, odd)
    return json.dumps(tree, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


KINDS = {
    "images": (images, UnreadableImage),
    "bombs": (bombs, UnreadableImage),
    "checkpoints": (checkpoints, UserError),
    "json": (jsons, UserError),
}


def read_kind(kind: str, times: int, seed: int) -> dict[str, Any]:
    make, refusal = KINDS[kind]
    outcomes, slowest, failures = Counter(), 0.0, []
    with tempfile.TemporaryDirectory(prefix="torture_") as folder:
        for number, read in enumerate(make(times, random.Random(seed), Path(folder))):
            started = time.monotonic()
            try:
                read()
                outcomes["read"] += 1
            except refusal as error:
                outcomes["refused"] += 1
                if not str(error).strip():
                    failures.append(f"{number}: an empty message")
            except BaseException as error:
                failures.append(f"{number}: {type(error).__name__}: {error}"[:300])
            seconds = time.monotonic() - started
            slowest = max(slowest, seconds)
            if seconds > SLOWEST_SECONDS:
                failures.append(f"{number}: {seconds:.0f} s")
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if megabytes > MOST_MEGABYTES:
        failures.append(f"{megabytes:.0f} MB")
    return {"outcomes": outcomes, "slowest": slowest, "megabytes": megabytes, "failures": failures}


# --- all of them --------------------------------------------------------------------------------------------


def read_arguments(arguments: Sequence[str]):
    parser = Parser(prog="python -m benchmarks.torture_files", description=__doc__)
    parser.add_argument("--what", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--times", type=int, default=2000, metavar="N", help="files of each kind")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--here", action="store_true", help="read one kind in this process; result as JSON")
    return parser.read(arguments, ())


def torture_all(arguments: Sequence[str]) -> int:
    options = read_arguments(arguments)
    if options.here:
        print(json.dumps(read_kind(options.what[0], options.times, options.seed)))
        return 0
    print(
        "| files | read | refused | slowest | peak memory | failures |\n|---|---|---|---|---|---|", flush=True
    )
    failed = 0
    for kind in options.what:
        command = [sys.executable, "-m", "benchmarks.torture_files", "--here", "--what", kind]
        command += ["--times", str(options.times), "--seed", str(options.seed)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"{kind}: an hour is over; something waits for ever") from None
        if done.returncode:
            raise RunFailed(f"{kind}: exit code {done.returncode}: {done.stderr[-2000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        failed = failed or int(bool(result["failures"]))
        read, refused = (result["outcomes"].get(outcome, 0) for outcome in ("read", "refused"))
        print(
            f"| {read + refused} {kind} | {read} | {refused} | {result['slowest']:.1f} s | "
            f"{result['megabytes']:.0f} MB | {'; '.join(result['failures']) or 'none'} |",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: torture_all(sys.argv[1:]), "stopped"))
