"""Text towers: any Hugging Face encoder by id or folder, bert-base-chinese, and a tiny one over bytes."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    logging,
)

from common.errors import UserError, did_you_mean, first_line
from models.registry import TEXT_ENCODERS, register
from models.weights import fetch_from_hub, load_into, part_of, read_state_dict

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and the loader's forks do not mix
logging.set_verbosity_error()  # its loading reports; what matters is checked below and said by us

OPTION = "--text-weights"
OWN_PREFIX = "text_tower.encoder."  # of an encoder's tensors in this program's checkpoints
_TOKENIZER_FILES = ["config.json", "tokenizer*", "vocab*", "special_tokens_map.json", "added_tokens.json",
                    "merges.txt", "*.model"]  # fmt: skip
_MOST_TOKENS = 512


class TextTower(nn.Module):
    """An encoder whose token features are averaged over the sentence.

    encoder: Hugging Face model with `last_hidden_state`. load_tokenizer: called when first needed.
    pretrained: names of the parameters that came from published weights.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_features: int,
        load_tokenizer: Callable[[], Any],
        pretrained: bool = False,
    ):
        super().__init__()
        self.encoder, self.num_features = encoder, num_features
        self._load_tokenizer, self._tokenizer = load_tokenizer, None
        names = (name for name, _ in self.named_parameters())
        self.pretrained = frozenset(names) if pretrained else frozenset()

    def tokenize(self, sentences: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """{"input_ids", "attention_mask"}, each (S, T) int64, and notes on what the tokenizer lost."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        tokenizer = self._tokenizer
        longest = min(
            tokenizer.model_max_length,
            getattr(self.encoder.config, "max_position_embeddings", _MOST_TOKENS),
            _MOST_TOKENS,
        )
        notes = []
        for sentence in sentences:
            ids = tokenizer(sentence)["input_ids"]
            if len(ids) > longest:
                notes.append(
                    f"the sentence {sentence[:30]!r}… has {len(ids)} tokens; the last {len(ids) - longest} "
                    "are cut"
                )
            elif tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                notes.append(
                    f"the text encoder's vocabulary lacks {ids.count(tokenizer.unk_token_id)} of the "
                    f"tokens of {sentence!r}"
                )
        batch = tokenizer(
            list(sentences), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        return {key: batch[key] for key in ("input_ids", "attention_mask")}, notes

    def train_only(self, tokens: Mapping[str, torch.Tensor]) -> None:
        """Of the token embeddings train those alone that are looked up for `tokens`, as `tokenize` gives
        them, where the encoder has a plain table. No gradient reaches the others, yet an optimizer would go
        over all of them at every step: of bert-base-chinese 16 of 102 million numbers, of xlm-roberta-base
        192 of 278.
        """
        try:
            table = self.encoder.get_input_embeddings()
        except NotImplementedError:  # such as CANINE, which has hashes instead
            return
        if type(table) is not nn.Embedding:
            return
        uses = [own for _, own in self.named_parameters(remove_duplicate=False) if own is table.weight]
        if len(uses) > 1:
            return
        looked_up, was_training = [], self.training
        hook = table.register_forward_pre_hook(lambda _, ids: looked_up.append(ids[0].flatten()))
        with torch.no_grad():  # some look up more than they are given, such as padding of their own
            self.eval()(**{key: value[:1] for key, value in tokens.items()})
        hook.remove()
        self.train(was_training)
        if looked_up:
            every = torch.cat([tokens["input_ids"].flatten(), *looked_up])
            name = next(name for name, module in self.named_modules() if module is table)
            parent, _, own = name.rpartition(".")
            setattr(self.get_submodule(parent), own, TrainedRows(table, every.unique()))

    def checkpoint_gradients(self, name: str) -> None:
        """As `ImageTower.checkpoint_gradients`."""
        encoder = self.encoder
        enable = getattr(encoder, "activation_checkpointing_enable", None)  # its name since transformers 5.23
        try:
            (enable or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
        except ValueError:
            raise UserError(f"--gradient-checkpointing: the text encoder {name} has no form of it") from None

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(S, T), (S, T) -> (S, num_features): mean over the tokens that are no padding."""
        of_heads = attention_mask
        config = self.encoder.config
        looks_both_ways = isinstance(self.encoder, BertModel) and not config.is_decoder
        if looks_both_ways and config._attn_implementation == "sdpa":
            # As attention takes it: in a mask over tokens transformers looks for padding, and a GPU is waited
            # for. Other models may take another form.
            of_heads = attention_mask[:, None, None].bool()  # (S, 1, 1, T)
        hidden = self.encoder(input_ids=input_ids, attention_mask=of_heads).last_hidden_state  # (S, T, H)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


class TrainedRows(nn.Module):
    """A table of embeddings (V, D) of which only the rows `tokens` (n,) are trained, and can be asked for: as
    a parameter `rows` (n, D). In a state dict it is the whole table, `weight`, as without this.
    """

    def __init__(self, table: nn.Embedding, tokens: torch.Tensor):
        super().__init__()
        self.weight, self.rows = table.weight.requires_grad_(False), nn.Parameter(table.weight[tokens])
        place = torch.full((table.num_embeddings,), -1)  # no row: other tokens are an error
        place[tokens] = torch.arange(len(tokens))
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("place", place, persistent=False)
        padding = -1 if table.padding_idx is None else int(place[table.padding_idx])
        self.padding = None if padding < 0 else padding  # a row without gradient

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(self.place[token_ids], self.rows, self.padding)

    @torch.no_grad()
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.weight[self.tokens] = self.rows
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}rows"]

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        self.weight[self.tokens] = self.rows  # which stay as they are where nothing is loaded
        super()._load_from_state_dict({**state_dict, f"{prefix}rows": self.rows}, prefix, *others)
        self.rows.copy_(self.weight[self.tokens])


