"""Whether an id is there twice: ids sorted by their hash, in two steps of pieces.

1. ids: those of a span's images and captions, by bucket
2. unique: those of a bucket, of which none may be there twice. Where a source knows several rows to
   be of one image, the row that takes their place, by span.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sharding.manifest import contents, exchange, spans
from pipeline.sharding.manifest.spans import PLACED, Manifest, Span
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece, Plan

ADVICE = {
    "image": "give every image one row, its captions in a list, or name it by source.id_column "
    "(of tars a field of the JSON, or __key__)",
    "caption": "give every caption an id of its own",
}
ID, PLACE = pa.field("id", pa.large_string()), pa.field("place", pa.int64())
IDS, PLACES = pa.schema([ID, PLACE]), pa.schema([PLACE])
FOLDER = "ids"  # beside the manifest
Make = Callable[[Piece], dict]


def is_gathered(kind: str) -> bool:
    """Whether a source may have several rows of one image."""
    return hasattr(sources.source(kind), "one_image")


def steps(manifest: Manifest, kind: str) -> Iterator[tuple[Plan, Make]]:
    """The plans and what makes their pieces; the second is drawn up when the first is finished."""
    whole, count = is_gathered(kind), len(manifest.spans)
    folder = store.join(manifest.folder, FOLDER)
    follows = store.fingerprint("ids", spans.VERSION, spans.ROWS, whole, manifest.contents())
    if spans.finished("ingest", folder, follows, {}):
        return
    about = zip(spans.numbered(count, "span"), manifest.contents(), manifest.spans, strict=True)
    pieces: list[tuple[str, Any, dict, int]] = [
        (name, depends, {"span": span, "buckets": count, "whole": whole}, spans.memory(spans.BLOCK))
        for name, depends, span in about
    ]
    yield spans.step("ingest", store.join(folder, "runs"), pieces, whole, count), write_ids
    version, uris, _ = spans.outputs(store.join(folder, "runs"), "ingest")
    firsts = [span.first for span in manifest.spans]
    inputs = {"runs": uris, "buckets": count, "whole": whole, "firsts": firsts}
    needed = spans.memory(manifest.rows // count)
    pieces = [
        (name, version, {**inputs, "bucket": number}, needed)
        for number, name in enumerate(spans.numbered(count, "bucket"))
    ]
    made = list(spans.step("ingest", folder, pieces, whole, count).pieces)
    yield Plan.of("ingest", folder, made, {}, follows), write_unique


# ---- ids of a span -------------------------------------------------------------------------------


def write_ids(piece: Piece) -> dict:
    """Write the ids of a span's images and captions, by bucket; of gathered images whole rows."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    return exchange.write(piece, 2 * piece.inputs["buckets"], _ids(piece.inputs), {})


def _ids(inputs: dict) -> Iterator[exchange.Block]:
    span: Span = inputs["span"]
    buckets, whole = inputs["buckets"], inputs["whole"]
    columns = None if whole else ["image_id", "captions.list.element.caption_id"]
    for first, rows in span.blocks(columns):
        place = first + np.arange(len(rows))
        images = rows if whole else rows.select(["image_id"])
        bucket_N = exchange.buckets_of(rows["image_id"], buckets)
        yield images.append_column(PLACE, pa.array(place)), bucket_N
        captions = of_captions(rows, place)
        named = captions["id"].fill_null("")
        yield captions, buckets + exchange.buckets_of(named, buckets)


def unnamed(rows: pa.Table) -> int:
    """How many images have an empty id."""
    return pc.sum(pc.equal(rows["image_id"].fill_null(""), "")).as_py() or 0


def of_captions(rows: pa.Table, place_N: np.ndarray) -> pa.Table:
    """Ids of the rows' captions, and the place of each one's row."""
    captions = rows["captions"].combine_chunks()
    owners = pc.list_parent_indices(captions).to_numpy()
    ids = captions.flatten().field("caption_id").cast(pa.large_string())
    return pa.table([ids, place_N[owners]], IDS)


# ---- a bucket ------------------------------------------------------------------------------------


