"""Where the time goes: whole training runs against their floor, in one run on one machine, as Markdown.

    python -m benchmarks.speed --data-dir xray3     # some 12 minutes on two cores
    python -m benchmarks.speed --data-dir xray3 --image-encoder resnet18 --text-encoder bert-base-chinese
    python -m benchmarks.speed --data-dir xray3 --upscale 1024     # the same images as large originals

The floor is the image tower alone: same architecture, precision, batch and size, on random tensors in memory,
forward + backward + AdamW for training and forward for validation. It is measured before and after each run,
and the faster one counts. A run's share of it is the time its images would take at the floor over the time
they took, everything included: from one epoch's line on the screen to the next, with validation and
checkpoints. The first epoch counts from where images begin to be read, with no cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

import common.torchvision_compat  # noqa: F401
import training.fit
from common.cli import Parser, exit_code_of
from common.device import Hardware, choose_hardware, keep_freed_memory
from common.errors import RunFailed, UserError
from common.files import write_json
from common.stopping import Requests
from data.augment import Augmentation
from data.images import Squares, read_image
from data.loader import EpochBatches, ImageDataset, build_loader
from data.scan import scan_folder
from evaluation.predict import predict_probs
from models.clip import ClassSentences, CLIPModel, build_clip, build_image_tower
from models.text_encoders import build_text_tower
from training.fit import train_one_epoch
from training.losses import contrastive_loss
from training.optim import parameter_groups
from training.state import EarlyStopping, InEpoch, TrainState

ROOT = Path(__file__).resolve().parent.parent
TINY = "bert-tiny-bytes"
SENTENCE = "这是一张{}的胸部X光图像，可见双肺纹理、心影与膈面，供放射科医师参考诊断之用，请结合临床"


@dataclass(frozen=True)
class Floor:
    """Images/s of a tower alone."""

    train: float
    evaluate: float


def seconds_of(
    work: Callable[[], object], device: torch.device, repeats: int = 5, warm_up: int = 2, at_once: int = 1
) -> float:
    """Median time of one call, after `warm_up` that do not count. A GPU is waited for after `at_once` calls,
    which count as one of the repeats.
    """

    def timed() -> float:
        started = time.perf_counter()
        for _ in range(at_once):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / at_once

    return median([timed() for _ in range(repeats + warm_up)][warm_up:])


def floor_of(encoder: str, size: int, batch: int, hardware: Hardware, compiled: bool = False) -> Floor:
    """The tower by itself, on normalised tensors in memory. A GPU is waited for after every tenth step."""
    device = hardware.device
    repeats, at_once = (3, 10) if device.type == "cuda" else (5, 1)
    backbone = build_image_tower(encoder, "none", size).backbone.to(device, memory_format=torch.channels_last)
    if compiled:
        backbone.compile()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    def train() -> None:
        with hardware.autocast():
            features = backbone(images)
        features.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def evaluate() -> None:
        with torch.no_grad(), hardware.autocast():
            backbone(images)

    train_seconds = seconds_of(train, device, repeats, at_once=at_once)
    backbone.eval()
    floor = Floor(batch / train_seconds, batch / seconds_of(evaluate, device, repeats, at_once=at_once))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the run, which is another process
    return floor


def text_seconds(text_encoder: str, n_classes: int, hardware: Hardware) -> float:
    """One step of the text tower alone: a sentence per class, forward + backward + AdamW on its weights."""
    device = hardware.device
    tower = build_text_tower(text_encoder, "none").to(device).train()
    tokens, _ = tower.tokenize([SENTENCE.format(i) for i in range(n_classes)])
    tokens = {key: value.to(device) for key, value in tokens.items()}
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with hardware.autocast():
            features = tower(**tokens)
        features.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return seconds_of(step, device, 3)


@dataclass(frozen=True)
class Run:
    """A whole run, in seconds: to read the images; each epoch; from the start to where the first step begins.

    memory: MB held at each epoch's end.
    """

    n_train: int
    n_val: int
    read: float
    epochs: list[float]
    start: float
    memory: list[float]


def whole_run(data_dir: Path, encoder: str, text: str, options: Sequence[str], work: Path) -> Run:
    """Train as a user would, in a process of its own, and note when it prints what."""
    work.mkdir(exist_ok=True)
    texts = work / "texts.json"
    write_json(texts, {name: SENTENCE.format(name) for name in scan_folder(data_dir).classes})
    command = [
        sys.executable, str(ROOT / "train_clip.py"), "--data-dir", str(data_dir),
        "--output-dir", str(work / "run"), "--overwrite", "--image-encoder", encoder, "--text-encoder", text,
        "--image-weights", "none", "--text-weights", "none",
        "--class-texts-file", str(texts), "--cache-dir", str(work / "cache"), *options,
    ]  # fmt: skip
    started = last = time.perf_counter()
    n_train = n_val = 0
    read = start = 0.0
    epochs, memory, done = [], [], False
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open(work / "errors.txt", "w") as errors, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    ) as run:  # fmt: skip
        for line in run.stdout:
            now = time.perf_counter()
            if line.startswith("read "):
                read = float(line.split(" images in ")[1].split()[0])
            elif line.startswith("training on "):
                n_train, n_val = int(line.split()[2]), int(line.split("validating on ")[1].split()[0])
                start, last = now - started, now
            elif line.startswith("epoch "):
                epochs.append(now - last)
                status = Path(f"/proc/{run.pid}/status").read_text() if sys.platform == "linux" else ""
                memory += [int(row.split()[1]) / 1024 for row in status.splitlines() if "VmRSS" in row]
                last = now
            elif line.startswith("warning: torch.compile cannot"):
                run.kill()
                raise RunFailed(line.strip())
            elif line.startswith("done:"):
                done = True
                run.kill()  # what follows, the report, is measured elsewhere
                break
        if not done:
            raise RunFailed(f"{' '.join(command)} failed: {(work / 'errors.txt').read_text()[-500:]}")
    return Run(n_train, n_val, read, epochs, start, memory)


def in_memory(
    encoder: str, size: int, batch: int, n_classes: int, n_images: int, hardware: Hardware
) -> tuple[TrainState, ClassSentences, EpochBatches, ImageDataset]:
    """What a run with a frozen tiny text tower holds, over random images, grey as radiographs are."""
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (n_images, size, size, 1), np.uint8)
    squares = Squares(grey.repeat(3, axis=3))
    labels = random.integers(0, n_classes, n_images)
    model = build_clip(encoder, TINY, img_size=size, embed_dim=512, temperature=0.07, image_weights="none",
                       freeze_text=True)  # fmt: skip
    sentences = ClassSentences(model, {f"c{i}": [f"class number {i}"] for i in range(n_classes)})
    model.to(hardware.device, memory_format=torch.channels_last)
    sentences.prepare(hardware.device, center=True)
    groups = parameter_groups(
        model, learning_rate=1e-4, new_lr_ratio=10, text_lr_ratio=0.2, weight_decay=0.01
    )
    batches = EpochBatches(np.arange(n_images), batch, 0)
    state = TrainState(
        model, torch.optim.AdamW(groups, fused=True), torch.amp.GradScaler(enabled=False),
        EarlyStopping("val_acc", None, 0), len(batches), 10 * len(batches), 0,
    )  # fmt: skip
    images = ImageDataset([Path("none")] * n_images, labels, size, squares, hardware.device)
    return state, sentences, batches, images


def step_seconds(
    encoder: str, size: int, batch: int, n_classes: int, hardware: Hardware, steps: int = 6
) -> float:
    """Time of the program's own training step, `standard` augmentation: a mean over `steps`, of several the
    median.
    """
    state, sentences, batches, images = in_memory(encoder, size, batch, n_classes, steps * batch, hardware)
    loader = build_loader(images, batches, 0)
    return seconds_of(lambda: one_epoch(state, sentences, loader, hardware), hardware.device, 3) / steps


def one_epoch(state: TrainState, sentences: ClassSentences, loader: DataLoader, hardware: Hardware) -> None:
    state.in_epoch = InEpoch()
    train_one_epoch(
        state, sentences, loader, Augmentation("standard", True, 0), hardware, Requests(0), lambda: None,
        micro_batch_size=None, cutmix_prob=0.0, criterion=partial(contrastive_loss, "unicl"), grad_clip=1.0,
        max_nonfinite_steps=1, seed=0,
    )  # fmt: skip


def parts_of_a_step(encoder: str, size: int, batch: int, hardware: Hardware) -> list[tuple[str, float]]:
    """Share of a training step that each part takes. On a CPU, where nothing runs behind one's back."""
    spent: dict[str, float] = defaultdict(float)

    def timed(owner: object, method: str, name: str):
        original = getattr(owner, method)

        def call(*args, **kwargs):
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - started

        return patch.object(owner, method, call)

    state, sentences, batches, images = in_memory(encoder, size, batch, 3, 8 * batch, hardware)
    loader = build_loader(images, batches, 0)
    tower = state.model.image_tower
    with ExitStack() as stack:
        for owner, method, name in (
            (ImageDataset, "__getitems__", "gather images"),
            (Augmentation, "__call__", "augment"),
            (tower, "normalise", "normalise"),
            (tower.backbone, "forward", "image tower, forward"),
            (state.model, "encode_text", "class sentences"),
            (torch.Tensor, "backward", "backward"),
            (training.fit, "gradient_norm", "gradient norm"),
            (state.optimizer, "step", "AdamW"),
        ):
            stack.enter_context(timed(owner, method, name))
        for _ in range(2):  # the first warms up
            spent.clear()
            started = time.perf_counter()
            one_epoch(state, sentences, loader, hardware)
            total = time.perf_counter() - started
    spent["everything else"] = total - sum(spent.values())
    return [(name, seconds / total) for name, seconds in spent.items()]


