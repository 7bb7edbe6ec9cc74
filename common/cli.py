"""What the command-line programs share: mistakes said all at once, and one meaning of each exit code."""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

from common.errors import DISK_FULL, PIPE_CLOSED, RunFailed, UserError, did_you_mean
from common.files import printable
from common.stopping import exit_code, sigterm_stops

MOST_PROBLEMS = 50
# Of the programs that use trained models: the least and the greatest.
NUMBERS = {"--batch-size": (1, 65536), "--num-workers": (0, 256), "--gpu-id": (-1, 1023)}


class Parser(argparse.ArgumentParser):
    """Mistakes in flags become a UserError and so read like all others."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> None:
        raise UserError(f"{message}; --help explains the options")

    def read(self, arguments: Sequence[str], required: Sequence[str]) -> argparse.Namespace:
        """The typed options. Raises UserError naming every unknown flag and every one of `required` (names of
        flags whose default is None) that is missing.
        """
        found, problems = self.examine(arguments, required)
        if problems:
            raise UserError(*problems)
        return found

    def examine(
        self,
        arguments: Sequence[str],
        required: Sequence[str],
        numbers: Mapping[str, tuple[int, int]] | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        """As `read`, but the mistakes are returned, so that a program can add its own. numbers: flags whose
        text is a whole number between two, into which it is converted (into None where it is none). Raises
        UserError where an option lacks its value.
        """
        found, unknown = self.parse_known_args(arguments)
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        problems = problems_with_unknown(unknown, flags)
        problems += _blank_values(arguments)
        problems += [f"{flag} is required" for flag in required if getattr(found, _dest(flag)) is None]
        for flag, (low, high) in (numbers or {}).items():
            text = getattr(found, _dest(flag))
            value = int(text) if re.fullmatch(r"-?\d{1,9}", text) else None
            if value is None or not low <= value <= high:
                problems.append(f"{flag} must be a whole number, {low} to {high}, not {text!r}")
            setattr(found, _dest(flag), value)
        return found, problems


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _blank_values(arguments: Sequence[str]) -> list[str]:
    """A sentence for each value that holds nothing, such as that of "$UNSET": as a path it would be "."."""
    problems, flag = [], ""
    for word in arguments:
        given, value = "=", word
        if word.startswith("--"):
            flag, given, value = word.partition("=")
        if flag and given and not value.strip():
            problems.append(f"{flag} must be a non-empty text, not {value!r}")
    return problems


def problems_with_unknown(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A sentence for each word of a command line that no option took; the word after an unknown option counts
    as its value.
    """
    problems, may_be_value = [], False
    for word in words:
        is_option = re.match(r"-(?![\d.])", word) is not None  # not -1
        if is_option:
            near = did_you_mean(word.split("=")[0], flags)
            problems.append(f"unknown option {word}{near}; --help explains the options")
        elif not may_be_value:
            problems.append(f"unexpected argument {word!r}; quote values that contain spaces")
        may_be_value = is_option and "=" not in word
    return problems


class _Shown:
    """A stream that writes control characters as codes: no class name moves the cursor or changes colours.
    Ends of lines in a name stay. Progress bars begin and end what they write with a carriage return.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        with contextlib.suppress(AttributeError):  # a stream put in stdout's place need not have it
            stream.reconfigure(errors="replace")  # letters that the terminal or the pipe lacks become "?"

    def write(self, text: str) -> int:
        bare = text.strip("\r")
        return self._stream.write(text.replace(bare, printable(bare).replace("\r", "\\r")) if bare else text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def as_program() -> Iterator[None]:
    """In the block any name can be printed, and SIGTERM and SIGHUP stop as Ctrl-C does."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Shown, before)
    try:
        with sigterm_stops():
            yield
    finally:
        sys.stdout, sys.stderr = before


def exit_code_of(program: Callable[[], int], interrupted: str) -> int:
    """Run `program`; say what went wrong on stderr. 1: it could not be done, 2: bad input, 129, 130
    or 143: stopped by SIGHUP, Ctrl-C or SIGTERM.
    """
    with as_program():
        try:
            return program()
        except UserError as error:
            return say(error)
        except ModuleNotFoundError as error:
            return say(RunFailed(not_installed(error)))
        except KeyboardInterrupt as stop:
            print(f"\ninterrupted; {interrupted}", file=sys.stderr)
            return exit_code(stop)
        except (MemoryError, OSError) as error:
            return say(RunFailed(_in_words(error)))


def _in_words(error: MemoryError | OSError) -> str:
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f"the disk of {error.filename}" if error.filename else "a disk that it writes to"
        return f"no space left on {where} ({error.strerror}); make room there, or write elsewhere"
    return str(error)


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Imports at the head of a program, in the block: where a package is missing, the program says so and
    ends. A program that runs already and takes something from this one says it itself.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(sys.stderr, _Shown):
            raise
        sys.exit(say(RunFailed(not_installed(error))))


def not_installed(error: ModuleNotFoundError) -> str:
    return (
        f"the Python at {sys.executable} has no package {error.name!r}; run this with .venv/bin/python, or "
        f"install the packages: {sys.executable} -m pip install -r requirements.txt"
    )


def say(error: UserError, who: str = "", silent: bool = False) -> int:
    """Print its problems, each with `who` before it. Returns the exit code that it stands for."""
    problems = list(error.problems[:MOST_PROBLEMS])
    if len(error.problems) > MOST_PROBLEMS:
        problems.append(f"and {len(error.problems) - MOST_PROBLEMS} more like these")
    for problem in () if silent else problems:
        print(f"error: {who}{problem}", file=sys.stderr)
    return 1 if isinstance(error, RunFailed) else 2
