"""Image towers from timm: the guide's names, and `timm:NAME` for any other."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from common.errors import UserError, did_you_mean, first_line, last_line
from models.registry import IMAGE_ENCODERS, register
from models.weights import fetch_from_hub, part_of, read_state_dict
from models.wide import widen_depthwise

logging.getLogger("timm").setLevel(logging.ERROR)  # what its loading reports is checked below and said by us

OPTION = "--image-weights"
LEAST_IMG_SIZE = 32  # of --img-size
OWN_PREFIX = "image_tower.backbone."  # of a backbone's tensors in this program's checkpoints


class ImageTower(nn.Module):
    """A backbone with its own input normalisation.

    backbone: nn.Module, (B, 3, S, S) normalised float -> (B, num_features). mean, std: of the images
    (0..1) that the backbone was made for. pretrained: names of the backbone's parameters that came from
    published weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pretrained: frozenset[str] = frozenset(),
    ):
        super().__init__()
        widen_depthwise(backbone)
        self.backbone, self.num_features, self.mean, self.std = backbone, num_features, mean, std
        self.pretrained = frozenset(f"backbone.{name}" for name in pretrained)
        # None: not tried; False: it could not be
        self.compiled: Callable[[torch.Tensor], torch.Tensor] | Literal[False] | None = None
        # (image / 255 - mean) / std = image * scale + shift
        scale, shift = 1 / (255 * torch.tensor(std)), -torch.tensor(mean) / torch.tensor(std)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S), or (B, 1, S, S) of grey images, uint8 or 0..255 float -> what the backbone takes:
        (B, 3, S, S) in channels-last memory.
        """
        images = images.permute(0, 2, 3, 1).float().contiguous()
        width, channels = images.shape[2:]
        if channels == 1:
            return torch.addcmul(self.shift, images, self.scale).permute(0, 3, 1, 2)
        # a row of pixels at once: on a CPU, loops over three channels take three times as long
        rows = torch.addcmul(self.shift.repeat(width), images.flatten(2), self.scale.repeat(width))
        return rows.view_as(images).permute(0, 3, 1, 2)

    def checkpoint_gradients(self, name: str) -> None:
        """Hold no activations within stages; compute them again in the backward pass (Chen et al. 2016, arXiv
        1604.06174). Raises UserError where the encoder `name` cannot.
        """
        try:
            self.backbone.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise UserError(f"--gradient-checkpointing: the image encoder {name} has no form of it") from None

    def compile_training(self, images: torch.Tensor, autocast: torch.autocast) -> str:
        """Have torch.compile make kernels for training passes over batches of any size, in place of PyTorch's
        own, and try them on `images`, of which there must be two or more. Evaluation goes on with PyTorch's.
        Weights, running statistics and random states stay as they are; a copy of the tower would share them.

        Returns "", or why nothing was compiled: not every machine and not every network can.
        """
        was_training, buffers = self.training, [(buffer, buffer.clone()) for buffer in self.buffers()]
        try:
            torch._dynamo.reset()  # it compiles a function 8 times, and networks of a kind share one
            # one function beside the module: the names of its weights stay what they are
            self.compiled = torch.compile(self.backbone.forward)
            with torch.random.fork_rng([images.device] if images.is_cuda else []), autocast:
                with torch.no_grad():
                    self.train()(images)  # what a network keeps from its first pass is there before
                features = self(images)
            features.float().sum().backward()
        except Exception as error:  # of Python, of the compiler, of the GPU
            self.compiled = False
            return f"{type(error).__name__}: {first_line(error)}"
        finally:
            self.train(was_training)
            self.zero_grad(set_to_none=True)
            for buffer, before in buffers:
                buffer.copy_(before)
        return ""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """What `normalise` takes -> (B, num_features)."""
        images = self.normalise(images)
        if not self.compiled or not self.training or not torch.is_grad_enabled():
            return self.backbone(images)
        torch._dynamo.maybe_mark_dynamic(images, 0)
        return self.compiled(images)


def feature_size(backbone: nn.Module, img_size: int) -> int:
    """Length of the feature vector, found by one image in evaluation mode: no running statistic changes."""
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, img_size, img_size))
    backbone.train(was_training)
    if features.ndim != 2:
        raise UserError(
            f"the image encoder gives {tuple(features.shape)} for one image, not one feature vector"
        )
    return features.shape[1]


def timm_repo(name: str) -> str:
    """Hub repository of the weights that timm takes by default for `name`."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise UserError(
            f"timm publishes no weights for {name!r}; use {OPTION} none, or a file: {OPTION} PATH"
        )
    return cfg.hf_hub_id


