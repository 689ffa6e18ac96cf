"""Vectors in Parquet of other programs: ids, sides and vectors, checked row by row."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.storage import ids, store, text_files

COLUMNS = ("id", "image_id", "modality", "vector")
WHAT = f"Parquet with the columns {', '.join(COLUMNS)}"
SIDES = {
    **dict.fromkeys(("image", "images", "img", "picture", "photo", "visual"), "image"),
    **dict.fromkeys(("text", "texts", "txt", "caption", "captions", "sentence"), "text"),
}


class Rows(NamedTuple):
    """The rows of a file."""

    id_N: list[str]
    image_N: list[str]
    side_N: list[str]
    vector_ND: np.ndarray  # float32


class Table(NamedTuple):
    """The rows of either side, in their order."""

    image_ids: list[str]
    text_ids: list[str]
    text_image_ids: list[str]  # of `image_ids`
    images: np.ndarray  # (M, D) float32
    texts: np.ndarray  # (N, D) float32


def read(uri: str) -> Table:
    """The table of a file, or of all of a folder's in the order of their names."""
    names = sorted(name for name in store.list_files(uri) if name.endswith(".parquet"))
    files = [store.join(uri, name) for name in names] or [uri]
    parts = [_rows(file) for file in files]
    widths = {part.vector_ND.shape[1]: file for part, file in zip(parts, files, strict=True)}
    if len(widths) > 1:
        said = ", ".join(f"{width} in {file}" for width, file in widths.items())
        raise InputError(f"vectors are of several widths: {said}; give those of one model")
    id_N, image_N, side_N = ([cell for part in parts for cell in part[k]] for k in range(3))
    vector_ND, is_image_N = np.concatenate([part[3] for part in parts]), np.array(side_N) == "image"
    found: dict[str, tuple[list[str], list[str]]] = {}
    for side, of_side_N in (("image", is_image_N), ("text", ~is_image_N)):
        rows = np.flatnonzero(of_side_N).tolist()
        found[side] = [id_N[n] for n in rows], [image_N[n] for n in rows]
        ids.unique(found[side][0], f"{uri}, {side}s")
        if not rows:
            raise InputError(f"{uri} holds no {side}; there must be some of either modality")
    owners = _owners(uri, *found["image"], *found["text"])
    image_ids, text_ids = found["image"][0], found["text"][0]
    return Table(image_ids, text_ids, owners, vector_ND[is_image_N], vector_ND[~is_image_N])


def _owners(uri: str, images: list, keys: list, texts: list, of_texts: list) -> list[str]:
    """The id of each text's image, which `keys` are other names of."""
    ids.unique(keys, f"{uri}, image_id of images")
    image_of = dict(zip(keys, images, strict=True))
    lost = [(text, key) for text, key in zip(texts, of_texts, strict=True) if key not in image_of]
    if lost:
        text, key = lost[0]
        raise InputError(
            f"{uri}: {len(lost):,} of {len(texts):,} texts are of images that are not there, the "
            f"first {text!r} of {key!r}; add those images, or leave the texts out"
        )
    return [image_of[key] for key in of_texts]


def _rows(uri: str) -> Rows:
    packed = text_files.data(uri, WHAT)
    try:
        file = pq.ParquetFile(pa.BufferReader(packed))
        by_name = {name.casefold().strip(): name for name in reversed(file.schema_arrow.names)}
        if missing := [name for name in COLUMNS if name not in by_name]:
            there = ", ".join(file.schema_arrow.names)
            raise InputError(f"{uri} has no column {missing[0]!r}, but {there}; give {WHAT}")
        table = file.read([by_name[name] for name in COLUMNS])
        columns = [table[by_name[name]] for name in COLUMNS]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"{uri} is no Parquet, or torn ({error}); give {WHAT}") from error
    if not len(table):
        raise InputError(f"{uri} holds no row; give {WHAT}")
    id_N, image_N, said_N = map(_texts, [uri] * 3, COLUMNS, columns)
    side_N = [SIDES.get(said.casefold().strip(), "") for said in said_N]
    if "" in side_N:
        row = side_N.index("")
        raise InputError(f"{uri} row {row}: modality {said_N[row]!r}; write image or text")
    return Rows(id_N, image_N, side_N, _vectors(uri, columns[3]))


def _texts(uri: str, name: str, column: pa.ChunkedArray) -> list[str]:
    """Cells as texts: of whole numbers their digits, also of those that were made floats."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    try:
        cells = column.to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(f"{uri}: {name} holds text that is not UTF-8 ({error})") from error
    for row, cell in enumerate(cells):
        whole = isinstance(cell, float) and cell.is_integer()
        if isinstance(cell, bytes):
            try:
                cells[row] = cell.decode()
            except UnicodeDecodeError:
                raise InputError(f"{uri} row {row}: {name} {cell!r} is not UTF-8") from None
        elif not isinstance(cell, str):
            if not whole and (not isinstance(cell, int) or isinstance(cell, bool)):
                do = "give every row a text or a whole number"
                raise InputError(f"{uri} row {row}: {name} is {cell!r} ({kind}); {do}")
            cells[row] = str(int(cell))
    return cells


def _vectors(uri: str, column: pa.ChunkedArray) -> np.ndarray:
    """The rows (N, D) of a column of lists of numbers of any kind, each as long as the others."""
    parts, start, width = [], 0, None
    for chunk in column.chunks:
        chunk = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        inner = getattr(chunk.type, "value_type", pa.null())
        if not (pa.types.is_floating(inner) or pa.types.is_integer(inner)):
            raise InputError(f"{uri}: vector is {column.type}; give lists of numbers")
        length_R = pc.list_value_length(chunk).to_numpy(zero_copy_only=False)
        if width is None and len(length_R):
            width = length_R[0]
        if (other_R := ~(length_R == width)).any():  # NaN where there is none
            row = int(other_R.argmax())
            found = "none" if np.isnan(length_R[row]) else f"{length_R[row]:g} numbers"
            raise InputError(f"{uri} row {start + row}: vector holds {found}, the first {width:g}")
        values = chunk.flatten().to_numpy(zero_copy_only=False)
        with np.errstate(over="ignore"):
            parts.append(values.astype(np.float32).reshape(len(chunk), -1 if len(chunk) else 0))
        if (bad_R := ~np.isfinite(parts[-1]).all(1)).any():
            row = start + int(bad_R.argmax())
            raise InputError(
                f"{uri} row {row}: vector holds NaN, infinity or nothing; write it anew"
            )
        start += len(chunk)
    if not width:
        raise InputError(f"{uri} row 0: vector holds nothing; give lists of numbers")
    return np.concatenate([part for part in parts if len(part)])
