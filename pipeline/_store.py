"""Files at any URI: absolute names, whole-or-nothing writes, fingerprints.

A local path and s3://, gs://, memory:// … are used alike, through fsspec.
"""

import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

FINGERPRINT = b"halftone.fingerprint"
SUMMARY = b"halftone.summary"


def absolute(uri: str) -> str:
    """The URI unchanged, or a local path made absolute (workers run in other directories)."""
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def is_local(uri: str) -> bool:
    return "://" not in uri


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def name_of(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def exists(uri: str) -> bool:
    fs, path = fsspec.core.url_to_fs(uri)
    return fs.exists(path)


def list_files(folder: str) -> dict[str, int]:
    """Size in bytes of every file directly in a folder, by name; empty where there is no folder."""
    fs, path = fsspec.core.url_to_fs(folder)
    try:
        entries = fs.ls(path, detail=True, refresh=True)
    except FileNotFoundError:
        return {}
    return {name_of(e["name"]): e["size"] for e in entries if e["type"] == "file"}


def list_folders(folder: str) -> list[str]:
    """Names of the folders directly in a folder, sorted."""
    fs, path = fsspec.core.url_to_fs(folder)
    try:
        entries = fs.ls(path, detail=True, refresh=True)
    except FileNotFoundError:
        return []
    return sorted(name_of(e["name"]) for e in entries if e["type"] == "directory")


def remove(uri: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens where there is none."""
    fs, path = fsspec.core.url_to_fs(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def stamp(uri: str) -> list:
    """[size, modification time] of a file, to notice that it was changed."""
    fs, path = fsspec.core.url_to_fs(uri)
    info = fs.info(path)
    changed = info.get("mtime") or info.get("LastModified") or info.get("ETag") or ""
    return [info.get("size"), str(changed)]


def read_bytes(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    if is_local(uri):
        with open(uri, "rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)
    fs, path = fsspec.core.url_to_fs(uri)
    return fs.cat_file(path, offset, None if size is None else offset + size)


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
    fs, path = fsspec.core.url_to_fs(uri)
    fs.pipe_file(path, data)  # object stores show an object only when it is complete


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


class temporary:
    """A local path to write to; on leaving without an error it becomes the file at `uri`."""

    def __init__(self, uri: str):
        self.uri = uri

    def __enter__(self) -> str:
        folder = None
        if is_local(self.uri):
            folder = os.path.dirname(self.uri)
            os.makedirs(folder, exist_ok=True)
        handle, self.path = tempfile.mkstemp(prefix=".writing-", dir=folder)
        os.close(handle)
        return self.path

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            if os.path.exists(self.path):
                os.remove(self.path)

    def _publish(self) -> None:
        if not is_local(self.uri):
            fs, path = fsspec.core.url_to_fs(self.uri)
            fs.put_file(self.path, path)
            return
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(self.path, 0o644)  # mkstemp's 0600 would lock out other users of a shared folder
        os.replace(self.path, self.uri)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fingerprint(*parts: Any) -> str:
    """16 hex digits that stand for all the JSON-able parts: same parts, same digits."""
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode())[:16]


def write_table(uri: str, table: pa.Table, fingerprint: str, summary: dict, **metadata) -> dict:
    """Write Parquet with its fingerprint and summary; the summary with the file's size and hash."""
    extra = {FINGERPRINT: fingerprint, SUMMARY: json.dumps(summary, sort_keys=True)}
    extra |= {f"halftone.{key}": str(value) for key, value in metadata.items()}
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({**(table.schema.metadata or {}), **extra}),
        buffer,
        compression="zstd",
    )
    data = buffer.getvalue()
    write_bytes(uri, data)
    return _with_file(summary, uri, data)


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(pa.BufferReader(read_bytes(uri)), columns=columns)


def finished(uri: str, fingerprint: str) -> dict | None:
    """The summary `write_table` returned for this file, if it is there with this fingerprint.

    So must be, at their sizes, the other files the summary names (a shard's tar).
    """
    try:
        data = read_bytes(uri)
        metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
    except (OSError, pa.ArrowInvalid):  # not there, or torn: a bad footer is an OSError
        return None
    if metadata.get(FINGERPRINT, b"").decode() != fingerprint:
        return None
    summary = json.loads(metadata[SUMMARY])
    for name, file in summary.get("files", {}).items():
        beside = join(uri.rpartition("/")[0], name)
        if not exists(beside) or stamp(beside)[0] != file["bytes"]:
            return None
    return _with_file(summary, uri, data)


def _with_file(summary: dict, uri: str, data: bytes) -> dict:
    own = {name_of(uri): {"bytes": len(data), "sha256": sha256(data)}}
    return {**summary, "files": {**summary.get("files", {}), **own}}
