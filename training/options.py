"""Options as given, by flags or JSON, over a preset and the defaults; and all that is wrong with them.

Nothing heavy is imported, so that `--help` answers at once.
"""

import argparse
import contextlib
import json
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import Parser, problems_with_unknown
from common.errors import UserError, did_you_mean
from common.files import MOST_WRITTEN_BY_HAND, problems_of_cache_dir, read_json
from common.run_files import saved_in
from training.config import FIELDS, Config, flag_of, named, of_preset

MOST_UNKNOWN = 20
MOST_ENTRIES = 1000
_TYPES = typing.get_type_hints(Config)


def _optional_and_type(name: str) -> tuple[bool, type]:
    hint = _TYPES[name]
    if isinstance(hint, types.UnionType):
        return True, next(t for t in typing.get_args(hint) if t is not type(None))
    return False, hint


def _range_text(metadata: Mapping[str, Any]) -> str:
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    return " and ".join(f"{word} {metadata[key]}" for key, word in words.items() if metadata[key] is not None)


def in_json(value: Any) -> str:
    """A value as a message says it: true, false and null as a JSON file has them."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


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
        return f"{shown_as} must be {wanted}, not {in_json(value)}"
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
        if not (typed.get("use_cv") or typed.get("multi_config")):
            if saved:
                resolved["resume_from"] = str(saved)
            elif (output_dir := typed.get("output_dir")) and Path(output_dir, "config.json").exists():
                print(f"note: {output_dir} holds no checkpoint to resume from")
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
        problems = contradictions(config)
    if problems:
        raise UserError(*problems)
    return config


def refuse_missing(config: Config, weights: bool) -> None:
    """Raises UserError naming each file that is to be read (`weights`: these too) and is not there, a
    --cache-dir that cannot be used, and a --val-dir that is --data-dir.
    """
    problems = problems_of_cache_dir(config.cache_dir)
    for name in ("class_texts_file", "groups_file", *(("image_weights", "text_weights") if weights else ())):
        path = getattr(config, name)
        if path not in (None, "auto", "pretrained", "none") and not os.path.exists(path):
            problems.append(f"{flag_of(name)} {path} does not exist")
    folders = (config.data_dir, config.val_dir)
    if config.val_dir and all(map(os.path.exists, folders)) and os.path.samefile(*folders):
        problems.append(
            f"--val-dir {config.val_dir} is --data-dir itself; give another folder, or leave it out, and "
            "--val-ratio of the images are set apart"
        )
    if problems:
        raise UserError(*problems)


def refuse_without_effect(typed: Mapping[str, Any], config: Config) -> None:
    """Raises UserError for typed options that change nothing: whoever typed them meant something. Of two that
    the guide gives beside what they need, as its JSON does too, it is only said.
    """
    if config.multi_config:
        return  # they may be meant for an entry
    if "n_splits" in typed and not config.use_cv:
        print("note: --n-splits has no effect without --use-cv: this trains one model on one split")
    if config.resume_from:
        return  # they may be meant for what the checkpoint says
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
            problems.append(f"{where}'name' must be a non-empty text, not {in_json(name)}")
        problems += check_options(options, where)
    if problems:
        raise UserError(*problems)
    return entries
