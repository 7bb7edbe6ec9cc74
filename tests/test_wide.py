"""Training in bf16 on a CPU: what stays in float32, and that nothing else about a network changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.clip import build_image_tower
from models.wide import DepthwiseConv2d, wide, widen_depthwise


def gradients(network: nn.Module, images: torch.Tensor, dtype: torch.dtype | None) -> list[torch.Tensor]:
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        output = network(images)
    (output.float() if dtype else output).square().mean().backward()
    return [p.grad for p in network.parameters()]


def test_only_depthwise_convolutions_are_replaced_and_they_compute_the_same():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2))
    before = copy.deepcopy(network)
    widen_depthwise(network)
    assert [type(module) for module in network] == [nn.Conv2d, DepthwiseConv2d, nn.Conv2d]
    assert network.state_dict().keys() == before.state_dict().keys()
    images = torch.randn(2, 3, 9, 9)
    assert torch.equal(network(images), before(images))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images), before(images))


def test_in_training_a_depthwise_convolution_is_as_exact_as_float32():
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 16, 7, padding=3, groups=16)
    ours = copy.deepcopy(plain)
    widen_depthwise(ours)
    exact = copy.deepcopy(plain).double()
    images = torch.randn(4, 16, 14, 14)
    wanted = gradients(exact, images.double(), None)
    errors = []
    for network in (ours, plain):
        found = gradients(network, images, torch.bfloat16)
        errors.append(
            max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
        )
    # what remains is the rounding of the output and of its gradient to bf16, 8 bits
    assert errors[0] < 0.01 and errors[0] < errors[1]


def test_the_result_has_the_type_that_autocast_gives():
    q = torch.randn(2, 4, 9, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(F.scaled_dot_product_attention, q, q, q).dtype == torch.bfloat16
        with torch.no_grad():
            assert wide(F.scaled_dot_product_attention, q, q, q).dtype == torch.bfloat16
    assert wide(F.scaled_dot_product_attention, q, q, q).dtype == torch.float32


@pytest.mark.parametrize("name", ["starnet_dual_pyramid_rcf", "timm:convnext_atto"])
def test_encoders_train_in_bf16_close_to_float32(name):
    torch.manual_seed(0)
    tower = build_image_tower(name, "none", 64)
    assert any(isinstance(module, DepthwiseConv2d) for module in tower.modules())
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    other = copy.deepcopy(tower)
    torch.manual_seed(1)  # stochastic depth drops the same
    found = torch.cat([g.flatten() for g in gradients(tower, images, torch.bfloat16)])
    torch.manual_seed(1)
    wanted = torch.cat([g.flatten() for g in gradients(other, images, None)])
    assert F.cosine_similarity(found, wanted, dim=0) > 0.95


def test_normalisation_equals_its_formula_whatever_the_layout():
    tower = build_image_tower("vit", "none", 32)
    images = torch.randint(0, 256, (2, 3, 32, 24), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (tower.mean, tower.std))
    wanted = (images.double() / 255 - mean) / std
    for given in (images, images.float(), images.contiguous(memory_format=torch.channels_last)):
        found = tower.normalise(given)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)
        assert found.is_contiguous(memory_format=torch.channels_last)
    grey = images[:, :1]
    assert torch.equal(tower.normalise(grey.float()), tower.normalise(grey.repeat(1, 3, 1, 1)))
