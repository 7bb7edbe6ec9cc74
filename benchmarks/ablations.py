"""What is left of starnet_dual_pyramid_rcf without one of its parts, as encoders for benchmarks.accuracy.

rcf-global: the global pyramid alone. rcf-late: both pyramids, fused after the last stage only, no cascade.
The local pyramid alone is timm:starnet_s1.
"""

import torch
from torch import nn

from models.image_encoders import ImageTower
from models.registry import IMAGE_ENCODERS, register
from models.starnet_dual_pyramid_rcf import CHANNELS, StarNetDualPyramidRCF, starnet_dual_pyramid_rcf


class GlobalPyramid(nn.Module):
    """(B, 3, H, W) -> (B, 192), with the head that the whole has."""

    num_features = CHANNELS[-1]

    def __init__(self, whole: StarNetDualPyramidRCF):
        super().__init__()
        self.stages = nn.Sequential(whole.global_stem, *whole.global_stages)
        self.norm = whole.local.norm

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.stages(images)).mean(dim=(2, 3))


class LateFusion(nn.Module):
    """F_3 = L_3 + a_3 * A_3(G_3), where L_3 knows nothing of the other. (B, 3, H, W) -> (B, 192)."""

    num_features = CHANNELS[-1]

    def __init__(self, whole: StarNetDualPyramidRCF):
        super().__init__()
        self.local_stages = nn.Sequential(whole.local.stem, *whole.local.stages)
        self.global_stages = nn.Sequential(whole.global_stem, *whole.global_stages)
        self.adapter, self.gain, self.norm = whole.adapters[-1], whole.fusion_gains[-1], whole.local.norm

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        added = self.gain.view(1, -1, 1, 1) * self.adapter(self.global_stages(images))
        return self.norm(self.local_stages(images) + added).mean(dim=(2, 3))


def _enter(name: str, part: type[GlobalPyramid] | type[LateFusion]) -> None:
    @register(IMAGE_ENCODERS, name)
    def build(weights: str, img_size: int) -> ImageTower:
        whole = starnet_dual_pyramid_rcf("none", img_size)
        return ImageTower(part(whole.backbone), whole.num_features, whole.mean, whole.std)


_enter("rcf-global", GlobalPyramid)
_enter("rcf-late", LateFusion)
