import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from evaluation.heatmaps import coarse_maps, heat_maps, log_odds, overlay
from evaluation.trained import TrainedModel
from models.clip import CLIPModel, build_clip
from models.image_encoders import ImageTower

SIZE = 64
# One of every kind of map (NCHW, NHWC, tokens with and without class and register tokens), and how many
# cells wide it is at SIZE: a sixteenth of its pixels before the last stage.
KINDS = {
    "resnet18": 4,
    "efficientnet-b0": 4,
    "starnet_dual_pyramid_rcf": 4,
    "timm:starnet_s050": 4,
    "timm:convnext_atto": 4,
    "timm:mobilenetv3_small_050": 4,
    "timm:test_mambaout": 4,  # NHWC
    "timm:swin_tiny_patch4_window7_224": 4,  # NHWC
    "timm:efficientformer_l1": 14,  # convolutions before tokens; made for 224 px only
    "timm:vit_tiny_patch16_224": 4,  # class token
    "timm:deit_tiny_distilled_patch16_224": 4,  # class and distillation token
    "timm:test_vit2": 4,  # mean of the patch tokens, with a class token beside them
    "timm:test_vit3": 4,  # attention pooling
    "timm:vit_wee_patch16_reg1_gap_256": 4,
}
UNFIT = ["timm:cait_xxs24_224", "timm:pit_ti_224", "timm:efficientvim_m1"]


def model_of(name, size=SIZE, text=None, seed=0):
    torch.manual_seed(seed)
    options = {"img_size": size, "embed_dim": 16, "temperature": 0.1, "image_weights": "none"}
    return build_clip(name, text, **options).eval()


def random_images(count, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def random_features(count, dim=16, seed=0):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


class TinyCNN(nn.Module):
    def __init__(self):
        super().__init__()
        first, second = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 5, 2, stride=2)
        self.convs = nn.Sequential(first, nn.ReLU(), second, nn.Tanh())

    def forward_features(self, images):
        return self.convs(images)

    def forward_head(self, maps):
        return maps.square().mean(dim=(2, 3))  # squared, so that the gradient is not the same everywhere

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


def tiny_model(make_backbone, dim=7):
    torch.manual_seed(1)
    backbone = make_backbone()
    tower = ImageTower(backbone, getattr(backbone, "num_features", 5), (0.5,) * 3, (0.5,) * 3)
    return CLIPModel(tower, None, dim, temperature=0.2).eval()


def enlarge(small, size):
    """Bilinear by hand, float64: the centres of the pixels are aligned, the border is repeated."""
    side = len(small)
    at = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
    low = np.minimum(at.astype(int), max(side - 2, 0))
    rows = np.zeros((size, side))
    rows[np.arange(size), low] = 1 - (at - low)
    rows[np.arange(size), np.minimum(low + 1, side - 1)] += at - low
    return rows @ small @ rows.T


def cam(maps, gradient, size, cell_by_cell):
    """For one image: (channels, h, w) twice -> (size, size), maximum 1. Equations 1 and 2 of the Grad-CAM
    paper, or `cell_by_cell` that of HiResCAM, smoothed by [1 2 1] / 4 both ways.
    """
    heat = sum((gradient[k] if cell_by_cell else gradient[k].mean()) * maps[k] for k in range(len(maps)))
    heat = np.maximum(heat, 0)
    if cell_by_cell:
        heat = np.pad(heat, 1, mode="edge")
        heat = heat[:-2] / 4 + heat[1:-1] / 2 + heat[2:] / 4
        heat = heat[:, :-2] / 4 + heat[:, 1:-1] / 2 + heat[:, 2:] / 4
    heat = enlarge(heat, size)
    return heat / heat.max() if heat.max() > 0 else heat


def score_by_hand(pooled, model, features, target):
    """float64, no autograd: log(p / (1 - p)) from the probabilities themselves."""
    embedded = model.image_projection.weight.detach().double().numpy() @ pooled
    logits = features.double().numpy() @ (embedded / np.linalg.norm(embedded)) / 0.2
    probs = np.exp(logits) / np.exp(logits).sum()
    return np.log(probs[target] / (1 - probs[target]))


