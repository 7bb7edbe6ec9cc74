"""How far something is that takes long: a bar on a terminal, elsewhere a line a minute."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0


class _Log:
    """tqdm's pictures of its bar, as lines of stderr."""

    def write(self, picture: str) -> None:
        if line := picture.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(things: Iterable | None = None, desc: str = "", delay: float = 0, **options: Any) -> tqdm:
    """tqdm over `things`, or to be told by update(); other `options` are tqdm's."""
    if not sys.stderr.isatty():
        options |= {
            "file": _Log(), "mininterval": SECONDS_BETWEEN_LINES, "miniters": 1,
            "bar_format": "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left",
        }  # fmt: skip
        delay = SECONDS_BETWEEN_LINES
    return tqdm(things, desc, leave=False, delay=delay, **options)
