"""Images in tar files ("shards"), members class/key.jpg as webdataset names them: an image folder, packed.

Nothing is unpacked. One walk along the headers notes where each member lies, and from then on an image is a
piece of a file, read whenever a file of a folder would be: into the cache of squares, each epoch where there
is none, for a report. Shards of an object store (https, gs, hf, pipe:COMMAND ...) are fetched through
webdataset, once, each from beginning to end, and kept beside the cache.

webdataset's readers are not used for the members: they take one of any size into memory, make one sample of
1.2.dcm and 1.3.dcm, and know no place of an image to come back to. Nothing is unpickled or run.
"""

import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from common.errors import UserError, all_of, first_line, shorten
from common.files import whole_file
from common.progress import progress
from data.cache import FREE_DISK, cache_dir_of
from data.members import Member, Members, stamp_of
from data.names import Names
from data.scan import (
    ImageFolder,
    folder_of_classes,
    has_dicom_magic,
    is_litter,
    leads_to,
    not_an_image,
    not_utf8,
    refuse_no_folder,
    scan_folder,
    spelling,
)

LISTED_BY = "3"  # another way of listing must not find the old lists
MOST_SHARDS = 100_000
MOST_HEADER = 2**20  # bytes of a long name or of pax records: tarfile takes them into memory
TAR = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
PIECE = 2**22  # bytes fetched at a time
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


def may_run_a_command(source: str | None) -> bool:
    """Whether `source`, from a file that may be a stranger's, could be a command (`pipe:`, however it is
    written) or an address to fetch from.
    """
    return source is not None and ":" in source and not os.path.exists(source)


def is_shards(source: str | Path) -> bool:
    """Whether `source` stands for tar files (URLs, a pattern, a folder of them) and not for class folders."""
    text = str(source)
    if os.path.isdir(text):
        return bool(_shards_in(Path(text)))
    return _is_remote(text) or TAR.search(text) is not None


def scan_and_check(
    sources: Mapping[str, str | Path], *checks: Callable[[], object], **how: object
) -> list[ImageFolder]:
    """`scan_images` of each source, by the option that names it. Before it, one message names every source
    that is not there and what `checks` find: shards may take hours to fetch, and a folder on a network disk
    minutes to scan.
    """
    folders = {option: Path(source) for option, source in sources.items() if not is_shards(source)}
    all_of(*(partial(refuse_no_folder, source, option) for option, source in folders.items()), *checks)
    return all_of(*(partial(scan_images, source, option, **how) for option, source in sources.items()))


def scan_images(
    source: str | Path,
    option: str = "--data-dir",
    at_least: int = 2,
    cache_dir: str | Path | None = None,
    fetch: bool = True,
) -> ImageFolder:
    """`scan_folder` for a folder; for shards the same of their members.

    cache_dir: where lists of shards, and those that are fetched, are kept; without `fetch` these must be
    there, and nothing is written. Raises UserError as `scan_folder` does, and where a shard is missing or
    damaged or cannot be fetched.
    """
    if not is_shards(source):
        return scan_folder(Path(source), option, at_least)
    cache_dir = cache_dir_of(cache_dir)
    names, places, loose, ignored = Names(), array("q"), 0, Counter()
    if os.path.isdir(source):
        shards = tuple(_shards_in(Path(source), ignored))
    else:
        shards = tuple(_local_shards(str(source), option, cache_dir, fetch))
    stamps = tuple(stamp_of(shard.stat()) for shard in shards)
    rows_of: dict[str, array] = {}  # by class folder
    bar = progress(shards, "listing shards", delay=1, unit="tar")
    for number, shard in enumerate(bar):
        try:
            listed, pieces, others = _listed(shard, stamps[number], cache_dir, keep=fetch)
        except UnicodeEncodeError as error:
            raise not_utf8(f"{option} {shard}", error) from None
        except Exception as error:  # a damaged file makes tarfile raise anything from OSError to ValueError
            raise UserError(f"{option}: the shard {shard} {_damage(shard, error)}") from None
        ignored += others
        for name, (offset, size) in zip(listed, pieces.tolist(), strict=True):
            if "/" not in name:
                loose += 1
                continue
            rows_of.setdefault(name.split("/")[0], array("q")).append(len(names))
            names.extend([name])
            places.extend((number, offset, size))
    classes = sorted(rows_of, key=spelling)
    order = np.array(
        [row for name in classes for row in sorted(rows_of[name], key=lambda i: spelling(names[i]))]
    )
    paths, found = names.take(order), np.array(places, np.int64).reshape(-1, 3)[order.astype(np.int64)]
    _refuse_repeats(paths, [shards[number] for number in found[:, 0]], option)
    counts = {name: len(rows_of[name]) for name in classes}
    folder = folder_of_classes(Path(source), option, at_least, counts, paths, loose, ignored)
    return replace(folder, members=Members(shards, stamps, found))


