import copy
import fnmatch
import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CanineConfig, CanineModel, LongformerConfig, LongformerModel

from common.errors import UserError
from models.clip import build_image_tower
from models.image_encoders import _TIMM_NAMES, ImageTower, feature_size, timm_repo
from models.registry import IMAGE_ENCODERS, TEXT_ENCODERS, register
from models.text_encoders import TextTower, TrainedRows, build_text_tower, trained_rows
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


def without_gradient(tower) -> list[str]:
    """The parameters that get none, or zeros."""
    return [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()]


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


def test_tiny_text_encoder_reads_bytes_and_pads_without_effect():
    tower = build_text_tower("bert-tiny-bytes", "none").eval()
    tokens, notes = tower.tokenize(["正", "一句长一些的话"])
    assert tokens["input_ids"][0, :4].tolist() == [b + 3 for b in "正".encode()] + [1] and notes == []
    alone, _ = tower.tokenize(["正"])
    torch.testing.assert_close(tower(**tokens)[:1], tower(**alone), atol=1e-5, rtol=1e-5)


class _NumbersRead(TorchDispatchMode):
    """How often a number of a tensor was asked for, for which a GPU would be waited."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_training_step_of_a_bert_reads_no_number_back():
    tower = build_text_tower("bert-tiny-bytes", "none").train()
    tokens, _ = tower.tokenize(["一个类别", "a longer name"])
    tower.train_only(tokens)
    with _NumbersRead() as numbers:
        tower(**tokens).sum().backward()
    assert numbers.count == 0


def test_every_parameter_of_a_text_tower_gets_a_gradient():
    tower = build_text_tower("bert-tiny-bytes", "none")
    tokens, _ = tower.tokenize(["一", "二 three"])
    tower(**tokens).cos().sum().backward()
    # what is added to all keys of attention changes no softmax: but for rounding, its gradient is zero
    assert [n for n in without_gradient(tower) if not n.endswith("attention.self.key.bias")] == []


def test_training_the_embeddings_of_known_tokens_alone_is_training_all():
    whole = build_text_tower("bert-tiny-bytes", "none").train()
    some, start = copy.deepcopy(whole), copy.deepcopy(whole.state_dict())
    tokens, _ = whole.tokenize(["一", "二 three"])  # the first is padded
    some.train_only(tokens)
    for tower in (whole, some):
        trained = [p for p in tower.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            tower(**tokens).cos().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    after, expected = some.state_dict(), whole.state_dict()
    assert list(after) == list(expected)
    name = "encoder.embeddings.word_embeddings.weight"
    unused = torch.ones(384, dtype=torch.bool)
    unused[tokens["input_ids"]] = False
    torch.testing.assert_close(after[name][unused], start[name][unused], rtol=0, atol=0)
    expected[name][unused] = start[name][unused]  # there they decayed, which nothing of a run sees
    torch.testing.assert_close(after, expected)
    assert after[name].ne(start[name]).any(dim=1).sum() == (~unused).sum() - 1  # padding: zeros, no gradient


def test_a_tower_of_known_tokens_takes_and_gives_a_whole_table():
    torch.manual_seed(0)
    some, whole = (build_text_tower("bert-tiny-bytes", "none").eval() for _ in range(2))
    tokens, _ = whole.tokenize(["一", "二 three"])
    other, _ = whole.tokenize(["四"])
    some.train_only(tokens)
    with pytest.raises(IndexError):
        some(**other)
    some.load_state_dict(whole.state_dict())
    torch.testing.assert_close(some(**tokens), whole(**tokens))
    with torch.no_grad():
        trained_rows(some).rows.mul_(2)
    whole.load_state_dict(some.state_dict())
    torch.testing.assert_close(some(**tokens), whole(**tokens))
    with torch.no_grad():
        trained_rows(some).rows.mul_(3)
    expected = some(**tokens)
    with pytest.raises(RuntimeError, match="Missing key"):
        some.load_state_dict({})
    torch.testing.assert_close(some(**tokens), expected)


def test_an_encoder_without_a_table_of_its_tokens_is_trained_whole():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = CanineModel(CanineConfig(**sizes, num_hash_buckets=16), add_pooling_layer=False)
    tower = TextTower(encoder, 32, None)
    tower.train_only({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2).long()})
    assert all(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("padding", [None, 7, 9, 3])
def test_rows_of_a_table_have_the_gradients_that_the_table_has(padding):
    """Of padding none, whether it is among the tokens or not."""
    torch.manual_seed(0)
    table, ids = nn.Embedding(20, 4, padding_idx=padding), torch.tensor([[9, 2, 9], [11, 7, 2]])
    nn.init.normal_(table.weight)
    table(ids).cos().sum().backward()
    expected = table.weight.grad[[2, 7, 9, 11]]
    rows = TrainedRows(table, ids.unique())
    rows(ids).cos().sum().backward()
    torch.testing.assert_close(rows.rows.grad, expected)


class _Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class _AnEncoder(nn.Module):
    """With a table of 9 tokens, that is scaled, or used twice, or none but its weight is used."""

    def __init__(self, kind: str):
        super().__init__()
        self.config = None
        self.table, self.kind = _Scaled(9, 4) if kind == "scaled" else nn.Embedding(9, 4), kind
        self.head = nn.Linear(4, 9, bias=False)
        if kind == "tied":
            self.head.weight = self.table.weight

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask):
        hidden = self.table.weight[input_ids] if self.kind == "weight" else self.table(input_ids)
        return SimpleNamespace(last_hidden_state=self.head(hidden))


@pytest.mark.parametrize("kind", ["plain", "scaled", "tied", "weight"])
def test_a_table_that_is_more_than_a_table_is_trained_whole(kind):
    tower = TextTower(_AnEncoder(kind), 9, None)
    tower.train_only({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2).long()})
    assert (trained_rows(tower) is not None) == (kind == "plain")
    assert all(p.requires_grad for p in tower.parameters()) == (kind != "plain")


def test_what_an_encoder_looks_up_by_itself_is_trained_too():
    """Longformer pads what it is given to its windows."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LongformerConfig(vocab_size=30, attention_window=4, pad_token_id=1, **sizes)
    tower = TextTower(LongformerModel(config, add_pooling_layer=False), 16, None).eval()
    tokens = {"input_ids": torch.tensor([[5, 6, 7], [5, 8, 7]]), "attention_mask": torch.ones(2, 3).long()}
    expected = tower(**tokens)
    tower.train_only(tokens)
    assert trained_rows(tower).tokens.tolist() == [1, 5, 6, 7, 8]
    torch.testing.assert_close(tower(**tokens), expected)