def evaluation_speed(model: CLIPModel, images: ImageDataset, batch: int, hardware: Hardware) -> float:
    """Images/s of the program's own predict path over decoded images."""
    loader = build_loader(images, EpochBatches(np.arange(len(images)), batch, None), 0)
    features = torch.nn.functional.normalize(torch.randn(3, 512, device=hardware.device), dim=-1)
    model.eval()
    return len(images) / seconds_of(
        lambda: predict_probs(model, features, loader, hardware.autocast(), hardware.device),
        hardware.device,
        3,
    )


def timm_speed(data_dir: Path, size: int, batch: int, hardware: Hardware) -> float:
    """Images/s of training a plain resnet18 classifier by timm's own means: data set, loader (2 workers),
    augmentation (crop, mirror, colour) and optimizer, over one epoch after a warm one.
    """
    import timm
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2

    model = timm.create_model("resnet18", num_classes=len(scan_folder(data_dir).classes))
    model.to(hardware.device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.01)
    loader = create_loader(
        create_dataset("", str(data_dir)), (3, size, size), batch, is_training=True, num_workers=2,
        use_prefetcher=False, persistent_workers=True, color_jitter=0.1,
    )  # fmt: skip

    def epoch() -> None:
        for images, labels in loader:
            images = images.to(hardware.device).contiguous(memory_format=torch.channels_last)
            with hardware.autocast():
                loss = torch.nn.functional.cross_entropy(model(images), labels.to(hardware.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    epoch()
    return len(loader) * batch / seconds_of(epoch, hardware.device, 1, warm_up=0)


def copied(data_dir: Path, target: Path, change: Callable[[Image.Image], Iterable[Image.Image]]) -> Path:
    """What `change` makes of each image, as JPEG in the same class folders of `target`."""

    def copy(path: str) -> None:
        for i, image in enumerate(change(read_image(data_dir / path))):
            new = target / f"{path}_{i}.jpg"
            new.parent.mkdir(parents=True, exist_ok=True)
            image.save(new, quality=90)

    paths = scan_folder(data_dir).paths
    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(copy, paths), total=len(paths), desc="making images", leave=False))
    return target


