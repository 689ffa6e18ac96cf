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
from pipeline.sources import notes
from pipeline.sources.part import Part
from pipeline.sources.readers import annotations, fetch, samples, tars
from pipeline.storage import store
from schemas.settings import SourceSettings

EXPECTED = "a .tar, a folder of them, or a pattern (data/*.tar, data/{00000..00099}.tar)"
SETTINGS = {"image_column", "caption_column", "id_column", "text_captions"}
RANGE = re.compile(r"(?P<tar>.+)#(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)


def parts(settings: SourceSettings) -> list[str]:
    """The tars, sorted by path."""
    uri = annotations.path(settings, EXPECTED)
    if fetch.is_address(uri):
        raise InputError(
            f"source.path {uri} is a web address, of which ranges cannot be relied on; "
            "copy the tars to a folder or an object store"
        )
    if annotations.is_folder(uri):
        found = [store.join(uri, name) for name in tars.in_folder(uri)]
    else:
        found = annotations.files(settings, EXPECTED)
    if not found:
        raise InputError(f"there is no .tar in source.path {uri}; expected {EXPECTED}")
    if packed := [file for file in found if tars.is_compressed(file)]:
        raise InputError(f"{packed[0]} is a compressed tar; {tars.FAULTS['compressed tar']}")
    return found


def inputs(settings: SourceSettings, part: str) -> list:
    """The tar's stamp, and whether a .txt was said to hold one caption or several."""
    said = samples.Reading.of(settings, part).lines
    return annotations.stamps([part]) + ([] if said is None else [["lines", said]])


def rows(settings: SourceSettings, part: Part) -> Iterator[dict]:
    """What is said of each image in the order of the tar, of those with an id of their own last."""
    used, first = 0, ""
    for image in samples.images(_samples(settings, part.uri), part.name):
        sample, problem = image.sample, None
        if sample.faults:
            kind, detail = sample.faults[0]
            problem = f"{kind}: {detail} in {part.uri}; {samples.FAULTS[kind]}"
            first = first or problem
        used += not problem
        place = sample.picture
        uri = (
            f"{part.uri}#{place.offset_data}+{place.size}" if place else f"{part.uri}#{sample.key}"
        )
        yield annotations.row(
            image.image_id, uri, image.captions, split=sample.split, problem=problem
        )
    if first and not used:
        notes.add("tars in which no sample can be used", f"{part.uri}, for {first}")


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


def one_image(uris: list[str]) -> bool:
    """Whether rows of several tars with one id are of one picture: members of one size."""
    places = [RANGE.fullmatch(uri) for uri in uris]
    return all(places) and len({place["size"] for place in places}) == 1


def _samples(settings: SourceSettings, part: str) -> Iterator[samples.Sample]:
    reading = samples.Reading.of(settings, part)
    try:
        with tars.opened(part) as file:
            for sample in samples.read(file, reading):
                sample.members, sample.texts, sample.about = {}, {}, {}  # a tar may hold millions
                yield sample
    except tars.Broken as broken:
        raise InputError(f"{part} is broken: {broken}") from None
