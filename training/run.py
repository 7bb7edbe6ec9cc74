"""One run from options to results: check, build, read, split, train, sum up."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common.device import choose_hardware
from common.distributed import first_here_first, is_main, n_processes, wait_for_all
from common.errors import UserError, all_of
from common.files import PREVIOUS, check_writable
from data.findings import print_findings
from evaluation.results import headline, write_results
from training.begin import refuse_for_processes, say_what_options_do
from training.build import (
    build_model,
    n_parameters,
    refuse_unfit,
    tokenise,
)
from training.config import Config
from training.cross_validation import train_folds
from training.dataset import (
    findings_of,
    patients_of,
    read_images,
    record_of,
    scan,
    sentences_of,
    split_of,
)
from training.one_split import RunResult, refuse_few_images, train_on_split
from training.options import refuse_missing
from training.outputs import (
    LOCK,
    locked,
    prepare_output_folder,
    print_files,
    print_use,
    refuse_full_disk,
    refuse_results,
    resumes_in,
    run_record,
)
from training.resume import (
    changed_on_resume,
    check_same_classes,
    check_same_data,
    config_of_resumed_run,
    read_to_resume,
)


def run(config: Config, typed: Mapping[str, Any]) -> int:
    """Dispatch to the kind of run that is asked for. `typed`: the options given on the command line.

    Returns the exit code.
    """
    if n_processes() > 1 and config.multi_config and config.overwrite:
        raise UserError(
            "--overwrite with --multi-config and torchrun: should torchrun start it anew, finished entries "
            "could not be told from older ones; remove the folder instead"
        )
    if config.sync_batchnorm and n_processes() == 1:
        print("note: with one process --sync-batchnorm changes nothing")
    if config.multi_config:
        from training.multi_config import train_entries

        return train_entries(config, typed)
    train(config, typed)
    return 0


def train(config: Config, typed: Mapping[str, Any], class_texts: Mapping[str, Any] | None = None) -> None:
    """Train one configuration, on one split or on the folds of a cross-validation.

    `class_texts`: class name -> sentence or list of sentences, for callers from Python.
    """
    if config.use_cv:
        train_folds(config, class_texts)
    else:
        train_single(config, typed, class_texts)


def train_single(
    config: Config, typed: Mapping[str, Any], class_texts: Mapping[str, Any] | None = None
) -> RunResult:
    """Train one model on one split. Everything that can be refused is refused before the images are read."""
    checkpoint = None
    missing = partial(refuse_missing, config, weights=not config.resume_from)
    if config.resume_from:
        checkpoint, file = read_to_resume(Path(config.resume_from))
        config = dataclasses.replace(config, resume_from=str(file))
        config = config_of_resumed_run(config, checkpoint, typed)
    refuse_for_processes(config)
    say_what_options_do(config)
    output_dir = Path(config.output_dir)
    hardware = choose_hardware(config.gpu_id, config.use_amp)
    with first_here_first():  # the others find the shards fetched
        taken, unfit = partial(refuse_taken, output_dir, config), partial(refuse_unfit, config)
        folder, val_folder = scan(config, missing, taken, unfit)
    texts, patients = all_of(
        partial(sentences_of, config, folder, class_texts), partial(patients_of, config, folder, val_folder)
    )
    if checkpoint:
        check_same_classes(checkpoint, f"--resume-from {config.resume_from}", folder.classes, texts)

    print(f"device: {hardware.description}")
    model = build_model(config, hardware, checkpoint)
    refuse_full_disk(output_dir, model, config)
    sentences = tokenise(model, texts)
    with first_here_first():  # the others find the cache made
        data = read_images(config, folder, val_folder, patients, at_least=2 if val_folder is None else 1)
    split = split_of(config, data)
    refuse_few_images(config, split)
    if checkpoint:
        check_same_data(checkpoint, data, split)

    findings = findings_of(data, [split])
    print_findings(findings)

    refuse_full_disk(output_dir, model, config)  # once more: decoded images may be kept on the same disk
    wait_for_all()  # the first process changes the folder, in which the others have looked
    with locked(output_dir):
        if is_main():
            refuse_results(output_dir, config)  # another run may have used the folder while images were read
            # what was killed before its first checkpoint left nothing to go on from
            prepare_output_folder(output_dir, overwrite=not resumes_in(output_dir, config))
        records = {
            "config.json": {
                **run_record(config, data, texts, hardware, n_parameters(model)),
                "changed_on_resume": changed_on_resume(config, checkpoint),
            },
            "splits.json": record_of(config, data, [split]),
            "data_check.json": {"findings": findings},
        }
        result = train_on_split(
            config,
            hardware,
            model,
            data,
            split,
            sentences,
            output_dir,
            checkpoint,
            records,
            resumed_from=Path(config.resume_from) if config.resume_from else None,
            frozen=None,
            seed=config.random_state,
        )
        if not is_main():
            return result
        metrics = write_results(output_dir, data.predictions(split.val, result.probs), "predictions.csv")
        print(f"last epoch: {headline(metrics)}")
        # it draws: two seconds of imports that training can do without
        from evaluation.report import write_report

        (output_dir / PREVIOUS).unlink(missing_ok=True)  # it has done its work
        write_report(output_dir)  # last: where it is, the run is finished
        print_files(output_dir)
        print_use(output_dir)
    return result


def refuse_taken(output_dir: Path, config: Config) -> None:
    """Raises InUse, or as `refuse_results`: better now than after the images are read."""
    check_writable(output_dir)
    if (output_dir / LOCK).exists():
        with locked(output_dir):
            pass
    refuse_results(output_dir, config)