def upscaled(data_dir: Path, side: int, target: Path) -> Path:
    """The same images with a shorter side of `side` pixels: stand-ins for large originals."""

    def enlarge(image: Image.Image) -> list[Image.Image]:
        factor = side / min(image.size)
        return [image.resize((round(image.width * factor), round(image.height * factor)))]

    return copied(data_dir, target, enlarge)


def turned_copies(data_dir: Path, copies: int, target: Path) -> Path:
    """`copies` of every image, each turned by another degree."""
    return copied(
        data_dir,
        target,
        lambda image: (image.rotate(i + 1, resample=Image.Resampling.BILINEAR) for i in range(copies)),
    )


def growth(data_dir: Path, encoder: str, options: argparse.Namespace, work: Path) -> str:
    """What an image costs, and four times as many, small ones so that the tower hides little."""
    flags = ["--img-size", "64", "--batch-size", str(options.batch_size), "--gpu-id", str(options.gpu_id)]
    flags += ["--freeze-text-encoder", "--epochs", "3"]
    said = []
    for copies in (1, 4):
        folder = turned_copies(data_dir, copies, work / f"copies_{copies}")
        run = whole_run(folder, encoder, TINY, flags, work / f"run_{folder.name}")
        n = run.n_train + run.n_val
        later, read = (1e3 * seconds / n for seconds in (median(run.epochs[1:]), run.read))
        said.append(f"{n:,}: {later:.2f} ms in an epoch, {read:.2f} ms to read")
    return f"an image of {encoder} at 64 px, of so many: {'; '.join(said)}\n"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


