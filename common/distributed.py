"""The processes of one training that torchrun started, and what they tell each other.

Without torchrun nothing of PyTorch's distributed engine is initialised: there is one process, and every
function here returns at once. CPU tensors go through gloo, a GPU's through NCCL.
"""

import contextlib
import datetime
import hashlib
import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

LONGEST_WAIT = datetime.timedelta(days=2)  # the first process of a machine may decode millions of images
_CONNECTION_LOST = ("connection closed by peer", "connection reset by peer", "remote process exited")
_BEGUN, _SAID = "the run has begun", "an error was said"
_torchruns: dist.Store | None = None  # which outlives restarts
_store: dist.Store | None = None  # of this start
_patient: dist.ProcessGroup | None = None


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def rank_here() -> int:
    """Number of this process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def n_processes_here() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """In the block, the processes of this torchrun are one group, of which all but the first are silent.
    Gives whether torchrun has started the run anew, after `begun`.
    """
    global _torchruns, _store, _patient
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield False
        return
    _torchruns, number, count = next(dist.rendezvous("env://"))
    _store = _of_this_start(_torchruns, number, count)
    # NCCL does nothing before a tensor of a GPU is sent
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=count)
    _patient = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    again = of_the_first(_torchruns.check([_BEGUN]))
    with contextlib.ExitStack() as silence:
        if number:
            nowhere = silence.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        yield again
    dist.destroy_process_group()  # not after an error: it would wait for what never comes


def _of_this_start(store: dist.Store, number: int, count: int) -> dist.Store:
    """A part of `store` for the processes of this start. torchrun keeps its store when it starts them again,
    with what the dead ones wrote there, and counts restarts on each machine by itself. So the first process
    gives the part a name, and answers with it whoever asks, until all have come.
    """
    me = uuid.uuid4().hex
    store.set(f"{number} asks", me)
    if number:
        name = store.get(f"answer to {me}").decode()
        store.set(f"{number} has come to {name}", "")
        return dist.PrefixStore(name, store)
    answered, others = set(), range(1, count)
    while not all(store.check([f"{other} has come to {me}"]) for other in others):
        for other in others:
            asker = store.get(f"{other} asks").decode()
            if asker not in answered:
                store.set(f"answer to {asker}", me)
                answered.add(asker)
        time.sleep(0.02)
    return dist.PrefixStore(me, store)


def begun() -> None:
    """From now on a start by torchrun goes on with what this one has done."""
    if _torchruns is not None and is_main():
        _torchruns.set(_BEGUN, "")


def agree_on(facts: str) -> bool:
    """Whether all processes give the same."""
    digest = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7], "big")
    largest, negative = maximum([digest, -digest])
    return largest == -negative


def who_says(message: str, if_nothing_else: bool = False) -> str | None:
    """What to put before an error: "" in a run of one process, else who this is. None where another process
    has said the same already, or, with `if_nothing_else`, anything.
    """
    if _store is None:
        return ""
    if if_nothing_else and _store.check([_SAID]):
        return None
    _store.set(_SAID, "")
    if _store.add(f"said: {message}", 1) > 1:
        return None
    return f"process {rank()} of {n_processes()}, on {platform.node()}: "


def lost_another(error: BaseException) -> bool:
    """Whether `error` means that another process of the run has ended."""
    text = str(error).lower()
    of_engine = isinstance(error, RuntimeError) and dist.is_initialized()
    return of_engine and any(words in text for words in _CONNECTION_LOST)


def maximum(numbers: Sequence[int]) -> list[int]:
    """Of each number, the largest that a process gives. All wait for each other."""
    return _largest(numbers, None)


def _largest(numbers: Sequence[int], group: dist.ProcessGroup | None) -> list[int]:
    if n_processes() == 1:
        return list(numbers)
    largest = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    return largest.tolist()


def wait_for_all() -> None:
    """However long that takes."""
    _largest([0], _patient)


def of_the_first(value: bool) -> bool:
    """What the first process gives, on every process, however long it takes to get there."""
    (largest,) = _largest([is_main() and value], _patient)
    return bool(largest)


@contextlib.contextmanager
def first_here_first() -> Iterator[None]:
    """The block is run by the first process of each machine, and by its others once that one is through."""
    if rank_here() > 0:
        wait_for_all()
    yield
    if rank_here() == 0:
        wait_for_all()


def share(n: int, number: int, count: int) -> slice:
    """Which of n rows are those of process `number` of `count`: sizes differ by one at most, the first ones
    take more.
    """
    size, more = divmod(n, count)
    start = number * size + min(number, more)
    return slice(start, start + size + (number < more))


def own_share(n: int) -> slice:
    return share(n, rank(), n_processes())


def gathered(own: torch.Tensor, n: int) -> torch.Tensor:
    """The (n, D) rows of which each process has its share, in order; on every process.

    The gradient is right where each process computes the same loss from them and DistributedDataParallel then
    takes the mean of the processes' parameter gradients. (With dropout in the text tower each process has
    other sentences, and the mean is over their losses.)
    """
    return own if n_processes() == 1 else _Gather.apply(own, n)


class _Gather(torch.autograd.Function):
    """Every process has the loss's whole gradient, so each keeps that of its own rows and nothing is sent. It
    is multiplied by their number because the mean over processes, taken later, must be the sum over rows.
    """

    @staticmethod
    def forward(ctx, own: torch.Tensor, n: int) -> torch.Tensor:
        count = n_processes()
        shares = [share(n, number, count) for number in range(count)]
        longest = shares[0].stop
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded)
        return torch.cat([part[: s.stop - s.start] for part, s in zip(parts, shares, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return n_processes() * gradient[own_share(len(gradient))], None
