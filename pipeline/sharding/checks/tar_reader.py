"""What is in a WebDataset tar, and whether each member is what its ending says."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.sharding import images
from pipeline.storage import store
from schemas.settings import ShardSettings

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
PAYLOADS = (*PICTURES, "npy")
NAME = re.compile(r"(?s)((?:.*/)?[^./]+)\.([^/]+)")  # as webdataset cuts it: at the first dot


class Torn(Exception):
    """The archive ends, or breaks, before its end; the message says where."""


@dataclass
class Sample:
    """Adjacent members with one key."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)  # by ending

    def payload(self) -> tarfile.TarInfo | None:
        """The picture's or the features' member."""
        return next((info for end, info in self.members.items() if end.lower() in PAYLOADS), None)


def open_tar(uri: str) -> BinaryIO:
    """The file, seekable; a remote one is read into memory once."""
    return open(uri, "rb") if store.is_local(uri) else io.BytesIO(store.read_bytes(uri))


def digest(file: BinaryIO) -> tuple[int, str]:
    """Bytes and sha256 of a whole file."""
    file.seek(0)
    value = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    return file.seek(0, io.SEEK_END), value


def members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Every member in order; raises `Torn` after the last good one.

    `tarfile` itself takes a broken header for the end, and does not ask for the two empty blocks
    that close an archive.
    """
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield from tar
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise Torn(str(error)) from error
    file.seek(end)
    closing = file.read(2 * tarfile.BLOCKSIZE)
    if len(closing) < 2 * tarfile.BLOCKSIZE:
        raise Torn(f"it ends at byte {end + len(closing):,} without the blocks that close a tar")
    if any(closing):
        raise Torn(f"no member's header where one should be, at byte {end:,}")


def content(file: BinaryIO, info: tarfile.TarInfo) -> bytes:
    file.seek(info.offset_data)
    return file.read(info.size)


def unusable(name: str, data: bytes, settings: ShardSettings | None) -> str | None:
    """Why a member cannot be used; pictures and features as `shard` checks them, or not at all."""
    ending = name.rpartition(".")[2].lower()
    try:
        if ending == "json":
            if not isinstance(json.loads(data), dict):
                return "JSON, but no object"
        elif ending == "txt":
            if not data.decode("utf-8").strip():
                return "an empty caption"
        elif settings and ending in PAYLOADS:
            images.checked(data, settings)
    except images.Rejected as reason:
        return str(reason)
    except ValueError as error:  # no UTF-8, no JSON
        return str(error)
    return None
