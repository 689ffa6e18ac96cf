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
from typing import Any

from pipeline.errors import InputError
from pipeline.sources.part import Part
from pipeline.sources.readers import annotations, cells, tables
from pipeline.sources.readers.pictures import Folder
from pipeline.storage import store
from schemas.settings import SourceSettings

EXPECTED = "a folder that Dataset.save_to_disk wrote, or hf://OWNER/NAME"
SETTINGS = {"images", "image_column", "caption_column", "split_column", "id_column"}
NAME = re.compile(
    r"hf://(datasets/)?(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<config>.+))?"
)
CELL = re.compile(r"(?P<path>.+)#(?P<split>[^#/]+)/(?P<column>.+)/(?P<row>\d+)", re.DOTALL)
NAMED = False  # a data set's splits are no files
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
    """The fingerprint that the library gives a split, and the stamps of its files."""
    dataset = _opened(annotations.path(settings, EXPECTED))[part.split(":")[0]]
    return [dataset._fingerprint, *annotations.stamps(_files(dataset))]


def rows(settings: SourceSettings, part: Part) -> Iterator[dict]:
    """Manifest rows, one for each image in the order of first appearance."""
    path = annotations.path(settings, EXPECTED)
    return tables.images(_records(settings, path, part.uri), f"{path} {part.uri}")


def files_of(uri: str) -> tuple[str, ...]:
    """The files of the data set that a row is in, or the image file itself."""
    if not (cell := CELL.fullmatch(uri)):
        return (uri,)
    return _files(_opened(cell["path"])[cell["split"]])


def _files(dataset: Any) -> tuple[str, ...]:
    return tuple(file["filename"] for file in dataset.cache_files)


def load(uri: str) -> bytes:
    """The bytes in a row's image column, or those of the file it names."""
    if not (cell := CELL.fullmatch(uri)):
        return store.read_bytes(uri)
    with _LOCK:  # threads of a shard ask for the same one at once
        images = _images(cell["path"], cell["split"], cell["column"])
    found = cells.picture(images[int(cell["row"])][cell["column"]][0].as_py())
    if found is None:
        raise InputError(f"no image in the row: {uri}")
    return store.read_bytes(found) if isinstance(found, str) else found


def _records(settings: SourceSettings, path: str, part: str) -> Iterator[tables.Record]:
    split, start, stop = part.split(":")
    dataset = _opened(path)[split]
    columns = tables.columns(settings, dataset.column_names, f"{path} {split}")
    features = dataset.features
    written = getattr(features[columns.image], "dtype", None) in ("string", "large_string")
    names = _names(features.get(columns.split))
    wanted = {*columns} - {None, None if written else columns.image}
    folder = Folder(annotations.image_folder(settings) if settings.images else path)
    table = dataset.select_columns(sorted(wanted)).select(range(int(start), int(stop)))
    own = split if _is_divided(path) else None
    paths = _paths(dataset, columns.image, range(int(start), int(stop)))
    for number, row in enumerate(table, int(start)):
        where = f"{path} {split} row {number}"
        place = cells.place(row[columns.image]) if written else paths.get(number)
        written_path, uri, problem = None, f"{path}#{split}/{columns.image}/{number}", None
        if place:
            written_path = folder.path(place)
            uri = folder.find(written_path)
        elif written:
            problem = f"no path: {where} has none in {columns.image!r}"
        said = row.get(columns.split)
        said = names[said] if names and isinstance(said, int) and 0 <= said < len(names) else said
        image_id = tables.identifier(row.get(columns.id), columns.id, where)
        captions = cells.captions(row[columns.caption])
        name = f"{split}-{number:06d}"
        said = own if cells.is_none(said) else said
        yield tables.Record(uri, written_path, captions, said, image_id, name, problem)


def _names(feature: Any) -> list[str]:
    """What the numbers of a column of class labels are called."""
    return list(getattr(feature, "names", None) or [])


def _paths(dataset: Any, column: str, rows: range) -> dict[int, str]:
    """The files of a column of images that name them and do not hold their bytes, by row."""
    if type(dataset.features[column]).__name__ != "Image":
        return {}
    table = dataset.with_format("arrow").select_columns([column]).select(rows)[:]
    cells_ = table[column].combine_chunks()
    held, named = cells_.field("bytes").is_valid(), cells_.field("path").to_pylist()
    pairs = zip(rows, held.to_pylist(), named, strict=True)
    return {row: path for row, there, path in pairs if path and not there}


@functools.lru_cache(maxsize=16)
def _images(path: str, split: str, column: str):
    """The column alone, images as they are stored."""
    return _opened(path)[split].select_columns([column]).with_format("arrow")


def _library():
    try:
        import datasets
    except ImportError:
        raise InputError(
            "the huggingface source needs the datasets library; run `pip install datasets`"
        ) from None
    return datasets


_LOCK = threading.Lock()


def _opened(path: str) -> dict:
    """The splits by name; rows stay on disk until they are asked for."""
    found = _found(path)
    return dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}


def _is_divided(path: str) -> bool:
    """Whether a data set says its splits."""
    found = _found(path)
    return isinstance(found, dict) or found.split is not None


@functools.lru_cache(maxsize=4)
def _found(path: str) -> Any:
    """A `Dataset`, or a dictionary of them by split."""
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
    return found
