"""Where the time goes: whole training runs against their floor, in one run on one machine, as Markdown.

    python -m benchmarks.speed --data-dir xray3     # some 25 minutes on two cores
    python -m benchmarks.speed --data-dir xray3 --image-encoder resnet18 --text-encoder bert-base-chinese
    python -m benchmarks.speed --data-dir xray3 --upscale 1024     # the same images as large originals

The floor is the image tower alone: same architecture, precision, batch and size, on random tensors in memory,
forward + backward + AdamW for training and forward for validation; where the text tower is trained, also its
forward + backward + AdamW. It is measured before the first epoch and after each, while the run is stopped,
seven steps of which six count; an epoch is held against what was measured on both its sides, so that a slow
drift of the machine's speed meets both. A run's share of the floor is the time its images would take there
over the time they took, everything included: from one epoch's line on the screen to the next, with validation
and checkpoints (of which such a run writes more than it would by itself, since its clock goes on while it is
stopped). The first epoch counts from where images begin to be read, with no cache. A CPU alone:
benchmarks.speed_gpu measures a GPU.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import common.torchvision_compat  # noqa: F401
import training.fit
from benchmarks.floor import in_turn, seconds_of, table, text_alone, tower_alone
from benchmarks.whole_run import ROOT, Run, sentences_of, whole_run
from common.cli import Parser, exit_code_of
from common.device import Hardware, choose_hardware, keep_freed_memory
from common.errors import UserError
from common.progress import progress
from common.stopping import Requests
from data.augment import Augmentation
from data.images import Squares, read_image
from data.loader import EpochBatches, ImageDataset, build_loader
from data.scan import scan_folder
from evaluation.predict import predict_probs
from models.clip import ClassSentences, CLIPModel, build_clip
from training.fit import train_one_epoch
from training.losses import contrastive_loss
from training.optim import parameter_groups
from training.state import EarlyStopping, InEpoch, TrainState
from training.step import StepOptions

TINY = "bert-tiny-bytes"


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


def own_steps(
    encoder: str, size: int, batch: int, n_classes: int, hardware: Hardware, steps: int
) -> Callable[[], None]:
    """So many of the program's own training steps, `standard` augmentation."""
    state, sentences, batches, images = in_memory(encoder, size, batch, n_classes, steps * batch, hardware)
    loader = build_loader(images, batches, 0)
    return lambda: one_epoch(state, sentences, loader, hardware)


def one_epoch(state: TrainState, sentences: ClassSentences, loader: DataLoader, hardware: Hardware) -> None:
    state.in_epoch = InEpoch()
    options = StepOptions(
        micro_batch_size=None, cutmix_prob=0.0, criterion=partial(contrastive_loss, "unicl"), grad_clip=1.0,
        max_nonfinite_steps=1, seed=0,
    )  # fmt: skip
    augment = Augmentation("standard", True, 0)
    train_one_epoch(state, sentences, loader, augment, hardware, options, Requests(0), lambda: None)


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


def own_prediction(
    model: CLIPModel, images: ImageDataset, batch: int, hardware: Hardware
) -> Callable[[], object]:
    """The program's own predict path over decoded images, once over all of them."""
    loader = build_loader(images, EpochBatches(np.arange(len(images)), batch, None), 0)
    features = torch.nn.functional.normalize(torch.randn(3, 512, device=hardware.device), dim=-1)
    model.eval()
    return lambda: predict_probs(model, features, loader, hardware.autocast(), hardware.device)


