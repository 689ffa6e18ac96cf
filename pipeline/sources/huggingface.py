"""Hugging Face data sets: a folder that `save_to_disk` wrote, or `hf://OWNER/NAME` of the Hub.

`hf://OWNER/NAME@REVISION/CONFIGURATION` says more exactly which. The image column holds images,
bytes, paths or addresses; the caption column a text, a list of them, or records (`{"raw": …}`).
With `source.id_column` the rows of an image are gathered, where there is a row a caption. The data
set's own splits count, unless a column says another. Needs the `datasets` library, also where the
images are loaded.
"""

import functools
import re
import threading
from collections.abc import Iterator

from pipeline.errors import InputError
from pipeline.sources.readers import annotations, tables
from pipeline.storage import store
from schemas.settings import SourceSettings

EXPECTED = "a folder that Dataset.save_to_disk wrote, or hf://OWNER/NAME"
NAME = re.compile(
    r"hf://(datasets/)?(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<config>.+))?"
)
CELL = re.compile(r"(?P<path>.+)#(?P<split>[^#/]+)/(?P<column>.+)/(?P<row>\d+)", re.DOTALL)
PART_ROWS = 10_000  # of a part


def parts(settings: SourceSettings) -> list[str]:
    """'train:0:10000' and so on: a split and a range of its rows, or all if rows are gathered."""
    path = annotations.path(settings, EXPECTED)
    return [
        f"{split}:{start}:{min(start + step, len(rows))}"
        for split, rows in _opened(path).items()
        for step in [len(rows) or 1 if settings.id_column else PART_ROWS]
        for start in range(0, len(rows), step)
    ]


def inputs(settings: SourceSettings, part: str) -> list:
    """The fingerprint that the library gives a split."""
    dataset = _opened(annotations.path(settings, EXPECTED))
    return [dataset[part.split(":")[0]]._fingerprint]


def rows(settings: SourceSettings, part: str) -> Iterator[dict]:
    """Manifest rows, one for each image in the order of first appearance."""
    path = annotations.path(settings, EXPECTED)
    return tables.images(_records(settings, path, part), f"{path} {part}", "huggingface")


def load(uri: str) -> bytes:
    """The bytes in a row's image column, or those of the file it names."""
    if not (cell := CELL.fullmatch(uri)):
        return store.read_bytes(uri)
    with _LOCK:  # threads of a shard ask for the same one at once
        images = _images(cell["path"], cell["split"], cell["column"])
    value = images[int(cell["row"])][cell["column"]]
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return data
    if isinstance(value, dict) and value.get("path"):
        return store.read_bytes(value["path"])
    raise InputError(f"no image in the row: {uri}")


def _records(settings: SourceSettings, path: str, part: str) -> Iterator[tables.Record]:
    split, start, stop = part.split(":")
    dataset = _opened(path)[split]
    there = dataset.column_names
    image, caption, split_column, id_column = tables.columns(settings, there, f"{path} {split}")
    written = getattr(dataset.features[image], "dtype", None) in ("string", "large_string")
    wanted = {caption, split_column, id_column, image if written else None} - {None}
    folder = annotations.image_folder(settings) if settings.images else path
    known = settings.split or annotations.SPLIT_WORDS.get(split, split)
    table = dataset.select_columns(sorted(wanted)).select(range(int(start), int(stop)))
    for number, row in enumerate(table, int(start)):
        written_path, uri = None, f"{path}#{split}/{image}/{number}"
        if written:
            where = f"{path} {split} row {number}"
            written_path = annotations.image_path(row[image], image, where)
            uri = annotations.image_uri(folder, written_path)
        captions, name = annotations.texts(row[caption]), f"{split}-{number:06d}"
        image_id, said = tables.text(row.get(id_column)), tables.text(row.get(split_column))
        yield tables.Record(uri, written_path, captions, said or known, image_id, name)


@functools.lru_cache(maxsize=16)
def _images(path: str, split: str, column: str):
    """The column alone, images as the bytes they are stored as."""
    dataset = _opened(path)[split].select_columns([column])
    if type(dataset.features[column]).__name__ == "Image":
        dataset = dataset.cast_column(column, _library().Image(decode=False))
    return dataset


def _library():
    try:
        import datasets
    except ImportError:
        raise InputError(
            "the huggingface source needs the datasets library; run `pip install datasets`"
        ) from None
    return datasets


_LOCK = threading.Lock()


@functools.lru_cache(maxsize=4)
def _opened(path: str) -> dict:
    """The splits by name; rows stay on disk until they are asked for."""
    library = _library()
    if not path.startswith("hf://") and not annotations.is_folder(path):
        raise InputError(f"source.path {path} does not exist; expected {EXPECTED}")
    named = NAME.fullmatch(path)
    if path.startswith("hf://") and not named:
        raise InputError(f"source.path {path} does not name a data set; expected {EXPECTED}")
    try:
        if named:
            name, config = named["name"], named["config"]
            found = library.load_dataset(name, config, revision=named["revision"])
        else:
            found = library.load_from_disk(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"source.path {path}: {reason}; expected {EXPECTED}") from None
    one = isinstance(found, library.Dataset)
    return {str(found.split or "train"): found} if one else dict(found)
