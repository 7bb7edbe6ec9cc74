"""Heat maps: which parts of an image speak for a class, by gradient times activation, and their picture."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from models.clip import CLIPModel
from models.starnet_dual_pyramid_rcf import StarNetDualPyramidRCF

COLORMAP = "inferno"  # perceptually even: equal steps of heat look equal
MOST_COVER = 0.6  # how far the colour hides the image where the heat is 1: the anatomy stays readable


def heat_maps(
    model: CLIPModel,
    images: torch.Tensor,
    class_features: torch.Tensor,
    targets: torch.Tensor | Sequence[int],
) -> np.ndarray:
    """`coarse_maps` enlarged to the images, bilinearly, each by its own maximum: (B, S, S) float32, 0..1.

    A map without anything for the class stays zero.
    """
    coarse = coarse_maps(model, images, class_features, targets)
    heat = F.interpolate(coarse[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    largest = heat.amax(dim=(1, 2), keepdim=True)
    return (heat / torch.where(largest > 0, largest, 1)).cpu().numpy()


def coarse_maps(
    model: CLIPModel,
    images: torch.Tensor,
    class_features: torch.Tensor,
    targets: torch.Tensor | Sequence[int],
) -> torch.Tensor:
    """What speaks for "this class rather than the others" (`log_odds`): (B, h, w) float32, not negative.

    images (B, 3, S, S) uint8 or 0..255 float; class_features (C, D) of unit length; targets (B,) indices of
    classes. Gradient times activation, summed over channels. In a backbone with stages this is done cell by
    cell (HiResCAM) and smoothed, in the map that enters the last stage (of the dual pyramid the local one,
    not F_3): cells of the map that the head pools, twice as coarse, may each have seen the whole image, and
    their peaks fell on lesions less often, in some encoders as seldom as by chance (benchmarks/RESULTS.md).
    Patch tokens have no stages: there the gradient's mean over them weights each channel (Grad-CAM), in the
    final tokens of a ViT that averages them. A ViT that reads only its class token has no use for those;
    there it is the tokens that enter the last attention. Class and register tokens are left out. A ViT may
    have mixed what it saw into tokens of the background by then, small ones trained from scratch often do,
    and the map says where it is, not where it came from.

    It costs one forward pass and a backward pass from the score to the map, in float32. The model stays as it
    was: mode, weights, gradients. Raises UserError for backbones that have no such map.

    Selvaraju et al. 2017, "Grad-CAM", arXiv 1610.02391. Draelos & Carin 2020, "HiResCAM", arXiv 2011.08891.
    """
    device = model.logit_scale.device
    targets = torch.as_tensor(targets, device=device)
    # A backward pass cannot use what its caller made in inference mode, hence the clone.
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False), _evaluating(model):
        class_features = class_features.to(device).clone()
        backbone = model.image_tower.backbone
        last, pooled = _last_map(backbone, model.image_tower.normalise(images.to(device)))
        with torch.enable_grad():
            image_features = F.normalize(model.image_projection(pooled), dim=-1)  # (B, D)
            logits = model.logits(image_features, class_features)  # (B, C)
            score = log_odds(logits, targets).sum()  # over images: in evaluation mode none touches another
        (gradient,) = torch.autograd.grad(score, last)
        maps, gradient = (_as_grid(backbone, values) for values in (last.detach(), gradient))
        of_tokens = last.ndim == 3
        weights = gradient.mean(dim=(2, 3), keepdim=True) if of_tokens else gradient
        heat = F.relu((weights * maps).sum(dim=1))
        return heat if of_tokens else _without_grid(heat)


def _without_grid(heat: torch.Tensor) -> torch.Tensor:
    """(B, h, w) smoothed by 1/4, 1/2, 1/4 both ways: a layer of stride 2 behind the map gives every other
    cell more heat, a grid of dots that these weights even out.
    """
    weights = torch.tensor([0.25, 0.5, 0.25], device=heat.device)
    padded = F.pad(heat[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, torch.outer(weights, weights)[None, None])[:, 0]


def log_odds(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of the target class's softmax probability p: (B, C), (B,) -> (B,).

    That is its logit minus the log-sum-exp of the others: the closest rival counts most, as it does in the
    model's own decision, and unlike that of log p the gradient does not die where the model is sure. A
    single class has no others, and its logit stands alone.
    """
    own = F.one_hot(targets, logits.shape[1]).bool()
    if logits.shape[1] == 1:
        return logits[own]
    return logits[own] - logits.masked_fill(own, -math.inf).logsumexp(dim=1)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The heat (H, W) 0..1 in colour over the image (H, W, 3) uint8: (H, W, 3) uint8.

    The more heat, the less transparent; without heat the pixel is the image's own.
    """
    heat = np.clip(np.asarray(heat, np.float64), 0, 1)
    colour = matplotlib.colormaps[COLORMAP](heat)[..., :3] * 255  # (S, S, 3)
    cover = MOST_COVER * heat[..., None]
    return np.rint((1 - cover) * image + cover * colour).astype(np.uint8)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module in the mode that was its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _last_map(backbone: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The map to look at, and the pooled features (B, num_features) as a function of it alone.

    What comes before the map is not recorded for the backward pass, whether or not the tower is frozen.
    """
    if isinstance(backbone, StarNetDualPyramidRCF):
        with torch.no_grad():
            last, global_map = backbone.before_last_stage(images)
        last = last.detach().requires_grad_()
        with torch.enable_grad():
            return last, backbone.from_last_stage(last, global_map)
    if getattr(backbone, "global_pool", None) == "token":
        return _caught(backbone, images, _last_attention(backbone), at_input=True)
    stage_before = _stage_before_the_last(backbone)
    if stage_before is not None:
        return _caught(backbone, images, stage_before, at_input=False)
    if not hasattr(backbone, "forward_features"):
        raise _no_map(backbone, "it does not give the map before its pooling")
    with torch.no_grad():
        last = backbone.forward_features(images)
    if not isinstance(last, torch.Tensor):
        raise _no_map(backbone, "it ends in several maps")
    last = last.detach().requires_grad_()
    with torch.enable_grad():
        return last, backbone.forward_head(last)


