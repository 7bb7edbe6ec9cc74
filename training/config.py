"""Every option once: name, type, default, range, help. The flags, the JSON keys and config.json come from
here.

Nothing heavy is imported, so that `--help` answers at once.
"""

import argparse
import contextlib
import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli import Parser, problems_with_unknown
from common.errors import UserError, did_you_mean
from common.files import MOST_WRITTEN_BY_HAND, problems_of_cache_dir, read_json, saved_in

MOST_UNKNOWN = 20
MOST_ENTRIES = 1000
MONITORS = ("val_acc", "val_loss", "val_balanced_acc", "val_macro_f1")
# What did better than the defaults on 1,124 real films, trained from scratch (benchmarks/RESULTS.md).
PRESETS = {"small-data": {"augmentation": "minimal", "logit_adjustment": True, "cutmix_prob": 0.5}}


def option(
    default: Any,
    group: str,
    help: str,
    *,
    flag: str | None = None,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    on_resume: str = "said",
) -> Any:
    """A field of Config. `low`/`high` are inclusive bounds, `above`/`below` exclusive ones.

    `on_resume` says whether it may change when a run is continued. "fixed": no. "same": only where the split
    and the sentences stay what they were. "said": with --resume-from, which then says so; a cross-validation
    and the entries of a --config-file are refused. "free": always.
    """
    return field(
        default=default, metadata={key: value for key, value in locals().items() if key != "default"}
    )


