"""Tars as archives: which there are, what they are called, their members, and whether all is there.

Ranges of a tar are read where a picture is asked for, so a tar is plain: a compressed one has no
places to read from without unpacking all that stands before.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from pipeline.errors import InputError
from pipeline.storage import store

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# What can be wrong with a whole tar, and what to do.
FAULTS = {
    "torn tar": "copy or write it again, or leave it out",
    "no tar": "leave it out, or copy it again",
    "compressed tar": "unpack it (`gunzip 0.tar.gz`): pictures are read by their place in the tar, "
    "which a compressed one has not",
    "data behind the end": "other readers stop there; `tar --ignore-zeros -xf` unpacks all of it, "
    "to be packed as one tar",
    "a sample whose members are not adjacent": "sort the members by key before packing "
    "(`tar --sort=name`)",
    "every .txt holds several lines": "say whether a line is a caption: --source.text_captions "
    "lines or one, or a dataset_type.txt beside the tars that says retrieval",
    "nothing to use": "leave it out, or see which members are picture and caption in "
    "docs/your-own-data.md",
}


class Broken(Exception):
    """What is wrong with a whole tar: a kind of `FAULTS`, and the place."""

    def __init__(self, kind: str, detail: str):
        self.kind, self.detail = kind, detail
        super().__init__(f"{kind}: {detail}; {FAULTS[kind]}")


# ---- which there are -----------------------------------------------------------------------------


def is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def is_compressed(name: str) -> bool:
    return name.lower().endswith(COMPRESSED)


def in_folder(folder: str) -> list[str]:
    """Paths of the tars in a folder and the folders in it, sorted; compressed ones among them.

    Links are followed. What is hidden is passed over, such as a Mac's ._0.tar, and so is the
    0.tar.gz that 0.tar was unpacked from.
    """
    found = _walked(folder) if store.is_local(folder) else _found(folder)
    tars = {name for name in found if (is_tar(name) or is_compressed(name)) and not hidden(name)}
    packed = {name for name in tars if is_compressed(name) and name.rpartition(".")[0] in tars}
    return sorted(tars - packed)


def _walked(folder: str) -> Iterator[str]:
    folder, seen = folder.removeprefix("file://").rstrip("/") or "/", {}
    for place, folders, files in os.walk(folder, followlinks=True):
        other = seen.setdefault(os.path.realpath(place), place)
        if other != place:
            do = "remove the link, or name the tars by a pattern"
            raise InputError(f"{place} and {other} are one folder; {do}")
        folders[:] = [name for name in folders if not store.is_hidden(name)]
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in files)


def _found(folder: str) -> list[str]:
    def find(fs, path):
        inside = path.strip("/") + "/"
        return [name.lstrip("/").removeprefix(inside) for name in fs.find(path)]

    return store.ask(folder, find)


def hidden(path: str) -> bool:
    """Whether a file, or a folder that it lies in, is hidden, such as a Mac's ._0.jpg."""
    if path[0] != "." and "/." not in path and "__MACOSX" not in path:
        return False
    return any(store.is_hidden(name) and name not in (".", "..") for name in path.split("/"))


# ---- members -------------------------------------------------------------------------------------


def opened(uri: str, *, whole: bool = False) -> BinaryIO:
    """The tar to read here and there in; a remote one that is read `whole` comes at once."""
    if whole and not store.is_local(uri):
        return io.BytesIO(store.read_bytes(uri))
    return store.opened(uri)


def members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Every member in order; raises `Broken` after the last good one.

    `tarfile` itself takes a broken header for the end, does not ask for the mark that ends an
    archive, and does not look behind it.
    """
    _begins(file)
    before, last, end = "", "", 0  # names of members, and where the last one ends
    try:
        with tarfile.open(
            fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace"
        ) as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # else it would remember all
                if tar.offset <= end:  # of a negative size: it would be read for ever
                    raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
                before, last, end = last, member.name, tar.offset
                yield member
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError) as why:
        if (size := file.seek(0, io.SEEK_END)) < end:
            where = f"it ends at byte {size:,}, inside {last!r}"
            raise Broken("torn tar", f"{_after(before)}: {where}") from None
        raise Broken("torn tar", f"{_after(last)}: at byte {end:,}, {why}") from None
    _ends(file, last, end)


def _after(name: str) -> str:
    return f"after {name!r}" if name else "after its beginning"


def _begins(file: BinaryIO) -> None:
    file.seek(0)
    begins = file.read(tarfile.BLOCKSIZE)
    file.seek(0)
    for magic, kind in MAGIC.items():
        if begins.startswith(magic):
            raise Broken("compressed tar", f"it is of {kind}")
    if len(begins) < tarfile.BLOCKSIZE:
        raise Broken("torn tar", f"after its beginning: it ends at byte {len(begins):,}")
    try:
        if any(begins):
            tarfile.TarInfo.frombuf(begins, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        raise Broken("no tar", f"it begins with {begins[:40]!r}") from None


def _ends(file: BinaryIO, last: str, end: int) -> None:
    """Refuses a file without the mark of the end, and one with more than zeros behind it."""
    file.seek(end)
    mark = file.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE:
        why = f"it ends at byte {end + len(mark):,} without the blocks that close a tar"
        raise Broken("torn tar", f"{_after(last)}: {why}")
    if any(mark):
        why = f"no member's header where one should be, at byte {end:,}"
        raise Broken("torn tar", f"{_after(last)}: {why}")
    at = end + len(mark)
    while block := file.read(1 << 20):
        if behind := block.lstrip(b"\0"):
            at += len(block) - len(behind)
            raise Broken("data behind the end", f"at byte {at:,}; the tar ends at {end:,}")
        at += len(block)
