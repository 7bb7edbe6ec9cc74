"""A file written past the page cache has the bytes that were given, whatever the system can and refuses."""

import errno
import os

import pytest
import torch

from common import direct_file
from common.direct_file import DirectFile

BLOCK = DirectFile.BLOCK


def pieces_of(*lengths: int) -> list[bytes]:
    return [bytes([65 + i]) * length for i, length in enumerate(lengths)]


def written(path, pieces) -> bytes:
    with DirectFile(path) as file:
        for piece in pieces:
            assert file.write(memoryview(piece)) == len(piece)
        file.flush()
    return path.read_bytes()


@pytest.mark.parametrize(
    "lengths",
    [(), (0,), (1,), (BLOCK,), (BLOCK - 1, 1), (BLOCK - 1, 2), (3, 2 * BLOCK, 5), (7, 3 * BLOCK - 7)],
)
@pytest.mark.parametrize("direct", [True, False])
def test_the_file_holds_what_was_written(tmp_path, monkeypatch, lengths, direct):
    if not direct:
        monkeypatch.setattr(direct_file, "DIRECT", 0)
    (tmp_path / "f").write_bytes(b"old" * BLOCK)
    pieces = pieces_of(*lengths)
    assert written(tmp_path / "f", pieces) == b"".join(pieces)


def test_tensors_of_any_type_come_back(tmp_path):
    wanted = {
        "a": torch.arange(2_000_003, dtype=torch.int32),
        "b": torch.ones(5, 7, dtype=torch.bfloat16).T,
        "c": torch.empty(0),
        "d": torch.tensor(True),
    }
    with DirectFile(tmp_path / "f.pth") as file:
        torch.save(wanted, file)
    found = torch.load(tmp_path / "f.pth", weights_only=True)
    assert all(torch.equal(found[key], own) for key, own in wanted.items()) and len(found) == 4


@pytest.mark.parametrize("taken", [None, 0, BLOCK // 2 + 1])
def test_a_file_system_that_refuses_direct_writing_gets_the_same_file(tmp_path, monkeypatch, taken):
    """As tmpfs did before Linux 6.6. `taken`: bytes before one that opens refuses to go on."""
    flag = direct_file.DIRECT or 0o40000
    system_open, system_write, left = os.open, os.write, {}

    def open_(path, flags, mode=0o777):
        if flags & flag and taken is None:
            raise OSError(errno.EINVAL, "Invalid argument")
        file = system_open(path, flags & ~flag, mode)
        if flags & flag:
            left[file] = taken
        return file

    def write(file, data):
        if left.get(file) == 0:
            del left[file]  # its number may be another's soon
            raise OSError(errno.EINVAL, "Invalid argument")
        n = system_write(file, data[: left.get(file)])
        if file in left:
            left[file] -= n
        return n

    monkeypatch.setattr(direct_file, "DIRECT", flag)
    monkeypatch.setattr(direct_file.os, "open", open_)
    monkeypatch.setattr(direct_file.os, "write", write)
    pieces = pieces_of(5, 2 * BLOCK, 11)
    assert written(tmp_path / "f", pieces) == b"".join(pieces)
    assert not left
