#!/usr/bin/env python3
"""Train a CLIP-style image classifier on a folder of class folders. `python train_clip.py --help`."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.cli import as_program, say
from common.errors import RunFailed, UserError
from common.files import LATEST
from common.stopping import exit_code
from training.config import Config, make_config, options_from_flags, refuse_without_effect, resolve_auto


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, validate, run. Returns the exit code: 0 done, 1 failed, 2 bad input, 130 or 143 stopped by
    Ctrl-C or SIGTERM.
    """
    with as_program():
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> int:
    started, config = time.time(), None
    try:
        typed = resolve_auto(options_from_flags(arguments))
        config = make_config(typed)
        refuse_without_effect(typed, config)
    except UserError as error:
        # torchrun gives all processes of a machine the same options
        return say(error, silent=os.environ.get("LOCAL_RANK", "0") != "0")

    # the heavy libraries, only now that the options are known to be good
    from common.distributed import is_main, joined, lost_another, who_says
    from training.device import explain_failure
    from training.run import run

    try:
        with joined(on_gpu=config.gpu_id >= 0):
            return run(config, typed)
    except UserError as error:
        who = who_says(str(error))
        return say(error, who or "", silent=who is None)
    except KeyboardInterrupt as stop:
        if is_main():
            print(f"\ninterrupted; {_how_to_continue(config, started)}", file=sys.stderr)
        return exit_code(stop)
    except (RuntimeError, MemoryError, OSError) as error:
        if lost_another(error):
            if is_main():
                print(
                    f"error: another process of this run has ended; {_how_to_continue(config, started)}",
                    file=sys.stderr,
                )
            return 1
        explanation = explain_failure(error, config)
        if explanation is None:
            raise
        how = f"{explanation}; {_how_to_continue(config, started)}"
        return say(RunFailed(how), who_says(how) or "")


def _how_to_continue(config: Config | None, started: float) -> str:
    if config is None or config.output_dir is None:
        return "nothing was written"
    if not Path(config.output_dir).exists():
        return f"--output-dir {config.output_dir} is not there (any more)"
    once_more = " without --overwrite" if config.overwrite else ""
    if config.use_cv or config.multi_config:
        return f"what is finished is saved, and the same command{once_more} continues"
    latest = Path(config.output_dir) / LATEST
    if latest.exists() and (config.resume_from or latest.stat().st_mtime >= started):
        return f"what was trained is saved; to go on, the same command{once_more}, and --resume-from {latest}"
    return "nothing was trained, so there is nothing to resume from"


if __name__ == "__main__":
    sys.exit(main())