def finder(source: str | Path, cache_dir: str | Path | None = None) -> Callable[[str], Path | Member]:
    """What gives the image of a path that `scan_images` has listed; nothing is fetched. Where the shards
    cannot be read any more the files it gives do not exist.
    """
    root = Path(source)
    try:
        if is_shards(source):
            folder = scan_images(source, at_least=1, cache_dir=cache_dir, fetch=False)
            row = {path: i for i, path in enumerate(folder.paths)}
            return lambda path: folder.file(row[path]) if path in row else root / path
    except UserError as error:
        print(f"note: {error}")
    return lambda path: root / path


def _is_remote(source: str) -> bool:
    return source.startswith("pipe:") or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", source) is not None


def _shards_in(folder: Path, others: Counter[str] | None = None) -> list[Path]:
    """Its tar files, sorted (compressed ones too, which are refused when they are read); none where it has
    sub-folders: then those are the classes. What else there is goes to `others`, by suffix.
    """
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, leads_to(entry.is_dir)) for entry in entries if not is_litter(entry.name)]
    except OSError:  # `scan_folder` says so
        return []
    if any(is_folder for _, is_folder in found):
        return []
    if others is not None:
        others.update(Path(name).suffix or "no suffix" for name, _ in found if not TAR.search(name))
    return [folder / name for name, _ in sorted(found) if TAR.search(name)]


def _local_shards(source: str, option: str, cache_dir: Path, fetch: bool) -> list[Path]:
    """The files of `source`, which is no folder, those of an object store fetched. Raises UserError naming
    what is missing.
    """
    if os.path.isfile(source):
        return [Path(source)]
    from braceexpand import UnbalancedBracesError, braceexpand

    parts, count = source.split("::"), 0  # as webdataset writes several patterns
    for part in parts:
        ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", part)  # braceexpand makes all before it gives the first
        count += math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges)
    if count > MOST_SHARDS:
        raise UserError(f"{option} {source} stands for more than {MOST_SHARDS} shards; make larger ones")
    try:
        of_parts = (braceexpand(part, escape=os.sep == "/") for part in parts)
        urls = [url.removeprefix("file://") for urls in of_parts for url in urls]
    except UnbalancedBracesError as error:
        raise UserError(f"{option} {source}: the braces cannot be expanded: {error}") from None
    missing = [url for url in urls if not _is_remote(url) and not Path(url).is_file()]
    if missing:
        raise UserError(f"{option}: {len(missing)} of {len(urls)} shards do not exist:\n{shorten(missing)}")
    bar = progress(urls, "fetching shards", delay=1, unit="tar")
    return [_fetched(url, option, cache_dir, fetch) if _is_remote(url) else Path(url) for url in bar]


