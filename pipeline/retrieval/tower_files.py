"""The tower vectors of a split as they are read: ids and vectors out of its shards' files.

Legend of the shape suffixes: N vectors, D width, S sampled queries.
"""

import functools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.retrieval.near_cells import SAMPLED
from pipeline.retrieval.stored import Source
from pipeline.sharding.exclusions import Excluded
from pipeline.storage import mapped, parquet, store
from pipeline.storage.run_folder import Files, need_index
from pipeline.storage.vector_columns import vector_matrix

KIND = {"image": "image-ids-1", "text": "text-ids-1"}  # of the files of ids; another number, others
SHARDS = 32  # that sampled queries are read from
OTHER = {"image": "text", "text": "image"}


def version(found: Files, excluded: Excluded) -> str:
    """What stands for a split's vectors without those that are excluded."""
    left_out = [sorted(ids) for ids in excluded]
    return store.fingerprint("towers", found.version, len(found.names), left_out)


def items(found: Files, excluded: Excluded, limit: float) -> tuple[pa.Table, pa.Table]:
    """Ids of the images, and of the texts with the row of each one's image: mapped tables."""
    made: dict[str, pa.Table] = {}

    def make(of: str) -> pa.Table:
        made.update(made or _items(found, excluded))
        return made[of]

    about = {"bytes": 0, "sha256": store.sha256(version(found, excluded).encode())}
    images, texts = (
        mapped.made(about, limit, KIND[of], functools.partial(make, of)) for of in KIND
    )
    return images, texts


def _items(found: Files, excluded: Excluded) -> dict[str, pa.Table]:
    images, texts, first = [IDS["image"].empty_table()], [IDS["text"].empty_table()], 0
    for uri in found.uris:
        table = _table(found, uri, ["id", "image_id", "modality"])
        of_image = pc.equal(table["modality"], "image")
        ids, of_text = table.filter(of_image)["id"], table.filter(pc.invert(of_image))
        ids, of_text = _kept(ids, ids, excluded.images), _kept(of_text, of_text["id"], excluded[1])
        row = pc.index_in(of_text["image_id"], ids)
        if row.null_count:
            lost = of_text["image_id"].filter(pc.is_null(row))[0].as_py()
            raise InputError(f"{uri}: texts belong to image {lost!r}, which is not in that file")
        rows = pc.add(row, pa.scalar(first, pa.int32())).combine_chunks()
        images.append(pa.table({"id": ids}).cast(IDS["image"]))
        texts.append(pa.table({"id": of_text["id"], "image": rows}).cast(IDS["text"]))
        first += len(ids)
    return {"image": parquet.joined(images), "text": parquet.joined(texts)}


IDS = {
    "image": pa.schema([("id", pa.large_string())]),
    "text": pa.schema([("id", pa.large_string()), ("image", pa.int32())]),
}


def _kept(values, ids, excluded: frozenset[str]):
    if not excluded:
        return values
    return values.filter(pc.invert(pc.is_in(ids, pa.array(sorted(excluded), pa.string()))))


def source(found: Files, of: str, excluded: Excluded, limit: float) -> Source:
    """Where the vectors of images ("image") or of texts ("text") come from."""
    number = list(KIND).index(of)
    with store.opened(found.uris[0]) as file:
        dim = pq.read_schema(file).field("vector").type.list_size
    count = len(items(found, excluded, limit)[number])

    def parts() -> Iterator[np.ndarray]:
        return (_vectors(found, uri, of, excluded) for uri in found.uris)

    def asked() -> np.ndarray:
        """Evenly spaced vectors of the other side, of evenly spaced shards."""
        some = [found.uris[n] for n in _spaced(len(found.uris), SHARDS)]
        drawn = []
        for uri in some:
            vectors = _vectors(found, uri, OTHER[of], excluded)
            drawn.append(vectors[_spaced(len(vectors), -(-SAMPLED // len(some)))])
        return np.concatenate(drawn)

    return Source(f"{version(found, excluded)} {of}", (count, dim), parts, asked)


def _vectors(found: Files, uri: str, of: str, excluded: Excluded) -> np.ndarray:
    table = _table(found, uri, ["id", "modality", "vector"])
    table = table.filter(pc.equal(table["modality"], of))
    gone = excluded.images if of == "image" else excluded.captions
    return vector_matrix(_kept(table, table["id"], gone)["vector"])


def _table(found: Files, uri: str, columns: list[str]) -> pa.Table:
    """Columns of a shard's file, whose bytes are those of the stage's index: they are kept long."""

    def made(data: bytes) -> pa.Table:
        return parquet.of_bytes(data, columns).replace_schema_metadata()

    return mapped.checked(uri, _files_of(found)[uri], made)


@functools.lru_cache(maxsize=4)
def _files_of(found: Files) -> dict[str, dict]:
    """{"bytes", "sha256"} of every shard's file, by its URI."""
    entries = {entry["name"]: entry for entry in need_index(found.folder, "evaluate")["pieces"]}
    names = zip(found.uris, found.names, strict=True)
    return {uri: entries[name]["files"][store.name_of(uri)] for uri, name in names}


def _spaced(count: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))
