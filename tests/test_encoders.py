import pytest
import timm
import torch
from quick import without_gradient
from safetensors.torch import save_file

from common.errors import UserError
from models.clip import build_image_tower
from models.image_encoders import _TIMM_NAMES, ImageTower, feature_size, timm_repo
from models.registry import IMAGE_ENCODERS, TEXT_ENCODERS, register
from models.text_encoders import build_text_tower
from models.weights import fetch_from_hub, read_state_dict

SMALL = [
    "resnet18",
    "resnet50",
    "efficientnet-b0",
    "convnext-tiny",
    "timm:vit_tiny_patch16_224",
    "timm:mobilenetv3_small_050",
]


def test_the_guides_encoders_are_all_there():
    named = (
        "starnet_dual_pyramid_rcf vit resnet18 resnet34 resnet50 resnet101 resnet152 "
        + " ".join(f"efficientnet-b{i}" for i in range(8))
        + " convnext-tiny convnext-small convnext-base convnext-large"
    ).split()
    benchmarks = {"rcf-global", "rcf-late", "darkcovidnet"}  # there where their tests are collected too
    assert set(named) == set(IMAGE_ENCODERS) - benchmarks
    assert set(TEXT_ENCODERS) == {"bert-base-chinese", "bert-tiny-bytes"}


@pytest.mark.parametrize("name", _TIMM_NAMES)
def test_each_timm_name_exists_and_has_published_weights(name):
    timm_name = _TIMM_NAMES[name]
    assert timm_name in timm.list_models() and timm_repo(timm_name).startswith("timm/")
    assert timm.get_pretrained_cfg(timm_name).tag in [
        tag.split(".", 1)[1] for tag in timm.list_pretrained(timm_name + ".*")
    ]


@pytest.mark.parametrize("name", SMALL)
def test_forward_backward_and_a_gradient_for_every_parameter(name):
    tower = build_image_tower(name, "none", 64)
    if name.startswith("resnet"):
        # A block's last gain is zero at the start: until that has moved, what is before it has no gradient.
        for n, p in tower.named_parameters():
            if n.endswith(("bn2.weight", "bn3.weight")) and not p.any():
                torch.nn.init.ones_(p)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = tower.train()(images)
    assert features.shape == (2, tower.num_features)
    features.cos().sum().backward()
    assert without_gradient(tower) == []


