"""COCO's caption files: `captions_train2017.json`, `captions_val2017.json`, one or a pattern.

    {"images": [{"id": 391895, "file_name": "000000391895.jpg"}],
     "annotations": [{"id": 770337, "image_id": 391895, "caption": "A man with a red helmet."}]}

A file is a split, which its name says, or `source.split`. Images are in `source.images`, or in the
folder inside it that the file's name ends with (`train2017`); without it they are fetched from
their `coco_url`. A caption's id is its annotation's, as in the files that refer to COCO's captions.
"""

import functools
from collections import Counter
from collections.abc import Iterator

from pipeline.errors import InputError
from pipeline.sources import notes
from pipeline.sources.part import Part
from pipeline.sources.readers import annotations, cells, pictures
from pipeline.sources.readers.cells import Caption
from pipeline.sources.readers.pictures import Folder
from pipeline.storage import store, text_files
from schemas.settings import SourceSettings

EXPECTED = "a COCO caption file (captions_val2017.json), or a pattern (captions_*.json)"
SETTINGS = {"images"}
inputs = annotations.stamp_of_part


def parts(settings: SourceSettings) -> list[str]:
    """The JSON files, sorted by name."""
    return annotations.files(settings, EXPECTED)


def prefixes(parts: list[Part]) -> list[tuple[str, str]]:
    """What image and caption ids of each file begin with: its name, where files share ids."""
    if len(parts) == 1:
        return [("", "")]
    known = [_ids(part.uri, str(store.stamp(part.uri))) for part in parts]
    shared = []
    for kind in (0, 1):
        times = Counter(id_ for ids in known for id_ in ids[kind])
        shared.append(any(n > 1 for n in times.values()))
    images, captions = shared
    return [(f"{p.name}/" if images else "", f"{p.name}#" if captions else "") for p in parts]


@functools.lru_cache(maxsize=32)
def _ids(uri: str, stamp: str) -> tuple[frozenset, frozenset]:
    """File names and caption ids of a file."""
    content = text_files.loosely_parsed(uri, EXPECTED)
    named = (("images", "file_name"), ("annotations", "id"))
    found = [
        [e.get(key) for e in content.get(what) or [] if isinstance(e, dict)] for what, key in named
    ]
    names, ids = (frozenset(v for v in values if isinstance(v, str | int)) for values in found)
    return names, ids


def rows(settings: SourceSettings, part: Part) -> Iterator[dict]:
    """Manifest rows in the order of the file's images."""
    if not settings.split and not part.split:
        raise InputError(
            f"the name of {part.uri} says no split (train, val, test); set source.split"
        )
    content = text_files.loosely_parsed(part.uri, EXPECTED)
    names: dict[str, str | None] = {}  # by COCO's number of the image
    folder = _folder(settings, part.uri)
    images = annotations.field(content, "images", list, f"{part.uri} is no COCO file: it")
    for number, image in enumerate(images):
        coco_id = cells.identifier(image.get("id") if isinstance(image, dict) else None)
        if coco_id is None:
            raise InputError(f"{part.uri} image {number} has no id; expected {EXPECTED}")
        if coco_id in names:
            raise InputError(
                f"{part.uri} image {number} has id {coco_id}, as an earlier one; give each its own"
            )
        name = cells.place(image.get("file_name"))
        names[coco_id] = name and folder.path(name)
    captions = _captions(content, names, part)
    ids = pictures.image_ids(name for name in names.values() if name)
    for image, (coco_id, name) in zip(images, names.items(), strict=True):
        where = f"{part.uri} image {coco_id}"
        address, problem = cells.identifier(image.get("coco_url")), None
        if not name:
            problem, uri = f"no file name: {where} has none", where
        elif settings.images:
            uri = folder.find(name)
        elif address:
            uri = address
        else:
            raise InputError(
                f"source.images is not given, and {where} has no 'coco_url'; "
                "give the folder of the image files"
            )
        image_id = part.prefix + (ids[name] if name else coco_id)
        yield annotations.row(image_id, uri, captions[coco_id], problem=problem)


def _folder(settings: SourceSettings, uri: str) -> Folder:
    """`source.images`, or the folder inside it that the file's name ends with (train2017)."""
    folder = annotations.image_folder(settings) if settings.images else ""
    name = store.name_of(uri).removesuffix(".gz").removesuffix(".json")
    inside = store.join(folder, name.rpartition("_")[2])
    return Folder(inside if folder and annotations.is_folder(inside) else folder)


def _captions(content: dict, names: dict[str, str | None], part: Part) -> dict[str, list[Caption]]:
    """Captions with their ids, by COCO's number of the image."""
    captions: dict[str, list[Caption]] = {coco_id: [] for coco_id in names}
    written = annotations.field(content, "annotations", list, f"{part.uri} is no caption file: it")
    for number, annotation in enumerate(written):
        where = f"{part.uri} annotation {number}"
        if not isinstance(annotation, dict):
            raise InputError(f"{where} is no record; expected {EXPECTED}")
        image_id = cells.identifier(annotation.get("image_id"))
        id_ = cells.identifier(annotation.get("id"))
        if image_id not in captions or id_ is None:
            of = f"image {image_id}, which is not among 'images'" if id_ else "no 'id'"
            notes.add("captions that cannot be told whose they are", f"{where} ({of})")
            continue
        found = cells.captions(annotation.get("caption"))
        wrong = Caption(None, "", f"no caption: {where} has none")
        captions[image_id].append((found[0] if found else wrong)._replace(id=part.captions + id_))
    if written and not any(captions.values()):
        raise InputError(f"no annotation of {part.uri} is a caption of one of its images")
    return captions
