import math

import pytest
import timm
import torch
from safetensors.torch import save_file

from common.errors import UserError
from models.clip import build_image_tower
from models.starnet_dual_pyramid_rcf import PooledAttention, StarNetDualPyramidRCF, sincos_position_code


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 96, 64, generator=torch.Generator().manual_seed(0))


def perturb(module):
    """Weights and statistics that no initialisation has, so that nothing agrees by being zero or one."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=random))
        for name, b in module.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.1 * torch.randn(b.shape, generator=random))
            elif name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=random))
    return module


def test_maps_have_the_published_strides_and_channels(images):
    model = StarNetDualPyramidRCF().eval()
    assert [tuple(m.shape) for m in model.before_last_stage(images)] == [(3, 96, 6, 4)] * 2
    assert model.forward_features(images).shape == (3, 192, 3, 2)


def test_random_depth_of_the_local_pyramid_rises_linearly_to_a_tenth():
    blocks = [block for stage in StarNetDualPyramidRCF().local.stages for block in stage[1:]]
    dropped = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert len(dropped) == 15 and dropped == pytest.approx([0.1 * i / 14 for i in range(15)])


def test_without_injection_it_is_exactly_starnet_s1(images):
    model = perturb(StarNetDualPyramidRCF()).eval()
    reference = timm.create_model("starnet_s1", num_classes=0).eval()
    reference.load_state_dict(model.local.state_dict())
    with torch.no_grad():
        assert not torch.allclose(model(images), reference(images), atol=1e-3)
        for gain in model.fusion_gains:
            gain.zero_()
        torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)


def test_forward_is_the_cascade_of_the_specification(images):
    """Stage by stage from the parts: F_i = L_i + a_i A_i(G_i), next local input L_i + g_i (F_i - L_i)."""
    model = perturb(StarNetDualPyramidRCF()).eval()
    with torch.no_grad():
        x, g = model.local.stem(images), model.global_stem(images)
        for i in range(4):
            local, g = model.local.stages[i](x), model.global_stages[i](g)
            injected = model.adapters[i](g, torch.ones(local.shape[1]))
            fused = local + model.fusion_gains[i][:, None, None] * injected
            stride = 4 * 2**i
            assert fused.shape == (3, (24, 48, 96, 192)[i], 96 // stride, 64 // stride)
            x = local + (model.cascade_gains[i] * (fused - local) if i < 3 else 0)
        expected = model.local.norm(fused).mean((2, 3))
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient_from_the_first_step(images):
    model = StarNetDualPyramidRCF()
    model(images).cos().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_pooled_attention_equals_the_written_out_formula():
    torch.manual_seed(0)
    layer = PooledAttention(24, 4, 2).double()
    tokens = torch.randn(2, 4, 6, 24, dtype=torch.float64)
    pooled = tokens.reshape(2, 2, 2, 3, 2, 24).mean((2, 4)).reshape(2, 6, 24)
    query = layer.query(tokens.reshape(2, 24, 24)).reshape(2, 24, 4, 6)
    key, value = (part(pooled).reshape(2, 6, 4, 6) for part in (layer.key, layer.value))
    weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(6)).softmax(-1)
    expected = layer.out(torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(2, 4, 6, 24))
    torch.testing.assert_close(layer(tokens), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("height", "width", "channels"), [(56, 56, 24), (7, 7, 192), (2, 3, 96)])
def test_position_code_tells_all_places_apart_and_all_frequencies_live(height, width, channels):
    code = sincos_position_code(height, width, channels)
    assert code.shape == (height * width, channels)
    distances = torch.cdist(code, code) + 10 * torch.eye(len(code))
    assert distances.min() > 0.05
    assert (code.std(0) > 0.1).all()


def test_published_local_weights_fill_the_local_pyramid_and_nothing_else(tmp_path, images):
    published = perturb(timm.create_model("starnet_s1"))  # with its 1000-class head
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    tower = build_image_tower("starnet_dual_pyramid_rcf", str(tmp_path), 64)
    for name, value in tower.backbone.local.state_dict().items():
        assert torch.equal(value, published.state_dict()[name]), name
    assert tower.pretrained == {
        f"backbone.local.{name}" for name, _ in tower.backbone.local.named_parameters()
    }


def test_size_that_is_no_multiple_of_32_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="multiple of 32, such as 224"):
        build_image_tower("starnet_dual_pyramid_rcf", "none", 220)


@pytest.mark.parametrize("size", [64, 224])
def test_what_the_global_pyramid_injects_depends_on_the_image_at_every_stage(size):
    """Not on the place alone: of its mean square, the part that is left without the mean over the images."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(16, 3, 6, 6, generator=generator) * 255
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255)
    torch.manual_seed(3)
    tower = build_image_tower("starnet_dual_pyramid_rcf", "none", size)
    injected = []
    for adapter in tower.backbone.adapters:
        adapter.register_forward_hook(lambda module, inputs, output: injected.append(output))
    with torch.no_grad():
        tower(images)
    assert len(injected) == 4
    for map_ in injected:
        of_images = (map_ - map_.mean(0)).square().mean() / map_.square().mean()
        assert of_images > 0.35
