"""The names of a million images in little memory."""

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class Names(Sequence[str]):
    """N names in one block of UTF-8, each made into a str when it is asked for.

    A million str objects of 30 letters take 90 MB, 140 MB where one letter is Chinese, and a process that
    only reads them still writes into them (Python counts who uses an object in the object itself), so every
    forked process ends up with a copy. This takes 40 MB, of which nothing is written.

    Raises UnicodeEncodeError at a name that is no UTF-8.
    """

    def __init__(self, names: Iterable[str] = ()):
        self._text, self._ends = bytearray(), array("q")
        self.extend(names)

    @classmethod
    def of(cls, text: np.ndarray, ends: np.ndarray) -> "Names":
        """What `arrays` gave."""
        names = cls()
        names._text, names._ends = bytearray(text.tobytes()), array("q", ends.tobytes())
        return names

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All letters as uint8, and where each name ends (N,) int64, to be written to a file."""
        return np.frombuffer(bytes(self._text), np.uint8), np.array(self._ends, np.int64)

    def extend(self, names: Iterable[str]) -> None:
        for name in names:
            self._text += name.encode()
            self._ends.append(len(self._text))

    def take(self, indices: Iterable[int]) -> "Names":
        return Names(self[i] for i in indices)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int | slice) -> "str | Names":
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        end = self._ends[index]
        i = index + len(self) if index < 0 else index
        return self._text[self._ends[i - 1] if i else 0 : end].decode()

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends:
            yield self._text[start:end].decode()
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        if isinstance(other, Names):
            return self._ends == other._ends and self._text == other._text
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))


def all_but(dropped: set[int], n: int) -> np.ndarray:
    """0..n-1 without those in `dropped`, ascending."""
    return np.delete(np.arange(n), list(dropped))