def trained_rows(model: nn.Module) -> TrainedRows | None:
    return next((module for module in model.modules() if isinstance(module, TrainedRows)), None)


def _random_encoder(config: Any) -> nn.Module:
    return AutoModel.from_config(config, **_without_pooler(config))


def _without_pooler(config: Any) -> dict[str, bool]:
    """BERT's pooler would get no gradient, since the sentence is the mean of its tokens."""
    model_class = MODEL_MAPPING[type(config)]
    has_option = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if has_option else {}


def _feature_size(encoder: nn.Module, name: str) -> int:
    """Size of a token's feature vector, by one forward; refuses models that are no plain text encoder."""
    try:
        with torch.no_grad():
            ids = torch.ones(1, 2, dtype=torch.long)
            hidden = encoder.eval()(input_ids=ids, attention_mask=ids).last_hidden_state
    except Exception as error:
        raise UserError(
            f"--text-encoder {name} is no plain text encoder ({type(encoder).__name__}: "
            f"{first_line(error, 100)}); "
            "use a BERT-like model"
        ) from None
    encoder.train()
    return hidden.shape[-1]


def build_hugging_face(
    name: str, weights: str, known_config: Any = None, hub_ids: Sequence[str] = ()
) -> TextTower:
    """A text encoder by local folder or hub id. No code from the hub is run.

    known_config: used when weights are not asked for, so that no network is needed before the tokenizer is.
    """
    weights = "pretrained" if weights == "auto" else weights
    local = Path(name) if Path(name).is_dir() else None
    hub_ids = hub_ids or [name]

    def folder_with(patterns: list[str], *needed: str) -> Path:
        return local or fetch_from_hub(hub_ids, patterns, needed, "--text-encoder")

    def load_tokenizer() -> Any:
        folder = folder_with(_TOKENIZER_FILES, "tokenizer.json", "vocab*", "*.model")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise UserError(
                f"--text-encoder {name}: its tokenizer cannot be loaded: {first_line(error)}"
            ) from None
        if tokenizer.pad_token is None:
            raise UserError(f"--text-encoder {name} has no padding token, so it is no BERT-like text encoder")
        return tokenizer

    if local and not (local / "config.json").is_file():
        raise UserError(
            f"--text-encoder {name} is a folder without config.json; give a Hugging Face model folder"
        )
    source = None if weights in ("pretrained", "none") else Path(weights)
    if weights == "pretrained":
        patterns = [*_TOKENIZER_FILES, "*.safetensors.index.json"]
        folder = folder_with(patterns, "*.safetensors", "pytorch_model.bin")
        if not any(folder.glob("*.safetensors")):
            source = folder
            if not (folder / "pytorch_model.bin").is_file():
                raise UserError(
                    f"--text-encoder {name} holds no weights (*.safetensors, pytorch_model.bin); put "
                    f"model.safetensors there, or ask for random weights: {OPTION} none"
                )
    elif known_config is None:
        folder = folder_with(_TOKENIZER_FILES, "config.json")
    try:
        config = known_config if weights != "pretrained" and known_config else None
        config = config or AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_MAPPING:
            raise UserError(
                f"--text-encoder {name}: {config.model_type} is no plain text encoder; use a BERT-like model"
            )
        if weights == "pretrained" and not source:
            encoder, loading = AutoModel.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
                output_loading_info=True, **_without_pooler(config),
            )  # fmt: skip
            if loading["missing_keys"]:
                raise UserError(
                    f"--text-encoder {name}: its weights lack {_first_three(loading['missing_keys'])}"
                )
        else:
            encoder = _random_encoder(config)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--text-encoder {name} cannot be loaded: {first_line(error)}") from None
    if source:
        option = "--text-encoder" if weights == "pretrained" else OPTION
        state = read_state_dict(source, option)
        state = part_of(state, OWN_PREFIX) or part_of(state, encoder.base_model_prefix + ".") or state
        load_into(encoder, _with_todays_names(state), f"{option} {source}")
    return TextTower(encoder, _feature_size(encoder, name), load_tokenizer, pretrained=weights != "none")


