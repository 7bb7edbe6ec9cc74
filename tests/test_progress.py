"""How far a program is: a bar on a terminal, lines in a log."""

import io
import sys

from common.progress import progress


def stderr_of(monkeypatch, is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def clock(seconds):
    return f"{seconds // 60:02d}:{seconds % 60:02d}"


def test_a_log_gets_a_line_a_minute_and_says_what_is_left(monkeypatch):
    log, now = stderr_of(monkeypatch, False), [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for _ in progress(range(40), "epoch 5", unit="batch"):
        now[0] += 14
    lines = [
        f"epoch 5: {n} of 40, {clock(14 * n)} gone, {clock(14 * (40 - n))} left\n" for n in range(5, 41, 5)
    ]
    assert log.getvalue() == "".join(lines)


def test_a_log_gets_its_line_also_where_things_become_slow(monkeypatch):
    log, now = stderr_of(monkeypatch, False), [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for i in progress(range(130), "reading images"):
        now[0] += 1 if i < 100 else 50
    assert [line.split()[2] for line in log.getvalue().splitlines()] == ["60", *map(str, range(101, 131, 2))]


def test_what_ends_within_a_minute_leaves_a_log_alone(monkeypatch):
    log = stderr_of(monkeypatch, False)
    with progress(total=3, desc="reading images", unit="img") as bar:
        bar.update(3)
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar_that_goes(monkeypatch):
    terminal = stderr_of(monkeypatch, True)
    list(progress(range(3), "drawing"))
    assert "drawing:   0%" in terminal.getvalue() and terminal.getvalue().endswith("\r")