def test_a_small_cnn_equals_finite_differences_in_float64():
    model, features = tiny_model(TinyCNN), random_features(3, 7)
    images, targets = random_images(4, 32), [0, 2, 1, 2]
    found = heat_maps(model, images, features, targets)
    assert found.shape == (4, 32, 32) and found.dtype == np.float32
    convs = copy.deepcopy(model.image_tower.backbone.convs).double()
    with torch.no_grad():
        maps = convs((images.double() / 255 - 0.5) / 0.5).numpy()  # (4, 5, 4, 4)
    for i, target in enumerate(targets):
        gradient = np.zeros_like(maps[i])
        for at in np.ndindex(*gradient.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = maps[i].copy()
                moved[at] += step
                ends.append(score_by_hand((moved**2).mean((1, 2)), model, features, target))
            gradient[at] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(found[i], cam(maps[i], gradient, 32, True), atol=1e-4)
    assert all(heat.max() == 1 for heat in found)


@pytest.mark.parametrize(("name", "stage"), [("resnet18", "layer3"), ("efficientnet_b0", "blocks.4")])
def test_stages_equal_a_full_backward_pass_to_what_enters_the_last(name, stage):
    model = tiny_model(lambda: timm.create_model(name, num_classes=0))
    features, images, targets = random_features(3, 7), random_images(3), torch.tensor([1, 0, 2])
    found = heat_maps(model, images, features, targets)
    caught = {}

    def keep(module, inputs, output):
        output.retain_grad()
        caught["maps"] = output

    model.image_tower.backbone.get_submodule(stage).register_forward_hook(keep)
    probs = (model.logit_scale.exp() * model.encode_image(images) @ features.T).softmax(1)[range(3), targets]
    (probs / (1 - probs)).log().sum().backward()
    maps, gradient = caught["maps"].detach().double().numpy(), caught["maps"].grad.double().numpy()
    for i in range(3):
        np.testing.assert_allclose(found[i], cam(maps[i], gradient[i], SIZE, True), atol=1e-3)


@pytest.mark.parametrize("registers", [0, 4])
def test_a_class_token_vit_equals_a_full_backward_pass_with_a_hook(registers):
    options = {"num_classes": 0, "img_size": SIZE, "reg_tokens": registers}
    model, features = tiny_model(lambda: timm.create_model("test_vit", **options)), random_features(3, 7)
    backbone = model.image_tower.backbone
    images, targets = random_images(3), torch.tensor([1, 0, 2])
    found = heat_maps(model, images, features, targets)
    caught = {}

    def keep(module, inputs, tokens):
        tokens.retain_grad()
        caught["tokens"] = tokens

    backbone.blocks[-1].norm1.register_forward_hook(keep)
    logits = model.logit_scale.exp() * model.encode_image(images) @ features.T
    probs = logits.softmax(1)[torch.arange(3), targets]
    (probs / (1 - probs)).log().sum().backward()
    tokens, gradient = (
        value.detach()[:, 1 + registers :].double().numpy().transpose(0, 2, 1).reshape(3, -1, 4, 4)
        for value in (caught["tokens"], caught["tokens"].grad)
    )
    for i in range(3):
        np.testing.assert_allclose(found[i], cam(tokens[i], gradient[i], SIZE, False), atol=1e-4)


def test_a_layer_of_stride_two_leaves_no_grid_in_the_map():
    """Behind the map, one that looks at every other cell only: its gradient is a grid, the image is even."""

    class Strided(TinyCNN):
        def forward_features(self, images):
            return F.avg_pool2d(images + 2, 4)

        def forward_head(self, maps):
            return F.pad(maps[..., ::2, ::2].mean(dim=(2, 3)), (0, 2), value=1.0)

    model = tiny_model(Strided)
    grey = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    found = torch.stack([coarse_maps(model, grey, random_features(2, 7), [target])[0] for target in (0, 1)])
    assert found.max() > 0
    inner = found[:, 1:-1, 1:-1]  # at the border the grid is cut off
    assert (inner.amax((1, 2)) - inner.amin((1, 2)) <= 1e-5 * found.max()).all()


def test_log_odds():
    logits = torch.tensor([[2.0, -1.0, 0.5], [9.0, 0.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([2, 0])
    probs = logits.softmax(1)[torch.arange(2), targets]
    torch.testing.assert_close(log_odds(logits, targets), torch.log(probs / (1 - probs)))
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)  # softmax is 1 exactly
    log_odds(sure, torch.tensor([0])).sum().backward()
    assert sure.grad.tolist() == [[1, -1]]
    assert log_odds(torch.tensor([[3.0]]), torch.tensor([0])).tolist() == [3]


def state_of(model):
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "learning": [p.requires_grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "recording": torch.is_grad_enabled(),
        "random": torch.get_rng_state(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_encoder_gives_maps_and_stays_as_it_was(name):
    size = 224 if "efficientformer" in name else SIZE
    model, images, features = model_of(name, size), random_images(3, size), random_features(3)
    expected = heat_maps(model, images, features, [0, 1, 2])
    assert expected.shape == (3, size, size) and expected.dtype == np.float32
    assert np.isfinite(expected).all() and expected.min() >= 0 and expected.max() == 1
    assert all(heat.max() in (0, 1) for heat in expected)
    coarse = coarse_maps(model, images, features, [0, 1, 2])
    assert coarse.shape == (3, KINDS[name], KINDS[name]) and not coarse.requires_grad

    model.train()
    next(model.image_tower.backbone.children()).eval()  # modes as mixed as in fine-tuning
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = state_of(model)
    np.testing.assert_allclose(heat_maps(model, images, features, [0, 1, 2]), expected, atol=1e-4)
    assert same(state_of(model), before)
    model.freeze(model.image_tower)
    np.testing.assert_allclose(heat_maps(model, images, features, [0, 1, 2]), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "timm:test_vit"])
def test_the_callers_modes_and_the_batch_change_nothing(name):
    model, images, features = model_of(name), random_images(3), random_features(3)
    expected = heat_maps(model, images, features, [0, 1, 2])
    with torch.inference_mode():
        found = heat_maps(model, images.clone(), features.clone(), torch.tensor([0, 1, 2]))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = heat_maps(model, images, features, [0, 1, 2])
        assert not torch.is_grad_enabled()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    one_by_one = [heat_maps(model, images[i : i + 1], features, [i])[0] for i in range(3)]
    np.testing.assert_allclose(one_by_one, expected, atol=1e-4)


def test_a_map_without_anything_for_the_class_stays_zero():
    class Brightness(TinyCNN):
        """Pooled: brightness above that of black, and a constant; the brighter, the more of the first."""

        def forward_features(self, images):
            return F.avg_pool2d(images + 1, 8)

        def forward_head(self, maps):
            return F.pad(maps.mean(dim=(1, 2, 3))[:, None], (0, 4), value=1.0)

    model, features = tiny_model(Brightness), torch.eye(7)[:2]
    with torch.no_grad():
        model.image_projection.weight.zero_()
        model.image_projection.weight[[0, 1], [0, 1]] = 1
    images = random_images(2, 32)
    for_bright, for_dark = heat_maps(model, images, features, [0, 1])
    assert for_bright.max() == 1 and for_bright.min() > 0
    assert (for_dark == 0).all()


def test_a_backbone_that_shows_no_map_is_refused():
    class Plain(nn.Module):
        def forward(self, images):
            return images.mean(dim=(2, 3))

    with pytest.raises(UserError, match=r"no heat maps.*before its pooling"):
        heat_maps(tiny_model(Plain), random_images(2, 32), torch.eye(7)[:2], [0, 1])


@pytest.mark.parametrize("name", UNFIT)
def test_encoders_without_one_last_map_are_refused(name):
    size = 224 if "pit" in name else SIZE
    model = model_of(name, size)
    before = state_of(model)
    with pytest.raises(UserError, match=r"no heat maps for an image encoder of the kind \w+: [^()]*;"):
        heat_maps(model, random_images(1, size), random_features(2), [0])
    assert same(state_of(model), before)


# --- Trained models: the peak lies on what tells the classes apart, and only because of what was learnt.


def blobs(count, seed):
    """Noise with a bright (0) or a dark (1) square in a random quarter: images, labels, and the quarters
    (x0, y0, x1, y1).
    """
    random = np.random.RandomState(seed)
    pixels = random.normal(110, 12, (count, SIZE, SIZE))
    labels, quarters = random.randint(2, size=count), []
    for i, label in enumerate(labels):
        x, y = random.randint(2, size=2) * SIZE // 2
        pixels[i, y + 4 : y + 28, x + 4 : x + 28] += (90, -90)[label]
        quarters.append((x, y, x + SIZE // 2, y + SIZE // 2))
    images = torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8))[:, None].expand(-1, 3, -1, -1)
    return images.contiguous(), torch.from_numpy(labels), quarters


def train(model, features_of, steps, learning_rate):
    """`features_of()`: (2, D) as they are at this step."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    model.train()
    for step in range(steps):
        images, labels, _ = blobs(16, seed=step)
        logits = model.logit_scale.exp() * model.encode_image(images) @ features_of().T
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def hits(heats, quarters):
    """Share of maps whose peak (its middle, where it is flat) lies in the square's quarter."""
    found = []
    for heat, (x0, y0, x1, y1) in zip(heats, quarters, strict=True):
        y, x = np.argwhere(heat >= heat.max() - 1e-6).mean(0)
        found.append(heat.max() > 0 and x0 <= x < x1 and y0 <= y < y1)
    return np.mean(found)


def likeness(heats, others):
    """Mean correlation of the maps with those of the same images."""
    pairs = zip(heats.reshape(len(heats), -1), others.reshape(len(others), -1), strict=True)
    return np.mean([np.corrcoef(a, b)[0, 1] if a.std() and b.std() else 0 for a, b in pairs])


# The dual pyramid's 4 x 4 cells at this size see nearly all of the image: other seeds hit 50 to 88 %.
# A ViT trained from scratch for so few steps may gather what it knows of the image in tokens of the
# background (at other seeds about one in five does, for one of the classes), and its map then says so.
@pytest.mark.parametrize(
    ("name", "steps", "learning_rate", "seed"),
    [
        ("resnet18", 20, 1e-3, 0),
        ("timm:convnext_atto", 30, 1e-3, 0),
        ("timm:vit_tiny_patch16_224", 40, 5e-4, 2),
        ("starnet_dual_pyramid_rcf", 40, 2e-3, 1),
    ],
)
def test_the_peak_lies_on_what_was_learnt_and_random_weights_move_it(name, steps, learning_rate, seed):
    features = torch.eye(16)[:2]
    model = train(model_of(name, seed=seed), lambda: features, steps, learning_rate)
    images, labels, quarters = blobs(32, seed=999)
    with torch.no_grad():
        assert ((model.encode_image(images) @ features.T).argmax(1) == labels).all()
    learnt = heat_maps(model, images, features, labels)
    assert hits(learnt, quarters) >= 0.75  # chance is 0.25
    # Adebayo et al. 2018, arXiv 1810.03292: a map that random weights do not change explains nothing. One
    # random model may be right by chance; three are not.
    random = [heat_maps(model_of(name, seed=i), images, features, labels) for i in (101, 102, 103)]
    assert np.mean([hits(heats, quarters) for heats in random]) <= 0.5
    assert np.mean([likeness(learnt, heats) for heats in random]) < 0.5


def test_a_nonsense_sentence_changes_the_map():
    model = model_of("timm:convnext_atto", text="bert-tiny-bytes")
    texts = {"亮": ["a bright square"], "暗": ["一个暗色的方块"]}
    tokens = model.text_tower.tokenize([own[0] for own in texts.values()])[0]
    with torch.no_grad():
        model.center_text(model.text_tower(**tokens))
    train(model, lambda: model.encode_text(tokens), 40, 1e-3)
    cpu = torch.device("cpu")
    with torch.no_grad():
        features = model.encode_text(tokens)
    trained = TrainedModel(Path("-"), model, cpu, tuple(texts), texts, features, SIZE, {})
    images, labels, quarters = blobs(32, seed=999)
    images, quarters = (
        images[labels == 0],
        [q for q, label in zip(quarters, labels, strict=True) if label == 0],
    )
    bright = heat_maps(model, images, trained.features_of(texts)[0], [0] * len(images))
    assert hits(bright, quarters) >= 0.75
    texts = {**texts, "胡言": ["qwx 0000 zzz, zzz: kjh"]}
    nonsense = heat_maps(model, images, trained.features_of(texts)[0], [2] * len(images))
    assert hits(nonsense, quarters) <= 0.5 and likeness(bright, nonsense) < 0.5


# --- Pictures


def test_an_overlay_keeps_the_image_where_there_is_no_heat_and_never_hides_it():
    image = np.random.RandomState(0).randint(0, 256, (20, 20, 3), dtype=np.uint8)
    heat = np.zeros((20, 20), np.float32)
    heat[5:10, 5:10], heat[12, 12] = 1, 0.5
    before = image.copy()
    picture = overlay(image, heat)
    assert picture.shape == (20, 20, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[heat == 0], image[heat == 0])
    assert (picture[heat > 0] != image[heat > 0]).any(axis=1).all()
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(overlay(image, torch.from_numpy(heat)), picture)
    # under full heat the image's steps of light are still there, if smaller
    ramp = np.repeat(np.arange(0, 256, 17, dtype=np.uint8)[None, :, None], 3, axis=2)
    covered = overlay(ramp, np.ones(ramp.shape[:2]))
    assert (np.diff(covered.astype(int), axis=1) >= 5).all()
