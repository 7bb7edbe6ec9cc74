"""The one exception that means "the user can mend this"."""

import difflib
import errno
import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class UserError(Exception):
    """Bad input. Carries one or more messages, each saying what is wrong, where, and how to mend it.

    The command line prints them all and exits with code 2 (1 for RunFailed).
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


def all_of(*checks: Callable[[], Any]) -> list[Any]:
    """What each of `checks` gives. All are made: raises UserError with the problems of every one, of the kind
    that one of them has, such as InUse.
    """
    given, errors = [], []
    for check in checks:
        try:
            given.append(check())
        except UserError as error:
            errors.append(error)
    if errors:
        kind = next((type(error) for error in errors if type(error) is not UserError), UserError)
        raise kind(*(problem for error in errors for problem in error.problems))
    return given


class RunFailed(UserError):
    """The run could not go on though its input was accepted. Exit code 1."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PIPE_CLOSED = "the program that this one's output went to has ended (as head does after some lines)"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return " (did you mean 'x' or 'y'?)" with the nearest valid names, or "" when none is near."""
    by_lower = {v.lower(): v for v in valid}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    ratios = [difflib.SequenceMatcher(None, n, name.lower()).ratio() for n in near]
    meant = [by_lower[n] for n, ratio in zip(near, ratios, strict=True) if ratio > ratios[0] - 0.2]
    return f" (did you mean {' or '.join(map(repr, meant))}?)" if meant else ""


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).splitlines()
    return cut(lines[0], limit) if lines else type(error).__name__


def why_not_loaded(error: BaseException) -> str:
    """`first_line`, but in other words for a file without its end, and for what torch.load refuses to run,
    where PyTorch's advice is to run it.
    """
    if isinstance(error, zipfile.BadZipFile):
        return "it was cut short, or is not of the form that torch.save writes"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values; nothing of it was run"
    return first_line(error)


def last_line(error: BaseException, limit: int = 200) -> str:
    """The last line of an error's message: what happened, where a traceback leads up to it."""
    lines = str(error).splitlines()
    return cut(lines[-1], limit) if lines else type(error).__name__


def number(count: int, one: str, many: str) -> str:
    """number(2, "class is", "classes are") -> "2 classes are"."""
    return f"{count} {one if count == 1 else many}"


def one_line(text: str) -> str:
    """A name may hold ends of lines, and what follows one would stand there as the program's own words."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def listed(names: Iterable[str]) -> str:
    """The names on one line."""
    return ", ".join(map(one_line, names))


def shorten(items: Sequence[str], limit: int = 10) -> str:
    """Join at most `limit` items, one per line, and say how many are left out."""
    lines = ["  " + one_line(item) for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join(lines)
