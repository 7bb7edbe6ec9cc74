#!/usr/bin/env python3
"""Train a CLIP-style image classifier on a folder of class folders. `python train_clip.py --help`."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import as_program, not_installed, say
from common.errors import RunFailed, UserError
from common.run_files import LATEST
from common.stopping import exit_code
from training.config import Config
from training.options import make_config, options_from_flags, refuse_without_effect, resolve_auto

OF_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, validate, run. Returns the exit code: 0 done, 1 failed, 2 bad input, 129, 130 or 143
    stopped by SIGHUP, Ctrl-C or SIGTERM.
    """
    with as_program():
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> int:
    started, given, config = time.time(), {}, None
    try:
        with _processes() as again:
            given = options_from_flags(arguments)
            typed = resolve_auto(given, again)
            config = make_config(typed)
            refuse_without_effect(typed, config)
            # the heavy libraries, only now that the options are known to be good
            from training.run import run

            return run(config, typed)
    except UserError as error:
        return _say(error)
    except ModuleNotFoundError as error:
        return _say(RunFailed(f"{not_installed(error)}; {_how_to_continue(config, given, started)}"))
    except KeyboardInterrupt as stop:
        how = f"interrupted; {_how_to_continue(config, given, started)}"
        if (who := _who(how, if_nothing_else=True)) is not None:
            print(f"\n{who}{how}", file=sys.stderr)
        return exit_code(stop)
    except (RuntimeError, ValueError, MemoryError, OSError) as error:
        from common.distributed import lost_another
        from training.failures import explain_failure

        explanation = explain_failure(error, config)
        if explanation is None:
            raise
        how = _how_to_continue(config, given, started, ", any training after it is lost")
        failed = RunFailed(f"{explanation}; {how}")
        return _say(failed, if_nothing_else=lost_another(error))


@contextlib.contextmanager
def _processes() -> Iterator[bool]:
    """In the block this process is one of those that torchrun started, or alone. Gives whether they were
    started anew.
    """
    if not OF_TORCHRUN:
        yield False
        return
    from common.distributed import joined

    with joined() as again:
        yield again


def _say(error: UserError, if_nothing_else: bool = False) -> int:
    """Print it, unless another process has said the same. Returns the exit code that it stands for."""
    who = _who(str(error), if_nothing_else)
    return say(error, who or "", silent=who is None)


def _who(message: str, if_nothing_else: bool = False) -> str | None:
    """Who says it, where there are several processes. None: another has said so, or (`if_nothing_else`) has
    said why the run ends.
    """
    if not OF_TORCHRUN:
        return ""
    from common.distributed import who_says

    return who_says(message, if_nothing_else)


def _how_to_continue(config: Config | None, given: Mapping[str, Any], started: float, lost: str = "") -> str:
    if config is None or config.output_dir is None:
        return "nothing was written"
    if not Path(config.output_dir).exists():
        return f"there is no --output-dir {config.output_dir}: nothing was written yet, or it was removed"
    once_more = " without --overwrite" if config.overwrite else ""
    if config.use_cv or config.multi_config:
        return f"what is finished is saved, and the same command{once_more} continues"
    latest = Path(config.output_dir) / LATEST
    if latest.exists() and (config.resume_from or latest.stat().st_mtime >= started):
        saved = f"what was trained up to {_saved_up_to(latest)} is saved{lost}"
        if given.get("resume_from") in ("auto", str(latest), config.output_dir):
            return f"{saved}, and the same command{once_more} continues"
        more = f"--resume-from {shlex.quote(str(latest))}"
        return f"{saved}; to go on, the same command{once_more}, and {more}"
    return "nothing was saved yet, so there is nothing to resume from"


def _saved_up_to(latest: Path) -> str:
    if OF_TORCHRUN:  # the first process may write another while others fail
        return "its last checkpoint"
    try:
        torch = sys.modules["torch"]
        saved = torch.load(latest, map_location="cpu", weights_only=True, mmap=True)  # reads no tensors
        epoch, steps = saved["epoch"], saved["in_epoch"]["steps"]
        return f"step {steps} of epoch {epoch + 1}" if steps else f"the end of epoch {epoch}"
    except Exception:  # torch may not be loaded yet, or the file be damaged
        return "its last checkpoint"


if __name__ == "__main__":
    sys.exit(main())
