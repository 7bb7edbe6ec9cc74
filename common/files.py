"""Files are written whole or not at all; JSON is read strictly."""

import contextlib
import csv
import glob
import io
import json
import os
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from common.errors import DISK_FULL, UserError

# What Python makes of JSON can take twenty times as much memory.
MOST_JSON_BYTES = 64 * 2**20
MOST_WRITTEN_BY_HAND = 8 * 2**20
MOST_OF_SPLITS = 2**30  # each image is named once per fold
MOST_LINE_LETTERS = 2**20
# What moves a terminal's cursor, changes its colours or turns the writing direction; tabs and ends of lines
# do not.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# A spreadsheet takes a cell that starts with one of these for a formula; the last four are full-width.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The name of a temporary neighbour to write; after the block it is flushed to disk and renamed `path`.

    Raises OSError where the system refuses.
    """
    # jobs on several machines may share a folder, and even a process number
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in DISK_FULL and error.filename is None:  # as where data is refused to an open file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary neighbour, flush it to disk, then rename it to `path`.

    Raises OSError where the system refuses.
    """
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        write(file)


def unwritable(folder: Path) -> Path | None:
    """What keeps files from being written into `folder`, which need not exist yet: it, or the nearest of its
    parents that exists. None where nothing does.
    """
    folder = Path(os.path.realpath(folder))  # without ".."
    # os.path's: Path.exists raises where a folder above may not be looked into
    nearest = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        # root has the right where nothing can be written, as in /proc
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=nearest):
            return None
    return nearest


def why_unwritable(named: str, folder: Path) -> str | None:
    """The sentence that refuses `named`, an option with its value, where nothing can be written into
    `folder`, which need not exist yet; None where something can.
    """
    blocking = unwritable(folder)
    return f"{named} cannot be written: {blocking} is no folder that may be written" if blocking else None


def check_writable(output_dir: Path) -> None:
    """Raises UserError when the folder is a file or cannot be written to."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir} is a file; give a folder")
    if problem := why_unwritable(f"--output-dir {output_dir}", output_dir):
        raise UserError(problem)


def problems_of_cache_dir(given: str | Path | None) -> list[str]:
    """What keeps the folder that --cache-dir names from being used. One filled before may be on a read-only
    disk; where none is given, a run does without when it must.
    """
    problem = why_unwritable(f"--cache-dir {given}", Path(given)) if given else None
    if problem is None or any(glob.glob(kept, root_dir=given) for kept in ("*.npy", "shards/*")):
        return []
    return [f"{problem}; give another one, or --no-cache instead"]


def write_json(path: Path, value: Any) -> None:
    """Readable UTF-8. Sequences of other kinds than list and tuple are written as lists."""
    pieces = json.JSONEncoder(ensure_ascii=False, indent=2, allow_nan=False, default=list).iterencode(value)

    def write(file: BinaryIO) -> None:
        for piece in pieces:  # one by one: the text of a million names would be held twice
            file.write(piece.encode())
        file.write(b"\n")

    write_whole(path, write)


def writable(text: str) -> str:
    """`text` without what UTF-8 (bytes of a name in another encoding) or a CSV (NUL) cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def printable(text: str) -> str:
    """`text` for a terminal or a page, with control characters written as codes such as \\x1b."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def text_cell(text: str) -> str:
    """A name for a cell of a CSV, with an apostrophe before what a spreadsheet would take for a formula.

    `text_of_cell` gives it back.
    """
    return "'" + writable(text) if text.lstrip("'").startswith(FORMULA_STARTS) else writable(text)


def text_of_cell(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA_STARTS) else cell


def path_cell(name: str) -> str:
    """A path likewise: "./" before it, with which it is still the path."""
    return "./" + writable(name) if name.startswith(FORMULA_STARTS) else writable(name)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """UTF-8 with BOM, so that Excel shows Chinese."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode("utf-8-sig")))


def lines_of(file: TextIO, what: str) -> Iterator[str]:
    """The lines of an open file. Raises UserError naming `what` at one long enough to fill the memory."""
    number = 0
    while line := file.readline(MOST_LINE_LETTERS):
        number += 1
        if len(line) == MOST_LINE_LETTERS:
            raise UserError(f"{what}, line {number}: longer than {MOST_LINE_LETTERS} letters")
        yield line


def csv_rows(lines: Iterator[str], columns: Sequence[str], what: str) -> Iterator[tuple[int, list[str]]]:
    """The line's number and the cells of `columns`, without blanks around them, of each row of a CSV with a
    header; rows of empty cells, as spreadsheets leave them, are passed over.

    Raises UserError naming `what` where a column is not there once, a cell is empty, or the text is no CSV.
    """
    reader = csv.reader(lines, strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        for column in columns:
            if header.count(column) != 1:
                other = len(header) == 1 and re.search("[;\t]", header[0])
                hint = "; separate the cells by commas" if other else "; give each once, by that name"
                wanted = f"the column{'s' * (len(columns) > 1)} {' and '.join(columns)}"
                has = ", ".join(header) or "nothing"
                raise UserError(f"{what} needs {wanted}; its first line has {has}{hint}")
        places = [header.index(column) for column in columns]
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            cells = [row[place].strip() if place < len(row) else "" for place in places]
            if not all(cells):
                raise UserError(f"{what}, line {reader.line_num}: {' or '.join(columns)} is empty")
            yield reader.line_num, cells
    except csv.Error as error:
        mend = "a cell that begins with a double quote must end with one, and hold it doubled"
        raise UserError(f"{what}, line {reader.line_num}: {error}; {mend}") from None


def read_json(path: Path, what: str, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Read UTF-8 JSON, with or without BOM. `what` names the file's role in messages.

    Raises UserError when the file is missing, is larger than `most_bytes`, is not UTF-8, is not JSON (NaN and
    Infinity are not), or repeats a key in one object.
    """
    try:
        size = Path(path).stat().st_size
        if size > most_bytes:
            raise UserError(f"{what} {path} holds {size} bytes; at most {most_bytes} are read")
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 ({error}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None

    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
            more = f" and {len(repeated) - 10} more" if len(repeated) > 10 else ""
            raise UserError(
                f"{what} {path} repeats the key {', '.join(map(repr, repeated[:10]))}{more}; keep one of each"
            )
        return found

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, object_pairs_hook=refuse_repeats, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError also stands for a number of too many digits
        raise UserError(f"{what} {path} is not valid JSON: {error}") from None