def timm_epoch(data_dir: Path, size: int, batch: int, hardware: Hardware) -> tuple[Callable[[], None], int]:
    """An epoch of training a plain resnet18 classifier by timm's own means: data set, loader (2 workers),
    augmentation (crop, mirror, colour) and optimizer. And its number of steps.
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

    return epoch, len(loader)


def copied(data_dir: Path, target: Path, change: Callable[[Image.Image], Iterable[Image.Image]]) -> Path:
    """What `change` makes of each image, as JPEG in the same class folders of `target`."""

    def copy(path: str) -> None:
        for i, image in enumerate(change(read_image(data_dir / path))):
            new = target / f"{path}_{i}.jpg"
            new.parent.mkdir(parents=True, exist_ok=True)
            image.save(new, quality=90)

    paths = scan_folder(data_dir).paths
    with ThreadPoolExecutor() as pool:
        list(progress(pool.map(copy, paths), "making images", total=len(paths)))
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


HEAD = (
    "image encoder", "floor, train / forward, img/s", "epoch 2 on, a mean", "at the floor",
    "share of the floor (of each epoch)", "first epoch, no cache", "share of the floor",
    "predict path over squares in memory, share of the forward floor", "start to first step, warm cache",
    "MB after each epoch",
)  # fmt: skip


def seconds_at_floor(run: Run, batch: int) -> np.ndarray:
    """For each epoch, what its images would take at the floor. run.floors: seconds of a training step of a
    batch of images, of a forward pass of one, and where it is trained of a text tower's step.
    """
    speeds = 1 / np.array(run.floors)  # which have a mean, where seconds do not
    times = [run.n_train / batch, run.n_val / batch, -(-run.n_train // batch)]
    return 2 / (speeds[:-1] + speeds[1:]) @ times[: speeds.shape[1]]


def row_of(
    encoder: str, data_dir: Path, options: argparse.Namespace, hardware: Hardware, work: Path
) -> tuple[str, ...]:
    """One encoder's line of the table: a cold run in turn with its floor, then how a warm one starts."""
    size, batch, frozen = options.img_size, options.batch_size, options.text_encoder == TINY
    flags = ["--img-size", str(size), "--batch-size", str(batch), "--gpu-id", str(options.gpu_id)]
    flags += ["--freeze-text-encoder"] if frozen else []
    train, evaluate = tower_alone(encoder, size, batch, hardware)
    works = [train, evaluate]
    if not frozen:
        works.append(text_alone(options.text_encoder, [*sentences_of(data_dir).values()], hardware))

    def floor() -> list[float]:
        return in_turn(*works)

    floor()  # memory is new to the first steps
    run = partial(whole_run, data_dir, encoder, options.text_encoder, work=work)
    cold = run([*flags, "--epochs", str(options.epochs)], floor=floor)
    warm = run([*flags, "--epochs", "1"])
    at_floor = seconds_at_floor(cold, batch)
    shares = " ".join(f"{a / b:.2f}" for a, b in zip(at_floor, cold.epochs, strict=True))
    first = cold.epochs[0] + cold.read
    step, forward = batch * (1 / np.array(cold.floors)).mean(axis=0)[:2]
    state, _, _, images = in_memory(encoder, size, batch, 3, 8 * batch, hardware)
    predict = own_prediction(state.model, images, batch, hardware)
    predicted, passes = in_turn(predict, lambda: [evaluate() for _ in range(8)], rounds=24)
    return (
        encoder, f"{step:.1f} / {forward:.0f}",
        f"{mean(cold.epochs[1:]):.1f} s", f"{mean(at_floor[1:]):.1f} s",
        f"**{sum(at_floor[1:]) / sum(cold.epochs[1:]):.3f}** ({shares})",
        f"{cold.epochs[0]:.1f} s + {cold.read:.1f} s reading", f"**{at_floor[0] / first:.2f}**",
        f"{len(images) / predicted:.0f} img/s, **{passes / predicted:.3f}**",
        f"{warm.start:.1f} s", " ".join(f"{mb:.0f}" for mb in cold.memory),
    )  # fmt: skip


def stage(what: str) -> None:
    """Say what is measured next, beside the Markdown."""
    print(f"{datetime.now():%H:%M:%S} {what}", file=sys.stderr, flush=True)


def measure(options: argparse.Namespace, hardware: Hardware, work: Path) -> None:
    """Print the table, and with a frozen text tower what else costs time."""
    size, batch, encoders = options.img_size, options.batch_size, options.image_encoder
    data_dir = options.data_dir
    if options.upscale:
        data_dir = upscaled(data_dir, options.upscale, work / "large")
    frozen = options.text_encoder == TINY
    rows = []
    for i, encoder in enumerate(encoders):
        stage(f"{encoder}: a run of {options.epochs} epochs, in turn with its floor, and one of 1 epoch")
        rows.append(row_of(encoder, data_dir, options, hardware, work / str(i)))
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
    for encoder in encoders:
        stage(f"{encoder}: the parts of a step")
        parts = parts_of_a_step(encoder, size, batch, hardware)
        print(f"a step of {encoder}: " + ", ".join(f"{name} {share:.1%}" for name, share in parts) + "\n")
    stage("three epochs of timm's trainer and of this one, in turn")
    peer, steps = timm_epoch(data_dir, size, batch, hardware)
    seconds = in_turn(peer, own_steps("resnet18", size, batch, 3, hardware, steps), rounds=2)
    theirs, ours = (steps * batch / s for s in seconds)
    print(
        f"training resnet18: {ours:.1f} img/s; a plain classifier with timm's data set, loader (2 workers) "
        f"and optimizer: {theirs:.1f} img/s; {ours / theirs:.2f} times as fast\n"
    )
    stage("3 and 1,000 classes, in turn")
    steps = 6
    works = (own_steps(encoders[0], size, batch, n, hardware, steps) for n in (3, 1000))
    few, many = (1e3 * seconds / steps for seconds in in_turn(*works))
    print(f"classes 3 -> 1000, {encoders[0]}: {few:.0f} -> {many:.0f} ms a step ({many / few - 1:+.1%})\n")
    stage("runs over all images and over four times as many, at 64 px")
    print(growth(data_dir, encoders[0], options, work))
    stage("dual pyramid and StarNet-S1, in turn; the last")
    towers = [tower_alone(e, size, batch, hardware) for e in ("timm:starnet_s1", "starnet_dual_pyramid_rcf")]
    for i, what in enumerate(("training", "forward")):
        s1, rcf = (batch / s for s in in_turn(towers[0][i], towers[1][i]))
        print(
            f"starnet_dual_pyramid_rcf against its local pyramid, StarNet-S1, towers alone, {what}: "
            f"{rcf:.1f} / {s1:.1f} img/s = {rcf / s1:.2f}\n"
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
    """Measure and print. Returns the exit code: 0 done, 1 a run failed, 2 bad input."""

    def program() -> int:
        options = read_arguments(sys.argv[1:] if typed is None else typed)
        hardware = choose_hardware(options.gpu_id, True)
        if hardware.device.type != "cpu":
            raise UserError("python -m benchmarks.speed_gpu measures a GPU; give --gpu-id -1 for the CPU")
        keep_freed_memory()  # as training does: the floor shall be as fast as it can be
        with tempfile.TemporaryDirectory() as work:
            measure(options, hardware, Path(work))
        return 0

    return exit_code_of(program, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