@dataclass(frozen=True)
class Config:
    """All options of a run. Field names are the JSON keys of the guide."""

    data_dir: str | None = option(
        None,
        "data",
        "folder with one sub-folder of images per class, or tar shards (required)",
        on_resume="free",
    )
    output_dir: str | None = option(
        None, "data", "folder for everything the run writes (required)", on_resume="free"
    )
    val_dir: str | None = option(
        None, "data", "a ready validation folder (or shards), instead of holding images out", on_resume="same"
    )
    val_ratio: float = option(
        0.2, "data", "share of images held out for validation", above=0, high=0.5, on_resume="same"
    )
    group_pattern: str | None = option(
        None, "data", "regular expression on the file name whose first group is the patient", on_resume="same"
    )
    groups_file: str | None = option(
        None, "data", "CSV with columns path,group that names each image's patient", on_resume="same"
    )
    cache_dir: str | None = option(
        None, "data", "folder for decoded images (default: ~/.cache/train_clip)", on_resume="free"
    )
    use_cache: bool = option(
        True, "data", "keep no decoded images on disk", flag="--no-cache", on_resume="free"
    )
    skip_unreadable: bool = option(False, "data", "leave unreadable images out instead of stopping")
    overwrite: bool = option(False, "data", "replace another run's results in --output-dir", on_resume="free")

    text_template: str | None = option(
        None,
        "text",
        'sentence for every class, such as "这是一张{class_name}的图片" (default: the class name)',
        on_resume="same",
    )
    class_texts_file: str | None = option(
        None, "text", "JSON file: class name -> one sentence or a list of sentences", on_resume="same"
    )

    image_encoder_name: str = option(
        "starnet_dual_pyramid_rcf",
        "model",
        "image encoder, or timm:NAME for any timm model",
        flag="--image-encoder",
        on_resume="fixed",
    )
    text_encoder_name: str = option(
        "bert-base-chinese",
        "model",
        "text encoder: bert-base-chinese, bert-tiny-bytes (no download), a Hugging Face id or a local folder",
        flag="--text-encoder",
        on_resume="fixed",
    )
    image_weights: str = option(
        "auto",
        "model",
        "pretrained, none (random), or a file or folder; auto: none for starnet_dual_pyramid_rcf, else "
        "pretrained",
        on_resume="fixed",
    )
    text_weights: str = option(
        "auto",
        "model",
        "pretrained, none (random), or a file or folder; auto: none for bert-tiny-bytes, else pretrained",
        on_resume="fixed",
    )
    embed_dim: int = option(
        512, "model", "size of the shared embedding space", low=2, high=8192, on_resume="fixed"
    )
    temperature: float = option(
        0.07,
        "model",
        "temperature at the start; learned afterwards",
        low=0.01,
        high=1.0,
        on_resume="fixed",
    )
    freeze_image_encoder: bool = option(
        False, "model", "keep the image tower as it is; train its projection", on_resume="fixed"
    )
    freeze_text_encoder: bool = option(
        False,
        "model",
        "keep the text tower as it is; its sentences are then encoded once per run",
        on_resume="fixed",
    )

    preset: str | None = option(
        None,
        "training",
        "small-data: --augmentation minimal --logit-adjustment --cutmix-prob 0.5; options that are given "
        "as well win",
        choices=tuple(PRESETS),
        on_resume="fixed",
    )
    batch_size: int = option(32, "training", "images per step, over all processes", low=2)
    micro_batch_size: int | None = option(
        None,
        "training",
        "images whose activations are held at once, on each process; loss and gradients stay those of the "
        "whole batch, though CutMix pairs within these (default: all)",
        low=1,
    )
    gradient_checkpointing: bool = option(
        False, "training", "compute activations twice instead of holding them: a third more time, less memory"
    )
    sync_batchnorm: bool = option(
        False, "training", "with torchrun: BatchNorm over the images of all processes, not of each by itself"
    )
    epochs: int = option(100, "training", "passes over the training images", low=1)
    learning_rate: float = option(
        1e-4, "training", "peak learning rate of a pretrained image tower", above=0, high=1
    )
    new_lr_ratio: float = option(
        10.0,
        "training",
        "times --learning-rate: projections, scale, image layers without pretrained weights",
        above=0,
    )
    text_lr_ratio: float = option(0.2, "training", "times --learning-rate: the text tower", above=0)
    weight_decay: float = option(0.01, "training", "AdamW's decay of weight matrices", low=0, below=1)
    warmup_epochs: float | None = option(
        None, "training", "epochs of linear warm-up (default: 5 %% of --epochs)", low=0
    )
    grad_clip: float = option(
        1.0, "training", "largest norm of a step's gradient; 0 switches clipping off", low=0
    )
    max_nonfinite_steps: int = option(
        3,
        "training",
        "stop after this many steps in a row whose loss or gradient is not finite; fewer are skipped",
        low=1,
        on_resume="free",
    )
    loss: str = option(
        "unicl",
        "training",
        "unicl: class-aware, both directions; clip: in-batch pairs; ce: image to text only",
        choices=("unicl", "clip", "ce"),
    )
    use_weighted_sampling: bool = option(
        False,
        "training",
        "show every class equally often: rare images several times an epoch, frequent ones not in each",
    )
    logit_adjustment: bool = option(
        False,
        "training",
        "correct the loss for the classes' frequencies, so that rare classes are found too",
    )
    logit_adjustment_tau: float = option(
        1.0,
        "training",
        "how far --logit-adjustment goes: 1 as if all classes were equally frequent, 0.5 half of the way, so "
        "that fewer images are taken for a rare class",
        above=0,
        high=5,
    )
    img_size: int = option(224, "training", "image side in pixels", low=32, high=4096, on_resume="fixed")
    augmentation: str = option(
        "standard", "training", "training augmentation", choices=("none", "minimal", "standard")
    )
    horizontal_flip: bool = option(
        True, "training", "no mirrored images (a mirror swaps left and right)", flag="--no-horizontal-flip"
    )
    cutmix_prob: float = option(
        0.0,
        "training",
        "in such a share of the steps each image gets a box of another one, and both their classes",
        low=0,
        high=1,
    )

    compile: bool = option(
        False,
        "other",
        "let torch.compile make kernels for the image tower: minutes at the start; may make steps faster; "
        "for one process and whole batches",
        on_resume="free",
    )
    num_workers: int = option(
        4,
        "other",
        "processes that read images which neither the cache nor memory holds, at most one per CPU core",
        low=0,
        high=256,
        on_resume="free",
    )
    gpu_id: int = option(0, "other", "CUDA device; -1 trains on the CPU", low=-1, on_resume="free")
    use_amp: bool = option(True, "other", "train in float32 instead of mixed precision", flag="--no-amp")
    resume_from: str | None = option(
        None,
        "other",
        "checkpoint to continue from, or its run's folder; auto: the one in --output-dir, where there is one",
        on_resume="free",
    )
    save_every_minutes: float = option(
        10.0,
        "other",
        "save within an epoch too, this often; 0 saves at the ends of epochs only",
        low=0,
        on_resume="free",
    )
    save_best: bool = option(True, "other", "do not write checkpoint_best.pth", flag="--no-save-best")

    use_cv: bool = option(False, "cross-validation", "k-fold cross-validation", on_resume="fixed")
    n_splits: int = option(5, "cross-validation", "number of folds", low=2, on_resume="fixed")
    fold: int | None = option(
        None,
        "cross-validation",
        "train this fold alone (1 to --n-splits), as one of several jobs",
        low=1,
        on_resume="free",
    )
    random_state: int = option(
        42, "cross-validation", "seed of splits, weights and order", low=0, high=2**31 - 1, on_resume="fixed"
    )

    early_stopping_patience: int | None = option(
        None, "early stopping", "stop after this many epochs without improvement (default: never)", low=1
    )
    early_stopping_min_delta: float = option(
        0.0,
        "early stopping",
        "smallest change that counts: percentage points for accuracies and F1, absolute for loss",
        low=0,
    )
    early_stopping_monitor: str = option(
        "val_acc",
        "early stopping",
        "what early stopping and checkpoint_best.pth go by",
        choices=MONITORS,
        on_resume="fixed",
    )

    multi_config: bool = option(
        False, "several configurations", "train every entry of --config-file", on_resume="free"
    )
    config_file: str | None = option(
        None, "several configurations", "JSON array of configurations", on_resume="free"
    )
    config_index: int | None = option(
        None,
        "several configurations",
        "train this entry alone (1 is the first), as one of several jobs",
        low=1,
        on_resume="free",
    )


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
_TYPES = typing.get_type_hints(Config)


