"""Large files, written past the system's page cache."""

import mmap
import os
from pathlib import Path

DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
BINARY = getattr(os, "O_BINARY", 0)  # Windows needs it


class DirectFile:
    """A new file, written once from its beginning to its end: `with DirectFile(path) as file: ...`.

    The page cache would take a copy of all that is written, which for a checkpoint of 1.4 GB is 2 s of a
    processor that training beside it lacks. Direct writing (O_DIRECT of open(2)) takes whole blocks of memory
    that begins at a page; where the system has it not, or refuses it, the file is written as any other.

    Raises OSError where the system refuses data, and what a signal raises, also when the writer makes a
    RuntimeError of that, as torch.save does.
    """

    BLOCK = 4 * 2**20  # bytes

    def __init__(self, path: Path):
        # an anonymous map is shared: of private memory a process that is forked meanwhile would get a copy
        self._block, self._filled = memoryview(mmap.mmap(-1, self.BLOCK)), 0
        self._path = path
        new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY
        self._is_direct = bool(DIRECT)
        try:
            self._file = os.open(path, new | DIRECT, 0o666)
        except OSError:
            if not self._is_direct:
                raise
            self._is_direct = False
            self._file = os.open(path, new, 0o666)

    def __enter__(self) -> "DirectFile":
        return self

    def write(self, data: bytes | memoryview) -> int:
        data = memoryview(data).cast("B")
        done = 0
        while done < len(data):
            n = min(len(data) - done, self.BLOCK - self._filled)
            self._block[self._filled : self._filled + n] = data[done : done + n]
            done, self._filled = done + n, self._filled + n
            if self._filled == self.BLOCK:
                self._put(self._block)
                self._filled = 0
        return done

    def flush(self) -> None:
        """What does not fill a block waits for more."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._write_as_any_other()
                self._put(self._block[: self._filled])
        finally:
            os.close(self._file)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None

    def _put(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._file, data) :]
            except OSError:
                if not self._is_direct:
                    raise
                self._write_as_any_other()

    def _write_as_any_other(self) -> None:
        if self._is_direct:
            self._is_direct = False
            direct, self._file = self._file, os.open(self._path, os.O_WRONLY | BINARY)
            os.lseek(self._file, os.lseek(direct, 0, os.SEEK_CUR), os.SEEK_SET)
            os.close(direct)
