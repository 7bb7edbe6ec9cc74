import math

import pytest
import torch

from models.clip import build_clip
from training.optim import gradient_norm, lr_factor, parameter_groups, warmup_steps


def test_learning_rate_at_the_start_the_end_of_warm_up_half_way_and_the_end():
    assert lr_factor(0, 100, 10) == pytest.approx(0.1)
    assert lr_factor(9, 100, 10) == pytest.approx(1.0)
    assert lr_factor(10, 100, 10) == pytest.approx(1.0)
    assert lr_factor(55, 100, 10) == pytest.approx(0.5)
    assert lr_factor(99, 100, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert lr_factor(0, 1, 0) == 1.0
    assert lr_factor(120, 100, 10) == 0  # of a schedule made shorter on resume


def test_warm_up_is_by_default_the_nearest_step_to_5_percent_of_the_epochs():
    assert [warmup_steps(None, *of) for of in ((100, 7), (5, 7), (4, 1))] == [35, 2, 0]
    assert [warmup_steps(given, 100, 7) for given in (0, 2.5, 3)] == [0, 18, 21]


def test_the_norm_is_that_of_all_gradients_in_any_memory_layout():
    torch.manual_seed(0)
    shapes = [(), (7,), (30, 20), (5, 4, 3, 3)]
    gradients = [torch.randn(shape) * (i + 1) for i, shape in enumerate(shapes)]
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    gradients[2] = gradients[2].T.contiguous().T
    gradients[3] = gradients[3].contiguous(memory_format=torch.channels_last)
    assert float(gradient_norm(gradients)) == pytest.approx(expected, rel=1e-6)
    gradients[1][3] = float("nan")
    assert math.isnan(gradient_norm(gradients))


@pytest.fixture
def model():
    return build_clip(
        "starnet_dual_pyramid_rcf",
        "bert-tiny-bytes",
        img_size=32,
        embed_dim=16,
        temperature=0.07,
        freeze_text=False,
    )


def groups_of(model):
    return parameter_groups(model, learning_rate=1e-4, new_lr_ratio=10, text_lr_ratio=0.2, weight_decay=0.05)


def test_each_trainable_parameter_is_in_exactly_one_group(model):
    ids = [id(p) for group in groups_of(model) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    model.freeze(model.text_tower)
    ids = [id(p) for group in groups_of(model) for p in group["params"]]
    frozen = {id(p) for p in model.text_tower.parameters()}
    assert len(ids) == len(set(ids)) and not frozen & set(ids)


def test_biases_norms_gains_and_scale_are_not_decayed(model):
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups_of(model):
        for p in group["params"]:
            one_dimensional = (
                names[id(p)].endswith(("bias", "logit_scale")) or "gains" in names[id(p)] or p.ndim < 2
            )
            assert group["weight_decay"] == (0 if one_dimensional else 0.05), names[id(p)]


def test_rates_of_pretrained_new_and_text_parameters(model):
    model.image_tower.pretrained = frozenset(
        name for name, _ in model.image_tower.named_parameters() if ".local." in name
    )
    rate = {id(p): group["peak_lr"] for group in groups_of(model) for p in group["params"]}
    for name, p in model.named_parameters():
        expected = 2e-5 if name.startswith("text_tower.") else 1e-4 if ".local." in name else 1e-3
        assert rate[id(p)] == pytest.approx(expected), name


def test_position_embeddings_that_timm_exempts_are_not_decayed():
    model = build_clip(
        "timm:vit_tiny_patch16_224",
        "bert-tiny-bytes",
        img_size=32,
        embed_dim=8,
        temperature=0.07,
        image_weights="none",
    )
    decayed = {id(p) for group in groups_of(model) if group["weight_decay"] for p in group["params"]}
    assert id(model.image_tower.backbone.pos_embed) not in decayed
