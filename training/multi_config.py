"""Several configurations, one after the other: a folder each, one leaderboard."""

import dataclasses
import gc
import os
import re
import traceback
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.device import gpu_meant
from common.distributed import first_here_first, is_main, n_processes, of_the_first
from common.errors import UserError, all_of
from common.files import check_writable, write_json
from common.run_files import saved_in
from data.scan import ImageFolder
from data.shards import may_run_a_command, scan_images
from training.begin import refuse_for_processes
from training.build import refuse_unfit
from training.config import Config, as_typed, of_preset
from training.dataset import check_by_names, sentences_and_notes
from training.failures import explain_failure
from training.leaderboard import FAILURE, Entry, is_finished, print_leaderboard, write_leaderboard
from training.options import in_json, layered, make_config, read_config_file, refuse_missing
from training.outputs import (
    FREE_ON_CONTINUE,
    InUse,
    continues,
    locked,
    refuse_other_images,
)
from training.run import train

_NOT_PER_ENTRY = (
    "data_dir",
    "output_dir",
    "multi_config",
    "config_file",
    "resume_from",
    "overwrite",
    "fold",
    "config_index",
)


class _Problems:
    """Of entries, by their numbers. What is wrong for several is said once."""

    def __init__(self):
        self._entries_with: dict[str, list[str]] = {}

    def add(self, number: int, *problems: str) -> None:
        for problem in problems:
            self._entries_with.setdefault(problem, []).append(str(number))

    def refuse(self, where: str = "", hints: Sequence[str] = ()) -> None:
        """Raises UserError where there is any, with `hints` after them."""
        if self._entries_with:
            said = self._entries_with.items()
            raise UserError(*(f"{where}entry {', '.join(numbers)}: {what}" for what, numbers in said), *hints)


def folder_name(number: int, config: Config, name: str | None) -> str:
    """`01_resnet50_bert-base-chinese`, or `01_NAME`: unique by its number, valid on every file system."""
    if name is None:
        text = Path(config.text_encoder_name).name or config.text_encoder_name
        name = f"{config.image_encoder_name}_{text}"
    name = re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFC", name)).strip("-. ")[:80].rstrip("-. ")
    return f"{number:02d}_{name or 'unnamed'}"


def read_entries(config: Config, typed: Mapping[str, Any]) -> list[Entry]:
    """All entries, checked together. Typed flags win over the file; the file wins over the defaults.

    Raises UserError with each mistake's entry number.
    """
    entries, problems, said = [], _Problems(), set()
    for number, own in enumerate(read_config_file(Path(config.config_file)), 1):
        options = dict(own)
        name = options.pop("name", None)
        fixed = [key for key in _NOT_PER_ENTRY if key in options]
        if fixed:
            problems.add(number, f"{', '.join(fixed)} cannot be set per entry; give it on the command line")
            continue
        if "val_dir" not in typed and may_run_a_command(options.get("val_dir")):
            why = "val_dir may be a command to run or an address; type --val-dir to allow that"
            problems.add(number, why)
            continue
        for key, value in {**of_preset(typed), **typed}.items():
            if key in options and options[key] != value and key not in said:
                said.add(key)
                of = "" if key in typed else f" by --preset {typed['preset']}"
                print(
                    f"note: {as_typed(key, value)}{of} on the command line wins over "
                    f"{in_json(options[key])} in the file"
                )
        of_this_run = {"multi_config": False, "config_file": None, "config_index": None}
        try:
            own = make_config({**layered(options, typed), **of_this_run})
            folder = Path(config.output_dir) / folder_name(number, own, name)
            entry = Entry(number, folder, dataclasses.replace(own, output_dir=str(folder)))
            to_train = config.config_index in (None, number) and (own.overwrite or not is_finished(entry))
            all_of(
                partial(refuse_for_processes, own),
                partial(refuse_missing, own, weights=to_train and (own.overwrite or not saved_in(folder))),
                partial(_refuse_pipes, own),
                *([partial(gpu_meant, own.gpu_id), partial(refuse_unfit, own)] if to_train else []),
            )
            entries.append(entry)
        except UserError as error:
            problems.add(number, *error.problems)
    problems.refuse(f"--config-file {config.config_file}, ")
    return entries


