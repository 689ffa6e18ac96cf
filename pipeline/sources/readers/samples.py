"""Tars as samples: neighbouring members of one name up to its first dot, and what they say.

    000000010.jpg 000000010.txt 000000010.json

Endings are read in any case. The picture is the member with an image type's ending, else the
features are the `.npy`. Captions are those of the JSON, else the text member is one, or one a line.
What is wrong with a sample is noted on it; what is wrong with the tar is raised.
"""

import functools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from pipeline.errors import InputError
from pipeline.sources.readers import cells, pictures, tars
from pipeline.sources.readers.cells import Caption
from pipeline.storage import store, text_files
from schemas.settings import SourceSettings

NAME = re.compile(r"(?:\./)*((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # the key, and the ending
TEXTS = ("txt", "text", "caption")
FEATURES = "npy"
TEXT_BYTES = 1 << 24  # of a text or JSON member; a longer one is no caption
DECODER = json.JSONDecoder(parse_constant=lambda _: None)  # NaN is none
KEY = "__key__"  # as webdataset calls a sample's name
# What can be wrong with a sample, and what to do.
FAULTS = {
    "a member that is there twice": "give every sample a key of its own",
    "a member that is no plain file": "write the tar from plain files "
    "(`tar --dereference --hard-dereference`)",
    "a member that cannot be used": "mend it, or take the sample out",
    "two pictures in one sample": "say which with --source.image_column, such as jpg; names are "
    "cut at their first dot, so a key may have none",
    "a sample without picture or features": "add KEY.jpg, KEY.png or KEY.npy, take it out, or "
    "name the ending with --source.image_column",
    "a sample without caption": "add KEY.txt, or KEY.json with a caption, take it out, or name "
    "the ending or the JSON's field with --source.caption_column",
    "a sample without id": "name another field of the JSON with --source.id_column, or "
    f"{KEY} to call samples after their names",
    "two samples of one id that differ": "give every image an id of its own, or "
    f"--source.id_column {KEY} to call samples after their names",
}


class Fault(NamedTuple):
    """What is wrong with a sample: a kind of `FAULTS`, and the place."""

    kind: str
    detail: str


class Reading(NamedTuple):
    """How samples are read, where settings say more than the members do."""

    picture: tuple[str, ...] = ()  # endings of the picture's member, the first that is there
    caption: tuple[str, ...] = ()  # fields of the JSON, or endings of the caption's member
    id: str | None = None  # the field of the JSON that every sample must have
    lines: bool | None = None  # whether a text member holds a caption a line; None: not known

    @classmethod
    def of(cls, settings: SourceSettings, tar: str) -> "Reading":
        lines = {"auto": lines_of(tar), "lines": True, "one": False}[settings.text_captions]
        named = (settings.image_column or "").lower(), settings.caption_column or ""
        picture, caption = (
            tuple(name.strip().removeprefix(".") for name in given.split(";") if name.strip())
            for given in named  # as WebDataset lists names: jpg;png
        )
        return cls(picture, caption, settings.id_column, lines)


def lines_of(tar: str) -> bool | None:
    """True where a dataset_type.txt beside the tar, or one folder above, says retrieval."""
    folder = tar.rpartition("/")[0]
    places = (store.join(f, "dataset_type.txt") for f in (folder, folder.rpartition("/")[0]) if f)
    return any(_says_retrieval(uri, store.state(uri)) for uri in places) or None


@functools.lru_cache(maxsize=64)
def _says_retrieval(uri: str, state: tuple) -> bool:
    return store.exists(uri) and store.read_text(uri).strip().lower() == "retrieval"


@dataclass
class Sample:
    """The members of one key, and what they say."""

    key: str
    offset: int  # of its first member's data
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)  # by ending, small letters
    texts: dict[str, str] = field(default_factory=dict)  # of the members that are text, by ending
    about: dict = field(default_factory=dict)  # the JSON
    picture: tarfile.TarInfo | None = None  # or features
    image_id: str | None = None  # where the JSON has one
    split: str | None = None  # where the JSON has one
    captions: list[Caption] = field(default_factory=list)
    by_line: bool = False  # its caption is a text member of several lines
    faults: list[Fault] = field(default_factory=list)

    def wrong(self, kind: str, detail: str) -> None:
        self.faults.append(Fault(kind, detail))


