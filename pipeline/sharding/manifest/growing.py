"""Data that grows: rows that are in a shard stay there, the others are dealt out to new shards.

Three steps of pieces find who is there already, by split and id, sorted by the ids' hash:

1. known: the ids of the shards that were finished last
2. named: the ids of a span
3. joined: the rows of a bucket that are known, by span, with their shard and their place in it
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.sharding.manifest import exchange, spans
from pipeline.sharding.manifest.exchange import Stretch
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece, Plan

Make = Callable[[Piece], dict]
KEY = [pa.field("split", pa.large_string()), pa.field("image_id", pa.large_string())]
KNOWN = pa.schema([*KEY, ("shard", pa.int64()), ("row", pa.int64())])
NAMED = pa.schema([*KEY, ("place", pa.int64())])
PLACED = pa.schema([("place", pa.int64()), ("shard", pa.int64()), ("row", pa.int64())])


class Shard(NamedTuple):
    """A shard that is there."""

    name: str
    split: str
    rows: str | Stretch  # its sidecar; or where it is lost, its rows as they were dealt out
    images: int

    @property
    def number(self) -> int:
        return int(self.name.rpartition("-")[2])


class Grown(NamedTuple):
    """What the steps found, by span."""

    uris: tuple[str, ...]
    into: int  # how many spans

    def of_span(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places in the manifest, rising, of the span's rows that are known; shards and rows."""
        found = exchange.joined(self.uris, number, self.into, PLACED)
        order = np.argsort(found["place"].to_numpy())
        return tuple(found[name].to_numpy()[order] for name in PLACED.names)


def numbers(shards: list[Shard]) -> dict[str, int]:
    """Of every split the number of the first new shard."""
    out: dict[str, int] = {}
    for shard in shards:
        out[shard.split] = max(out.get(shard.split, 0), shard.number + 1)
    return out