def published_weights(name: str, weights: str) -> dict[str, torch.Tensor]:
    """The state of timm model `name`: from its repository ("pretrained") or from a path."""
    if weights != "pretrained":
        return read_state_dict(Path(weights), OPTION)
    folder = fetch_from_hub(
        [timm_repo(name)], ["config.json", "model.safetensors"], ["model.safetensors"], OPTION
    )
    return read_state_dict(folder, OPTION)


def _refuse_leftovers(loaded: nn.Module, random: nn.Module, source: str) -> None:
    """timm leaves what a weights file lacks at random without a word. `random` was built from the same random
    state: a tensor that varies and yet equals its random start was not loaded. Raises UserError.
    """
    starts = dict(random.named_parameters())
    left = [n for n, p in loaded.named_parameters() if torch.equal(p, starts[n]) and p.min() < p.max()]
    if left:
        raise UserError(
            f"{source} does not fit the encoder: {len(left)} tensors are missing (first: {left[0]}); "
            "is it for another architecture?"
        )


def timm_config(name: str) -> PretrainedCfg:
    """timm's facts about `name`, or `name.tag`. Raises UserError when it knows no such model or tag."""
    if not timm.is_model(name):
        raise UserError(f"timm knows no model {name!r}{did_you_mean(name, timm.list_models())}")
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        tags = timm.list_pretrained(name.split(".")[0] + ".*")
        raise UserError(f"timm knows no weights {name!r}{did_you_mean(name, tags)}") from None


def _say_what_is_cut(backbone: nn.Module, name: str, img_size: int) -> None:
    """Whole patches may not reach the image's right and lower edge."""
    stem = next((layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d)), None)
    # a subclass may pad what it is given, and so may the embedding around it
    if type(stem) is not nn.Conv2d or any(stem.padding):
        return
    patch, step = stem.kernel_size[0], stem.stride[0]  # patches may overlap
    if patch % step:
        return
    if getattr(getattr(backbone, "patch_embed", None), "dynamic_img_pad", False):
        return
    below = img_size // step * step
    if below == img_size:
        return
    near = " or ".join(str(size) for size in (below, below + step) if size >= LEAST_IMG_SIZE)
    print(
        f"warning: --img-size {img_size}: {name} takes patches of {patch} pixels and leaves out "
        f"{img_size - below} at the right and lower edge; a multiple of {step}, such as {near}, shows it all"
    )


def build_timm(name: str, weights: str, img_size: int) -> ImageTower:
    """Any timm model without its classifier. Raises UserError for an unknown name or unfit image size."""
    weights = "pretrained" if weights == "auto" else weights
    cfg = timm_config(name)
    arguments: dict = {"num_classes": 0}
    if cfg.fixed_input_size:
        arguments["img_size"] = img_size
    try:
        random_state = torch.get_rng_state()
        backbone = timm.create_model(name, **arguments)
        _say_what_is_cut(backbone, name, img_size)
        if weights != "none":  # timm converts old layouts and resamples position embeddings as it loads
            state = published_weights(name, weights)
            torch.set_rng_state(random_state)
            random, overlay = backbone, {"state_dict": part_of(state, OWN_PREFIX) or state}
            try:
                backbone = timm.create_model(
                    name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
                )
            except RuntimeError as error:  # load_state_dict's
                raise UserError(
                    f"{OPTION} {weights} does not fit the encoder: {last_line(error).strip()}; is it for "
                    "another architecture, or another image size?"
                ) from None
            _refuse_leftovers(backbone, random, f"{OPTION} {weights}")
        num_features = feature_size(backbone, img_size)
    except UserError:
        raise
    except Exception as error:  # timm's builders raise many kinds
        raise UserError(
            f"image encoder {name!r} cannot be built for --img-size {img_size} and {OPTION} {weights}: "
            f"{first_line(error)}"
        ) from None
    loaded = frozenset(n for n, _ in backbone.named_parameters()) if weights != "none" else frozenset()
    return ImageTower(backbone, num_features, cfg.mean, cfg.std, loaded)


# The guide's name -> timm's. efficientnet_b6 and b7 have no weights in timm's own layout, only in
# TensorFlow's.
_TIMM_NAMES = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    "vit": "vit_base_patch16_224",
    **{f"efficientnet-b{i}": f"efficientnet_b{i}" for i in range(6)},
    **{f"efficientnet-b{i}": f"tf_efficientnet_b{i}" for i in (6, 7)},
    **{f"convnext-{size}": f"convnext_{size}" for size in ("tiny", "small", "base", "large")},
}
for _name, _timm_name in _TIMM_NAMES.items():
    register(IMAGE_ENCODERS, _name)(partial(build_timm, _timm_name))