def _fetched(url: str, option: str, cache_dir: Path, fetch: bool) -> Path:
    """The local copy of a shard, made where it is not there. Raises UserError."""
    copy = cache_dir / "shards" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"
    if copy.exists():
        return copy
    if not fetch:
        raise UserError(f"{option}: the shard {url} is not kept in {copy.parent} any more")
    part = copy.with_name(f".{copy.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    full = None
    try:
        from webdataset.gopen import gopen

        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(part, "wb") as file:
            os.chmod(part, 0o600)  # patients' images: for this user alone
            with gopen(url) as stream:
                while full is None and (piece := stream.read(PIECE)):
                    free = shutil.disk_usage(copy.parent).free
                    if free < len(piece) + FREE_DISK:
                        full = UserError(
                            f"{option}: no room in {copy.parent} for the shard {url}: {free / 1e6:,.0f} MB "
                            f"are free, and {FREE_DISK / 1e6:,.0f} MB are kept for the run's results; "
                            "--cache-dir puts the shards elsewhere"
                        )
                    else:
                        file.write(piece)
            os.fsync(file.fileno())
        if full is None:
            _keep(part, copy)
    except Exception as error:  # whatever the library or the program it calls runs into
        if full is not None:  # then the command may complain that nobody reads on
            raise full from None
        s3 = "; for s3 give pipe:aws s3 cp s3://BUCKET/NAME.tar -" if url.startswith("s3:") else ""
        raise UserError(f"{option}: the shard {url} cannot be fetched: {first_line(error)}{s3}") from None
    finally:
        part.unlink(missing_ok=True)
    if full is not None:
        raise full
    return copy


def _keep(part: Path, copy: Path) -> None:
    """Name the fetched `part`, unless another run has done so meanwhile: it is using its own already."""
    try:
        os.link(part, copy)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not copy.exists():
            os.replace(part, copy)


class _Header(tarfile.TarInfo):
    """What tarfile makes of 512 bytes, less trusting: it takes a damaged header, or none, for the end, and
    names of any length into memory.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the end as it should be
                raise
            raise tarfile.ReadError(f"no end where the last member ends, but {error}") from None
        of_names = not header.isreg() and not header.isdir() and header.size > MOST_HEADER
        if header.size < 0 or of_names or header.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"a header of type {header.type} claims {header.size} bytes")
        return header


def _listed(
    shard: Path, stamp: tuple[int, int, int], cache_dir: Path, keep: bool
) -> tuple[Names, np.ndarray, Counter[str]]:
    """Names of the n images in a tar file, offsets and sizes (n, 2), and what else there is, by suffix.

    Kept in the cache, with `keep`: to walk along a million headers takes a minute of processor time, and on
    a network file system as many reads.
    """
    key = hashlib.sha256(f"{shard.resolve()}\n{stamp}\n{LISTED_BY}".encode(errors="surrogatepass"))
    kept = cache_dir / "shards" / f"{key.hexdigest()[:16]}.list"
    with suppress(OSError, ValueError), open(kept, "rb") as file:
        parts = [np.lib.format.read_array(file, allow_pickle=False) for _ in range(5)]
        text, ends, pieces, words, crc = parts
        if len(ends) == len(pieces) and crc == _crc(parts[:4]):
            return Names.of(text, ends), pieces, Counter(json.loads(words.tobytes()))

    names, places, ignored = Names(), array("q"), Counter()
    for name, offset, size in _images_in(shard, ignored):
        names.extend([name])
        places.extend((offset, size))
    pieces = np.array(places, np.int64).reshape(-1, 2)
    if not keep:
        return names, pieces, ignored
    with suppress(OSError):  # no room, or no right to write: it is listed again next time
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(kept) as temporary, open(temporary, "wb") as file:
            os.chmod(temporary, 0o600)  # names may be those of patients
            parts = [*names.arrays(), pieces, np.frombuffer(json.dumps(ignored).encode(), np.uint8)]
            for part in (*parts, np.array(_crc(parts))):
                np.lib.format.write_array(file, part, allow_pickle=False)
    return names, pieces, ignored


def _crc(parts: Sequence[np.ndarray]) -> int:
    total = 0
    for part in parts:
        total = zlib.crc32(np.ascontiguousarray(part), total)
    return total


def _images_in(shard: Path, ignored: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each image in a tar file; what else there is goes to `ignored`, by suffix."""
    with tarfile.open(shard, "r:", tarinfo=_Header, encoding="utf-8") as tar:
        while member := tar.next():
            tar.members.clear()
            if member.size < 0:  # pax records may say so, and tarfile would follow it for ever
                raise tarfile.ReadError("a member ends before it begins")
            if member.issparse():  # what lies there is not what the image is
                raise tarfile.ReadError("a sparse member; pack it without holes")
            parts = [part for part in member.name.split("/") if part != "."]
            name = "/".join(parts)

            if member.isdir():
                continue
            if not member.isreg():
                ignored["link or device"] += 1
            elif "" in parts or ".." in parts or "\0" in name:
                ignored["absolute name or .."] += 1
            elif any(map(is_litter, parts)):
                continue
            elif kind := not_an_image(parts[-1], partial(has_dicom_magic, tar.fileobj, member.offset_data)):
                ignored[kind] += 1
            else:
                yield name, member.offset_data, member.size
        tar.fileobj.seek(tar.offset)
        while rest := tar.fileobj.read(PIECE):
            if any(rest):  # a hole in a copied file, or two files in one
                raise tarfile.ReadError("there is something behind its end")


def _damage(shard: Path, error: Exception) -> str:
    """What is wrong with it, and what to do."""
    try:
        with open(shard, "rb") as file:
            start = file.read(2)
    except OSError as unreadable:
        return f"cannot be read: {unreadable.strerror}"
    if start in COMPRESSED:
        return (
            f"is compressed ({COMPRESSED[start]}), so no image in it can be read by itself; decompress it: "
            "images hardly get smaller"
        )
    return (
        f"is no whole tar file ({first_line(error)}); copy it again, or remove it (a copy in the cache, too)"
    )


def _refuse_repeats(paths: Names, shards: Sequence[Path], option: str) -> None:
    """Raises UserError where two of the sorted `paths` are the same."""
    repeated = [
        f"{path} in {shards[i]} and {shards[i + 1]}"
        for i, (path, after) in enumerate(itertools.pairwise(paths))
        if path == after
    ]
    if repeated:
        raise UserError(
            f"{option}: {len(repeated)} names are in the shards twice; an image's name must be its own:\n"
            + shorten(repeated)
        )
