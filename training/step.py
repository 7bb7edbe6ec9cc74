"""Loss and gradients of one batch, at once or in parts, on one process or several."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from common.distributed import gathered, n_processes, own_share, share
from models.clip import CLIPModel, Texts

# logits (B, C), labels (B,) -> the loss, and its image-to-text part over all classes
Criterion = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StepOptions:
    """How a run trains, the same at every step. micro_batch_size: a batch goes through the image tower in
    parts of at most so many images (None: at once). max_nonfinite_steps: so many in a row end the run.
    """

    micro_batch_size: int | None
    cutmix_prob: float
    criterion: Criterion
    grad_clip: float
    max_nonfinite_steps: int
    seed: int


@dataclass(frozen=True)
class StepModel:
    """A model as a step needs it. shared: the same, but with several processes its gradients are the mean of
    theirs. norms: what has running statistics that training changes.
    """

    model: CLIPModel
    shared: nn.Module
    norms: Sequence[_BatchNorm]


def step_model_of(model: CLIPModel) -> StepModel:
    frozen = {id(module) for tower in model.frozen for module in tower.modules()}
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and id(m) not in frozen]
    return StepModel(model, _shared(model), norms)


def _shared(model: CLIPModel) -> nn.Module:
    if n_processes() == 1:
        return model
    # What is frozen needs no exchange, and a frozen text tower may stay on the CPU. Running statistics are
    # the first process's; they are sent when they are used, not at every step.
    left_out = [name for name, p in model.named_parameters() if not p.requires_grad]
    left_out += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left_out)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def parts_of(
    images: torch.Tensor, indices: torch.Tensor, most: int | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This process's `images` (b, 3, S, S), and which of the batch's `indices` (B,) they are, in even parts
    of at most `most`; as many on every process, which exchange the statistics of each (so one may hold an
    image or two more than `most` where one would be left alone, here or on another process).
    """
    n_parts, own = _n_parts(len(indices), most), indices[own_share(len(indices))]
    return list(zip(images.tensor_split(n_parts), own.tensor_split(n_parts), strict=True))


def _n_parts(n: int, most: int | None) -> int:
    longest, shortest = -(-n // n_processes()), n // n_processes()
    parts = min(-(-longest // (most or longest)), shortest)
    if most != 1:  # no part of a single image: BatchNorm may have nothing to compare
        parts = min(parts, max(1, shortest // 2))
    return parts


def all_parts(n: int, most: int | None) -> list[torch.Tensor]:
    """The parts of a batch of n images as `parts_of` makes them, of every process in turn, as positions."""
    shares = [torch.arange(n)[share(n, number, n_processes())] for number in range(n_processes())]
    return [part for own in shares for part in own.tensor_split(_n_parts(n, most))]


def loss_and_gradients(
    step_model: StepModel,
    views: Sequence[Callable[[], torch.Tensor]],
    texts: Texts,
    labels: torch.Tensor,
    criterion: Criterion,
    scaler: torch.amp.GradScaler,
    autocast: Callable[[], torch.autocast],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, its image-to-text part over all classes, and logits (B, C) of a batch, none with gradient; the
    gradients are left in the parameters, scaled by `scaler`.

    views: each gives the images of one part, the same ones whenever it is called; together this process's
    share of the batch. labels (B,): of the whole batch.

    With one part, forward and backward. With several, gradient caching (Gao et al. 2021, arXiv 2101.06983):
    features without activations, the loss's gradient with respect to them, then each part once more with
    its activations. What is exact about it: loss and gradients, dropout and random depth included. BatchNorm
    normalises within a part, as it does within a process.
    """
    of_part = [None] * (len(views) - 1) + [texts]  # sentences are encoded once, with the last part
    states = []
    if len(views) == 1:
        with autocast():
            image_features, *others = step_model.shared(views[0](), texts)
    else:
        features = []
        for view, own_texts in zip(views, of_part, strict=True):
            states.append(_random_states(labels.device))
            with activations_forgotten(), statistics_kept(step_model.norms), autocast():
                own, *others = (value.detach() for value in step_model.model(view(), own_texts))
            features.append(own)
        image_features = torch.cat(features).requires_grad_()
        others = [value.requires_grad_() for value in others]

    text_features, scale = others
    logits = scale * gathered(image_features, len(labels)) @ text_features.T  # (B, C)
    loss, over_classes = criterion(logits, labels)
    with statistics_kept(step_model.norms):  # checkpointed activations are computed again
        scaler.scale(loss).backward()

    if states:
        gradients = image_features.grad.split([len(own) for own in features])
        for view, own_texts, state, gradient in zip(views, of_part, states, gradients, strict=True):
            is_last = own_texts is not None
            of_others = [value.grad for value in others] if is_last else []
            with _random_states_of(state, labels.device), _exchanged(step_model.shared, is_last):
                with autocast():
                    outputs = step_model.shared(view(), own_texts)
                with statistics_kept(step_model.norms):
                    torch.autograd.backward(outputs, [gradient, *of_others])
    return loss.detach(), over_classes.detach(), logits.detach()


def _exchanged(shared: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """Gradients are exchanged with the last part, when they are complete."""
    return contextlib.nullcontext() if now or n_processes() == 1 else shared.no_sync()


def activations_forgotten() -> contextlib.AbstractContextManager:
    """In the block everything is computed as in training (without gradients a CPU takes other operations for
    some), but nothing is held for a backward pass.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)


@contextlib.contextmanager
def statistics_kept(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """In the block BatchNorm normalises as ever and its running mean and variance stay: they count an image
    once.
    """
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _random_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextlib.contextmanager
def _random_states_of(states: Sequence[torch.Tensor], device: torch.device) -> Iterator[None]:
    """In the block random numbers are those that were drawn from `states` on; afterwards as without it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], device)
        yield
