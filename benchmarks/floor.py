"""What a measurement is held against: towers by themselves; how they are timed; a Markdown table."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch

import common.torchvision_compat  # noqa: F401
from common.device import Hardware
from models.clip import build_image_tower
from models.text_encoders import build_text_tower


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


def in_turn(*works: Callable[[], object], rounds: int = 6) -> list[float]:
    """Mean seconds of each of `works` on a CPU, one after the other in every round; the first round does not
    count.
    """
    cpu = torch.device("cpu")
    spent = [[seconds_of(work, cpu, 1, 0) for work in works] for _ in range(rounds + 1)]
    return [mean(of_one) for of_one in zip(*spent[1:], strict=True)]


def tower_alone(
    encoder: str, size: int, batch: int, hardware: Hardware, compiled: bool = False
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step and a forward pass of the tower by itself, on normalised tensors in memory."""
    device = hardware.device
    towers = [
        build_image_tower(encoder, "none", size).backbone.to(device, memory_format=torch.channels_last)
        for _ in range(2)
    ]
    if compiled:
        torch._dynamo.reset()  # it compiles a function 8 times, and networks of a kind share one
        for tower in towers:
            tower.compile()
    trained, evaluated = towers[0].train(), towers[1].eval()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    def train() -> None:
        with hardware.autocast():
            features = trained(images)
        features.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def evaluate() -> None:
        with torch.no_grad(), hardware.autocast():
            evaluated(images)

    return train, evaluate


def floor_of(encoder: str, size: int, batch: int, hardware: Hardware, compiled: bool = False) -> Floor:
    """The tower by itself. A GPU is waited for after every tenth step."""
    device = hardware.device
    repeats, at_once = (3, 10) if device.type == "cuda" else (5, 1)
    train, evaluate = tower_alone(encoder, size, batch, hardware, compiled)
    floor = Floor(
        batch / seconds_of(train, device, repeats, at_once=at_once),
        batch / seconds_of(evaluate, device, repeats, at_once=at_once),
    )
    if device.type == "cuda":
        del train, evaluate
        gc.collect()  # a compiled tower holds itself
        torch.cuda.empty_cache()  # for the run, which is another process
    return floor


def text_alone(text_encoder: str, sentences: Sequence[str], hardware: Hardware) -> Callable[[], None]:
    """A step of the text tower by itself: forward + backward of these sentences, AdamW on the weights that
    they use.
    """
    device = hardware.device
    tower = build_text_tower(text_encoder, "none").train()
    tokens, _ = tower.tokenize(sentences)
    tower.train_only(tokens)
    tower.to(device)
    tokens = {key: value.to(device) for key, value in tokens.items()}
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with hardware.autocast():
            features = tower(**tokens)
        features.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
