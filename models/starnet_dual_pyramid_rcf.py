"""starnet_dual_pyramid_rcf: a local pyramid (StarNet-S1) and a global pyramid (attention), fused stage by
stage.

RCF = residual cascaded fusion. With L_i, G_i the outputs of the two pyramids at stage i, A_i an adapter,
a_i a gain per channel and g_i a gain per stage:

    F_i = L_i + a_i * A_i(G_i)                      fused map
    input of local stage i + 1 = L_i + g_i * (F_i - L_i)      the cascade, i = 0, 1, 2

Only what the global pyramid adds is injected, so that the published StarNet function is kept where a_i is
small. StarNet: Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967.
"""

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.image_encoders import OPTION, OWN_PREFIX, ImageTower, published_weights
from models.registry import IMAGE_ENCODERS, register
from models.weights import load_into, part_of
from models.wide import wide

CHANNELS = (24, 48, 96, 192)
# Adapters end in a normalisation, so a_i is the size of what is injected, in units of one standard deviation.
INITIAL_FUSION_GAIN = 0.2


def sincos_position_code(height: int, width: int, channels: int) -> torch.Tensor:
    """(height * width, channels) float32: sines and cosines of row and column, channels / 4 frequencies each.

    Wavelengths run geometrically from 4 tokens to twice the longer side, so that each of the few frequencies
    changes visibly over the map (those of Vaswani et al. 2017, up to 10000, would be constant on 7 x 7
    tokens).
    """
    count = channels // 4
    slowest = torch.pi / max(height, width, 2)
    exponents = torch.linspace(0, 1, count)
    frequencies = slowest * (torch.pi / 2 / slowest) ** exponents  # (count,)
    rows = torch.arange(height)[:, None] * frequencies  # (height, count)
    columns = torch.arange(width)[:, None] * frequencies  # (width, count)
    rows = rows[:, None].expand(-1, width, -1)
    columns = columns[None].expand(height, -1, -1)
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=-1).flatten(0, 1)


class PooledAttention(nn.Module):
    """Multi-head attention whose keys and values are average-pooled by `pool` (as in PVT, arXiv 2102.12122).

    The number of keys is that of the coarsest stage, (H/32)(W/32), and the weights are never stored.
    """

    def __init__(self, dim: int, heads: int, pool: int):
        super().__init__()
        self.heads, self.pool = heads, pool
        self.query, self.value, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.key = nn.Linear(dim, dim, bias=False)  # a bias would add the same to all scores of a query

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        batch, height, width, dim = tokens.shape
        pooled = tokens
        if self.pool > 1:
            pooled = F.avg_pool2d(tokens.permute(0, 3, 1, 2), self.pool).permute(0, 2, 3, 1)
        query = self.query(tokens).reshape(batch, height * width, self.heads, -1).transpose(1, 2)
        key, value = (
            x.reshape(batch, -1, self.heads, dim // self.heads).transpose(1, 2)  # (B, heads, keys, C / heads)
            for x in (self.key(pooled), self.value(pooled))
        )
        mixed = wide(F.scaled_dot_product_attention, query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, height, width, dim))


class GlobalStage(nn.Module):
    """Stride-2 convolution, position code, LayerNorm, one pre-norm transformer block. (B, C, H, W) in and
    out.
    """

    def __init__(self, in_channels: int, dim: int, pool: int, heads: int = 4, mlp_ratio: int = 4):
        super().__init__()
        self.downsample = nn.Conv2d(in_channels, dim, 3, stride=2, padding=1)
        self.position = nn.Linear(dim, dim)
        # The code starts with a standard deviation of 0.02, as ViT's. As large as the tokens, it filled more
        # of the map with every stage: 4 % of the last one depended on the image, and training left nothing.
        nn.init.normal_(self.position.weight, std=0.02 * (2 / dim) ** 0.5)
        nn.init.zeros_(self.position.bias)
        self.norm = nn.LayerNorm(dim)
        self.attention_norm, self.attention = nn.LayerNorm(dim), PooledAttention(dim, heads, pool)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))
        self._codes: dict[tuple, torch.Tensor] = {}

    def _code(self, height: int, width: int) -> torch.Tensor:
        weight = self.position.weight
        key = (height, width, weight.device, weight.dtype)
        if key not in self._codes:
            code = sincos_position_code(height, width, self.position.in_features)
            self._codes[key] = code.view(height, width, -1).to(weight)
        return self._codes[key]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.downsample(x).permute(0, 2, 3, 1)  # (B, H, W, C); a view where memory is channels_last
        code = self.position(self._code(*tokens.shape[1:3]))  # (H, W, C)
        tokens = wide(self.norm, tokens + code)
        tokens = tokens + self.attention(wide(self.attention_norm, tokens))
        tokens = tokens + self.mlp(wide(self.mlp_norm, tokens))
        return tokens.permute(0, 3, 1, 2)


