"""Where and in which precision a program computes."""

import contextlib
import ctypes
from dataclasses import dataclass

import torch

from common.distributed import n_processes, n_processes_here, rank_here
from common.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """device; dtype that autocast uses (float32: no autocast); a sentence for the user that names both."""

    device: torch.device
    dtype: torch.dtype
    description: str

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (AVX512-BF16, AMX); elsewhere bf16 is emulated, and slow."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def keep_freed_memory() -> None:
    """Let this process keep large blocks that it frees, where the C library is glibc.

    By default it gives them back, so that the activations of every step are new pages which the kernel clears
    first: 8 % of an epoch of resnet18 on two cores. The process then stays at its highest need.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no large block is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free bytes at the heap's end to keep, at the most


def gpu_meant(gpu_id: int) -> int:
    """The number of a CUDA GPU: `gpu_id`; or -1 for the CPU, when it is -1 or the machine has no CUDA GPU and
    0 was meant. Where torchrun started several processes, each has the GPU of its number on the machine
    instead.

    Raises UserError when a GPU other than 0 is asked for and does not exist.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_processes() > 1 and gpu_id >= 0:
        if gpu_id > 0:
            raise UserError(
                f"--gpu-id {gpu_id}: torchrun gives each process a GPU of its own; give --gpu-id 0, and "
                "choose the GPUs with CUDA_VISIBLE_DEVICES"
            )
        if 0 < count < n_processes_here():
            raise UserError(
                f"torchrun started {n_processes_here()} processes on this machine, which has {count} GPUs; "
                f"give --nproc_per_node={count}"
            )
        gpu_id = rank_here() if count else 0
    if gpu_id >= count > 0:
        raise UserError(
            f"--gpu-id {gpu_id} does not exist; this machine has GPU 0 to {count - 1}, and -1 is the CPU"
        )
    if gpu_id > 0 and not count:
        raise UserError(
            f"--gpu-id {gpu_id} does not exist: PyTorch sees no CUDA GPU here; -1 trains on the CPU"
        )
    return gpu_id if count else -1


def choose_hardware(gpu_id: int, use_amp: bool) -> Hardware:
    """What `gpu_meant` says, opened.

    Mixed precision: bf16 on CUDA where supported, else fp16; bf16 on CPUs with the instructions, else
    float32.
    """
    gpu = gpu_meant(gpu_id)
    several = f", {n_processes()} processes" if n_processes() > 1 else ""
    if gpu >= 0:
        device = torch.device("cuda", gpu)
        torch.cuda.set_device(device)  # else the loader's pinning thread would open GPU 0 as well
        dtype = torch.float32
        if use_amp:
            dtype = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
        name = torch.cuda.get_device_name(device)
        return Hardware(device, dtype, f"GPU {gpu} ({name}), {_name(dtype)}{several}")
    dtype = torch.bfloat16 if use_amp and _cpu_has_bf16() else torch.float32
    why = "" if gpu_id == -1 else "; PyTorch sees no CUDA GPU"
    return Hardware(torch.device("cpu"), dtype, f"CPU ({_threads()}), {_name(dtype)}{several}{why}")


def free_memory(gpu: torch.device) -> int:
    """Bytes, with those that PyTorch keeps for itself and does not use."""
    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + kept


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread" if count == 1 else f"{count} threads"


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "float32", torch.float16: "float16 mixed", torch.bfloat16: "bfloat16 mixed"}[dtype]