def train_entries(config: Config, typed: Mapping[str, Any]) -> int:
    """Train every entry that is not finished, or `config.config_index` alone. One that fails is reported
    and the others run.

    Returns 0, or 1 when an entry failed. The leaderboard is made from what the entries' folders hold,
    after every entry, so that entries may also run as separate jobs.
    """
    output_dir = Path(config.output_dir)
    all_of(
        partial(check_writable, output_dir),
        partial(refuse_missing, config, weights=False),
        partial(_refuse_pipes, config),
    )
    entries = read_entries(config, typed)
    if config.config_index is not None and config.config_index > len(entries):
        raise UserError(
            f"--config-index {config.config_index}: {config.config_file} has {len(entries)} entries"
        )
    chosen = [entry for entry in entries if config.config_index in (None, entry.number)]
    # every folder is looked at before the first entry starts
    with first_here_first():  # the others find the shards fetched
        images = scan_images(config.data_dir, cache_dir=config.cache_dir)
    texts = [sentences_and_notes(entry.config, images)[0] for entry in chosen]
    begun, problems = [], _Problems()
    for entry, own in zip(chosen, texts, strict=True):
        try:
            begun.append(continues(entry.folder, entry.config, own))
            if begun[-1] and is_finished(entry):
                refuse_other_images(entry.folder, entry.config, images)
        except UserError as error:
            problems.add(entry.number, *error.problems)
    alone = "--overwrite replaces all entries; with --config-index N it replaces entry N alone"
    problems.refuse(hints=[alone] if n_processes() == 1 else [])
    to_train = [entry for entry, on in zip(chosen, begun, strict=True) if not (on and is_finished(entry))]
    _refuse_by_names(to_train, images)
    failed = []
    for entry, going_on in zip(chosen, begun, strict=True):
        print(f"\n=== configuration {entry.number} of {len(entries)}: {entry.folder.name}", flush=True)
        if of_the_first(going_on and is_finished(entry)):  # which may still be writing the entry before
            print("finished already")
        elif not _train_entry(entry, going_on):
            failed.append(entry.folder.name)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if is_main():
            with locked(output_dir, wait=True):  # jobs of other entries may be ending too
                ranked = write_leaderboard(output_dir, entries)
    if is_main():
        print_leaderboard(ranked, output_dir)
    if failed:
        print(
            f"failed: {', '.join(failed)}; the same command again tries them anew and skips the finished ones"
        )
    return 1 if failed else 0


def _refuse_by_names(entries: Sequence[Entry], images: ImageFolder) -> None:
    """As `check_by_names`, of each entry."""
    problems = _Problems()
    for entry in entries:
        try:
            check_by_names(entry.config, images)
        except UserError as error:
            problems.add(entry.number, *error.problems)
    problems.refuse()


def _refuse_pipes(config: Config) -> None:
    paths = {name: getattr(config, name) for name in ("class_texts_file", "groups_file")}
    problems = [
        f"{as_typed(name, path)} is a pipe, which can be read only once, and a comparison reads it several "
        "times; save it as a file"
        for name, path in paths.items()
        if path and os.path.exists(path) and Path(path).is_fifo()
    ]
    if problems:
        raise UserError(*problems)


def _train_entry(entry: Entry, begun: bool) -> bool:
    """Train one entry, from its last checkpoint where it has one. False: it failed, and failure.json says
    why.
    """
    config, typed = entry.config, {}
    failure = entry.folder / FAILURE
    if is_main():
        failure.unlink(missing_ok=True)
    if not config.use_cv and begun:
        saved = saved_in(entry.folder)
        # killed before its first checkpoint: nothing is lost by starting anew
        change = {"resume_from": str(saved)} if saved else {"overwrite": True}
        config = dataclasses.replace(config, **change)
        # --val-dir too: an address or a command was typed, else the entry would have been refused
        mine = {"val_dir", *FREE_ON_CONTINUE} - {"resume_from", "overwrite"}
        typed = {key: getattr(config, key) for key in mine}
    if n_processes() > 1:  # of which one may have failed alone, so the others could not go on
        train(config, typed)
        return True
    try:
        train(config, typed)
    except InUse as error:  # whoever trains it will say how it ends
        print(f"configuration {entry.number} failed: {error}", flush=True)
        return False
    except UserError as error:
        message = "; ".join(error.problems)
    except Exception as error:  # an entry must not take the others with it
        message = explain_failure(error, config)
        if message is None:
            message = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    else:
        failure.unlink(missing_ok=True)  # of a second command, which was refused meanwhile
        return True
    print(f"configuration {entry.number} failed: {message}", flush=True)
    entry.folder.mkdir(parents=True, exist_ok=True)
    write_json(failure, {"error": message})
    return False
