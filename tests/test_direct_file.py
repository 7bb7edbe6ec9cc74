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


def test_blocks_are_written_directly_where_the_system_can(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except (AttributeError, OSError):
        pytest.skip("this system writes no file directly")
    system_write, seen = os.write, []

    def write(file, data):
        n = system_write(file, data)
        seen.append((bool(fcntl.fcntl(file, fcntl.F_GETFL) & direct_file.DIRECT), n))
        return n

    monkeypatch.setattr(direct_file.os, "write", write)
    n_open = len(os.listdir("/proc/self/fd"))
    written(tmp_path / "f", pieces_of(3, 2 * BLOCK, 5))
    assert seen == [(True, BLOCK), (True, BLOCK), (False, 8)]
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_a_full_disk_at_the_tail_is_an_os_error(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK + 5, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), DirectFile(tmp_path / "f") as file:
            file.write(bytes(BLOCK + 6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_what_stops_torch_is_what_is_raised(tmp_path, monkeypatch, raised):
    """torch.save itself makes a RuntimeError about a position of it."""

    def write(file, data):
        raise raised

    monkeypatch.setattr(direct_file.os, "write", write)
    with pytest.raises((OSError, KeyboardInterrupt)), DirectFile(tmp_path / "f") as file:
        torch.save(torch.zeros(BLOCK), file)
