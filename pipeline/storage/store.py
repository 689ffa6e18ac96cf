"""Files at any URI: absolute names, whole-or-nothing writes, fingerprints.

A local path and s3://, gs://, memory:// … are used alike, through fsspec. Object stores are found
and opened as their libraries do (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …). Their libraries ask again
for some seconds where a store does not answer; `ask` goes on for half a minute more.
"""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from pipeline.errors import InputError, Unreachable

WRITING = ".writing-"  # how the names of files begin that are not yet whole
WAITS = (1, 2, 4, 8, 16)  # seconds before a store that did not answer is asked again
# By name, and of any library: a line that fails, an answer that does not come or breaks off.
NO_ANSWER = {"ConnectionError", "TimeoutError", "HTTPClientError", "Timeout"} | {
    *("ClientConnectionError", "ClientPayloadError")
}
BUSY_STATUS = {429, 500, 502, 503, 504}  # of HTTP
BUSY_ERRNO = {errno.EBUSY, errno.EREMOTEIO, errno.EHOSTUNREACH, errno.ENETUNREACH}
LOG = logging.getLogger(__name__)
Answer = TypeVar("Answer")


def absolute(uri: str) -> str:
    """The URI unchanged, or a local path made absolute (workers run in other directories)."""
    uri = uri.removeprefix("file://")
    return str(Path(uri).expanduser().absolute()) if is_local(uri) else keyless(uri)


def keyless(uri: str) -> str:
    """The URI unchanged; refused with a password in it, as URIs are logged and kept."""
    if re.search(r"://[^/@:]*:(?!\d+(/|$))[^@]+@", uri):
        raise InputError(
            f"a {uri.split('://')[0]}:// URI holds a password, and URIs are kept in logs and in "
            "MLflow; give it by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
        )
    return uri


