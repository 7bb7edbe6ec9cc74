"""The image tower's passes as CUDA graphs: recorded once, replayed at every step.

A small network is thousands of kernels of a few microseconds each, and Python starts them more slowly than a
GPU ends them: on an H200, a step of the dual pyramid with 64 images took 50 ms, nearly as long as its kernels
take with 256. A replay starts all of them at once, and they compute what they would have one by one.
"""

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from common.device import Hardware
from common.errors import first_line
from models.image_encoders import ImageTower

CLOSE = 0.05  # largest share by which recorded features may differ from others; bf16 keeps three digits


class _Alone(nn.Module):
    """PyTorch replaces the forward method of what it records: not the backbone's own, which stays for all
    other sizes.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images)


def record_image_tower(
    tower: ImageTower, batch_sizes: Iterable[int], img_size: int, hardware: Hardware
) -> str:
    """Record training-mode forward and backward passes of `tower`, on a GPU, for batches of `batch_sizes`
    images; `tower` replays them from then on. Weights, running statistics and random states stay as they are.

    Returns "", or why nothing was recorded: not every network can be, and it needs memory for all sizes.
    """
    device = hardware.device
    tower.train()
    buffers = [(buffer, buffer.clone()) for buffer in tower.buffers()]
    random_state, pool = torch.cuda.get_rng_state(device), torch.cuda.graph_pool_handle()
    try:
        for n in sorted(set(batch_sizes), reverse=True):
            shape = torch.Size((n, 3, img_size, img_size))
            if shape in tower.recorded:
                continue
            pixels = torch.randint(0, 256, (2, *shape), dtype=torch.uint8, device=device)
            recorded_on, other = (tower.normalise(images) for images in pixels)
            with torch.autocast(
                device.type, hardware.dtype, enabled=hardware.dtype != torch.float32, cache_enabled=False
            ):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the streams that PyTorch itself warms up on
                    passes = torch.cuda.make_graphed_callables(
                        _Alone(tower.backbone), (recorded_on,), allow_unused_input=True, pool=pool
                    )
                of_both = []
                for network in (tower.backbone, passes):
                    torch.cuda.set_rng_state(random_state, device)
                    with torch.no_grad():
                        of_both.append(network(other).float().clone())
            one_by_one, replayed = of_both
            if not (replayed - one_by_one).norm() <= CLOSE * one_by_one.norm():
                raise RuntimeError("replayed, it gives other features")
            tower.recorded[shape] = passes
    except (RuntimeError, AssertionError) as error:
        tower.recorded.clear()
        return first_line(error)
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.cuda.set_rng_state(random_state, device)
    return ""
