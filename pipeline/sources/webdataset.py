"""Tars of samples as WebDataset, img2dataset, open_clip and this pipeline write them.

    000000010.jpg 000000010.txt 000000010.json        members of one name, up to its first dot

`source.path` names the tars: one, a folder of them, `data/*.tar` or `data/{00000..00099}.tar`. They
stay as they are; an image is read by its range of bytes (`TAR#OFFSET+SIZE`). An image is called by
the JSON's `image_id` (or `source.id_column`), as in our own shards, else after its tar and name. A
sample that cannot be used is set aside with its reason.
"""

import re
from collections.abc import Iterator

from pipeline.errors import InputError
from pipeline.sources.readers import annotations, fetch, problems, samples, tars
from pipeline.storage import store
from schemas.settings import SourceSettings

RANGE = re.compile(r"(?P<tar>.+)#(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)
TWICE = "ids that are a tar's own: name another field with --source.id_column, or " + samples.KEY


def parts(settings: SourceSettings) -> list[str]:
    """The tars, sorted by path."""
    uri = annotations.path(settings, tars.EXPECTED)
    if fetch.is_address(uri):
        raise InputError(
            f"source.path {uri} is a web address, of which ranges cannot be relied on; "
            "copy the tars to a folder or an object store"
        )
    return tars.named(settings)


def inputs(settings: SourceSettings, part: str) -> list:
    """The tar's stamp, and whether a .txt was said to hold one caption or several."""
    said = samples.Reading.of(settings, part).lines
    return annotations.stamps([part]) + ([] if said is None else [["lines", said]])


def rows(settings: SourceSettings, part: str) -> Iterator[dict]:
    """Manifest rows in the order of the tar, those of images with an id of their own last."""
    path = annotations.path(settings, tars.EXPECTED)
    name = tars.name(part, path if annotations.is_folder(path) else tars.root(path))
    named = settings.split or tars.split(part, name) or "train"
    used, first = 0, ""
    for image in samples.images(_samples(settings, part), name):
        sample = image.sample
        if sample.faults:
            kind, detail = sample.faults[0]
            reason = f"{kind}: {detail} in {part}; {samples.FAULTS[kind]}"
            first = first or reason
        used += not sample.faults
        uri = problems.uri(reason) if sample.faults else uri_of(part, sample.picture)
        split = _split(sample.split, settings) or named
        yield annotations.row(image.image_id, uri, split, image.captions, "webdataset")
    if first and not used:
        raise InputError(f"no sample of {part} can be used; the first: {first}")


def load(uri: str) -> bytes:
    """The member's bytes."""
    if not (place := RANGE.fullmatch(uri)):
        raise InputError(f"no image in the sample: {uri}")
    size = int(place["size"])
    data = store.read_bytes(place["tar"], int(place["offset"]), size)
    if len(data) < size:
        raise InputError(f"tar is shorter than it was: {uri}")
    return data


def one_image(uris: list[str]) -> bool:
    """Whether rows of several tars with one id are of one picture: members of one size."""
    places = [RANGE.fullmatch(uri) for uri in uris]
    return all(places) and len({place["size"] for place in places}) == 1


def uri_of(part: str, member) -> str:
    return f"{part}#{member.offset_data}+{member.size}"


def _samples(settings: SourceSettings, part: str) -> Iterator[samples.Sample]:
    reading = samples.Reading.of(settings, part)
    try:
        with tars.opened(part) as file:
            for sample in samples.read(file, reading):
                sample.members, sample.texts, sample.about = {}, {}, {}  # a tar may hold millions
                yield sample
    except tars.Broken as broken:
        raise InputError(f"{part} is broken: {broken}") from None


def _split(word: str | None, settings: SourceSettings) -> str | None:
    """The split that a sample's own word means; as it is where `source.splits` has it."""
    if word is None or word in settings.splits:
        return word
    return annotations.SPLIT_WORDS.get(word.lower(), word)
