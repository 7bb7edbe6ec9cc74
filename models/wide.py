"""What stays in float32 where a CPU trains in bf16: operations whose bf16 backward pass is the slower one.

Measured with PyTorch 2.13 on two cores with AVX512-BF16, batch 32, forward + backward, bf16 against float32:
a depthwise 7x7 convolution of 24 channels at 56 x 56, 43 ms against 14; attention of 3136 queries to 49 keys
in 4 heads, 105 against 40; LayerNorm of 24 channels at 56 x 56, 17 against 8. On a GPU nothing changes.
"""

from collections.abc import Callable

import torch
from torch import nn


def wide(operation: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """operation(*tensors); under CPU autocast with gradients, in float32, its result in autocast's type."""
    if tensors[0].device.type != "cpu" or not torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled():
        return operation(*tensors)
    with torch.autocast("cpu", enabled=False):
        return operation(*(tensor.float() for tensor in tensors)).to(torch.get_autocast_dtype("cpu"))


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d with one filter per channel, wide in training on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return wide(super().forward, x)


def widen_depthwise(network: nn.Module) -> None:
    """Make every depthwise nn.Conv2d of `network` a DepthwiseConv2d; names and tensors stay as they are.

    Subclasses, such as the padded convolutions of timm's tf_ models, are left alone.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and module.groups == module.in_channels > 1:
            module.__class__ = DepthwiseConv2d
