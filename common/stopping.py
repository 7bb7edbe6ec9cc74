"""Signals that ask a program to end, or a training to save. Nothing is done about them outside Python's main
thread.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from types import FrameType
from typing import Generic, TypeVar

Item = TypeVar("Item")
WORKERS_GO_ON_SECONDS = 3
PATIENCE_SECONDS = 2
SAVE_SIGNAL = getattr(signal, "SIGUSR1", None)  # Windows has none
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed


class Stopped(KeyboardInterrupt):
    """SIGTERM, a closed terminal, or Ctrl-C while training, asked this process to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """What a shell shows for a program that a signal ended: 130 for Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


@contextlib.contextmanager
def sigterm_stops() -> Iterator[None]:
    """In the block SIGTERM and SIGHUP raise Stopped, as Ctrl-C KeyboardInterrupt: files are closed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    def nothing_to_save(number: int, frame: FrameType | None) -> None:
        pass  # the system would end the program

    with _handled({signal.SIGTERM: stop, HANGUP: stop, SAVE_SIGNAL: nothing_to_save}):
        yield


@contextlib.contextmanager
def _handled(handlers: dict[int | None, Callable]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number, handler in handlers.items()
        # Windows lacks some; a shell lets background jobs ignore Ctrl-C
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_after_the_parent(_: int = 0) -> None:
    """For processes that load images: Ctrl-C and a cluster's SIGTERM reach all processes of a job, and the
    parent still needs them for the step it finishes. They end with it, or some seconds after a SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if SAVE_SIGNAL:
        signal.signal(SAVE_SIGNAL, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):

        def at_the_second_time_at_once(*_: object) -> None:
            if signal.alarm(WORKERS_GO_ON_SECONDS):
                os._exit(0)

        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, at_the_second_time_at_once)
        if signal.getsignal(HANGUP) is not signal.SIG_IGN:  # of nohup
            signal.signal(HANGUP, at_the_second_time_at_once)


def _say(words: bytes) -> None:
    try:
        os.write(2, words)  # print() might be in the middle of a line
    except OSError:  # the terminal is gone, and whatever else is said to it must not end the run
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)


class Requests:
    """What is asked of a training between two steps, in its block: to save (SIGUSR1, or `save_every_seconds`
    have gone by; 0: never), or to save and end (SIGINT, SIGTERM, SIGHUP).

    Ctrl-C once more, after PATIENCE_SECONDS, is a KeyboardInterrupt at once. One stop often comes as several
    signals, from the terminal, a script and the cluster, so sooner ones and SIGTERMs change nothing.

    agree: gives of each number the largest of all processes of the run, which stop and save after the same
    step; they ask the same of their Requests in the same order. says: whether this one speaks for them.
    """

    def __init__(
        self,
        save_every_seconds: float,
        agree: Callable[[Sequence[int]], Sequence[int]] = list,
        says: bool = True,
    ):
        self.save_every_seconds, self._agree, self._says = save_every_seconds, agree, says
        self.stop: int | None = None
        self._save, self._last_save, self._stopped_at = False, time.monotonic(), 0.0
        self._block = contextlib.ExitStack()

    def __enter__(self) -> "Requests":
        stops = dict.fromkeys((signal.SIGINT, signal.SIGTERM, HANGUP), self._on_stop)
        self._block.enter_context(_handled({**stops, SAVE_SIGNAL: self._on_save}))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._block.close()
        if kind is None:
            self.end_if_asked()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop is None:
            self.stop, self._stopped_at = number, time.monotonic()
            if self._says:
                _say(b"\nstopping after this step\n")
        elif number == signal.SIGINT and time.monotonic() - self._stopped_at > PATIENCE_SECONDS:
            raise KeyboardInterrupt

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def to_save(self) -> bool:
        late = 0 < self.save_every_seconds <= time.monotonic() - self._last_save
        stop, save = self._agree([self.stop or 0, self._save or late])
        if stop:
            self.stop = stop
        return bool(stop or save)

    def saved(self) -> None:
        self._save, self._last_save = False, time.monotonic()

    def end_if_asked(self) -> None:
        """Raises Stopped after a SIGINT, SIGTERM or SIGHUP."""
        (stop,) = self._agree([self.stop or 0])
        if stop:
            raise Stopped(stop)


class Stoppable(Generic[Item]):
    """`items`, where each may be the last: raises Stopped before the next when `requests` ask to end."""

    def __init__(self, items: Collection[Item], requests: Requests):
        self.items, self.requests = items, requests

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        for item in self.items:
            self.requests.end_if_asked()
            yield item
