"""What every run does first."""

from common.distributed import n_processes
from common.errors import UserError
from training.config import PRESETS, Config, as_typed, named


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