def _with_todays_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """BERT's published files call the weight and the bias of a LayerNorm gamma and beta."""
    old = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
    for before, after in old.items():
        state = {name.replace(before, after): value for name, value in state.items()}
    return state


def _first_three(names: Sequence[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@register(TEXT_ENCODERS, "bert-base-chinese")
def bert_base_chinese(weights: str) -> TextTower:
    """google-bert/bert-base-chinese: 12 layers, 768 wide, 21128 tokens (Devlin et al. 2018, arXiv
    1810.04805).
    """
    if Path("bert-base-chinese").is_dir():  # a downloaded copy in the working folder
        return build_hugging_face("bert-base-chinese", weights)
    ids = ["bert-base-chinese", "google-bert/bert-base-chinese"]
    return build_hugging_face("bert-base-chinese", weights, BertConfig(vocab_size=21128), ids)


@register(TEXT_ENCODERS, "bert-tiny-bytes")
def bert_tiny_bytes(weights: str) -> TextTower:
    """A 2-layer BERT, 128 wide, over UTF-8 bytes: no vocabulary file, nothing to download. No dropout: it
    sees the same few sentences each step, and noise on them would move every target at once.
    """
    if weights == "pretrained":
        raise UserError(
            f"bert-tiny-bytes has no published weights; use {OPTION} none, or a file: {OPTION} PATH"
        )
    config = BertConfig(
        vocab_size=384, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        max_position_embeddings=_MOST_TOKENS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    encoder = _random_encoder(config)
    if weights not in ("auto", "none"):
        state = read_state_dict(Path(weights), OPTION)
        load_into(encoder, part_of(state, OWN_PREFIX) or state, f"{OPTION} {weights}")
    return TextTower(encoder, config.hidden_size, ByT5Tokenizer, pretrained=weights not in ("auto", "none"))


def check_text_encoder(name: str) -> None:
    """Raises UserError where `name` is no registered name, no local folder, and can be no hub id."""
    if name in TEXT_ENCODERS or Path(name).is_dir():
        return
    if name.startswith((".", "/", "~")) or "\\" in name:
        raise UserError(f"--text-encoder {name}: there is no such folder")
    if name.count("/") != 1:
        near = did_you_mean(name, TEXT_ENCODERS)
        raise UserError(
            f"unknown text encoder {name!r}{near}; give {', '.join(TEXT_ENCODERS)}, a Hugging Face id such "
            "as "
            "hfl/chinese-roberta-wwm-ext, or a local folder"
        )


def build_text_tower(name: str, weights: str) -> TextTower:
    """By registered name, local folder, or hub id. Raises UserError for anything else."""
    check_text_encoder(name)
    return TEXT_ENCODERS[name](weights) if name in TEXT_ENCODERS else build_hugging_face(name, weights)
