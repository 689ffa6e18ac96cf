"""Precomputed image features: `{split}_ims.npy` with `{split}_caps.txt`, one caption a line.

`source.path` is the folder, or the folder and what the names begin with. An array has shape
[images, features] or [images, regions, features]. There are k caption lines an image, in the order
of the array's rows, k = 1, 2, …; where rows and lines are equally many and every row is there five
times over, as in some public features, every fifth row is an image. `{split}_ids.txt`, if it is
there, names the image of each array row; without it an image is called after its split and row.
Splits are train, val (or dev) and test (or testall); of two files for one split the fuller counts.
"""

import functools
import io
import math
from collections.abc import Iterator

import numpy as np

from pipeline.errors import InputError
from pipeline.sources.part import Part
from pipeline.sources.readers import annotations, pictures
from pipeline.sources.readers.cells import Caption
from pipeline.storage import store, text_files
from schemas.settings import SourceSettings

EXPECTED = "a folder with train_ims.npy and train_caps.txt, or that folder and a name's beginning"
SETTINGS: set[str] = set()
SPLITS = {"train": "train", "dev": "val", "val": "val", "test": "test", "testall": "test"}
HEADER_BYTES = 4096  # enough for the header of a plain array
REPEATS = 5  # captions of an image in the public features, and copies of its row in some


def parts(settings: SourceSettings) -> list[str]:
    """The name before `_ims.npy` of each split."""
    uri = annotations.path(settings, EXPECTED).rstrip("/")
    folder, prefix = uri, ""
    if not (names := store.list_files(folder)):
        folder, prefix = uri.rsplit("/", 1)
        names = store.list_files(folder)
    chosen = {}
    for named, split in SPLITS.items():  # later names win: val over dev, testall over test
        for begin in (f"{prefix}{named}", f"{prefix}_{named}"):
            if f"{begin}_ims.npy" in names:
                chosen[split] = begin
    if not chosen:
        raise InputError(f"no *_ims.npy of a split ({', '.join(SPLITS)}) at {uri}; give {EXPECTED}")
    for begin in chosen.values():
        if f"{begin}_caps.txt" not in names:
            raise InputError(f"{begin}_caps.txt is not beside {begin}_ims.npy in {folder}")
    return [store.join(folder, begin) for begin in chosen.values()]


def inputs(settings: SourceSettings, part: str) -> list:
    """The stamps of the array, the captions and, where they are there, the ids."""
    return annotations.stamps([f"{part}_ims.npy", f"{part}_caps.txt", *_ids_file(part)])


def _ids_file(part: str) -> list[str]:
    uri = f"{part}_ids.txt"
    return [uri] if store.exists(uri) else []


def rows(settings: SourceSettings, part: Part) -> Iterator[dict]:
    """Manifest rows of a split, one for each image in the order of the array."""
    begin = part.uri
    array_uri = f"{begin}_ims.npy"
    count = _header(array_uri)[0][0]
    lines = list(text_files.stream(f"{begin}_caps.txt", "a caption a line"))
    if not count or not lines or len(lines) % count:
        raise InputError(
            f"{begin}_caps.txt has {len(lines)} lines, {array_uri} has {count} rows; "
            "expected as many lines, or a whole multiple of the rows"
        )
    copies = REPEATS if len(lines) == count and _repeated(array_uri) else 1
    per_image = copies * len(lines) // count
    ids = _ids(begin, count)
    split = SPLITS[max((name for name in SPLITS if begin.endswith(name)), key=len)]
    for row in range(0, count, copies):
        image_id = ids[row] if ids else f"{split}-{row // copies:06d}"
        start = row // copies * per_image
        texts = lines[start : start + per_image]
        captions = [Caption(None, text) for text in texts]
        yield annotations.row(image_id, f"{array_uri}#{row}", captions, split=split)


def load(uri: str) -> bytes:
    """The bytes of a .npy file of that row alone, in the type it is stored in."""
    file = io.BytesIO()
    array_uri, _, row = uri.rpartition("#")
    if not array_uri or not row.isdecimal():
        raise InputError(f"{uri!r} is not a feature row; expected FILE.npy#ROW")
    np.save(file, _row(array_uri, int(row)), allow_pickle=False)
    return file.getvalue()


def files_of(uri: str) -> tuple[str, ...]:
    """The array that a row is in."""
    return (uri.rpartition("#")[0],)


def _ids(part: str, count: int) -> list[str] | None:
    for uri in _ids_file(part):
        names = [line.strip() for line in text_files.stream(uri, "an id a line")]
        if len(names) != count:
            expected = f"expected {count}, one a row of the array"
            raise InputError(f"{uri} has {len(names)} lines; {expected}")
        ids = pictures.image_ids(names)
        return [ids[name] for name in names]
    return None


def _repeated(uri: str) -> bool:
    """Whether the array is images five times over; looks at ten groups of rows, not at all."""
    count = _header(uri)[0][0]
    if count % REPEATS:
        return False
    groups = np.unique(np.linspace(0, count // REPEATS - 1, 10).astype(int)) * REPEATS
    return all(
        np.array_equal(_row(uri, group), _row(uri, group + k))
        for group in groups.tolist()
        for k in range(1, REPEATS)
    )


@functools.lru_cache(maxsize=16)
def _header(uri: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and the offset of the first byte of data of a .npy file."""
    file = io.BytesIO(store.read_bytes(uri, 0, HEADER_BYTES))
    try:
        form = np.lib.format
        readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
        shape, by_column, dtype = readers[form.read_magic(file)](file)
    except Exception as error:  # of a torn header anything may be raised
        raise InputError(f"{uri} is not a .npy file of numbers ({error})") from None
    if by_column or dtype.kind not in "fiu" or len(shape) not in (2, 3):
        order = "column by column" if by_column else "row by row"
        raise InputError(
            f"{uri} holds {dtype} of shape {shape}, {order}; expected numbers of shape "
            "[images, features] or [images, regions, features], row by row"
        )
    return shape, dtype, file.tell()


def _row(uri: str, row: int) -> np.ndarray:
    shape, dtype, start = _header(uri)
    if row >= shape[0]:
        raise InputError(f"{uri} has {shape[0]} rows; there is no row {row}")
    size = math.prod(shape[1:]) * dtype.itemsize
    data = store.read_bytes(uri, start + row * size, size)
    if len(data) < size:
        raise InputError(f"{uri} ends inside row {row}; copy the file again")
    return np.frombuffer(data, dtype).reshape(shape[1:])
