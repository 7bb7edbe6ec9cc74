"""Encoders that benchmarks.accuracy compares starnet_dual_pyramid_rcf with, from random weights.

rcf-global: its global pyramid alone. rcf-late: both pyramids, fused after the last stage only, no cascade.
Its local pyramid alone is timm:starnet_s1.
darkcovidnet: the network of the published figures on xray3 (Ozturk et al. 2020, doi
10.1016/j.compbiomed.2020.103792) up to its linear layer.
"""

import torch
from torch import nn

from common.errors import UserError
from models.image_encoders import ImageTower, feature_size
from models.registry import IMAGE_ENCODERS, register
from models.starnet_dual_pyramid_rcf import StarNetDualPyramidRCF, starnet_dual_pyramid_rcf


class GlobalPyramid(nn.Module):
    """(B, 3, H, W) -> (B, 192), with the head that the whole has."""

    def __init__(self, whole: StarNetDualPyramidRCF):
        super().__init__()
        self.stages = nn.Sequential(whole.global_stem, *whole.global_stages)
        self.norm = whole.local.norm

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.stages(images)).mean(dim=(2, 3))


class LateFusion(nn.Module):
    """F_3 = L_3 + a_3 * A_3(G_3), where L_3 knows nothing of the other. (B, 3, H, W) -> (B, 192)."""

    def __init__(self, whole: StarNetDualPyramidRCF):
        super().__init__()
        self.local_stages = nn.Sequential(whole.local.stem, *whole.local.stages)
        self.global_stages = nn.Sequential(whole.global_stem, *whole.global_stages)
        self.adapter, self.gain, self.norm = whole.adapters[-1], whole.fusion_gains[-1], whole.local.norm

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        added = self.adapter(self.global_stages(images), self.gain)
        return self.norm(self.local_stages(images) + added).mean(dim=(2, 3))


class DarkCovidNet(nn.Module):
    """For three classes: 17 convolutions with BatchNorm, five poolings. (B, 3, 256, 256) -> (B, 507):
    nothing is averaged over the image, so the classifier knows what was where.

    As in the authors' code, convolutions of 1 x 1 are padded too, and ReLU and BatchNorm follow the last one,
    BatchNorm and LeakyReLU the others.
    """

    def __init__(self):
        super().__init__()

        def conv(c_in: int, c_out: int, size: int = 3) -> nn.Sequential:
            layer = nn.Conv2d(c_in, c_out, size, padding=1, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.LeakyReLU(0.1))

        layers = [conv(3, 8), nn.MaxPool2d(2), conv(8, 16)]
        for c in (16, 32, 64, 128):
            layers += [nn.MaxPool2d(2), conv(c, 2 * c), conv(2 * c, c, 1), conv(c, 2 * c)]
        layers += [conv(256, 128, 1), conv(128, 256)]
        layers += [nn.Conv2d(256, 3, 3, padding=1, bias=False), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def _refuse_weights(name: str, weights: str) -> None:
    if weights not in ("auto", "none"):
        raise UserError(f"--image-weights {weights}: there are none for {name}; use none")


@register(IMAGE_ENCODERS, "darkcovidnet")
def darkcovidnet(weights: str, img_size: int) -> ImageTower:
    _refuse_weights("darkcovidnet", weights)
    backbone = DarkCovidNet()
    return ImageTower(backbone, feature_size(backbone, img_size), (0.5,) * 3, (0.25,) * 3)


def _enter(name: str, part: type[GlobalPyramid] | type[LateFusion]) -> None:
    @register(IMAGE_ENCODERS, name)
    def build(weights: str, img_size: int) -> ImageTower:
        _refuse_weights(name, weights)
        whole = starnet_dual_pyramid_rcf("none", img_size)
        return ImageTower(part(whole.backbone), whole.num_features, whole.mean, whole.std)


_enter("rcf-global", GlobalPyramid)
_enter("rcf-late", LateFusion)