def test_each_encoder_normalises_as_it_was_trained():
    vit = build_image_tower("timm:vit_tiny_patch16_224", "none", 32)
    resnet = build_image_tower("resnet18", "none", 32)
    seen = {}
    for name, tower in (("vit", vit), ("resnet", resnet)):
        tower.backbone.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        tower.eval()(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    torch.testing.assert_close(seen["vit"][0, :, 0, 0], torch.tensor([1.0, 1.0, 1.0]))
    expected = torch.tensor(
        [(1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    )
    torch.testing.assert_close(seen["resnet"][0, :, 0, 0], expected)


def test_finding_the_feature_size_touches_no_running_statistics_and_keeps_the_mode():
    backbone = timm.create_model("resnet18", num_classes=0).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert feature_size(backbone, 64) == 512 and backbone.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def compile_with(tower, monkeypatch, compiler) -> str:
    monkeypatch.setattr(torch, "compile", compiler)
    images = torch.full((2, 3, 32, 32), 90, dtype=torch.uint8)
    return tower.compile_training(images, torch.autocast("cpu", enabled=False))


def with_dropout():
    tower = build_image_tower("resnet18", "none", 32).eval()
    tower.backbone.drop_rate = 0.5
    return tower


def test_compiled_passes_serve_training_alone_and_trying_them_changes_nothing(monkeypatch):
    tower, calls = with_dropout(), []
    before, drawn = {k: v.clone() for k, v in tower.state_dict().items()}, torch.get_rng_state()

    def compiler(forward):
        return lambda images: calls.append(1) or forward(images)

    assert compile_with(tower, monkeypatch, compiler) == ""
    assert len(calls) == 1 and not tower.training and torch.equal(drawn, torch.get_rng_state())
    assert all(p.grad is None for p in tower.parameters())
    assert tower.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    tower(images)
    with torch.no_grad():
        tower.train()(images)
    assert len(calls) == 1
    tower(images)
    assert len(calls) == 2


def test_what_cannot_be_compiled_says_why_and_is_left_as_it_was(monkeypatch):
    """torch.compile itself says so only at the first pass."""
    tower = with_dropout()
    before, drawn = {k: v.clone() for k, v in tower.state_dict().items()}, torch.get_rng_state()

    def compiler(forward):
        def fails(images):
            forward(images).sum().backward()
            raise RuntimeError("no compiler on this machine")

        return fails

    assert compile_with(tower, monkeypatch, compiler) == "RuntimeError: no compiler on this machine"
    assert not tower.compiled and not tower.training and torch.equal(drawn, torch.get_rng_state())
    assert all(p.grad is None for p in tower.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_networks_of_a_kind_are_compiled_however_many_came_before(monkeypatch):
    """torch.compile gives up on a function after 8 compilations, and all ResNets share one."""
    compiled, real = [], torch.compile

    def backend(graph, _):
        compiled.append(1)
        return graph.forward

    for width in range(9):
        tower = ImageTower(OfAKind(2 + width), 2 + width, (0.5,) * 3, (0.5,) * 3)
        assert compile_with(tower, monkeypatch, lambda forward: real(forward, backend=backend)) == ""
        assert len(compiled) == width + 1


class OfAKind(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.Linear(3, width)

    def forward(self, images):
        return self.layer(images.mean(dim=(2, 3)))


def test_image_weights_from_a_local_file_fill_the_backbone(tmp_path):
    published = timm.create_model("resnet18")
    save_file(published.state_dict(), tmp_path / "w.safetensors")
    tower = build_image_tower("resnet18", str(tmp_path / "w.safetensors"), 64)
    assert all(
        torch.equal(value, published.state_dict()[name])
        for name, value in tower.backbone.state_dict().items()
    )
    assert len(tower.pretrained) == sum(1 for _ in tower.parameters())


@pytest.mark.parametrize(("share", "why"), [(0, ""), (0.1, "it was cut short"), (0.9, "it was cut short")])
def test_damaged_weights_are_refused(tmp_path, share, why):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=f"cannot be read as weights: {why}"):
        read_state_dict(path, "--image-weights")
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_state_dict(path, "--image-weights")


def test_a_pickle_with_code_is_refused_and_its_code_never_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_state_dict(tmp_path / "evil.pth", "--image-weights")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "target"),
    [("resnet34", "starnet_dual_pyramid_rcf"), ("resnet18", "resnet34"), ("convnext_atto", "resnet18")],
)
def test_weights_of_another_architecture_are_refused(tmp_path, source, target):
    save_file(timm.create_model(source).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not fit the encoder"):
        build_image_tower(target, str(tmp_path / "w.safetensors"), 64)


def test_weights_of_another_shape_are_refused_with_one_of_them(tmp_path):
    save_file(timm.create_model("resnet50").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"does not fit the encoder: size mismatch for \w+\.\d"):
        build_image_tower("resnet18", str(tmp_path / "w.safetensors"), 64)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "efficientnet_b0", "convnext_atto", "regnety_002"])
def test_weights_of_the_same_architecture_are_taken_at_another_size(tmp_path, name):
    save_file(timm.create_model(name).state_dict(), tmp_path / "w.safetensors")
    tower = build_image_tower(f"timm:{name}", str(tmp_path / "w.safetensors"), 64)
    assert len(tower.pretrained) == len(list(tower.parameters()))


def save_checkpoint(path, tower) -> str:
    torch.save({"model": {f"image_tower.{n}": v for n, v in tower.state_dict().items()}, "epoch": 3}, path)
    return str(path)


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("name", ["resnet18", "timm:vit_tiny_patch16_224", "timm:convnext_atto"])
def test_a_checkpoint_of_this_program_is_taken_at_its_own_size_and_at_another(tmp_path, name, size):
    trained = build_image_tower(name, "none", 64).eval()
    path = save_checkpoint(tmp_path / "checkpoint_latest.pth", trained)
    torch.manual_seed(1)
    tower = build_image_tower(name, path, size)
    assert len(tower.pretrained) == len(list(tower.parameters()))
    before = trained.state_dict()
    changed = [
        n for n, v in tower.state_dict().items() if before[n].shape != v.shape or (before[n] != v).any()
    ]
    resampled = ["backbone.pos_embed"] if "vit" in name and size != 64 else []
    assert changed == resampled


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("resnet18", "resnet34"),
        ("resnet50", "resnet18"),
        ("timm:convnext_atto", "timm:vit_tiny_patch16_224"),
        ("starnet_dual_pyramid_rcf", "resnet18"),
    ],
)
def test_a_checkpoint_with_another_encoder_is_refused(tmp_path, caplog, source, target):
    path = save_checkpoint(tmp_path / "checkpoint_latest.pth", build_image_tower(source, "none", 64))
    with pytest.raises(UserError, match="does not fit the encoder"):
        build_image_tower(target, path, 64)
    assert caplog.messages == []


