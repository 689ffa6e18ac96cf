"""What manifest rows hold: their hash, and the rows that are of one image."""

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import sources
from pipeline.storage import parquet


def digest(rows: pa.Table) -> str:
    """Hash of what manifest rows hold, whatever chunks and buffers it lies in."""
    hashed = hashlib.sha256()
    rows = rows.cast(parquet.large(rows.schema))
    for name in rows.column_names:
        _feed(hashed, rows[name].combine_chunks())
    return hashed.hexdigest()


def _feed(hashed, array: pa.Array) -> None:
    """Hash an array of `parquet.large`'s types: which values are there, their lengths, bytes."""
    hashed.update(array.is_valid().to_numpy(zero_copy_only=False))
    array = array.drop_null()
    if pa.types.is_large_list(array.type):
        hashed.update(pc.list_value_length(array).to_numpy())
        _feed(hashed, array.flatten())
    elif pa.types.is_struct(array.type):
        for values in array.flatten():
            _feed(hashed, values)
    elif pa.types.is_large_string(array.type):
        _, offsets, values = array.buffers()
        ends = np.frombuffer(offsets, np.int64)[array.offset :][: len(array) + 1]
        hashed.update(np.diff(ends))
        hashed.update(memoryview(values)[ends[0] : ends[-1]] if values else b"")
    else:
        hashed.update(array.to_numpy())


def gathered(rows: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The rows, those that their source knows to be of one image made one; and the first of each.

    As where every caption is a sample of its own, and an image's samples are in several tars.
    """
    made, gone = one_image_each(rows)
    return replaced(rows, np.arange(rows.num_rows), made, gone)


def one_image_each(rows: pa.Table) -> tuple[dict[int, dict], list[int]]:
    """Of rows that are of one image: the row that takes their place, by the number of the first.

    And the numbers of all of them, the first among them.
    """
    if not len(twice := repeated(rows["image_id"])):
        return {}, []
    at = np.flatnonzero(pc.is_in(rows["image_id"], twice).to_numpy())
    found: dict[str, list[int]] = {}
    for row, image_id in zip(at.tolist(), rows["image_id"].take(at).to_pylist(), strict=True):
        found.setdefault(image_id, []).append(row)
    one = {id_: _one_image(rows.take(places).to_pylist()) for id_, places in found.items()}
    made = {found[id_][0]: row for id_, row in one.items() if row}
    return made, [place for id_, row in one.items() if row for place in found[id_]]


def replaced(
    rows: pa.Table, number_N: np.ndarray, made: dict[int, dict], gone: Iterable[int]
) -> tuple[pa.Table, np.ndarray]:
    """The rows without those that are gone and with those that were made, by their numbers."""
    gone = np.fromiter(gone, np.int64)
    if not len(gone):
        return rows, number_N
    kept = np.flatnonzero(~np.isin(number_N, gone))
    table = pa.concat_tables([rows.take(kept), pa.Table.from_pylist([*made.values()], rows.schema)])
    first = np.concatenate([number_N[kept], np.array([*made], np.int64)])
    order = np.argsort(first)
    return table.take(order), first[order]


def _one_image(rows: list[dict]) -> dict | None:
    """The row of an image that several rows are of; None where the source knows no such thing."""
    first = rows[0]
    one_image = getattr(sources.source(first["source"]), "one_image", lambda uris: False)
    alike = all((row["split"], row["source"]) == (first["split"], first["source"]) for row in rows)
    if not alike or not one_image([row["uri"] for row in rows]):
        return None
    return {**first, "captions": [caption for row in rows for caption in row["captions"]]}


def repeated(ids: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The values that are there more than once."""
    counts = pc.value_counts(ids)
    return counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