def write_unique(piece: Piece) -> dict:
    """Find what of a bucket is there twice; write the rows that change, by span."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    inputs, about = piece.inputs, dict[str, Any]()
    uris, buckets, number = inputs["runs"], inputs["buckets"], inputs["bucket"]
    captions = exchange.joined(uris, buckets + number, 2 * buckets, IDS)
    about["caption"] = twice(captions["id"], captions["place"].to_numpy())
    columns = PLACED if inputs["whole"] else pa.schema([PLACED.field("image_id"), PLACE])
    images = exchange.joined(uris, number, 2 * buckets, columns)
    place_N, rows = images["place"].to_numpy(), images.drop_columns(["place"])
    made, gone = contents.one_image_each(rows) if inputs["whole"] else ({}, [])
    kept, first = contents.replaced(rows, np.arange(len(rows)), made, gone)
    about["unnamed"] = unnamed(kept)
    about["image"] = twice(kept["image_id"], place_N[first])
    firsts = inputs["firsts"]
    blocks = list(_moves(rows, place_N, made, gone, firsts))
    about["gone"] = _counted(rows["split"], place_N, made, gone, firsts) if gone else {}
    return exchange.write(piece, 2 * len(firsts), blocks, about)


def twice(ids: pa.ChunkedArray, place_N: np.ndarray) -> list | None:
    """How many ids are there more than once, the first of them, and its first two places."""
    if not len(found := contents.repeated(ids)):
        return None
    at = np.flatnonzero(pc.equal(ids, found[0]).to_numpy())[:2]
    return [len(found), found[0].as_py(), *place_N[at].tolist()]


def _span_of(place_N: np.ndarray, firsts: Sequence[int]) -> np.ndarray:
    return np.searchsorted(firsts, place_N, side="right") - 1


def _moves(
    rows: pa.Table, place_N: np.ndarray, made: dict[int, dict], gone: list[int], firsts: list[int]
) -> Iterator[exchange.Block]:
    """Places of rows that are gone, then rows that were made, by span."""
    if not gone:
        return
    places = np.sort(place_N[gone])
    yield pa.table([places], PLACES), _span_of(places, firsts)
    places = place_N[[*made]]
    table = pa.Table.from_pylist([*made.values()], rows.schema)
    yield table.append_column(PLACE, pa.array(places)), len(firsts) + _span_of(places, firsts)


def _counted(
    splits: pa.ChunkedArray, place_N: np.ndarray, made: dict, gone: list[int], firsts: list[int]
) -> dict[str, list[int]]:
    """How many rows fewer every span has, by split."""
    fewer = {}
    for split in pc.unique(splits).to_pylist():
        own = pc.equal(splits, split).to_numpy()
        lost, new = (np.array([n for n in numbers if own[n]], np.int64) for numbers in (gone, made))
        counts = [
            np.bincount(_span_of(place_N[n], firsts), minlength=len(firsts)) for n in (lost, new)
        ]
        fewer[split] = (counts[0] - counts[1]).tolist()
    return fewer


class Moves(NamedTuple):
    """What became of rows that are of one image: the buckets' files, and the number of spans."""

    uris: tuple[str, ...] = ()
    into: int = 0  # how many spans

    def blocks(
        self, span: Span, number: int, columns: list[str] | None = None
    ) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """(numbers of the rows, rows) of every block of a span, an image a row."""
        made: dict[int, dict] = {}
        gone = np.zeros(0, np.int64)
        if self.uris:
            found = exchange.joined(self.uris, self.into + number, 2 * self.into, PLACED)
            made = {row.pop("place"): row for row in found.to_pylist()}
            places = exchange.joined(self.uris, number, 2 * self.into, PLACES)
            gone = places["place"].to_numpy()
        for first, rows in span.blocks(columns):
            end = first + len(rows)
            here = gone[(gone >= first) & (gone < end)]
            own = {n: row for n, row in made.items() if first <= n < end}
            table, numbers = contents.replaced(rows, np.arange(first, end), own, here)
            yield numbers, table


def moves(manifest: Manifest) -> tuple[Moves, str, Sequence[dict]]:
    """What the finished steps found: where it is, its version, and the buckets' summaries."""
    version, uris, entries = spans.outputs(store.join(manifest.folder, FOLDER), "ingest")
    return Moves(tuple(uris), len(manifest.spans)), version, entries


# ---- what is refused -----------------------------------------------------------------------------


def check(manifest: Manifest, kind: str) -> None:
    """Refuses, of finished steps, an empty id and one that is there twice; removes what is read."""
    folder = store.join(manifest.folder, FOLDER)
    buckets = spans.outputs(folder, "ingest")[2]
    refuse(sum(bucket["unnamed"] for bucket in buckets), buckets, manifest)
    store.remove(store.join(folder, "runs") if is_gathered(kind) else folder)


def check_rows(rows: pa.Table, place_N: np.ndarray, manifest: Manifest) -> None:
    """The same of all rows at once, an image a row; `place_N` are their numbers."""
    captions = of_captions(rows, place_N)
    found = {
        "image": twice(rows["image_id"], place_N),
        "caption": twice(captions["id"], captions["place"].to_numpy()),
    }
    refuse(unnamed(rows), [found], manifest)


def refuse(empty: int, found: Sequence[dict], manifest: Manifest) -> None:
    """An error where images have no id, or where an id was found twice in any bucket."""
    if empty:
        raise InputError(f"{empty} images have an empty id; give every image an id of its own")
    for kind, advice in ADVICE.items():
        if not (several := [bucket[kind] for bucket in found if bucket[kind]]):
            continue
        _, id_, *places = min(several, key=lambda one: one[2])
        one, two = (manifest.part_of(place).of for place in places)
        where = f"twice in {one}" if one == two else f"in {one} and in {two}"
        raise InputError(
            f"{sum(count for count, *_ in several)} {kind} ids appear more than once, the first is "
            f"{id_!r}, {where}; {advice}"
        )
