"""Tars of samples as WebDataset, img2dataset, open_clip and this pipeline write them.

    000000010.jpg 000000010.txt 000000010.json        members of one name, up to its first dot

`source.path` names the tars: one, a folder of them, `data/*.tar` or `data/{00000..00099}.tar`. They
stay as they are; an image is read by its range of bytes (`TAR#OFFSET+SIZE`). Captions are those of
the JSON (`captions` or `caption`), else the .txt is one. An image is called by the JSON's
`image_id`, as in our own shards, else after its tar and name. A sample without an image or a
caption is kept for the shard stage to set aside.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.errors import InputError
from pipeline.sources.part import Part
from pipeline.sources.readers import annotations, cells, fetch, pictures
from pipeline.storage import store, text_files
from schemas.settings import SourceSettings

EXPECTED = "a .tar, a folder of them, or a pattern (data/*.tar, data/{00000..00099}.tar)"
inputs = annotations.stamp_of_part
SETTINGS: set[str] = set()
RANGE = re.compile(r"(?P<tar>.+)#(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # a sample's name, and the suffix
PAYLOADS = (*(ending[1:] for ending in pictures.TYPES), "npy")
TEXT_BYTES = 1 << 24  # of a .txt or .json member; a longer one is no caption


@dataclass
class _Sample:
    """The members of one name: where the image is, and what was read of the others."""

    name: str
    suffixes: list[str] = field(default_factory=list)
    image: str | None = None  # URI of its range
    text: str | None = None
    about: dict = field(default_factory=dict)


def parts(settings: SourceSettings) -> list[str]:
    """The tars, sorted by name."""
    uri = annotations.path(settings, EXPECTED)
    if fetch.is_address(uri):
        raise InputError(
            f"source.path {uri} is a web address, of which ranges cannot be relied on; "
            "copy the tars to a folder or an object store"
        )
    if not annotations.is_folder(uri):
        return annotations.files(settings, EXPECTED)
    names = sorted(name for name in store.list_files(uri) if name.endswith(".tar"))
    if not names:
        raise InputError(f"there is no .tar in source.path {uri}; expected {EXPECTED}")
    return [store.join(uri, name) for name in names]


def rows(settings: SourceSettings, part: Part) -> Iterator[dict]:
    """Manifest rows in the order of the tar."""
    for sample in _samples(part.uri):
        about = sample.about
        image_id = cells.identifier(about.get("image_id")) or f"{part.name}-{sample.name}"
        uri = sample.image or f"{part.uri}#{sample.name}"
        keys = ("captions", "caption")
        found = next((about[key] for key in keys if not cells.is_none(about.get(key))), sample.text)
        yield annotations.row(image_id, uri, cells.captions(found), split=about.get("split"))


def files_of(uri: str) -> tuple[str, ...]:
    """The tar that an image is in."""
    place = RANGE.fullmatch(uri)
    return (place["tar"],) if place else ()


def load(uri: str) -> bytes:
    """The member's bytes."""
    if not (place := RANGE.fullmatch(uri)):
        raise InputError(f"no image in the sample: {uri}")
    size = int(place["size"])
    data = store.read_bytes(place["tar"], int(place["offset"]), size)
    if len(data) < size:
        raise InputError(f"tar is shorter than it was: {uri}")
    return data


def _samples(part: str) -> Iterator[_Sample]:
    """Samples of a tar that is whole: neighbouring members with one name up to the first dot."""
    sample = None
    for member, data in _members(part):
        if not (named := MEMBER.fullmatch(member.name)):
            continue  # of no sample, such as README or a Mac's ._000000010.jpg
        name, suffix = named.groups()
        if sample is None or sample.name != name:
            if sample:
                yield sample
            sample = _Sample(name)
        _add(sample, suffix.lower(), member, data, part)
    if sample:
        yield sample


def _add(sample: _Sample, suffix: str, member: tarfile.TarInfo, data: bytes | None, part: str):
    if suffix in sample.suffixes:
        twice = f"{part} has two members {member.name!r} in one sample"
        raise InputError(f"{twice}; rename one of them")
    sample.suffixes.append(suffix)
    if suffix in PAYLOADS and not sample.image:
        sample.image = f"{part}#{member.offset_data}+{member.size}"
    elif data is not None and suffix in ("txt", "json"):
        try:
            text = data.decode("utf-8")
            if suffix == "txt":
                sample.text = text
            elif isinstance(about := json.loads(text), dict):
                sample.about = about
        except ValueError as error:
            kind = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "JSON"
            raise InputError(f"{part} member {member.name!r} is not {kind}: {error}") from None


def _members(part: str) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Regular members, with their bytes where they are texts; refuses a tar that is torn."""
    last = "its beginning"
    with text_files.binary(part, EXPECTED) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as tar:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # else it would remember all
                    if member.isreg() and not member.issparse():
                        yield member, _text(file, member)
                    last = repr(member.name)
                # A tar ends with a block of zeros; one cut between members, or with a bad header,
                # does not.
                file.seek(tar.offset)
                block = file.read(tarfile.BLOCKSIZE)
                if len(block) < tarfile.BLOCKSIZE or any(block):
                    raise tarfile.ReadError("there is neither a member nor the mark of the end")
        except (tarfile.TarError, OSError) as error:
            raise InputError(
                f"{part} is not a whole .tar after {last} ({error}); copy it again, unpack it if "
                "it is compressed, or leave it out of source.path"
            ) from None


def _text(file: BinaryIO, member: tarfile.TarInfo) -> bytes | None:
    if not member.name.lower().endswith((".txt", ".json")) or member.size > TEXT_BYTES:
        return None
    file.seek(member.offset_data)
    if len(data := file.read(member.size)) < member.size:
        raise tarfile.ReadError(f"it ends inside {member.name!r}")
    return data