def flag_of(name: str) -> str:
    return FIELDS[name].metadata["flag"] or "--" + name.replace("_", "-")


def shown(name: str, value: Any) -> str:
    """An option and its value, as a message names them: `--no-amp False` would say the opposite."""
    return f"{name if isinstance(value, bool) else flag_of(name)} {value}"


def _optional_and_type(name: str) -> tuple[bool, type]:
    hint = _TYPES[name]
    if isinstance(hint, types.UnionType):
        return True, next(t for t in typing.get_args(hint) if t is not type(None))
    return False, hint


def _range_text(metadata: Mapping[str, Any]) -> str:
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    return " and ".join(f"{word} {metadata[key]}" for key, word in words.items() if metadata[key] is not None)


def _problem_with(name: str, value: Any, shown_as: str) -> str | None:
    """What is wrong with one value, or None. `shown_as` is the flag or the quoted JSON key."""
    optional, kind = _optional_and_type(name)
    metadata = FIELDS[name].metadata
    if value is None:
        return None if optional else f"{shown_as} must not be null"
    right_type = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max,
        str: isinstance(value, str) and value.strip() != "" and "\0" not in value,
    }[kind]
    if not right_type:
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a non-empty text"}[
            kind
        ]
        return f"{shown_as} must be {wanted}, not {value!r}"
    if metadata["choices"] and value not in metadata["choices"]:
        return f"{shown_as} must be one of {', '.join(metadata['choices'])}, not {value!r}" + did_you_mean(
            value, metadata["choices"]
        )
    low, high, above, below = (metadata[key] for key in ("low", "high", "above", "below"))
    outside = (
        (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    )
    return f"{shown_as} must be {_range_text(metadata)}, not {value}" if outside else None


def build_parser() -> Parser:
    """The command line. Values stay text, so that `options_from_flags` can report every mistake at once."""
    parser = Parser(
        prog="train_clip.py",
        description="Train a CLIP-style image classifier on a folder with one sub-folder per class.",
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for name, f in FIELDS.items():
        title = f.metadata["group"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        _, kind = _optional_and_type(name)
        help_text = f.metadata["help"]
        if kind is bool:
            group.add_argument(
                flag_of(name), dest=name, action="store_const", const=not f.default, help=help_text
            )
            continue
        if f.default is not None:
            help_text += f" (default: {f.default})"
        choices = f.metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X", str: "TEXT"}[kind]
        group.add_argument(flag_of(name), dest=name, metavar=metavar, help=help_text)
    return parser


def options_from_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """The options typed on the command line, converted and checked. Raises UserError naming every mistake."""
    parser = build_parser()
    found, unknown = parser.parse_known_args(arguments)
    problems = problems_with_unknown(unknown, [flag_of(name) for name in FIELDS])
    options: dict[str, Any] = {}
    for name, value in vars(found).items():
        _, kind = _optional_and_type(name)
        if kind in (int, float):
            with contextlib.suppress(
                ValueError
            ):  # else it stays text, and _problem_with says what was wanted
                value = kind(value)
        problem = _problem_with(name, value, flag_of(name))
        if problem:
            problems.append(problem)
        options[name] = value
    if problems:
        raise UserError(*problems)
    return options


def resolve_auto(typed: Mapping[str, Any], again: bool = False) -> dict[str, Any]:
    """The typed options, where `--resume-from auto` is the checkpoint in the output folder, or nothing where
    there is none. Cross-validations and comparisons continue without it.

    again: torchrun starts the run anew. It goes on with what is in its output folder, whatever was typed.
    """
    resolved = dict(typed)
    saved = saved_in(Path(typed.get("output_dir") or ""))
    if again:
        resolved.pop("overwrite", None)
        resolved["resume_from"] = "auto" if saved else typed.get("resume_from", "auto")
    if resolved.get("resume_from") == "auto" and not resolved.get("overwrite"):  # else both are refused
        del resolved["resume_from"]
        if saved and not (typed.get("use_cv") or typed.get("multi_config")):
            resolved["resume_from"] = str(saved)
    return resolved


def check_options(options: Mapping[str, Any], where: str) -> list[str]:
    """Problems of a mapping of options read from JSON, each prefixed with `where`."""
    problems = []
    unknown = [name for name in options if name not in FIELDS]
    for name in unknown[:MOST_UNKNOWN]:  # to look for the nearest name takes its time
        problems.append(f"{where}unknown key {name!r}{did_you_mean(name, FIELDS)}")
    if len(unknown) > MOST_UNKNOWN:
        problems.append(f"{where}{len(unknown) - MOST_UNKNOWN} more keys are unknown")
    for name, value in options.items():
        if name in FIELDS:
            problem = _problem_with(name, value, repr(name))
            if problem:
                problems.append(where + problem)
    return problems


def contradictions(config: Config) -> list[str]:
    """Pairs of options that cannot both be meant."""
    problems = []
    for name in ("data_dir", "output_dir"):
        if getattr(config, name) is None:
            problems.append(f"{flag_of(name)} is required")
    for name in ("data_dir", "val_dir"):
        folder = getattr(config, name)
        for written, what in (("output_dir", "results"), ("cache_dir", "the cache")):
            target = getattr(config, written)
            if folder and target and Path(target).resolve().is_relative_to(Path(folder).resolve()):
                problems.append(
                    f"{flag_of(written)} {target} lies in {flag_of(name)}, where it would be taken for a "
                    f"class; give {what} a folder elsewhere"
                )
    exclusive = [
        ("resume_from", "overwrite", "one continues the old results, the other throws them away"),
        ("group_pattern", "groups_file", "both say which patient an image is of"),
        ("val_dir", "use_cv", "cross-validation makes its own validation sets"),
        (
            "resume_from",
            "use_cv",
            "a cross-validation continues by itself when the same command is given again",
        ),
        ("overwrite", "fold", "jobs of other folds may be writing there; clear the folder by hand"),
        ("resume_from", "multi_config", "finished entries are skipped when the same command is given again"),
    ]
    for first, second, why in exclusive:
        if second in ("use_cv", "multi_config") and config.resume_from == "auto":
            continue  # it changes nothing there
        if getattr(config, first) and getattr(config, second):
            problems.append(f"{flag_of(first)} and {flag_of(second)} exclude each other: {why}")
    if config.multi_config and not config.config_file:
        problems.append("--multi-config needs --config-file FILE.json")
    if config.config_file and not config.multi_config:
        problems.append("--config-file is only read with --multi-config; add it, or leave the file out")
    if config.config_index is not None and not config.multi_config:
        problems.append("--config-index needs --multi-config")
    if config.multi_config or config.resume_from:
        return problems  # what follows is checked again when the file's or the checkpoint's options are known
    if config.fold is not None and not config.use_cv:
        problems.append("--fold needs --use-cv")
    elif config.fold is not None and config.fold > config.n_splits:
        problems.append(f"--fold {config.fold} must be between 1 and --n-splits {config.n_splits}")
    if config.logit_adjustment and config.loss == "clip":
        problems.append(
            f"{named('logit_adjustment', config)} has no meaning with --loss clip, which scores an image "
            "over the batch, not over the classes; use --loss unicl or ce"
        )
    if config.logit_adjustment_tau != 1 and not config.logit_adjustment:
        problems.append(
            f"--logit-adjustment-tau {config.logit_adjustment_tau:g} has no effect without "
            "--logit-adjustment; leave it out, or add that"
        )
    if config.cutmix_prob and config.micro_batch_size == 1:
        problems.append(
            f"{named('cutmix_prob', config)} pairs images within a micro batch; give --micro-batch-size 2 or "
            "more, or --cutmix-prob 0"
        )
    if config.compile and config.micro_batch_size:
        problems.append(
            "--compile and --micro-batch-size do not go together: micro batches compute each image twice, "
            "and compiled the two results may differ; leave one out"
        )
    if config.warmup_epochs is not None and config.warmup_epochs >= config.epochs:
        problems.append(
            f"--warmup-epochs {config.warmup_epochs:g} must be less than --epochs {config.epochs}"
        )
    return problems


def named(name: str, config: Config) -> str:
    """An option as it is typed, with the preset it comes from, where it comes from one."""
    by_it = PRESETS.get(config.preset, {}).get(name)
    return flag_of(name) + (f" of --preset {config.preset}" if by_it == getattr(config, name) else "")


def of_preset(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the preset in `options` sets, where they name one; they themselves win over it."""
    return PRESETS.get(options.get("preset"), {})


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Options over others: a later layer wins over an earlier one, its preset included."""
    merged = {}
    for layer in layers:
        merged |= {**of_preset(layer), **layer}
    return merged


def make_config(options: Mapping[str, Any]) -> Config:
    """Build a configuration. Raises UserError naming every unknown key, wrong value and contradiction."""
    problems = check_options(options, "")
    if not problems:
        config = Config(**layered(options))
        problems = contradictions(config) + problems_of_cache_dir(config.cache_dir)
    if problems:
        raise UserError(*problems)
    return config


def refuse_without_effect(typed: Mapping[str, Any], config: Config) -> None:
    """Raises UserError for typed options that change nothing: whoever typed them meant something. Of two that
    the guide gives beside what they need, as its JSON does too, it is only said.
    """
    if config.multi_config or config.resume_from:
        return  # they may be meant for an entry, or for what the checkpoint says
    cases = [
        ("val_ratio", not config.use_cv, "with --use-cv, whose folds are of equal size"),
        ("val_ratio", not config.val_dir, "with --val-dir"),
        ("cache_dir", config.use_cache, "with --no-cache"),
        ("logit_adjustment_tau", config.logit_adjustment, "without --logit-adjustment"),
    ]
    problems = [
        f"{flag_of(name)} has no effect {why}; leave it out"
        for name, meant, why in cases
        if name in typed and not meant
    ]
    if problems:
        raise UserError(*problems)
    if "n_splits" in typed and not config.use_cv:
        print("note: --n-splits has no effect without --use-cv: this trains one model on one split")
    if "early_stopping_min_delta" in typed and config.early_stopping_patience is None:
        print("note: --early-stopping-min-delta has no effect without --early-stopping-patience")


def read_config_file(path: Path) -> list[dict[str, Any]]:
    """The entries of a --config-file, every entry checked before any is used. A "name" is kept beside the
    options.
    """
    entries = read_json(path, "--config-file", MOST_WRITTEN_BY_HAND)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--config-file {path} must hold a JSON array with at least one configuration")
    if len(entries) > MOST_ENTRIES:
        raise UserError(f"--config-file {path} holds {len(entries)} configurations, more than {MOST_ENTRIES}")
    problems = []
    for number, entry in enumerate(entries, 1):
        where = f"--config-file {path}, entry {number}: "
        if not isinstance(entry, dict):
            problems.append(where + "must be a JSON object")
            continue
        options = dict(entry)
        name = options.pop("name", "unnamed")
        if not isinstance(name, str) or not name.strip():
            problems.append(f"{where}'name' must be a non-empty text, not {name!r}")
        problems += check_options(options, where)
    if problems:
        raise UserError(*problems)
    return entries
