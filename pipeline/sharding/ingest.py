"""Stage 1: annotations of any known kind become a manifest, one row an image."""

import hashlib
import itertools
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.sources import SOURCES, source
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import RunFolder
from schemas.manifest import MANIFEST, TRUTH
from schemas.settings import Recipe, SourceSettings

SPLITS = ("train", "val", "test")
BLOCK = 10_000  # rows that are held as Python objects at a time


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every part of the source."""
    settings = recipe.source
    folder = RunFolder(root).folder("ingest")
    module = source(settings.kind)
    asked = settings.relevant()
    pieces = []
    for number, part in enumerate(module.parts(settings)):
        name, inputs = f"part-{number:05d}", {"part": part, "settings": settings}
        fingerprint = store.fingerprint("ingest", asked, part, module.inputs(settings, part))
        output = store.join(folder, f"{name}.parquet")
        pieces.append(Piece(name, output, fingerprint, inputs))
    return Plan.of("ingest", folder, pieces, asked)


def write_part(piece: Piece) -> dict:
    """Write the manifest rows of one part; a summary with the images of each split."""
    settings: SourceSettings = piece.inputs["settings"]
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    manifest, truth, splits = [], [], Counter()
    rows = iter(source(settings.kind).rows(settings, piece.inputs["part"]))
    while block := list(itertools.islice(rows, BLOCK)):
        for row in block:
            row["split"] = settings.splits.get(row["split"], row["split"])
        block = [row for row in block if row["split"] != "drop"]
        splits.update(row["split"] for row in block)
        facts = [fact for row in block for fact in row.pop("truth", ())]
        truth.append(_batch(facts, TRUTH))
        manifest.append(_batch(block, MANIFEST))
    for name in splits:
        if not re.fullmatch(r"\w[\w-]*", name or "", re.ASCII):
            raise InputError(
                f"found a split called {name!r}; shards are called after their split, so it may "
                "hold letters, digits, _ and - alone: rename it with source.splits"
            )
    summary = {"splits": dict(splits)}
    table = pa.Table.from_batches(truth, TRUTH)
    if table.num_rows:
        uri = piece.output.replace("part-", "truth-")
        summary |= parquet.write_table(uri, table, piece.fingerprint, {})
    table = pa.Table.from_batches(manifest, MANIFEST)
    return parquet.write_table(piece.output, table, piece.fingerprint, summary)


def check(plan: Plan) -> None:
    """Refuses an empty data set and an id that is there twice."""
    rows = images(plan.folder).combine_chunks()
    if not rows.num_rows:
        raise InputError(f"{plan.settings['path'] or plan.settings['kind']} holds no image")
    if unnamed := pc.sum(pc.equal(rows["image_id"].fill_null(""), "")).as_py():
        raise InputError(f"{unnamed} images have an empty id; give every image an id of its own")
    kinds = {"image": rows["image_id"], "caption": _caption_ids(rows["captions"])[1]}
    for kind, ids in kinds.items():
        if len(twice := _repeated(ids)):
            first = twice[0].as_py()
            raise InputError(
                f"{len(twice)} {kind} ids appear more than once, the first is {first!r}"
                f"{_places(plan, kind, first)}; {_advice(rows['source'][0].as_py(), kind)}"
            )


def images(folder: str) -> pa.Table:
    """The manifest's rows, in order; those that the source knows to be of one image made one."""
    rows = read(folder)
    if not len(twice := _repeated(rows["image_id"])):
        return rows
    at = np.flatnonzero(pc.is_in(rows["image_id"], twice).to_numpy())
    found: dict[str, list[int]] = {}
    for row, image_id in zip(at.tolist(), rows["image_id"].take(at).to_pylist(), strict=True):
        found.setdefault(image_id, []).append(row)
    of = {id_: _one_image(rows.take(places).to_pylist()) for id_, places in found.items()}
    made = {found[id_][0]: row for id_, row in of.items() if row}
    gone = [place for id_, row in of.items() if row for place in found[id_]]
    kept = np.setdiff1d(np.arange(rows.num_rows), gone)
    table = pa.concat_tables([rows.take(kept), pa.Table.from_pylist([*made.values()], rows.schema)])
    return table.take(np.argsort([*kept, *made]))


def _one_image(rows: list[dict]) -> dict | None:
    """The row of an image that several rows are of; None where the source knows no such thing."""
    first = rows[0]
    one_image = getattr(SOURCES.get(first["source"]), "one_image", lambda uris: False)
    alike = all((row["split"], row["source"]) == (first["split"], first["source"]) for row in rows)
    if not alike or not one_image([row["uri"] for row in rows]):
        return None
    return {**first, "captions": [caption for row in rows for caption in row["captions"]]}


