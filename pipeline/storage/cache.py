"""Remote files kept on this machine: fetched once, checked, the least recently used dropped.

A file is kept under the sha256 of its contents, so run folders share what is the same and nothing
here is ever out of date; so is what is made of a file to be mapped into memory, of local ones too.
HALFTONE_CACHE names the folder, on a disk of this machine.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import InputError
from pipeline.storage import store

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of a disk that is no use as a cache

_whole: set[Path] = set()  # copies whose contents this process compared with their hash
_no_room: set[Path] = set()  # copies that this machine's disk had no room for


def read(uri: str, file: dict, limit: float, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`, of the copy that is kept here of a remote one."""
    try:
        return store.read_bytes(kept(uri, file, limit), offset, size)
    except FileNotFoundError:  # dropped by another process meanwhile
        return store.read_bytes(uri, offset, size)


def kept(uri: str, file: dict, limit: float) -> str:
    """Path of this machine's copy of a remote file; the URI itself where there can be none.

    `file` is {"bytes", "sha256"} of the whole file, as its stage's index has it, `limit` what all
    copies may take together (bytes).
    """
    if store.is_local(uri) or file["bytes"] > limit:
        return uri
    path = folder() / file["sha256"]
    if path in _no_room:
        return uri
    try:
        if not _is_whole(path, file):
            _fetch(uri, path, file, limit)
        os.utime(path)  # the time of last use
    except FileNotFoundError:  # dropped by another process meanwhile, or not at `uri` either
        return uri
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _no_room.add(path)
        return uri
    return str(path)


def made(
    file: dict, limit: float, kind: str, make: Callable[[str], None], *, anew: bool = False
) -> str | None:
    """Path of what `make` wrote of a file, once on this machine; None where there is no room.

    `file` and `limit` are as of `kept`. `kind` is part of the name: what is made in another way is
    of another kind. `anew` drops what is there.
    """
    path = folder() / f"{file['sha256']}.{kind}"
    if path in _no_room or file["bytes"] > limit:
        return None
    try:
        if anew:
            path.unlink(missing_ok=True)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(Path(f"{path}.lock")):
                if not path.exists():  # else made by the process that this one waited for
                    with store.temporary(str(path)) as copy:
                        make(copy)
            with _locked(path.parent / "drop.lock"):
                _drop(path.parent, limit)
        os.utime(path)  # the time of last use
    except FileNotFoundError:  # dropped by another process meanwhile
        return None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _no_room.add(path)
        return None
    return str(path)


def trust(file: dict) -> None:
    """Take the copy of a file for whole: another process of this node compared it a moment ago."""
    _whole.add(folder() / file["sha256"])


def folder() -> Path:
    """Where files are kept on this machine."""
    default = f"{tempfile.gettempdir()}/halftone-{os.getuid()}/cache"
    return Path(os.environ.get("HALFTONE_CACHE") or default)


def _is_whole(path: Path, file: dict) -> bool:
    """Whether a file is there with its size and, the first time in this process, its hash."""
    try:
        if path.stat().st_size != file["bytes"]:
            return False
        if path not in _whole and not _has(path, file):
            return False
    except FileNotFoundError:
        return False
    _whole.add(path)
    return True


def _has(path: Path | str, file: dict) -> bool:
    with open(path, "rb") as copy:
        return hashlib.file_digest(copy, "sha256").hexdigest() == file["sha256"]


def _fetch(uri: str, path: Path, file: dict, limit: float) -> None:
    """Bring a file here, by one process at a time, and drop others until all fit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if _is_whole(path, file):  # fetched by the process that this one waited for
            return
        with store.temporary(str(path)) as copy:
            store.ask(uri, lambda fs, there: fs.get_file(there, copy))
            if not _has(copy, file):
                raise InputError(
                    f"{uri} has other bytes than when it was written; delete it and run the "
                    "stage that writes it again"
                )
        _whole.add(path)
    with _locked(path.parent / "drop.lock"):
        _drop(path.parent, limit)


def _drop(folder: Path, limit: float) -> None:
    """Remove the least recently used files until the others take no more than `limit` bytes."""
    known = []
    for path in folder.glob("?" * 64 + "*"):
        if path.suffix == ".lock":
            continue
        with contextlib.suppress(FileNotFoundError):
            about = path.stat()
            known.append((about.st_mtime_ns, about.st_size, path))
    held = sum(size for _, size, _ in known)
    for _, size, path in sorted(known):
        if held <= limit:
            return
        path.unlink(missing_ok=True)
        held -= size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Entered by one process, and one thread, at a time; the kernel lets go of a dead one's."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # who waits holds the old one: twice fetched at worst
