"""One run from options to results: check, build, read, split, train, sum up."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common.distributed import is_main, n_processes, wait_for_all
from common.errors import UserError
from common.files import check_writable
from common.run_files import PREVIOUS
from data.findings import print_findings
from evaluation.results import headline, write_results
from training.begin import build_and_read, look
from training.build import n_parameters
from training.config import Config
from training.cross_validation import train_folds
from training.dataset import findings_of, split_of, splits_record_of
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
        refuse_in_use(Path(config.output_dir))  # before it is said how the run goes on
        checkpoint, file = read_to_resume(Path(config.resume_from))
        config = dataclasses.replace(config, resume_from=str(file))
        config = config_of_resumed_run(config, checkpoint, typed)
    output_dir = Path(config.output_dir)
    taken = partial(refuse_taken, output_dir, config)
    found = look(config, class_texts, missing, taken, checkpoint=checkpoint)
    ready = build_and_read(config, found, checkpoint)
    data, split = ready.data, split_of(config, ready.data)
    refuse_few_images(config, split)
    if checkpoint:
        check_same_data(checkpoint, data, split)

    findings = findings_of(data, [split])
    print_findings(findings)

    refuse_full_disk(output_dir, ready.model, config)  # once more: decoded images may be on the same disk
    wait_for_all()  # the first process changes the folder, in which the others have looked
    with locked(output_dir):
        if is_main():
            refuse_results(output_dir, config)  # another run may have used the folder while images were read
            # what was killed before its first checkpoint left nothing to go on from
            prepare_output_folder(output_dir, overwrite=not resumes_in(output_dir, config))
        records = {
            "config.json": {
                **run_record(config, data, found.texts, ready.hardware, n_parameters(ready.model)),
                "changed_on_resume": changed_on_resume(config, checkpoint),
            },
            "splits.json": splits_record_of(config, data, [split]),
            "data_check.json": {"findings": findings},
        }
        resumed_from = Path(config.resume_from) if config.resume_from else None
        result = train_on_split(
            config, ready, split, output_dir, checkpoint, records,
            resumed_from=resumed_from, frozen=None, seed=config.random_state,
        )  # fmt: skip
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
    refuse_in_use(output_dir)
    refuse_results(output_dir, config)


def refuse_in_use(output_dir: Path) -> None:
    check_writable(output_dir)
    if (output_dir / LOCK).exists():
        with locked(output_dir):
            pass
