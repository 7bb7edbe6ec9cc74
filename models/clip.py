"""CLIPModel: an image tower and a text tower that meet in one space, where each class is one or more
sentences.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv
2103.00020.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

import models.starnet_dual_pyramid_rcf  # noqa: F401  (enters its encoder into the registry)
from common.errors import UserError, did_you_mean
from models.image_encoders import ImageTower, build_timm, timm_config
from models.registry import IMAGE_ENCODERS, STRIDES
from models.text_encoders import TextTower, build_text_tower

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


# S tokenised sentences, {"input_ids", "attention_mask"} (S, T), or what the text tower made of them before,
# {"pooled"} (S, num_features).
Texts = Mapping[str, torch.Tensor]


def _unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _projection(num_features: int, embed_dim: int, bias: bool = True) -> nn.Linear:
    projection = nn.Linear(num_features, embed_dim, bias=bias)
    nn.init.normal_(projection.weight, std=num_features**-0.5)  # as in the CLIP paper's code
    if bias:
        nn.init.zeros_(projection.bias)
    return projection


class CLIPModel(nn.Module):
    """Two towers, one linear projection each to D dimensions, and logit_scale = log(1 / temperature).

    The text projection has a bias, so that `center_text` can move the origin to where the sentences are.
    Without a text tower the model only encodes images: enough where the class features are known already.
    """

    def __init__(
        self, image_tower: ImageTower, text_tower: TextTower | None, embed_dim: int, temperature: float
    ):
        super().__init__()
        self.image_tower, self.text_tower = image_tower, text_tower
        self.image_projection = _projection(image_tower.num_features, embed_dim, bias=False)
        self.text_projection = _projection(text_tower.num_features, embed_dim) if text_tower else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.frozen: list[nn.Module] = []

    def freeze(self, tower: nn.Module) -> None:
        """No gradient, and evaluation mode for good: running statistics and dropout stay as they are."""
        tower.requires_grad_(False)
        self.frozen.append(tower)
        tower.eval()

    def train(self, mode: bool = True) -> "CLIPModel":
        super().train(mode)
        for tower in self.frozen:
            tower.eval()
        return self

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Images as `ImageTower.normalise` takes them -> (B, D) of unit length, float32 or wider."""
        return _unit(self.image_projection(self.image_tower(images)))

    @torch.no_grad()
    def center_text(self, pooled: torch.Tensor) -> None:
        """Set the text projection's bias so that the mean of `pooled` (S, num_features) projects to 0.

        Sentences of one kind lie close together (those of a set of chest findings had cosines of 0.98 in
        the tiny tower), so that no image could tell them apart at the start; around their own mean they
        point all ways.
        """
        self.text_projection.bias.copy_(-self.text_projection.weight @ pooled.mean(0))

    def encode_text(self, texts: Texts) -> torch.Tensor:
        """(S, D) of unit length, float32 or wider."""
        pooled = texts["pooled"] if "pooled" in texts else self.text_tower(**texts)
        return _unit(self.text_projection(pooled))

    def forward(self, images: torch.Tensor, texts: Texts | None) -> tuple[torch.Tensor, ...]:
        """What the loss is made from: image features (B, D) and, unless `texts` is None, text features (S, D)
        and 1 / temperature ().
        """
        image_features = self.encode_image(images)
        if texts is None:
            return (image_features,)
        return image_features, self.encode_text(texts), self.logit_scale.exp()

    def logits(self, image_features: torch.Tensor, class_features: torch.Tensor) -> torch.Tensor:
        """Cosine over temperature: (B, D) and (C, D) of unit length -> (B, C)."""
        return self.logit_scale.exp() * image_features @ class_features.T

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


