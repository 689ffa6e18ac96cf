"""A shard that is to be made: its rows, what of it is left out, and its fingerprint."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.sharding.manifest import contents, exchange, layout
from pipeline.sharding.manifest.exchange import Stretch
from pipeline.sharding.manifest.layout import SHIFT, Layout
from pipeline.sharding.sidecar import EXCLUDED
from pipeline.storage import parquet, store
from pipeline.storage.plan import Plan
from pipeline.storage.run_folder import read_index
from schemas.settings import Recipe

Excluded = dict[tuple[str, str], str]  # reasons by (kind, id)
LEFT_OUT = b"halftone.left_out"  # of a shard's stretch of rows, as JSON


class Shard(NamedTuple):
    """A shard that is to be made."""

    name: str
    split: str
    fingerprint: str
    rows: pa.Table | Stretch
    left_out: Excluded | None = None  # None: it stands with the rows


def of_rows(
    rows: pa.Table, place_N: np.ndarray, plan: Layout, settings: dict, excluded: Excluded
) -> Iterator[Shard]:
    """The shards that rows are of, by their places; of some shards all rows."""
    order, names = np.argsort(place_N), plan.names()
    ordinals, starts = np.unique(place_N[order] >> SHIFT, return_index=True)
    ends = [*starts[1:].tolist(), len(order)][: len(starts)]
    for ordinal, start, end in zip(ordinals.tolist(), starts.tolist(), ends, strict=True):
        own = rows.take(order[start:end])
        left_out = _left_out(own, excluded)
        listed = [[*key, reason] for key, reason in sorted(left_out.items())]
        fingerprint = store.fingerprint("shard", settings, contents.digest(own), listed)
        split, name = names[ordinal]
        yield Shard(name, split, fingerprint, own, left_out)


def _left_out(rows: pa.Table, excluded: Excluded) -> Excluded:
    """Reasons by (kind, id) of the images and captions of these rows that are on the list."""
    if not excluded:
        return {}
    out, captions = {}, rows["captions"].combine_chunks().flatten()
    ids = {"image": rows["image_id"], "caption": captions.field("caption_id")}
    for kind, here in ids.items():
        for id_ in here.to_pylist():
            if (reason := excluded.get((kind, id_))) is not None:
                out[kind, id_] = f"{EXCLUDED}: {reason or 'no reason given'}"
    return out


def of_table(rows: pa.Table, recipe: Recipe, excluded: Excluded) -> list[Shard]:
    """All shards of a collection whose rows are here, an image a row."""
    numbers = layout.splits(rows, recipe.source)
    sizes = {split: len(own) for split, own in numbers.items()}
    plan = Layout(sizes, recipe.shard.samples, recipe.shard.seed)
    positions = plan.positions()
    row, place = plan.places(numbers, {}, lambda start, end: positions[start:end])
    place_N = np.empty(len(rows), np.int64)
    place_N[row] = place
    return list(of_rows(rows, place_N, plan, recipe.shard.relevant(), excluded))


def shards(plan: Plan) -> Iterator[tuple[Shard, list[int] | None]]:
    """The shards of finished steps; and which entries of the exclusion list each holds."""
    for piece in plan.pieces:
        yield from _shards_of(piece.output)


def _shards_of(uri: str) -> Iterator[tuple[Shard, list[int] | None]]:
    table, start = parquet.read_table(uri).to_pydict(), 0
    columns = (table[name] for name in ("name", "split", "fingerprint", "found", "end"))
    for name, split, fingerprint, found, end in zip(*columns, strict=True):
        yield Shard(name, split, fingerprint, Stretch(exchange.runs_of(uri), start, end)), found
        start = end


def stretches(folder: str) -> dict[tuple[str, str], Stretch]:
    """Where the rows of shards lie that were dealt out the last time, by name and fingerprint."""
    index = read_index(folder) or {"pieces": []}
    out = {}
    for entry in index["pieces"]:
        uri = store.join(folder, f"{entry['name']}.parquet")
        if store.exists(uri):
            for shard, _ in _shards_of(uri):
                out[shard.name, shard.fingerprint] = shard.rows
    return out


def read(rows: pa.Table | Stretch, left_out: Excluded | None) -> tuple[pa.Table, Excluded]:
    """The rows of a shard and what of it is left out, wherever they lie."""
    if isinstance(rows, pa.Table):
        return rows, left_out or {}
    table = rows.read()
    listed = json.loads((table.schema.metadata or {})[LEFT_OUT])
    return table.replace_schema_metadata(), {(kind, id_): why for kind, id_, why in listed}