def read(file: BinaryIO, reading: Reading) -> Iterator[Sample]:
    """The samples of a tar in order; raises `tars.Broken`."""
    sample, places, several = None, {}, Counter()
    members = 0
    for members, member in enumerate(tars.members(file), 1):  # noqa: B007
        if member.isdir() or not (named := NAME.fullmatch(member.name)):
            continue  # of no sample, such as README
        if tars.hidden(member.name):
            continue
        key, ending = named.groups()
        if sample is None or sample.key != key:
            if sample:
                several[_finished(sample, reading).by_line] += bool(sample.captions)
                yield sample
            if (before := places.get(key)) is not None:
                here = f"{member.name!r} at byte {member.offset_data:,}"
                why = f"{here}; others of {key!r} begin at byte {before:,}"
                raise tars.Broken("a sample whose members are not adjacent", why)
            sample = Sample(key, member.offset_data)
            places[key] = member.offset_data
        _add(sample, ending.lower(), member, file, reading)
    if sample:
        several[_finished(sample, reading).by_line] += bool(sample.captions)
        yield sample
    elif members:
        raise tars.Broken("nothing to use", f"none of its {members:,} members is called KEY.ending")
    if reading.lines is None and several[True] > 1 and not several[False]:
        why = f"in each of {several[True]:,} samples, the last {sample.key!r}"
        raise tars.Broken("every .txt holds several lines", why)


def _add(
    sample: Sample, ending: str, member: tarfile.TarInfo, file: BinaryIO, reading: Reading
) -> None:
    if ending in sample.members:
        place = f"{member.name!r}, again at byte {member.offset_data:,}"
        sample.wrong("a member that is there twice", place)
        return
    is_text = ending in TEXTS or ending == "json" or ending in _endings(reading.caption)
    if not member.isreg() or member.issparse():
        if is_text or ending in _payloads(reading.picture):
            kind = f"a link to {member.linkname!r}" if member.linkname else "sparse or a device"
            sample.wrong("a member that is no plain file", f"{member.name!r} is {kind}")
        return
    sample.members[ending] = member
    if is_text:
        try:
            sample.texts[ending] = _text(file, member)
            if ending == "json":
                sample.about = _about(sample.texts[ending])
        except ValueError as why:
            sample.wrong("a member that cannot be used", f"{member.name!r}: {why}")


@functools.cache
def _payloads(named: tuple[str, ...]) -> frozenset[str]:
    """Endings of pictures and features, or those that were named."""
    return frozenset(named or [*(ending[1:] for ending in pictures.TYPES), FEATURES])


@functools.cache
def _endings(named: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.lower() for name in named)


