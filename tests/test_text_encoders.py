import copy
import fnmatch
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from quick import without_gradient
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CanineConfig, CanineModel, LongformerConfig, LongformerModel

from common.errors import UserError
from models.text_encoders import TextTower, TrainedRows, build_text_tower, trained_rows

TWO_TOKENS = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2).long()}


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
    tower.train_only(TWO_TOKENS)
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
    tower.train_only(TWO_TOKENS)
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