def _last_attention(backbone: nn.Module) -> nn.Module:
    blocks = getattr(backbone, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if blocks is not None else None
    if attention is None:
        raise _no_map(backbone, "its class token is read in a way of its own")
    return attention


def _stage_before_the_last(backbone: nn.Module) -> nn.Module | None:
    """By timm's list of a backbone's stages; None where it has none, or the last is no coarser."""
    stages = getattr(backbone, "feature_info", None) or []
    if len(stages) < 2 or stages[-2]["reduction"] >= stages[-1]["reduction"]:
        return None
    return dict(backbone.named_modules()).get(stages[-2]["module"])


def _caught(
    backbone: nn.Module, images: torch.Tensor, module: nn.Module, at_input: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters or leaves `module`, and the pooled features as a function of it."""
    caught: list[torch.Tensor] = []

    def catch(value: torch.Tensor) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise _no_map(backbone, "its stages pass on several maps")
        caught.append(value.detach().requires_grad_())
        torch.set_grad_enabled(True)  # from here on; leaving no_grad below takes it back
        return caught[0].clone()  # the next layer may work in place

    hook = (
        module.register_forward_pre_hook(lambda _, inputs: (catch(inputs[0]), *inputs[1:]))
        if at_input
        else module.register_forward_hook(lambda _, inputs, output: catch(output))
    )
    try:
        with torch.no_grad():
            pooled = backbone(images)
    finally:
        hook.remove()
    return caught[0], pooled


def _as_grid(backbone: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """(B, h, w, C), (B, tokens, C) or (B, C, h, w), whichever the backbone has -> (B, C, h, w)."""
    if values.ndim == 4:
        return values.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", None) == "NHWC" else values
    prefix = getattr(backbone, "num_prefix_tokens", 0)  # class and register tokens come first
    side = math.isqrt(max(0, values.shape[1] - prefix))
    if values.ndim != 3 or side == 0 or side**2 != values.shape[1] - prefix:
        shape = " x ".join(map(str, values.shape))
        raise _no_map(backbone, f"{shape} features are no square of patches behind {prefix} class tokens")
    return values[:, prefix:].transpose(1, 2).unflatten(2, (side, side))


def _no_map(backbone: nn.Module, why: str) -> UserError:
    return UserError(
        f"no heat maps for an image encoder of the kind {type(backbone).__name__}: {why}; leave them out, or "
        "train another encoder, such as resnet50, convnext-tiny, vit or starnet_dual_pyramid_rcf"
    )