def _text(file: BinaryIO, member: tarfile.TarInfo) -> str:
    if member.size > TEXT_BYTES:
        raise ValueError(f"{member.size:,} bytes are no caption")
    file.seek(member.offset_data)
    data = file.read(member.size)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("not UTF-8 text but UTF-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at {error.start:,}"
        raise ValueError(f"not UTF-8 text ({byte})") from None


def _about(text: str) -> dict:
    try:
        about = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(about, dict):
        raise ValueError(f"JSON, but no object: {text[:40]!r}")
    return about


# ---- what the members say ------------------------------------------------------------------------


def _finished(sample: Sample, reading: Reading) -> Sample:
    """The sample once all its members are there."""
    _find_picture(sample, reading)
    try:
        sample.image_id = _name(sample.about, reading.id or "image_id")
        sample.split = _name(sample.about, "split")
        sample.captions = _captions(sample, reading)
    except InputError as why:
        sample.wrong("a member that cannot be used", f"{sample.key + '.json'!r}: {why}")
        return sample
    if reading.id not in (None, KEY) and sample.image_id is None:
        sample.wrong("a sample without id", f"{sample.key!r} has no {reading.id!r} in a JSON")
    if not any(caption.text.strip() for caption in sample.captions):
        problem = next((f": {c.problem}" for c in sample.captions if c.problem), "")
        sample.wrong("a sample without caption", _there(sample) + problem)
    return sample


def _there(sample: Sample) -> str:
    return f"{sample.key!r} has " + (", ".join(f".{e}" for e in sample.members) or "no member")


def _find_picture(sample: Sample, reading: Reading) -> None:
    found = [ending for ending in sample.members if ending in _payloads(reading.picture)]
    if reading.picture:
        found = sorted(found, key=reading.picture.index)[:1]
    elif len(found) > 1:
        found = [ending for ending in found if ending != FEATURES]
    if len(found) > 1:
        sample.wrong("two pictures in one sample", _there(sample))
    elif found:
        sample.picture = sample.members[found[0]]
    else:
        sample.wrong("a sample without picture or features", _there(sample))


def _name(about: dict, field: str) -> str | None:
    try:
        name = cells.identifier(about.get(field))
        (name or "").encode()
    except UnicodeEncodeError as error:
        raise InputError(f"its {field} holds half a character, {error.object!r}") from None
    except InputError as why:
        raise InputError(f"its {field} {why}") from None
    return name


def _captions(sample: Sample, reading: Reading) -> list[Caption]:
    """The captions of a field of the JSON, else of a text member."""
    about, texts = sample.about, sample.texts
    for name in reading.caption or ("captions", "caption"):
        value = about.get(name)
        if isinstance(value, str) and "caption_id" in about:
            value = {"caption_id": about["caption_id"], "text": value}
        if found := cells.captions(value):
            return found
    endings = _endings(reading.caption) or TEXTS
    text = next((texts[ending] for ending in endings if ending in texts and ending != "json"), "")
    lines = [line for line in text_files.LINE_END.split(text) if line.strip()]
    sample.by_line = len(lines) > 1
    if reading.lines:
        return [Caption(None, line) for line in lines]
    return cells.captions(text) if text.strip() else []


# ---- images --------------------------------------------------------------------------------------


@dataclass
class Image:
    """What the samples of one picture say, or one sample that is set aside."""

    image_id: str
    sample: Sample  # the first
    captions: list[Caption] = field(default_factory=list)  # each with an id


def images(samples: Iterable[Sample], name: str) -> Iterator[Image]:
    """The images of a tar whose samples are called after `name`.

    Samples with one id in their JSON are one image, as where every caption is a sample of its own.
    Numbers that call captions of several images are an image's own, and follow its id.
    """
    held: dict[str | int, Image] = {}  # by id, or a number where there is none
    for number, sample in enumerate(samples):
        known, own_name = sample.image_id, f"{name}-{sample.key}"
        if known in held and (why := _differ(held[known].sample, sample)):
            sample.wrong("two samples of one id that differ", f"{known!r} is {why}")
        captions = [
            caption._replace(id=(not sample.faults and caption.id) or f"{own_name}#{k}")
            for k, caption in enumerate(sample.captions)
        ]
        if sample.faults:  # its name and ids are its own, and stand in nobody's way
            yield Image(own_name, sample, captions)
            continue
        image = held.setdefault(known or number, Image(known or own_name, sample))
        image.captions += captions
        if known is None and not any(map(_is_number, captions)):
            yield held.pop(number)  # no other sample has a say in it
    called = Counter(
        id_ for i in held.values() for id_ in {c.id for c in filter(_is_number, i.captions)}
    )
    own = any(count > 1 for count in called.values())
    for image in held.values():
        if own:
            image.captions = [
                c._replace(id=f"{image.image_id}#{c.id}") if _is_number(c) else c
                for c in image.captions
            ]
        yield image


def _is_number(caption: Caption) -> bool:
    return caption.id.isdecimal()


def _differ(one: Sample, two: Sample) -> str:
    """How two samples cannot be of one picture; empty where they can."""
    for what, values in (
        ("bytes", [sample.picture and sample.picture.size for sample in (one, two)]),
        ("split", [sample.split for sample in (one, two)]),
    ):
        if values[0] != values[1]:
            return f"{one.key!r} ({what}: {values[0]}) and {two.key!r} ({what}: {values[1]})"
    return ""