class ClassSentences:
    """The sentences of C classes, tokenised once, and their features: the text side of every step.

    A step encodes each sentence it uses once, whatever the batch holds. With the text tower frozen all
    sentences are encoded once per run, by `prepare`, and the tower goes back to the CPU.
    Raises UserError when the tokenizer cannot be had or makes sentences of two classes equal.
    """

    def __init__(self, model: CLIPModel, texts: Mapping[str, Sequence[str]]):
        self.model, self.texts = model, texts
        self.counts = torch.tensor([len(own) for own in texts.values()])  # (C,)
        self.starts = self.counts.cumsum(0) - self.counts
        self.class_of = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)  # (S,)
        every = [sentence for own in texts.values() for sentence in own]
        self.tokens, self.notes = model.text_tower.tokenize(every)
        self._refuse_equal(self.tokens["input_ids"], every)
        self.inputs: Texts = self.tokens

    def prepare(self, device: torch.device, *, center: bool) -> None:
        """Move to the model's device; encode once what is frozen; `center` a new model's text projection."""
        model = self.model.eval()
        self.class_of = self.class_of.to(device)
        self.inputs = self.tokens = {key: value.to(device) for key, value in self.tokens.items()}
        frozen = model.text_tower in model.frozen
        if frozen or center:
            with torch.no_grad():
                pooled = model.text_tower.to(device)(**self.tokens)  # (S, num_features)
            if center:
                model.center_text(pooled)
            if frozen:
                self.inputs = {"pooled": pooled}
                model.text_tower.cpu()

    def _refuse_equal(self, input_ids: torch.Tensor, every: Sequence[str]) -> None:
        seen: dict[tuple[int, ...], int] = {}
        for i, ids in enumerate(input_ids.tolist()):
            other = seen.setdefault(tuple(ids), i)
            if self.class_of[other] != self.class_of[i]:
                raise UserError(
                    f"the text encoder cannot tell {every[other]!r} from {every[i]!r} (equal tokens "
                    "after cutting "
                    "or for want of vocabulary); write sentences that differ earlier or in other words"
                )

    def for_step(self, generator: torch.Generator) -> Texts:
        """C sentences, one per class, drawn by `generator` where a class has several."""
        drawn = (torch.rand(len(self.counts), generator=generator) * self.counts).long()
        chosen = (self.starts + drawn).to(self.class_of.device, non_blocking=True)
        return {key: value[chosen] for key, value in self.inputs.items()}

    @torch.no_grad()
    def features(self) -> torch.Tensor:
        """(C, D): the normalised mean over each class's sentences (prompt ensemble). For evaluation mode."""
        every = self.model.encode_text(self.inputs)
        sums = torch.zeros(len(self.counts), every.shape[1], device=every.device)
        return F.normalize(sums.index_add_(0, self.class_of, every), dim=-1)


def check_image_encoder(name: str, img_size: int) -> None:
    """Raises UserError naming the nearest encoders when `name` is unknown, or the nearest size."""
    if name.startswith("timm:"):
        timm_config(name.removeprefix("timm:"))
    elif name not in IMAGE_ENCODERS:
        raise UserError(
            f"unknown image encoder {name!r}{did_you_mean(name, IMAGE_ENCODERS)}; "
            f"give {', '.join(IMAGE_ENCODERS)}, or timm:NAME"
        )
    stride = STRIDES.get(name, 1)
    if img_size % stride:
        near = max(stride, round(img_size / stride) * stride)
        raise UserError(f"--img-size {img_size}: {name} needs a multiple of {stride}, such as {near}")


def build_image_tower(name: str, weights: str, img_size: int) -> ImageTower:
    check_image_encoder(name, img_size)
    if name.startswith("timm:"):
        return build_timm(name.removeprefix("timm:"), weights, img_size)
    return IMAGE_ENCODERS[name](weights, img_size)


def build_clip(
    image_encoder: str,
    text_encoder: str | None,
    *,
    img_size: int,
    embed_dim: int,
    temperature: float,
    image_weights: str = "auto",
    text_weights: str = "auto",
    freeze_image: bool = False,
    freeze_text: bool = False,
    gradient_checkpointing: bool = False,
) -> CLIPModel:
    """Both towers by name, joined; without a text encoder, a model of images alone.

    Raises UserError for unknown names and for weights that cannot be had.
    """
    image_tower = build_image_tower(image_encoder, image_weights, img_size)
    text_tower = build_text_tower(text_encoder, text_weights) if text_encoder else None
    model = CLIPModel(image_tower, text_tower, embed_dim, temperature)
    if gradient_checkpointing and not freeze_image:
        image_tower.checkpoint_gradients(image_encoder)
    if gradient_checkpointing and text_tower and not freeze_text:
        text_tower.checkpoint_gradients(text_encoder)
    if freeze_image:
        model.freeze(model.image_tower)
    if freeze_text:
        model.freeze(model.text_tower)
    return model
