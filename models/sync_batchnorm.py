"""BatchNorm over the images of all processes of a run."""

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn

from common.errors import UserError


def synchronise_batchnorm(model: nn.Module, on_gpu: bool) -> None:
    """Let every BatchNorm of `model` take its mean and variance from all processes, in place.

    On a GPU that is PyTorch's own, which has no form for the CPU. Raises UserError for a kind of BatchNorm
    that has none here either.
    """
    if on_gpu:
        convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if type(module) in _ON_CPU:
            module.__class__ = _ON_CPU[type(module)]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(f"--sync-batchnorm: this encoder's {type(module).__name__} needs a GPU for that")


class _Sum(torch.autograd.Function):
    """The sum over all processes; the gradient of each one's part is the sum of what all have for it."""

    @staticmethod
    def forward(ctx, own: torch.Tensor) -> torch.Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(ctx, gradient)


def _normalised(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """`norm` in training (Ioffe & Szegedy 2015, arXiv 1502.03167) of (b, c, H, W), b of this process."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = _Sum.apply(wide.new_tensor(x.numel() / x.shape[1]))
    mean = _Sum.apply(wide.sum((0, 2, 3))) / n  # (c,)
    centred = wide - mean.view(1, -1, 1, 1)
    variance = _Sum.apply(centred.square().sum((0, 2, 3))) / n
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * n / (n - 1), norm.momentum)
    gain = norm.weight * (variance + norm.eps).rsqrt()
    return torch.addcmul(norm.bias.view(1, -1, 1, 1), centred, gain.view(1, -1, 1, 1)).to(x.dtype)


class _SyncBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normalised(self, x) if self.training else super().forward(x)


class _SyncBatchNormAct2d(BatchNormAct2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(_normalised(self, x))) if self.training else super().forward(x)


_ON_CPU = {nn.BatchNorm2d: _SyncBatchNorm2d, BatchNormAct2d: _SyncBatchNormAct2d}
