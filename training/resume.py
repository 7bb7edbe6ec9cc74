"""A run that goes on from a checkpoint: what may have changed since, and what must not."""

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, did_you_mean, listed
from common.files import whole_file
from common.run_files import BEST, LATEST, PREVIOUS, saved_in
from data.shards import may_run_a_command
from data.splits import Split
from evaluation.checkpoints import DAMAGED, NOT_FOR_USE, read_checkpoint, used_up
from training.config import FIELDS, Config, as_typed, flag_of, shown, value_of
from training.dataset import DataSet, split_fingerprint
from training.options import check_options, contradictions

_NOT_FROM_CHECKPOINT = ("resume_from", "overwrite", "compile")
# Of what may change: not how the model is trained.
_NO_TRAINING = ("skip_unreadable", "gradient_checkpointing", "save_best")


def read_to_resume(path: Path, option: str = "--resume-from") -> tuple[dict[str, Any], Path]:
    """The checkpoint to go on from and its file: `path`, or the latest in that folder; or where it is damaged
    or gone, the one before it.

    Raises UserError when neither can be used.
    """
    path = saved_in(path) or path
    if path.is_dir():
        raise UserError(
            f"{option} {path} is a folder without a {LATEST}; give a run's folder or that file in it. A "
            "cross-validation, or several configurations, go on when their own command is given again"
        )
    if not path.exists() and (meant := did_you_mean(str(path), ["auto"])):
        raise UserError(f"{option} {path} does not exist{meant}")
    previous = path.with_name(PREVIOUS)
    can_fall_back = path.name == LATEST and previous.exists()
    anew = "give another one, or start anew in another folder or with --overwrite"
    best = path.with_name(BEST)
    if path != best and best.is_file():
        anew += f"; {best} beside it is a model for use, from which training cannot go on"
    try:
        checkpoint = read_checkpoint(path, option, "" if can_fall_back else anew)
    except UserError as error:
        if not can_fall_back:
            raise
        try:
            checkpoint = read_checkpoint(previous, option, anew)
        except UserError as second:
            raise UserError(*error.problems, *second.problems) from None
        print(f"warning: {error}; going on from the one before it, {previous}")
        path = previous
    missing = [key for key in ("best", *NOT_FOR_USE) if key not in checkpoint]
    if missing:
        raise UserError(
            f"{option} {path} holds a model for use, without {', '.join(missing)}, so training cannot go on "
            f"from it; give {LATEST}"
        )
    return checkpoint, path


def config_of_resumed_run(config: Config, checkpoint: Mapping[str, Any], typed: Mapping[str, Any]) -> Config:
    """The checkpoint's options, overridden by typed ones.

    Raises UserError when a typed one cannot change in mid-run.
    """
    problems, changed = [], []
    if checkpoint["config"]["use_cv"]:
        raise UserError(
            f"--resume-from {config.resume_from} is of a fold; a cross-validation continues by itself when "
            "its own command is given again"
        )
    if "val_dir" not in typed and may_run_a_command(checkpoint["config"].get("val_dir")):
        problems.append(
            f"--resume-from {config.resume_from} names what may be a command to run, or an address, as its "
            f"--val-dir ({checkpoint['config']['val_dir']}); type the option again to allow it"
        )
    begun = checkpoint["epoch"] + (checkpoint["in_epoch"]["steps"] > 0)
    if typed.get("epochs", math.inf) < begun:
        problems.append(
            f"--epochs {typed['epochs']}: --resume-from {config.resume_from} has {begun} epochs behind it"
        )
    options = _options_of(checkpoint)
    for name, value in typed.items():
        # of --n-splits it is said that a run without folds takes no notice
        if name in (*_NOT_FROM_CHECKPOINT, "n_splits") or value == options[name]:
            continue
        if FIELDS[name].metadata["on_resume"] == "fixed":
            before = options[name]
            what = "it" if before is True else before
            trained = "without it" if before is None or before is False else f"with {what}"
            problems.append(
                f"{as_typed(name, value)} does not fit --resume-from {config.resume_from}, "
                f"which was trained {trained}; leave the option out, or start a new run"
            )
        if name in ("batch_size", "use_weighted_sampling") and (steps := checkpoint["in_epoch"]["steps"]):
            problems.append(
                f"{flag_of(name)} may change between two epochs only, and {config.resume_from} was saved "
                f"after {steps} of {checkpoint['in_epoch']['steps_per_epoch']} steps of epoch "
                f"{checkpoint['epoch'] + 1}; finish that epoch without the change"
            )
        if FIELDS[name].metadata["on_resume"] == "said":
            changed.append(f"{shown(name, options[name])} -> {value_of(name, value)}")
    if problems:
        raise UserError(*problems)
    if checkpoint["config"].get("compile") and not typed.get("compile"):
        print("note: the run was begun with --compile and goes on without it; add it to compile again")
    kept = {name: getattr(config, name) for name in _NOT_FROM_CHECKPOINT}
    merged = {**options, **typed, **kept}
    if typed.get("cache_dir"):
        merged["use_cache"] = True
    problems = check_options(options, f"--resume-from {config.resume_from}: ")
    problems = problems or contradictions(dataclasses.replace(Config(**merged), resume_from=None))
    problems = problems or _without_effect_at_its_end(Config(**merged), checkpoint, typed)
    if problems:
        raise UserError(*problems)
    if changed:
        print("resuming with changed options: " + ", ".join(changed))
    return Config(**merged)