def _repeated(ids: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The values that are there more than once."""
    counts = pc.value_counts(ids)
    return counts.filter(pc.greater(counts.field("counts"), 1)).field("values")


def _caption_ids(captions: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Of every caption its row, and its id."""
    captions = captions.combine_chunks()
    return pc.list_parent_indices(captions), captions.flatten().field("caption_id")


def _places(plan: Plan, kind: str, id_: str) -> str:
    """The two parts, and the rows in them, that have an id."""
    found: list[str] = []
    for piece in plan.pieces:
        rows = parquet.read_table(piece.output, ["image_id", "captions"])
        numbers, ids = range(rows.num_rows), rows["image_id"]
        if kind == "caption":
            numbers, ids = _caption_ids(rows["captions"])
        here = np.flatnonzero(pc.equal(ids, id_).to_numpy(zero_copy_only=False))
        found += [f"image {int(numbers[k]) + 1} of {piece.inputs['part']}" for k in here.tolist()]
        if len(found) > 1:
            return f": {found[0]} and {found[1]}"
    return ""


def _advice(kind_of_source: str, kind: str) -> str:
    if kind == "caption":
        return "give every caption an id of its own"
    advice = "give every image one row, its captions in a list"
    return getattr(SOURCES.get(kind_of_source), "TWICE", advice)


def totals(folder: str) -> dict[str, int]:
    """Images of each split of the source, those in several parts counted once."""
    rows = read(folder, ["image_id", "split"]).group_by(["split", "image_id"]).aggregate([])
    counts = pc.value_counts(rows["split"]).to_pylist()
    return {count["values"]: count["counts"] for count in counts}


def read(folder: str, columns: list[str] | None = None) -> pa.Table:
    """The manifest's rows, all parts in order, with offsets of 64 bits: it may be of any size."""
    schema = MANIFEST if columns is None else pa.schema([MANIFEST.field(c) for c in columns])
    schema = pa.schema([field.with_type(_large(field.type)) for field in schema])
    tables = [parquet.read_table(uri, columns) for uri in _files(folder, "part-")]
    return pa.concat_tables([t.cast(schema) for t in tables] or [schema.empty_table()])


def splits(manifest: pa.Table, settings: SourceSettings) -> dict[str, np.ndarray]:
    """Row numbers of each split, the holdout moved from the end of train to val."""
    found = pc.unique(manifest["split"]).to_pylist()
    order = {s: np.flatnonzero(pc.equal(manifest["split"], s).to_numpy()) for s in found}
    if settings.holdout:
        train = order.get("train", [])
        if "val" in order or settings.holdout >= len(train):
            raise InputError(
                f"source.holdout {settings.holdout} needs more than that many train images and no "
                f"val split of its own; found { ({k: len(v) for k, v in order.items()}) }"
            )
        order["train"], order["val"] = np.split(train, [len(train) - settings.holdout])
    names = [s for s in SPLITS if s in order] + sorted(set(order) - set(SPLITS))
    return {split: order[split] for split in names}


def digest(rows: pa.Table) -> str:
    """Hash of what manifest rows hold, whatever chunks and buffers it lies in."""
    hashed = hashlib.sha256()
    for name in rows.column_names:
        _feed(hashed, rows[name].combine_chunks())
    return hashed.hexdigest()


def truth(folder: str) -> dict[str, str]:
    """Facts by image and caption id, where the source knows the truth; empty elsewhere."""
    tables = [parquet.read_table(uri) for uri in _files(folder, "truth-")]
    pairs = (zip(t["id"].to_pylist(), t["facts"].to_pylist(), strict=True) for t in tables)
    return dict(itertools.chain.from_iterable(pairs))


def _files(folder: str, begin: str) -> list[str]:
    names = sorted(name for name in store.list_files(folder) if name.startswith(begin))
    return [store.join(folder, name) for name in names]


def _batch(rows: list[dict], schema: pa.Schema) -> pa.RecordBatch:
    try:
        return pa.RecordBatch.from_pylist(rows, schema)
    except UnicodeEncodeError as error:
        wrong = error.object[error.start : error.end]
        raise InputError(
            f"{error.object[:80]!r} holds {wrong!r}, half a character or a byte that is not UTF-8; "
            "mend that caption or name in the annotations"
        ) from error


def _large(kind: pa.DataType) -> pa.DataType:
    """The type with offsets of 64 bits: those of 32 end at 2 GB of captions."""
    if pa.types.is_list(kind):
        return pa.large_list(_large(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_large(field.type)) for field in kind])
    return pa.large_string() if pa.types.is_string(kind) else kind


def _feed(hashed, array: pa.Array) -> None:
    """Hash an array of `read`'s types: which values are there, their lengths, their bytes."""
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