def test_a_sentence_that_is_cut_is_said():
    _, notes = build_text_tower("bert-tiny-bytes", "none").tokenize(["肺" * 200])
    assert "601 tokens; the last 89 are cut" in notes[0]


@pytest.fixture
def small_bert(shared_data, tmp_path):
    """The published vocabulary on a small random BERT, saved as a local folder."""
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shared_data / "bert-base-chinese" / name).read_bytes())
    config = json.loads((shared_data / "bert-base-chinese" / "config.json").read_text())
    config |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_published_vocabulary_keeps_its_numbers(small_bert):
    tower = build_text_tower(str(small_bert), "none")
    tokens, notes = tower.tokenize(["肺炎", "X光"])
    words = (small_bert / "vocab.txt").read_bytes().decode().split("\n")  # two entries hold U+2028
    assert tokens["input_ids"][0].tolist() == [words.index(w) for w in ("[CLS]", "肺", "炎", "[SEP]")]
    assert "lacks 1 of the tokens of 'X光'" in notes[0]


def test_local_folder_without_weights_asks_for_them_or_for_none(small_bert):
    with pytest.raises(UserError, match=r"holds no weights.*--text-weights none"):
        build_text_tower(str(small_bert), "auto")


def test_local_folder_with_weights_is_loaded(small_bert):
    random = build_text_tower(str(small_bert), "none")
    state = {f"bert.{name}": value for name, value in random.encoder.state_dict().items()}
    save_file(
        state | {"cls.predictions.bias": torch.zeros(3)}, small_bert / "model.safetensors", {"format": "pt"}
    )
    loaded = build_text_tower(str(small_bert), "auto")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), random.parameters(), strict=True))
    assert len(loaded.pretrained) == len(list(loaded.parameters()))
    del state["bert.encoder.layer.0.output.dense.weight"]
    save_file(state, small_bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="weights lack"):
        build_text_tower(str(small_bert), "auto")


