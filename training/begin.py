"""What every run does first: look at options and folders, then build the model and read the images."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.device import Hardware, choose_hardware
from common.distributed import first_here_first, n_processes
from common.errors import UserError, all_of
from data.scan import ImageFolder
from models.clip import ClassSentences, CLIPModel
from training.build import build_model, refuse_unfit, tokenise
from training.config import PRESETS, Config, as_typed, named
from training.dataset import DataSet, check_patients, patients_of, read_images, scan, sentences_of
from training.outputs import refuse_full_disk
from training.resume import check_same_classes, check_same_sentences


@dataclass(frozen=True)
class Found:
    """What is known before the images are read."""

    hardware: Hardware
    folder: ImageFolder
    val_folder: ImageFolder | None
    texts: Mapping[str, list[str]]
    patients: list[str] | None


@dataclass(frozen=True)
class Ready:
    """What is trained, on what, where."""

    hardware: Hardware
    model: CLIPModel
    sentences: ClassSentences
    data: DataSet


def look(
    config: Config,
    class_texts: Mapping[str, Any] | None,
    *checks: Callable[[], object],
    checkpoint: Mapping[str, Any] | None = None,
) -> Found:
    """Raises UserError for all that can be refused before the images are read, by `checks` too. checkpoint:
    the one to go on from.
    """
    refuse_for_processes(config)
    say_what_options_do(config)
    hardware = choose_hardware(config.gpu_id, config.use_amp)
    with first_here_first():  # the others find the shards fetched
        folder, val_folder = scan(config, *checks, partial(refuse_unfit, config))
    where = f"--resume-from {config.resume_from}"
    if checkpoint:  # first: its sentences would not fit other classes either
        check_same_classes(checkpoint, where, folder.classes)
    texts, patients = all_of(
        partial(sentences_of, config, folder, class_texts), partial(patients_of, config, folder, val_folder)
    )
    check_patients(config, folder, patients)
    if checkpoint:
        check_same_sentences(checkpoint, where, texts)
    return Found(hardware, folder, val_folder, texts, patients)


def say_what_holds_threads_up(config: Config) -> None:
    """Of a CPU whose cores this run means to use all: its threads wait for the slowest at every operation."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0, os.cpu_count() or 1
    # a job that may use some cores only does not know how busy those are
    has_all = not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) == cores
    if config.fold:
        print(
            "note: jobs of several folds on one machine's CPU hold each other up; give each its share of the "
            "cores, such as OMP_NUM_THREADS=1"
        )
    elif has_all and load > cores:
        print(
            f"note: this machine was busy in the last minute (load {load:.1f} on {cores} cores); if other "
            "programs go on so, training is faster with fewer threads, such as OMP_NUM_THREADS=1"
        )


def build_and_read(config: Config, found: Found, checkpoint: Mapping[str, Any] | None = None) -> Ready:
    """The model, which `checkpoint` will fill where given, and the images."""
    hardware = found.hardware
    print(f"device: {hardware.description}")
    if hardware.device.type == "cpu" and torch.get_num_threads() > 1:
        say_what_holds_threads_up(config)
    model = build_model(config, hardware, checkpoint)
    sentences = tokenise(model, found.texts)
    if model.text_tower not in model.frozen:
        model.text_tower.train_only(sentences.tokens)
    # only now: what is not trained has no state of an optimizer
    refuse_full_disk(Path(config.output_dir), model, config)
    at_least = 2 if found.val_folder is None else 1
    with first_here_first():  # the others find the cache made
        data = read_images(config, found.folder, found.val_folder, found.patients, at_least)
    return Ready(hardware, model, sentences, data)


def refuse_for_processes(config: Config) -> None:
    """Raises UserError for options that so many processes cannot train with."""
    n = n_processes()
    problems = []
    if config.batch_size < n:
        problems.append(
            f"--batch-size {config.batch_size} is for all {n} processes together, and each needs an image; "
            "raise it, or start fewer processes"
        )
    elif config.cutmix_prob and config.batch_size < 2 * n:
        problems.append(
            f"{named('cutmix_prob', config)} pairs images within a process, and --batch-size "
            f"{config.batch_size} leaves some of the {n} with one image; raise it, or start fewer processes"
        )
    if config.compile and n > 1:
        problems.append(
            "--compile was never tried with several processes, of which each would compile; leave it out, or "
            "start one process"
        )
    if problems:
        raise UserError(*problems)


def say_what_options_do(config: Config) -> None:
    """What the preset sets, and of what is set twice."""
    if config.preset:
        by_it, given = [], []
        for name, value in PRESETS[config.preset].items():
            own = getattr(config, name)
            words = as_typed(name, own)
            if name == "logit_adjustment" and own and config.logit_adjustment_tau != 1:
                words += f" (with --logit-adjustment-tau {config.logit_adjustment_tau:g})"
            (by_it if own == value else given).append(words)
        instead = f"; given instead: {', '.join(given)}" if given else ""
        print(f"preset {config.preset} sets {', '.join(by_it) or 'nothing'}{instead}")
    if config.use_weighted_sampling and config.logit_adjustment:
        print(
            "note: --use-weighted-sampling and --logit-adjustment both make up for rare classes; together "
            "they do it twice, and frequent classes may be missed for it"
        )