def steps(
    folder: str, shards: list[Shard], version: str, named: list[tuple[str, Any, dict, int]]
) -> Iterator[tuple[Plan, Make]]:
    """The plans and what makes their pieces.

    `version` is of the shards; `named` are the pieces of the spans, whose inputs give `blocks` of
    (numbers, rows, numbers of the rows by split).
    """
    total = sum(shard.images for shard in shards)
    buckets = max(1, -(-total // spans.ROWS), len(named))
    common = {"buckets": buckets}
    groups = itertools.groupby(
        zip(itertools.accumulate((s.images for s in shards), initial=0), shards, strict=False),
        lambda pair: pair[0] // spans.ROWS,
    )
    pieces: list[tuple[str, Any, dict, int]] = [
        (f"group-{n:05d}", version, {**common, "shards": [s for _, s in group]}, 0)
        for n, (_, group) in enumerate(groups)
    ]
    yield spans.step("shard", store.join(folder, "known"), pieces, buckets), write_known
    named = [
        (name, depends, {**inputs, **common}, memory) for name, depends, inputs, memory in named
    ]
    yield spans.step("shard", store.join(folder, "named"), named, buckets), write_named
    of = [spans.outputs(store.join(folder, step), "shard") for step in ("known", "named")]
    inputs = {**common, "known": of[0][1], "named": of[1][1]}
    inputs["firsts"] = [piece[2]["span"].first for piece in named]
    both = [of[0][0], of[1][0]]
    needed = spans.memory(spans.ROWS // 4)
    pieces = [
        (bucket, both, {**inputs, "bucket": n}, needed)
        for n, bucket in enumerate(spans.numbered(buckets, "bucket"))
    ]
    yield spans.step("shard", store.join(folder, "joined"), pieces), write_joined


def write_known(piece: Piece) -> dict:
    """Write who is in some shards, by bucket of the ids."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    buckets = piece.inputs["buckets"]

    def blocks() -> Iterator[exchange.Block]:
        for shard in piece.inputs["shards"]:
            if isinstance(shard.rows, Stretch):
                ids = shard.rows.read()["image_id"]
            else:
                ids = parquet.read_columns(shard.rows, ["image_id"])["image_id"]
            ids, count = ids.cast(pa.large_string()), len(ids)
            split = pa.array([shard.split] * count, pa.large_string())
            columns = [split, ids, np.full(count, shard.number), np.arange(count)]
            yield pa.table(columns, KNOWN), exchange.buckets_of(ids, buckets)

    return exchange.write(piece, buckets, blocks(), {})


def write_named(piece: Piece) -> dict:
    """Write the ids of a span, by bucket, with their splits and places in the manifest."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    buckets, counts = piece.inputs["buckets"], Counter()

    def blocks() -> Iterator[exchange.Block]:
        for numbers_, rows, of_split in piece.inputs["blocks"](piece, ["image_id", "split"]):
            counts.update({split: len(own) for split, own in of_split.items()})
            for split, own in of_split.items():
                ids = rows["image_id"].take(pa.array(own)).cast(pa.large_string())
                said = pa.array([split] * len(own), pa.large_string())
                yield pa.table([said, ids, numbers_[own]], NAMED), exchange.buckets_of(ids, buckets)

    return exchange.write(piece, buckets, blocks(), {"counts": counts})


def write_joined(piece: Piece) -> dict:
    """Write the rows of a bucket that are known, by span; count those that are new."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    about, found = piece.inputs, {}
    for name, schema in (("known", KNOWN), ("named", NAMED)):
        found[name] = exchange.joined(about[name], about["bucket"], about["buckets"], schema)
    firsts, new = about["firsts"], {}
    blocks = []
    for split in pc.unique(found["named"]["split"]).to_pylist():
        known, named = (t.filter(pc.equal(t["split"], split)) for t in found.values())
        at = pc.index_in(named["image_id"], known["image_id"].combine_chunks())
        there = at.is_valid().to_numpy(zero_copy_only=False)
        place = named["place"].to_numpy()
        rows = known.select(["shard", "row"]).take(at.drop_null())
        columns = [place[there], rows["shard"], rows["row"]]
        blocks.append((pa.table(columns, PLACED), _span_of(place[there], firsts)))
        counts = np.bincount(_span_of(place[~there], firsts), minlength=len(firsts))
        new[split] = counts.tolist()
    return exchange.write(piece, len(firsts), blocks, {"new": new})


def _span_of(place_N: np.ndarray, firsts: list[int]) -> np.ndarray:
    return np.searchsorted(firsts, place_N, side="right") - 1


def grown(folder: str, count: int) -> tuple[Grown, str, list[Counter[str]]]:
    """What the finished steps left, its version, and the new rows of every span by split."""
    version, uris, entries = spans.outputs(store.join(folder, "joined"), "shard")
    new: list[Counter[str]] = [Counter() for _ in range(count)]
    for entry in entries:
        for split, counts in entry["new"].items():
            for span, number in enumerate(counts):
                new[span][split] += number
    return Grown(tuple(uris), count), version, new


def known(
    folder: str, index: dict, dealt: Callable[[], dict[tuple[str, str], Stretch]]
) -> list[Shard]:
    """The shards of an index; `dealt` gives rows by name and fingerprint, for a lost sidecar."""
    there, out = store.list_files(folder), []
    for entry in index["pieces"]:
        name = entry["name"]
        rows: str | Stretch | None = store.join(folder, f"{name}.parquet")
        if f"{name}.parquet" not in there:
            rows = dealt().get((name, entry["fingerprint"]))
            if rows is None:
                raise InputError(
                    f"{name}.parquet in {folder} is lost, and with it which images {name} held; "
                    "put it back, or set shard.grow false, which deals all images out anew"
                )
        count = entry.get("samples", 0) + sum(entry.get("rejected", {}).values())
        out.append(Shard(name, entry["split"], rows, count))
    return out
