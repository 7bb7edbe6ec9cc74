"""What tests/test_distributed.py starts through torchrun."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from common.distributed import is_main, joined, own_share, rank
from models.clip import ClassSentences, build_clip
from models.sync_batchnorm import synchronise_batchnorm
from training.losses import contrastive_loss
from training.step import loss_and_gradients, parts_of, step_model_of

TEXTS = {"正常": ["正常"], "肺炎": ["肺炎"], "气胸": ["气胸"]}
LABELS = torch.tensor([0, 1, 1, 2, 0, 1, 1, 0, 2, 1, 0, 1, 1])  # uneven for 2 and for 3 processes
ENCODERS = (
    "test_vit",
    "test_resnet",
    "test_efficientnet",
)  # timm's own, for tests; without BatchNorm: the first


def a_model(encoder):
    """In float64, with the class sentences, as a training step finds it."""
    torch.manual_seed(1)
    options = {"img_size": 160, "embed_dim": 16, "temperature": 0.1, "image_weights": "none"}
    model = build_clip(f"timm:{encoder}", "bert-tiny-bytes", **options).double()
    sentences = ClassSentences(model, TEXTS)
    model.text_tower.train_only(sentences.tokens)
    sentences.prepare(torch.device("cpu"), center=True)
    return model.train(), sentences.for_step(torch.Generator())


def a_batch():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (len(LABELS), 3, 160, 160), dtype=torch.uint8, generator=generator)


def results(loss, model):
    """The loss, the gradients, and the running statistics."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    statistics = {name: value for name, value in model.named_buffers() if "running" in name}
    return loss, {**gradients, **statistics}


def steps(out):
    """The loss and the gradients of one step of each kind, written by the first process."""
    found = {}
    for encoder in ENCODERS:
        for kind in ("unicl", "clip", "ce") if encoder == "test_vit" else ("unicl",):
            for most in (None, 4) if encoder != "test_efficientnet" else (None,):
                model, texts = a_model(encoder)
                synchronise_batchnorm(model, on_gpu=False)
                indices = torch.arange(len(LABELS))
                parts = parts_of(a_batch()[own_share(len(LABELS))], indices, most)
                loss, _, _ = loss_and_gradients(
                    step_model_of(model),
                    [lambda own=own: own for own, _ in parts],
                    texts,
                    LABELS,
                    partial(contrastive_loss, kind),
                    torch.amp.GradScaler(enabled=False),
                    lambda: torch.autocast("cpu", enabled=False),
                )
                found[encoder, kind, most] = results(loss, model)
    if is_main():
        torch.save(found, out)


def train(what, arguments):
    """train_clip, in which the second process does `what` at its sixth step, once."""
    import evaluation.report
    import train_clip
    import training.one_split as one_split
    from tests.quick import write_nothing

    loss, calls = one_split.contrastive_loss, []
    happened = Path(arguments[arguments.index("--output-dir") + 1] + " happened")

    def at_a_step(*given, **named):
        calls.append(1)
        if len(calls) == 6 and rank() == 1 and not happened.exists():
            happened.touch()
            if what == "raise":
                raise RuntimeError("CUDA out of memory")
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
        return loss(*given, **named)

    one_split.contrastive_loss = at_a_step
    evaluation.report.write_report = write_nothing  # test_report.py looks at real ones
    if what == "other" and os.environ["RANK"] == "1":
        arguments = [*arguments, "--learning-rate", "0.5"]
    return train_clip.main(arguments)


if __name__ == "__main__":
    if sys.argv[1] == "steps":
        with joined():
            steps(sys.argv[2])
    else:
        sys.exit(train(sys.argv[1], sys.argv[2:]))