HEAD = (
    "image encoder", "floor, train / forward, img/s", "an epoch at the floor", "epoch 2 on",
    "share of the floor", "first epoch, no cache", "share of the floor",
    "predict path over squares in memory, share of the forward floor", "start to first step, warm cache",
    "MB after each epoch",
)  # fmt: skip


def row_of(
    encoder: str, data_dir: Path, options: argparse.Namespace, hardware: Hardware, work: Path
) -> tuple[str, ...]:
    """One encoder's line of the table: a cold run, then a warm one, between two measurements of the floor."""
    size, batch, frozen = options.img_size, options.batch_size, options.text_encoder == TINY
    flags = ["--img-size", str(size), "--batch-size", str(batch), "--gpu-id", str(options.gpu_id)]
    flags += ["--freeze-text-encoder"] if frozen else []
    before = floor_of(encoder, size, batch, hardware)
    cold, warm = (
        whole_run(data_dir, encoder, options.text_encoder, [*flags, "--epochs", str(n)], work)
        for n in (options.epochs, 1)
    )
    after = floor_of(encoder, size, batch, hardware)
    floor = Floor(max(before.train, after.train), max(before.evaluate, after.evaluate))
    at_floor = cold.n_train / floor.train + cold.n_val / floor.evaluate
    if not frozen:
        n_classes = len(scan_folder(data_dir).classes)
        at_floor += -(-cold.n_train // batch) * text_seconds(options.text_encoder, n_classes, hardware)
    later, first = median(cold.epochs[1:]), cold.epochs[0] + cold.read
    state, _, _, images = in_memory(encoder, size, batch, 3, 8 * batch, hardware)
    predicted = evaluation_speed(state.model, images, batch, hardware)
    return (
        encoder, f"{floor.train:.1f} / {floor.evaluate:.0f}", f"{at_floor:.1f} s", f"{later:.1f} s",
        f"**{at_floor / later:.2f}**", f"{cold.epochs[0]:.1f} s + {cold.read:.1f} s reading",
        f"**{at_floor / first:.2f}**", f"{predicted:.0f} img/s, **{predicted / floor.evaluate:.2f}**",
        f"{warm.start:.1f} s", " ".join(f"{mb:.0f}" for mb in cold.memory),
    )  # fmt: skip


def measure(options: argparse.Namespace, hardware: Hardware, work: Path) -> None:
    """Print the table, and with a frozen text tower what else costs time."""
    size, batch, encoders = options.img_size, options.batch_size, options.image_encoder
    data_dir = options.data_dir
    if options.upscale:
        data_dir = upscaled(data_dir, options.upscale, work / "large")
    frozen = options.text_encoder == TINY
    rows = [row_of(e, data_dir, options, hardware, work / str(i)) for i, e in enumerate(encoders)]
    print(
        "The floor is eager; torch.compile was not tried. The first epoch's files are in the system's page "
        "cache.\n"
    )
    print(
        f"{hardware.description}; torch {torch.__version__}; {size} px, batch {batch}; text encoder "
        f"{options.text_encoder}, {'frozen' if frozen else 'trained'}\n\n{table(HEAD, rows)}"
    )
    if not frozen:
        return
    for encoder in encoders if hardware.device.type == "cpu" else ():
        parts = parts_of_a_step(encoder, size, batch, hardware)
        print(f"a step of {encoder}: " + ", ".join(f"{name} {share:.1%}" for name, share in parts) + "\n")
    peer, ours = (
        timm_speed(data_dir, size, batch, hardware),
        batch / step_seconds("resnet18", size, batch, 3, hardware),
    )
    print(
        f"training resnet18: {ours:.1f} img/s; a plain classifier with timm's data set, loader (2 workers) "
        f"and optimizer: {peer:.1f} img/s\n"
    )
    few, many = (1e3 * step_seconds(encoders[0], size, batch, n, hardware) for n in (3, 1000))
    print(f"classes 3 -> 1000, {encoders[0]}: {few:.0f} -> {many:.0f} ms a step ({many / few - 1:+.1%})\n")
    print(growth(data_dir, encoders[0], options, work))
    s1, rcf = (floor_of(e, size, batch, hardware) for e in ("timm:starnet_s1", "starnet_dual_pyramid_rcf"))
    print(
        "starnet_dual_pyramid_rcf against its local pyramid, StarNet-S1, towers alone: "
        f"{rcf.train:.1f} / {s1.train:.1f} img/s = {rcf.train / s1.train:.2f} in training, "
        f"{rcf.evaluate:.0f} / {s1.evaluate:.0f} = {rcf.evaluate / s1.evaluate:.2f} forward\n"
    )
    command = [sys.executable, str(ROOT / "train_clip.py"), "--help"]
    seconds = seconds_of(
        lambda: subprocess.run(command, capture_output=True, check=True), torch.device("cpu")
    )
    print(f"train_clip.py --help: {seconds:.2f} s")


def read_with_run_options(
    parser: Parser, typed: Sequence[str], encoders: Sequence[str], batch_size: int
) -> argparse.Namespace:
    """The typed options: `parser`'s own, and those of every measurement of whole runs, with these defaults.
    Raises UserError naming every mistake.
    """
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with one sub-folder of images per class (required)")
    add("--image-encoder", nargs="+", default=encoders)
    add("--img-size", type=int, default=224)
    add("--batch-size", type=int, default=batch_size)
    add("--epochs", type=int, default=3, help="at least 2: the first is not like the others")
    add("--gpu-id", type=int, default=0)
    found = parser.read(typed, ["--data-dir"])
    if found.epochs < 2:
        raise UserError(f"--epochs must be at least 2, not {found.epochs}")
    return found


def read_arguments(typed: Sequence[str]) -> argparse.Namespace:
    """The typed options. Raises UserError naming every mistake."""
    parser = Parser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--text-encoder", default=TINY, help=f"{TINY} is frozen, any other is trained")
    parser.add_argument("--upscale", type=int, help="shorter side of the originals to simulate")
    return read_with_run_options(parser, typed, ["resnet18", "starnet_dual_pyramid_rcf"], 32)


def main(typed: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code: 0 done, 2 bad input."""

    def program() -> int:
        options = read_arguments(sys.argv[1:] if typed is None else typed)
        hardware = choose_hardware(options.gpu_id, True)
        keep_freed_memory()  # as training does: the floor shall be as fast as it can be
        with tempfile.TemporaryDirectory() as work:
            measure(options, hardware, Path(work))
        return 0

    return exit_code_of(program, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
