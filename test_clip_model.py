#!/usr/bin/env python3
"""Check that encoders can be built and trained on this machine. Needs no network: weights are random.

    python test_clip_model.py                         every image and text encoder
    python test_clip_model.py resnet50 bert-tiny-bytes  those named

For each: build, forward, backward, shapes, a gradient for every parameter, parameters, time. Last, a whole
CLIP model. Exit code 0 when all pass, 1 when one fails, 2 for an unknown name.
"""

import sys
import time
from collections.abc import Sequence

from common.cli import Parser, exit_code_of
from common.errors import UserError, did_you_mean

IMAGE_SIZE = 64
EMBED_DIM = 64


def check(typed: Sequence[str]) -> int:
    """Print a line for each encoder. Raises UserError for unknown names."""
    parser = Parser(prog="test_clip_model.py", description=__doc__)
    parser.add_argument("encoders", nargs="*", help="names of encoders, or timm:NAME (default: all)")
    names = parser.read(typed, required=()).encoders

    import torch

    from models.clip import build_clip
    from models.registry import IMAGE_ENCODERS, TEXT_ENCODERS

    known = [*IMAGE_ENCODERS, *TEXT_ENCODERS]
    unknown = [name for name in names if name not in known and not name.startswith("timm:")]
    if unknown:
        raise UserError(
            *(f"unknown encoder {name!r}{did_you_mean(name, known)}" for name in unknown),
            f"known: {', '.join(known)}, and timm:NAME",
        )

    torch.manual_seed(0)
    failed = []
    print(f"{'encoder':28s} {'features':>8s} {'M param.':>9s} {'forward s':>10s} {'backward s':>10s}  result")
    checks = [(name, _check_text if name in TEXT_ENCODERS else _check_image) for name in names or known]
    for name, check_one in checks:
        try:
            features, parameters, forward, backward = check_one(name)
        except Exception as error:  # report it and go on with the next encoder
            failed.append(name)
            reason = str(error).splitlines()[0] if str(error) else ""
            print(f"{name:28s} {'':>40s}  FAILED: {type(error).__name__}: {reason}", flush=True)
        else:
            row = f"{features:8d} {parameters / 1e6:9.1f} {forward:10.2f} {backward:10.2f}"
            print(f"{name:28s} {row}  ok", flush=True)

    if not names:
        try:
            model = build_clip(
                "resnet18", "bert-tiny-bytes", img_size=IMAGE_SIZE, embed_dim=EMBED_DIM, temperature=0.07,
                image_weights="none",
            )  # fmt: skip
            _check_clip(model)
            print(f"{'CLIP: resnet18 + tiny text':28s} two classes told apart after a few steps  ok")
        except Exception as error:
            failed.append("CLIP model")
            print(f"{'CLIP: resnet18 + tiny text':28s} FAILED: {type(error).__name__}: {error}")
    print(f"{len(checks) + (not names) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def _check_image(name: str) -> tuple[int, int, float, float]:
    import torch

    from models.clip import build_image_tower

    tower = build_image_tower(name, "none", IMAGE_SIZE)
    images = torch.randint(0, 256, (2, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    return _forward_backward(tower, (images,), (2, tower.num_features))


def _check_text(name: str) -> tuple[int, int, float, float]:
    import torch

    from models.text_encoders import build_text_tower

    tower = build_text_tower(name, "none")
    ids = torch.randint(5, 300, (3, 12))
    return _forward_backward(tower, (ids, torch.ones_like(ids)), (3, tower.num_features))


def _forward_backward(tower, inputs: tuple, shape: tuple[int, int]) -> tuple[int, int, float, float]:
    tower.train()
    started = time.monotonic()
    features = tower(*inputs)
    middle = time.monotonic()
    if tuple(features.shape) != shape or not features.isfinite().all():
        raise UserError(f"features {tuple(features.shape)}, expected finite {shape}")
    (features * features.detach().cos()).sum().backward()
    ended = time.monotonic()
    without = [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        raise UserError(f"{len(without)} parameters get no gradient, first {without[0]}")
    return shape[1], sum(p.numel() for p in tower.parameters()), middle - started, ended - middle


def _check_clip(model) -> None:
    """A dark and a bright image must find their sentences within a few steps."""
    import torch

    from models.clip import ClassSentences
    from training.losses import contrastive_loss

    sentences = ClassSentences(model, {"暗": ["一张暗的图片"], "亮": ["一张亮的图片"]})
    sentences.prepare(torch.device("cpu"), center=True)
    images = torch.stack(
        [torch.full((3, IMAGE_SIZE, IMAGE_SIZE), v, dtype=torch.uint8) for v in (20, 40, 215, 235)]
    )
    images = images + torch.randint(0, 15, images.shape, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(10):
        features = model.encode_image(images)
        text = model.encode_text(sentences.for_step(torch.Generator()))
        logits = model.logits(features, text)
        loss, _ = contrastive_loss("unicl", logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not (logits.argmax(1) == labels).all():
        raise UserError(f"the model does not learn: loss {loss.item():.3f} after 10 steps")


def main(typed: Sequence[str] | None = None) -> int:
    return exit_code_of(lambda: check(sys.argv[1:] if typed is None else typed), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