def is_local(uri: str) -> bool:
    return "://" not in uri.removeprefix("file://")


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def name_of(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


@contextlib.contextmanager
def file_system_of(uri: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
    """The file system of a URI and the path in it.

    It remembers no listing, as other processes write too. An error that is none of Python's own
    (no route, no credentials, no such scheme) is told as bad input.
    """
    try:
        yield _file_system(uri)
    except (OSError, InputError):
        raise
    except Exception as error:  # the stores' libraries have no common base
        kind = Unreachable if _unanswered(error) else InputError
        raise kind(f"{uri} cannot be reached: {error}") from error


def _file_system(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """As `fsspec.core.url_to_fs`, for which `::` in a name would chain two file systems."""
    if is_local(uri):
        return fsspec.filesystem("file"), uri.removeprefix("file://")
    if "::" not in uri:
        return fsspec.core.url_to_fs(uri, use_listings_cache=False)
    cut = uri.rindex("/", 0, uri.index("::"))
    fs, path = fsspec.core.url_to_fs(uri[:cut], use_listings_cache=False)
    return fs, path.rstrip("/") + uri[cut:]


def ask(uri: str, question: Callable[[fsspec.AbstractFileSystem, str], Answer]) -> Answer:
    """`question(file system, path)`, asked again with growing waits while a store does not answer.

    What the store did answer (not found, forbidden) is raised at once. A question asked twice must
    leave what one leaves. Raises `Unreachable` where no answer comes.
    """
    waits = iter(WAITS)
    while True:
        try:
            with file_system_of(uri) as (fs, path):
                return question(fs, path)
        except (OSError, Unreachable) as error:
            if is_local(uri) or not _unanswered(error):
                raise
            why = error.__cause__ if isinstance(error, Unreachable) else error
            if (wait := next(waits, None)) is None:
                raise Unreachable(f"{uri} cannot be reached: {why}") from error
            LOG.warning("%s does not answer (%s); it is asked again in %d s", uri, why, wait)
        time.sleep(wait)


def _unanswered(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is of the line or of a busy store: both may pass."""
    while error is not None:
        answer = getattr(error, "response", None)  # botocore's; others have the number alone
        about = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
        status = [getattr(error, "status", 0), getattr(error, "code", 0)]
        if not BUSY_STATUS.isdisjoint([about.get("HTTPStatusCode"), *status]):
            return True
        if getattr(error, "errno", None) in BUSY_ERRNO:
            return True
        if NO_ANSWER & {kind.__name__ for kind in type(error).__mro__}:
            return True
        error = error.__cause__
    return False


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the data: .DS_Store, a Mac's ._1.jpg, .git."""
    return name.startswith(".") or name == "__MACOSX"


def opened(uri: str) -> BinaryIO:
    """The file opened for reading here and there, from wherever it is."""
    with file_system_of(uri) as (fs, path):
        return open(path, "rb") if is_local(uri) else fs.open(path, "rb")


def exists(uri: str) -> bool:
    return ask(uri, lambda fs, path: fs.exists(path))


def list_files(folder: str) -> dict[str, int]:
    """Size in bytes of every file directly in a folder, by name; empty where there is no folder."""
    return {name_of(e["name"]): e["size"] for e in _entries(folder) if e["type"] == "file"}


def list_stamps(folder: str) -> dict[str, str]:
    """What changes with the contents of every file directly in a folder, by name.

    Links that lead nowhere are among them.
    """
    files = (entry for entry in _entries(folder) if entry["type"] in ("file", "link"))
    return {name_of(e["name"]): "-".join(map(str, _stamp(e))) for e in files}


def list_folders(folder: str) -> list[str]:
    """Names of the folders directly in a folder, sorted."""
    return sorted(name_of(e["name"]) for e in _entries(folder) if e["type"] == "directory")


def _entries(folder: str) -> list[dict]:
    try:
        return ask(folder, _local_entries if is_local(folder) else _remote_entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remote_entries(fs: fsspec.AbstractFileSystem, path: str) -> list[dict]:
    found = fs.ls(path, detail=True)
    return [e for e in found if e["name"].strip("/") != path.strip("/")]


def _local_entries(fs: fsspec.AbstractFileSystem, path: str) -> list[dict]:
    """What lies in a folder; links count as what they lead to."""
    with os.scandir(path) as scan:
        found = list(scan)
    entries = []
    for entry in found:
        try:
            info = entry.stat()
        except OSError:  # a link that leads nowhere; or moved meanwhile, others write here too
            if entry.is_symlink():
                entries.append({"name": entry.path, "size": 0, "type": "link"})
            continue
        kind = {stat.S_IFDIR: "directory", stat.S_IFREG: "file"}.get(stat.S_IFMT(info.st_mode))
        about = {"name": entry.path, "size": info.st_size, "mtime": info.st_mtime}
        entries.append({**about, "type": kind or "other"})
    return entries


def remove(uri: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens where there is none."""

    def rm(fs: fsspec.AbstractFileSystem, path: str) -> None:
        if not glob.has_magic(path):
            fs.rm(path, recursive=True)
            return
        for file in fs.find(path):  # a name with * or [ would stand for others too
            fs.rm_file(file)
        if is_local(uri) and fs.isdir(path):
            shutil.rmtree(path)

    with contextlib.suppress(FileNotFoundError):
        ask(uri, rm)


def stamp(uri: str) -> list:
    """[size, what changes with the contents] of a file, to notice that it was changed."""
    return _stamp(ask(uri, lambda fs, path: fs.info(path)))


def _stamp(info: dict) -> list:
    changes = (info[key] for key in ("ETag", "mtime", "LastModified", "created") if key in info)
    return [info.get("size"), str(next(changes, ""))]


def state(uri: str) -> tuple:
    """What tells that a small local file was changed; a remote one is read once a process."""
    return tuple(stamp(uri)) if is_local(uri) and exists(uri) else ()


def read_bytes(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    """A file's bytes, or `size` of them from `offset`: fewer where the file ends before."""
    if is_local(uri):
        with open(uri.removeprefix("file://"), "rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)
    if size == 0:
        return b""
    end = None if size is None else offset + size
    return ask(uri, lambda fs, path: fs.cat_file(path, start=offset or None, end=end))


def read_text(uri: str) -> str:
    return read_bytes(uri).decode("utf-8")


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file or nothing: other readers never see a part, a crash leaves none."""
    if is_local(uri):
        with temporary(uri) as path:
            Path(path).write_bytes(data)
        return
    # Object stores show an object only when it is complete.
    ask(uri, lambda fs, path: fs.pipe_file(path, data))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def temporary(uri: str) -> Iterator[str]:
    """A local path to write to; on leaving without an error it becomes the file at `uri`.

    It is locked while it is written: a file of this name without a lock was left by a process that
    was killed.
    """
    if is_local(uri):  # beside the file, where a move is atomic
        folder = os.path.dirname(uri.removeprefix("file://"))
    else:
        folder = os.path.join(tempfile.gettempdir(), f"halftone-{os.getuid()}")
    os.makedirs(folder, exist_ok=True)
    _first_sweep(folder)
    file, path = _new_locked_file(folder)
    with file:
        try:
            yield path
            _publish(path, uri)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def sweep(folder: str) -> None:
    """Remove the temporary files that killed processes left in a folder."""
    if not is_local(folder):
        return
    for path in Path(folder.removeprefix("file://")).glob(f"{WRITING}*"):
        with contextlib.suppress(OSError), open(path, "r+b") as file:  # OSError: locked, or gone
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


_first_sweep = functools.cache(sweep)  # of this process in this folder


def _new_locked_file(folder: str) -> tuple[BinaryIO, str]:
    while True:
        handle, path = tempfile.mkstemp(prefix=WRITING, dir=folder)
        file = os.fdopen(handle, "wb")
        with contextlib.suppress(OSError):  # a file system without locks: never swept
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return file, path
        file.close()  # it was swept away before it was locked


def _publish(path: str, uri: str) -> None:
    if not is_local(uri):
        ask(uri, lambda fs, there: fs.put_file(path, there))
        return
    uri = uri.removeprefix("file://")
    os.chmod(path, 0o644)  # mkstemp's 0600 would lock out other users of a shared folder
    _to_disk(path)
    os.replace(path, uri)
    _to_disk(os.path.dirname(uri))  # the new name


def _to_disk(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(uri: str) -> Iterator[None]:
    """Alone among the processes that enter this: by a lock on a local file, which stays.

    Nothing is locked where the file is remote, or its file system has no locks.
    """
    if not is_local(uri):
        yield
        return
    path = uri.removeprefix("file://")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fingerprint(*parts: Any) -> str:
    """16 hex digits that stand for all the JSON-able parts: same parts, same digits."""
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode())[:16]