def reaches_the_edge(backbone) -> bool:
    """Does a pixel of the last row and of the last column change the features of a 70 x 70 image?"""
    images = torch.rand(1, 3, 70, 70, requires_grad=True)
    backbone.eval()(images).cos().sum().backward()
    return bool(images.grad[..., -1].any() and images.grad[..., -1, :].any())


@pytest.mark.parametrize(
    ("name", "patch", "left_out", "near"),
    [
        ("vit_tiny_patch16_224", 16, 6, "64 or 80"),
        ("deit_tiny_patch16_224", 16, 6, "64 or 80"),
        ("convnext_atto", 4, 2, "68 or 72"),
        ("pit_ti_224", 16, 6, "64 or 72"),
    ],
)
def test_a_size_of_which_patches_leave_out_a_part_is_said(name, patch, left_out, near, capsys):
    assert not reaches_the_edge(build_image_tower(f"timm:{name}", "none", 70).backbone)
    said = capsys.readouterr().out
    assert f"patches of {patch} pixels and leaves out {left_out} " in said
    assert f"such as {near}, shows" in said


@pytest.mark.parametrize("name", ["resnet18", "pvt_v2_b0", "tf_efficientnet_b0"])
def test_of_a_size_of_which_nothing_is_left_out_nothing_is_said(name, capsys):
    assert reaches_the_edge(build_image_tower(f"timm:{name}", "none", 70).backbone)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "near"), [("resnet5O", "resnet50"), ("efficientnet_b0", "efficientnet-b0")])
def test_unknown_image_encoder_names_the_nearest(name, near):
    with pytest.raises(UserError, match=rf"unknown image encoder.*{near}"):
        build_image_tower(name, "none", 64)


def test_unknown_timm_and_text_names():
    with pytest.raises(UserError, match=r"timm knows no model 'resnet_18'.*resnet18"):
        build_image_tower("timm:resnet_18", "none", 64)
    with pytest.raises(UserError, match=r"timm knows no weights 'resnet50.a1_in1'.*'resnet50.a1_in1k'"):
        build_image_tower("timm:resnet50.a1_in1", "none", 64)
    with pytest.raises(UserError, match="did you mean 'bert-base-chinese'"):
        build_text_tower("bert-base-chinse", "none")
    with pytest.raises(UserError, match="no such folder"):
        build_text_tower("./nowhere", "none")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"):
        register(IMAGE_ENCODERS, "vit")(lambda: None)


def test_without_a_network_the_ways_out_are_named(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("models.weights.MIRROR", "http://127.0.0.1:9/mirror")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        fetch_from_hub(["nobody/nothing"], ["*"], ["*.safetensors"], "--image-weights")
    for part in ("127.0.0.1:9:", "mirror", "(1)", "(2)", "(3)", "--image-weights none"):
        assert part in str(caught.value)


def test_an_endpoint_without_a_scheme_is_refused(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "hf-mirror.com")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"HF_ENDPOINT 'hf-mirror\.com' .* begin it with https://"):
        fetch_from_hub(["nobody/nothing"], ["*"], ["*.safetensors"], "--image-weights")
