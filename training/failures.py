"""Failures that come from the machine, in words."""

import contextlib
from collections.abc import Iterator

import torch

from common.distributed import lost_another
from common.errors import DISK_FULL, PIPE_CLOSED, RunFailed, first_line, last_line
from data.pixels import UnreadableImage
from training.config import Config


def explain_failure(error: BaseException, config: Config | None) -> str | None:
    """A sentence for failures that come from the machine rather than from this program, else None."""
    if is_out_of_memory(error):
        now = f" (now {config.batch_size} and {config.img_size})" if config else ""
        parts = ""
        if config and not config.compile:  # which micro batches do not go with
            parts = "lower --micro-batch-size, " if config.micro_batch_size else "give --micro-batch-size, "
        return (
            f"out of memory; lower --batch-size or --img-size{now}, {parts}take a smaller encoder, or freeze "
            "one (--freeze-text-encoder, --freeze-image-encoder)"
        )
    if lost_another(error):
        return "another process of this run was ended, perhaps for want of memory"
    text = str(error)
    if isinstance(error, RuntimeError) and "finished reduction in the prior iteration" in text:
        return (
            "an encoder has parameters that nothing uses, which several processes cannot train; start one "
            "process, or take another encoder"
        )
    if isinstance(error, ValueError) and "Expected more than 1 value per channel" in text:
        return (
            "BatchNorm got a single image whose last feature map is a single pixel, and has nothing to "
            "compare it with; raise --batch-size, --micro-batch-size or --img-size"
        )
    if isinstance(error, RuntimeError) and ("is killed by signal" in text or "exited unexpectedly" in text):
        return (
            f"a process that loads images was killed ({first_line(error, 120)}); lower --num-workers, or "
            "give the machine more memory (in Docker: more shared memory, --shm-size)"
        )
    if isinstance(error, RuntimeError) and ("</torch_" in text or "ancdata" in text):
        return (
            f"processes that load images ran out of shared memory or open files ({last_line(error, 120)}); "
            "lower --num-workers (0: no such processes), or raise the limit (in Docker --shm-size, else "
            "ulimit -n)"
        )
    if isinstance(error, UnreadableImage):
        return f"an image could be read at the start but not any more: {last_line(error, 500)}"
    if isinstance(error, OSError) and error.errno in DISK_FULL and config:
        return f"no space left on the disk of --output-dir {config.output_dir} ({error}); make room there"
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    if isinstance(error, OSError):
        return f"the system says: {error}"
    return None


@contextlib.contextmanager
def failures_explained(batch_size: int) -> Iterator[None]:
    """For programs that use a trained model: failures of the machine become a RunFailed with one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            explanation = f"out of memory; lower --batch-size (now {batch_size}) or --num-workers"
        else:
            explanation = explain_failure(error, None)
        if explanation is None:
            raise
        raise RunFailed(explanation) from None


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        any(words in text for words in ("out of memory", "can't allocate memory", "alloc_failed"))
    )