def _options_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A run of an earlier version lacks options that have come since."""
    return {name: checkpoint["config"].get(name, f.default) for name, f in FIELDS.items()}


def _without_effect_at_its_end(
    config: Config, checkpoint: Mapping[str, Any], typed: Mapping[str, Any]
) -> list[str]:
    """A sentence where nothing is left to train and typed options would say that it was trained with them."""
    options, without = _options_of(checkpoint), checkpoint["early_stopping"].get("epochs_without", 0)
    if checkpoint["in_epoch"]["steps"]:
        return []

    def needed(epochs: int, patience: int | None) -> list[str]:
        return [
            *(["more --epochs"] if epochs <= checkpoint["epoch"] else []),
            *(["a larger --early-stopping-patience"] if used_up(patience, without) else []),
        ]

    more = needed(config.epochs, config.early_stopping_patience)
    if not more:
        return []
    may_end_it = ("epochs", "early_stopping_patience")
    if needed(*(options[name] for name in may_end_it)):  # it was at its end before
        may_end_it = ()
    idle = [
        as_typed(name, value)
        for name, value in typed.items()
        if value != options[name]
        and FIELDS[name].metadata["on_resume"] == "said"
        and name not in (*_NO_TRAINING, *may_end_it)
    ]
    if not idle:
        return []
    return [
        f"--resume-from {config.resume_from} is trained to its end, so {', '.join(idle)} would change "
        f"nothing but what its results say of it; leave {'it' if len(idle) == 1 else 'them'} out, or give "
        f"{' and '.join(more)}"
    ]


def changed_on_resume(config: Config, checkpoint: Mapping[str, Any] | None) -> list[str]:
    """From where on which options were others, of this resuming and those before it; a line for each."""
    if checkpoint is None:
        return []
    now, steps = dataclasses.asdict(config), checkpoint["in_epoch"]["steps"]
    changes = [
        f"{as_typed(name, now[name])} (before: {value_of(name, before)})"
        for name, before in _options_of(checkpoint).items()
        if now[name] != before and FIELDS[name].metadata["on_resume"] == "said"
    ]
    where = f"step {steps} of epoch {checkpoint['epoch'] + 1}" if steps else f"epoch {checkpoint['epoch']}"
    new = [f"after {where}: {', '.join(changes)}"] if changes else []
    return [*checkpoint.get("changed_on_resume", []), *new]


def check_same_classes(checkpoint: Mapping[str, Any], where: str, classes: Sequence[str]) -> None:
    """A resumed run goes on with the classes it has learnt. `where` names the checkpoint."""
    if tuple(checkpoint["classes"]) != tuple(classes):
        raise UserError(
            f"{where} was trained on the classes {listed(checkpoint['classes'])}; --data-dir has "
            f"{listed(classes)}"
        )


def check_same_sentences(
    checkpoint: Mapping[str, Any], where: str, texts: Mapping[str, Sequence[str]]
) -> None:
    """And with their sentences; the classes are the same."""
    if checkpoint["class_texts"] != texts:
        changed = [name for name in texts if checkpoint["class_texts"][name] != texts[name]]
        raise UserError(
            f"{where} was trained with other sentences for {listed(changed)}; give it the same ones, or "
            "start a new run in another --output-dir"
        )


def check_same_data(checkpoint: Mapping[str, Any], data: DataSet, split: Split) -> None:
    """A resumed run must not validate on images it has trained on."""
    if checkpoint["dataset_fingerprint"] != data.fingerprint:
        raise UserError(
            "the images of --data-dir or --val-dir have changed since the checkpoint was written, so images "
            "already trained on could move to validation; restore them, or start a new run in another "
            "--output-dir"
        )
    if checkpoint["split_fingerprint"] != split_fingerprint(data, split):
        raise UserError(
            "the split differs from the checkpoint's; leave --val-ratio, --val-dir, --random-state, "
            "--group-pattern and --groups-file as they were. If they are, and an earlier version began the "
            "run with an image in two formats (Y92.jpg beside Y92.png; now kept on one side), start anew"
        )


def take_over(config: Config, resumed_from: Path, output_dir: Path) -> None:
    """The checkpoint that a run goes on from becomes its latest; one that goes on in another folder brings it
    and its best epoch along.
    """
    latest = output_dir / LATEST
    if resumed_from.resolve() == (output_dir / PREVIOUS).resolve():
        if latest.exists():
            os.replace(latest, output_dir / DAMAGED)
        os.replace(resumed_from, latest)
    brought = [(resumed_from, latest)]
    if config.save_best:
        brought.append((resumed_from.with_name(BEST), output_dir / BEST))
    for source, target in brought:
        if source.exists() and not target.exists():
            with whole_file(target) as new:
                shutil.copyfile(source, new)
