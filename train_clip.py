#!/usr/bin/env python3
"""Train a CLIP-style image classifier on a folder of class folders. `python train_clip.py --help`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from training.config import Config, make_config, options_from_flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, validate, run. Returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    config: Config | None = None
    try:
        typed = options_from_flags(sys.argv[1:] if arguments is None else arguments)
        config = make_config(typed)
        from training.run import run  # the heavy libraries, only now that the options are known to be good

        return run(config, typed)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted{_how_to_continue(config)}", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        from training.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        batch, size = (config.batch_size, config.img_size) if config else ("", "")
        print(
            f"error: out of memory; lower --batch-size (now {batch}) or --img-size (now {size}), "
            "take a smaller encoder, or freeze one (--freeze-text-encoder, --freeze-image-encoder)",
            file=sys.stderr,
        )
        return 1


def _how_to_continue(config: Config | None) -> str:
    if config is None or config.output_dir is None:
        return ""
    if config.use_cv or config.multi_config:
        return "; what is finished is saved, and the same command again continues"
    latest = Path(config.output_dir) / "checkpoint_latest.pth"
    if not latest.exists():
        return "; no epoch was finished, so there is nothing to resume from"
    return f"; finished epochs are saved. To continue, add: --resume-from {latest}"


if __name__ == "__main__":
    sys.exit(main())