class Adapter(nn.Module):
    """Global map to local one: 1x1 conv + GroupNorm(1), plus its input, 1x1 conv + GroupNorm(1); times a gain
    per channel.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.GroupNorm(1, dim))
        self.second = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.GroupNorm(1, dim))

    def forward(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) and (C,) -> (B, C, H, W)."""
        conv, norm = self.second
        x = conv(x + self.first(x))
        # the norm's own scale and shift take the gain along, which by itself would be a pass over the map
        return wide(
            lambda x, weight, bias: F.group_norm(x, norm.num_groups, weight, bias, norm.eps),
            x, norm.weight * gain, norm.bias * gain,
        )  # fmt: skip


class StarNetDualPyramidRCF(nn.Module):
    """(B, 3, H, W) with H, W multiples of 32 -> (B, 192)."""

    num_features = CHANNELS[-1]

    def __init__(self):
        super().__init__()
        # timm's starnet_s1 is the local pyramid itself: stem, four stages, final BatchNorm (`norm`).
        self.local = timm.create_model("starnet_s1", num_classes=0, drop_path_rate=0.1)
        self.global_stem = nn.Sequential(
            nn.Conv2d(3, CHANNELS[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS[0]),
            nn.GELU(),
        )
        inputs = (CHANNELS[0], *CHANNELS[:-1])
        self.global_stages = nn.ModuleList(
            GlobalStage(c_in, c, pool) for c_in, c, pool in zip(inputs, CHANNELS, (8, 4, 2, 1), strict=True)
        )
        self.adapters = nn.ModuleList(Adapter(c) for c in CHANNELS)
        self.fusion_gains = nn.ParameterList(torch.full((c,), INITIAL_FUSION_GAIN) for c in CHANNELS)  # a_i
        self.cascade_gains = nn.Parameter(torch.ones(len(CHANNELS) - 1))  # g_i
        self.checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Named as timm's. Only what enters a stage is held; the stage is computed again for the gradient."""
        self.checkpointing = enable

    def _stage(
        self, i: int, local: torch.Tensor, global_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage i of both pyramids: L_i + g_i * (F_i - L_i), after the last stage F_3, and G_i."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._computed, i, local, global_map, use_reentrant=False)
        return self._computed(i, local, global_map)

    def _computed(
        self, i: int, local: torch.Tensor, global_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        local, global_map = self.local.stages[i](local), self.global_stages[i](global_map)
        gain = self.fusion_gains[i]
        if i < len(self.cascade_gains):
            gain = self.cascade_gains[i] * gain
        return local + self.adapters[i](global_map, gain), global_map

    def before_last_stage(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the last stage of both pyramids: (B, 96, H / 16, W / 16) each. Heat maps look at the
        local one: after the last stage each cell has seen all others.
        """
        local, global_map = self.local.stem(images), self.global_stem(images)
        for i in range(len(CHANNELS) - 1):
            local, global_map = self._stage(i, local, global_map)
        return local, global_map

    def from_last_stage(self, local: torch.Tensor, global_map: torch.Tensor) -> torch.Tensor:
        """The features (B, 192) of what `before_last_stage` gives."""
        return self.forward_head(self._stage(len(CHANNELS) - 1, local, global_map)[0])

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """F_3 (B, 192, H / 32, W / 32); named as timm's backbones name theirs."""
        return self._stage(len(CHANNELS) - 1, *self.before_last_stage(images))[0]

    def forward_head(self, fused: torch.Tensor) -> torch.Tensor:
        return self.local.norm(fused).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


@register(IMAGE_ENCODERS, "starnet_dual_pyramid_rcf", stride=32)
def starnet_dual_pyramid_rcf(weights: str, img_size: int) -> ImageTower:
    """`weights`: none (also auto); pretrained (StarNet-S1's published weights in the local pyramid); or a
    path to either those or a checkpoint of this encoder.
    """
    backbone = StarNetDualPyramidRCF()
    cfg = timm.get_pretrained_cfg("starnet_s1")
    loaded: frozenset[str] = frozenset()
    if weights not in ("auto", "none"):
        state = published_weights("starnet_s1", weights)
        own = part_of(state, OWN_PREFIX)
        target, prefix = (backbone, "") if own else (backbone.local, "local.")
        load_into(target, own or state, f"{OPTION} {weights}")
        loaded = frozenset(prefix + name for name, _ in target.named_parameters())
    return ImageTower(backbone, backbone.num_features, cfg.mean, cfg.std, loaded)
