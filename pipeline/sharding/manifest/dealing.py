"""Rows dealt out to shards, in steps of pieces, of which each is drawn up from counts alone.

1. counts: where a share of train is cut off by a hash of ids, how much of each span that is
2. order: where each train row is packed, in a file of 8 bytes a row
3. dealt: the rows of a span, by bucket of shards
4. rows: the rows of a bucket's shards, each shard's together, with its fingerprint

The fourth stays: a shard's task reads its own rows there, and nothing else. The others are removed.
A collection of one span is dealt out by the command, with the same rules.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.sharding import exclusions
from pipeline.sharding.manifest import dealt, exchange, growing, layout, spans, unique
from pipeline.sharding.manifest.layout import SHIFT, Layout
from pipeline.sharding.manifest.spans import PLACED, Manifest
from pipeline.sharding.manifest.unique import Moves
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece, Plan
from schemas.settings import Recipe, SourceSettings

Make = Callable[[Piece], dict]
FOLDER = "rows"  # beside the shards
STEPS = ("counts", "known", "named", "joined", "order", "dealt")  # below it
POSITION = np.dtype("<i8")


class Collection(NamedTuple):
    """What the steps of a large collection are drawn up from."""

    manifest: Manifest
    recipe: Recipe
    folder: str  # of the rows, and of the steps
    shards: tuple[growing.Shard, ...] = ()  # that are there, and grow
    version: str = ""  # of them

    @property
    def follows(self) -> str:
        """Fingerprint of all that the rows of shards follow from."""
        shard, source = self.recipe.shard, self.recipe.source
        listed = shard.exclude and store.sha256(store.read_bytes(shard.exclude))
        matters = [spans.VERSION, spans.ROWS, shard.relevant(), shard.grow, listed]
        files = [part.contents for part in self.manifest.parts]
        return store.fingerprint(
            "rows", *matters, _cuts(source), source.holdout, source.kind, files
        )

    def done(self) -> Plan | None:
        """The plan of the rows, if they are all there."""
        return spans.finished("shard", self.folder, self.follows, {})


def steps(collection: Collection) -> Iterator[tuple[Plan, Make]]:
    """The plans of what is not there yet, and what makes their pieces."""
    if collection.done():
        return
    recipe = collection.recipe
    if unique.is_gathered(recipe.source.kind):
        yield from unique.steps(collection.manifest, recipe.source.kind)
    spanned, given = _spanned(collection)
    counts = [layout.held(n, h) for n, h in zip(given, spanned.holdouts, strict=True)]
    before, grown = sum(counts, Counter()), ""
    if collection.shards:
        known = list(collection.shards)
        yield from growing.steps(collection.folder, known, collection.version, spanned.named())
        entries = spans.outputs(store.join(collection.folder, "named"), "shard")[2]
        layout.check_cuts(
            before, sum((Counter(e["counts"]) for e in entries), Counter()), recipe.source
        )
        found, grown, counts = growing.grown(collection.folder, len(counts))
        spanned = spanned._replace(grown=found, version=store.fingerprint(spanned.version, grown))
    elif recipe.source.cut_val or recipe.source.cut_test:
        yield spanned.plan_counts(), write_counts
        entries = spans.outputs(store.join(collection.folder, "counts"), "shard")[2]
        counts = [Counter(e["counts"]) for e in entries]
        layout.check_cuts(before, sum(counts, Counter()), recipe.source)
    sizes = sum(counts, Counter())
    named = {split: sizes[split] for split in layout.ordered(sizes)}
    numbers = growing.numbers(list(collection.shards))
    plan = Layout(named, recipe.shard.samples, recipe.shard.seed, numbers)
    if sizes["train"]:
        yield _plan_order(collection, plan), write_order
    yield spanned.plan_dealt(plan, counts), write_dealt
    yield _plan_rows(collection, plan), write_rows
    if collection.done():
        for name in STEPS:
            store.remove(store.join(collection.folder, name))


def here(collection: Collection) -> Plan:
    """The plan of the rows, after this process has made what is not there yet."""
    for plan, make in steps(collection):
        plan.finish({piece.name: make(piece) for piece in plan.pending})
    if (done := collection.done()) is None:
        raise RuntimeError(f"{collection.folder} is not as it was written")
    return done


def counted(collection: Collection) -> tuple[Counter[str], Counter[str]]:
    """Images and captions of every split of the shards, a block of rows at a time."""
    images: Counter[str] = Counter()
    captions: Counter[str] = Counter()
    columns = ["image_id", "split", "captions.list.element.caption_id"]
    for piece in _spanned(collection)[0].plan_counts().pieces:
        for _, rows, of_split in _rows(piece, columns):
            lengths = rows["captions"].combine_chunks().value_lengths().to_numpy()
            images.update({split: len(own) for split, own in of_split.items()})
            captions.update({split: int(lengths[own].sum()) for split, own in of_split.items()})
    return images, captions


def _spanned(collection: Collection) -> tuple["_Spans", list[Counter[str]]]:
    """The spans, and the images of each by what they say of their split."""
    manifest, source = collection.manifest, collection.recipe.source
    gathered = unique.is_gathered(source.kind)
    moves, version, fewer = unique.moves(manifest) if gathered else (Moves(), "", [])
    given = _given(manifest, fewer)
    total = sum(given, Counter())
    layout.check_holdout(total, source)
    return _Spans(collection, moves, version, _held(given, total, collection.recipe)), given


def _given(manifest: Manifest, fewer: Sequence[dict]) -> list[Counter[str]]:
    """Images of every span by split, those that are of several rows counted once."""
    given = manifest.given()
    for bucket in fewer:
        for split, numbers in bucket["gone"].items():
            for span, number in enumerate(numbers):
                given[span][split] -= number
    return given


def _held(given: list[Counter[str]], total: Counter[str], recipe: Recipe) -> list[int]:
    """How many train rows of every span, its last ones, are of the holdout."""
    ends = list(itertools.accumulate(n["train"] for n in given))
    kept = total["train"] - recipe.source.holdout
    return [min(n["train"], max(0, end - kept)) for n, end in zip(given, ends, strict=True)]


class _Spans(NamedTuple):
    """The spans with all that dealing them out depends on."""

    collection: Collection
    moves: Moves
    version: str  # of the moves
    holdouts: list[int]
    grown: growing.Grown | None = None

    def _pieces(self, each: list[tuple[Any, dict]]) -> list[tuple[str, Any, dict, int]]:
        manifest, source = self.collection.manifest, self.collection.recipe.source
        names = spans.numbered(len(manifest.spans), "span")
        pieces = []
        for number, files in enumerate(manifest.contents()):
            depends, own = each[number]
            inputs = {"span": manifest.spans[number], "number": number, "moves": self.moves}
            inputs |= {"source": source, "holdout": self.holdouts[number], **own}
            depends = [files, self.version, self.holdouts[number], _cuts(source), depends]
            pieces.append((names[number], depends, inputs, spans.memory(spans.BLOCK)))
        return pieces

    def named(self) -> list[tuple[str, Any, dict, int]]:
        """Pieces whose inputs give the spans' blocks."""
        return self._pieces([([], {"blocks": _rows})] * len(self.holdouts))

    def plan_counts(self) -> Plan:
        folder = store.join(self.collection.folder, "counts")
        return spans.step("shard", folder, self._pieces([([], {})] * len(self.holdouts)))

    def plan_dealt(self, plan: Layout, counts: list[Counter[str]]) -> Plan:
        before = list(itertools.accumulate(counts, initial=Counter()))
        order = store.join(self.collection.folder, "order", "order.runs")
        common = {"plan": plan, "order": order, "buckets": -(-len(plan) // per_bucket(plan))}
        common["grown"] = self.grown
        each = [(dict(sorted(n.items())), {**common, "before": dict(n)}) for n in before[:-1]]
        folder = store.join(self.collection.folder, "dealt")
        return spans.step("shard", folder, self._pieces(each), asdict(plan))


def _cuts(source: SourceSettings) -> list:
    return [source.cut_val, source.cut_test, source.cut_seed]


def per_bucket(plan: Layout) -> int:
    """Shards of a bucket."""
    return max(1, spans.ROWS // plan.samples)


def write_counts(piece: Piece) -> dict:
    """Count the rows of each split of a span, what is cut off train among val and test."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    counts: Counter[str] = Counter()
    for rows in _rows(piece, ["image_id", "split"]):
        counts.update({split: len(own) for split, own in rows[2].items()})
    empty = pa.table({"place": pa.array([], pa.int64())})
    return parquet.write_table(piece.output, empty, piece.fingerprint, {"counts": dict(counts)})


def _rows(piece: Piece, columns: list[str] | None = None) -> Iterator[tuple]:
    """(numbers, rows, numbers of the rows by split) of every block of a span."""
    about = piece.inputs
    left = about["holdout"]
    blocks = about["moves"].blocks(about["span"], about["number"], columns)
    train = 0  # the holdout is the end: it is known once all train rows are counted
    if left:
        counts = [
            layout.counted(rows)["train"]
            for _, rows in about["moves"].blocks(
                about["span"], about["number"], ["image_id", "split"]
            )
        ]
        train = sum(counts)
    for numbers, rows in blocks:
        own = layout.counted(rows)["train"] if left else 0
        train -= own
        held = min(own, max(0, left - train))
        yield numbers, rows, layout.of_rows(rows, about["source"], held)


def _plan_order(collection: Collection, plan: Layout) -> Plan:
    size = plan.sizes["train"]
    piece = ("order", [size, plan.seed], {"plan": plan}, 3 * POSITION.itemsize * size)
    return spans.step("shard", store.join(collection.folder, "order"), [piece])


def write_order(piece: Piece) -> dict:
    """Write where each train row is packed."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    name, file = exchange.write_array(piece, piece.inputs["plan"].positions().astype(POSITION))
    empty = pa.table({"end": pa.array([], pa.int64())})
    return parquet.write_table(piece.output, empty, piece.fingerprint, {"files": {name: file}})


def write_dealt(piece: Piece) -> dict:
    """Write the rows of a span with their places, by bucket of shards."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    return exchange.write(piece, piece.inputs["buckets"], _dealt(piece), {})


def _dealt(piece: Piece) -> Iterator[exchange.Block]:
    about = piece.inputs
    plan: Layout = about["plan"]
    before, size = Counter(about["before"]), POSITION.itemsize

    def positions(start: int, end: int) -> np.ndarray:
        if start == end:
            return np.zeros(0, POSITION)
        data = store.read_bytes(about["order"], start * size, (end - start) * size)
        return np.frombuffer(data, POSITION)

    known = about["grown"] and about["grown"].of_span(about["number"])
    for numbers, rows, of_split in _rows(piece):
        place_N = np.empty(len(rows), np.int64)
        if known:
            of_split = _placed(plan, known, numbers, of_split, place_N)
        row, place = plan.places(of_split, before, positions)
        before.update({split: len(own) for split, own in of_split.items()})
        place_N[row] = place
        bucket_N = ((place_N >> SHIFT) // per_bucket(plan)).astype(np.int32)
        yield rows.append_column(PLACED.field("place"), pa.array(place_N)), bucket_N


def _placed(
    plan: Layout, known: tuple, numbers: np.ndarray, of_split: dict, place_N: np.ndarray
) -> dict[str, np.ndarray]:
    """Fill in the places of rows that are in a shard already; the others by split."""
    found, shards_, rows = known
    at = np.minimum(np.searchsorted(found, numbers), max(0, len(found) - 1))
    is_known = found[at] == numbers if len(found) else np.zeros(len(numbers), bool)
    for split, own in of_split.items():
        there = own[is_known[own]]
        if len(there):
            place_N[there] = plan.known(split, shards_[at[there]], rows[at[there]])
    return {split: own[~is_known[own]] for split, own in of_split.items()}


def _plan_rows(collection: Collection, plan: Layout) -> Plan:
    recipe = collection.recipe
    version, uris, _ = spans.outputs(store.join(collection.folder, "dealt"), "shard")
    count = -(-len(plan) // per_bucket(plan))
    inputs = {"runs": uris, "buckets": count, "plan": plan}
    inputs |= {"settings": recipe.shard.relevant(), "exclude": recipe.shard.exclude}
    needed = spans.memory(min(plan.samples * per_bucket(plan), sum(plan.sizes.values())))
    pieces = [
        (name, [version, collection.follows], {**inputs, "bucket": number}, needed)
        for number, name in enumerate(spans.numbered(count, "bucket"))
    ]
    made = spans.step("shard", collection.folder, pieces)
    return Plan.of("shard", collection.folder, list(made.pieces), {}, collection.follows)


def write_rows(piece: Piece) -> dict:
    """Write the rows of a bucket's shards, each with what of it is left out, and fingerprints."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    about = piece.inputs
    rows = exchange.joined(about["runs"], about["bucket"], about["buckets"], PLACED)
    place_N = rows["place"].to_numpy()
    excluded = exclusions.read(about["exclude"]) if about["exclude"] else {}
    number = {key: n for n, key in enumerate(excluded)}
    columns: dict[str, list] = {"name": [], "split": [], "fingerprint": [], "found": []}

    def parts() -> Iterator[pa.Table]:
        of = rows.drop_columns(["place"]), place_N, about["plan"], about["settings"], excluded
        for shard in dealt.of_rows(*of):
            for column in ("name", "split", "fingerprint"):
                columns[column].append(getattr(shard, column))
            columns["found"].append([number[key] for key in shard.left_out or {}])
            listed = json.dumps([[*key, why] for key, why in (shard.left_out or {}).items()])
            assert isinstance(shard.rows, pa.Table)  # as it was dealt out here
            yield shard.rows.replace_schema_metadata({dealt.LEFT_OUT: listed})

    return exchange.write_parts(piece, parts(), lambda ends: {"end": ends, **columns}, {})