def as_published(encoder) -> dict[str, torch.Tensor]:
    """Its tensors as BERT's first files name them."""
    names = {name: f"bert.{name}" for name in encoder.state_dict()}
    for name in names:
        if ".LayerNorm." in name:
            names[name] = f"bert.{name}".replace(".weight", ".gamma").replace(".bias", ".beta")
    return {names[name]: value for name, value in encoder.state_dict().items()}


def same_weights(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_text_weights_may_have_the_published_names(small_bert):
    random = build_text_tower(str(small_bert), "none")
    save_file(as_published(random.encoder), small_bert / "w.safetensors")
    loaded = build_text_tower(str(small_bert), str(small_bert / "w.safetensors"))
    assert same_weights(loaded, random)
    assert len(loaded.pretrained) == len(list(loaded.parameters()))


def test_a_folder_with_pytorch_model_bin_alone_is_loaded_and_nothing_of_it_run(small_bert):
    random = build_text_tower(str(small_bert), "none")
    whole = as_published(random.encoder)
    torch.save(whole | {"cls.predictions.bias": torch.zeros(3)}, small_bert / "pytorch_model.bin")
    assert same_weights(build_text_tower(str(small_bert), "auto"), random)
    assert same_weights(build_text_tower(str(small_bert), str(small_bert)), random)

    class Evil:
        def __reduce__(self):
            return (open, (str(small_bert / "ran"), "w"))

    torch.save(whole | {"evil": Evil()}, small_bert / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read as weights"):
        build_text_tower(str(small_bert), "auto")
    assert not (small_bert / "ran").exists()
    del whole["bert.encoder.layer.0.output.dense.weight"]
    torch.save(whole, small_bert / "pytorch_model.bin")
    with pytest.raises(UserError, match="1 tensors are missing"):
        build_text_tower(str(small_bert), "auto")


@pytest.mark.parametrize(
    ("held", "fetched", "fails", "by"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors", None, "https://hub.example"),
        (["pytorch_model.bin"], "pytorch_model.bin", "https://hub.example", "https://hf-mirror.com"),
    ],
)
def test_only_one_format_of_published_text_weights_is_fetched_and_by_the_mirror_only_where_the_hub_fails(
    small_bert, monkeypatch, held, fetched, fails, by
):
    random = build_text_tower(str(small_bert), "none")
    save_file(as_published(random.encoder), small_bert / "model.safetensors", {"format": "pt"})
    torch.save(as_published(random.encoder), small_bert / "pytorch_model.bin")
    cache, asked = small_bert / "cache", []

    def hub(repo_id, allow_patterns, local_files_only=False, endpoint=None, **_):
        if local_files_only:
            raise OSError("not in the cache")
        asked.append(endpoint)
        if endpoint == fails:
            raise OSError("it answers and sends nothing")
        cache.mkdir(exist_ok=True)
        for name in ["config.json", "vocab.txt", "tokenizer_config.json", *held]:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                shutil.copy(small_bert / name, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    monkeypatch.setattr("models.weights._check_answers", lambda _: None)
    assert same_weights(build_text_tower("hfl/chinese-roberta-wwm-ext", "auto"), random)
    assert [name for name in ("model.safetensors", "pytorch_model.bin") if (cache / name).exists()] == [
        fetched
    ]
    assert asked[-1] == by and set(asked) == {by, fails} - {None}


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_padded_sentence_gets_the_features_that_transformers_give_it(small_bert, is_decoder):
    config = json.loads((small_bert / "config.json").read_text()) | {"is_decoder": is_decoder}
    (small_bert / "config.json").write_text(json.dumps(config))
    tower = build_text_tower(str(small_bert), "none").eval()
    padded, alone = (tower.tokenize(texts)[0] for texts in (["肺炎", "一张正常的胸片"], ["肺炎"]))
    with torch.no_grad():
        expected = tower.encoder(input_ids=alone["input_ids"]).last_hidden_state.mean(1)
        assert torch.allclose(tower(**padded)[:1], expected, atol=1e-6)


def test_encoder_decoders_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(UserError, match="no plain text encoder"):
        build_text_tower(str(tmp_path), "none")


def test_a_tokenizer_without_padding_is_refused(small_bert):
    words = {"<unk>": 0, "a": 1}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (small_bert / "vocab.txt").unlink()
    (small_bert / "tokenizer.json").write_text(json.dumps(tokenizer))
    (small_bert / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="no padding token"):
        build_text_tower(str(small_bert), "none").tokenize(["a"])
