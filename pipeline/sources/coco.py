"""COCO's caption files: `captions_train2017.json`, `captions_val2017.json`, one or a pattern.

    {"images": [{"id": 391895, "file_name": "000000391895.jpg"}],
     "annotations": [{"id": 770337, "image_id": 391895, "caption": "A man with a red helmet."}]}

A file is a split, which its name says, or `source.split`. Images are in `source.images`, or in the
folder inside it that the file's name ends with (`train2017`); without it they are fetched from
their `coco_url`. A caption's id is its annotation's, as in the files that refer to COCO's captions.
"""

import functools
from collections.abc import Iterator

from pipeline.errors import InputError
from pipeline.sources.readers import annotations
from pipeline.storage import store
from schemas.settings import SourceSettings

EXPECTED = "a COCO caption file (captions_val2017.json), or a pattern (captions_*.json)"
inputs = annotations.stamp_of_part
_field = functools.partial(annotations.field, expected=EXPECTED)


def parts(settings: SourceSettings) -> list[str]:
    """The JSON files, sorted by name."""
    return annotations.files(settings, EXPECTED)


def rows(settings: SourceSettings, part: str) -> Iterator[dict]:
    """Manifest rows in the order of the file's images."""
    split = settings.split or annotations.split_of(part)
    if not split:
        raise InputError(f"the name of {part} says no split (train, val, test); set source.split")
    content = annotations.read_json(part, EXPECTED)
    names = {}  # by COCO's number of the image
    for number, image in enumerate(images := _field(content, "images", list, part)):
        where = f"{part} image {number}"
        coco_id = _field(image, "id", int, where)
        if coco_id in names:
            raise InputError(f"{where} has id {coco_id}, as an earlier one; give each its own")
        names[coco_id] = _field(image, "file_name", str, where)
    captions = _captions(content, names, part)
    ids = annotations.image_ids(names.values())
    folder = annotations.image_folder(settings) if settings.images else ""
    inside = store.join(folder, store.name_of(part).removesuffix(".json").rpartition("_")[2])
    folder = inside if folder and annotations.is_folder(inside) else folder
    for image in images:
        name = names[image["id"]]
        if not folder and not image.get("coco_url"):
            raise InputError(
                f"source.images is not given, and image {image['id']} of {part} has no 'coco_url'; "
                "give the folder of the image files"
            )
        uri = store.join(folder, name) if folder else image["coco_url"]
        yield annotations.row(ids[name], uri, split, captions[image["id"]], "coco")


def _captions(content: dict, names: dict[int, str], part: str) -> dict[int, list[tuple[str, str]]]:
    """Captions with their ids, by COCO's number of the image."""
    captions = {coco_id: [] for coco_id in names}
    for number, annotation in enumerate(_field(content, "annotations", list, part)):
        where = f"{part} annotation {number}"
        image_id = _field(annotation, "image_id", int, where)
        caption_id = str(_field(annotation, "id", int, where))
        if image_id not in captions:
            raise InputError(f"{where} is of image {image_id}, which is not among 'images'")
        captions[image_id].append((caption_id, _field(annotation, "caption", str, where)))
    return captions
