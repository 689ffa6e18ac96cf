"""Stage 1: annotations of any known kind become a manifest, one row an image."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sources import notes
from pipeline.sources import splits as splits_rule
from pipeline.sources.splits import Splits
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import RunFolder, need_index, read_index
from schemas.manifest import MANIFEST, TRUTH
from schemas.settings import Recipe, SourceSettings

SPLITS = ("train", "val", "test")
ADVICE = (
    "give every image one row, its captions in a list, or name it by source.id_column (of tars a "
    "field of the JSON, or __key__)"
)
UNUSABLE = "images that cannot be used"
BLOCK = 10_000  # rows that are held as Python objects at a time


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every part of the source.

    A piece that was made is made again when the annotations are others, and when a file that its
    rows name is not as it was: only then do the rows' stamps, and what depends on them, change.
    """
    settings = recipe.source
    folder = RunFolder(root).folder("ingest")
    read = sources.read_by(settings.kind)  # of another kind's settings nothing depends
    asked = {name: value for name, value in settings.relevant().items() if name in read}
    known = {entry["name"]: entry for entry in (read_index(folder) or {}).get("pieces", [])}
    pieces = []
    for number, part in enumerate(sources.parts(settings)):
        name = f"part-{number:05d}"
        output = store.join(folder, f"{name}.parquet")
        base = store.fingerprint("ingest", asked, sources.inputs(settings, part))
        seen = _seen(known.get(name, {}), base, output)
        inputs = {"part": part, "settings": settings, "base": base, "seen": seen}
        fingerprint = store.fingerprint(base, seen)
        pieces.append(Piece(name, output, fingerprint, inputs))
    return Plan.of("ingest", folder, pieces, asked)


def _seen(entry: dict, base: str, output: str) -> str:
    """What was seen of the files that a piece's rows name: another word once one has changed."""
    if entry.get("base") != base:
        return ""
    try:
        rows = parquet.read_table(output, ["uri", "stamp", "source"])
    except OSError:  # it is gone, and made again
        return entry["seen"]
    kind = rows["source"][0].as_py() if rows.num_rows else ""
    before = rows["uri"].to_pylist(), rows["stamp"].to_pylist()
    changed = sources.changed(kind, *before) if kind else {}
    return store.fingerprint(entry["seen"], changed) if changed else entry["seen"]


def write_part(piece: Piece) -> dict:
    """Write the manifest rows of one part; a summary with the images of each split."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    settings, part = piece.inputs["settings"], piece.inputs["part"]
    found = Splits(settings, part.split)
    manifest, truth, counts = [], [], Counter()
    with notes.collected() as passed:
        rows = sources.rows(settings, part, found)
        while block := list(itertools.islice(rows, BLOCK)):
            counts.update(row["split"] for row in block)
            for row in (row for row in block if row["problem"]):
                notes.add(UNUSABLE, row["problem"])
            facts = [fact for row in block for fact in row.pop("truth", ())]
            truth.append(pa.RecordBatch.from_pylist(facts, TRUTH))
            manifest.append(_batch(block, part.uri))
    summary = {"part": part.uri, "splits": dict(counts), "said": found.summary(), "passed": passed}
    summary |= {"base": piece.inputs["base"], "seen": piece.inputs["seen"]}
    facts = pa.Table.from_batches(truth, TRUTH)
    table = pa.Table.from_batches(manifest, MANIFEST)
    summary["contents"] = [digest(table.drop_columns(["stamp"])), digest(facts)]
    if facts.num_rows:
        uri = piece.output.replace("part-", "truth-")
        summary |= parquet.write_table(uri, facts, piece.fingerprint, {})
    return parquet.write_table(piece.output, table, piece.fingerprint, summary)


def check(plan: Plan, made: dict[str, dict], settings: SourceSettings) -> None:
    """Refuses an empty data set, an id that is there twice, splits that only some parts name."""
    summaries = plan.done | made
    splits_rule.check({s["part"]: s["said"] for s in summaries.values()}, settings)
    tables = [parquet.read_table(piece.output) for piece in plan.pieces]
    count = sum(map(len, tables))
    if not count:
        raise InputError(f"{settings.path or settings.kind} holds no image")
    passed = notes.summed([summary["passed"] for summary in summaries.values()])
    unusable, first = passed.get(UNUSABLE, (0, ""))
    if unusable == count:
        raise InputError(f"none of {count} images can be used, the first: {first}")
    rows = pa.concat_tables([t.cast(parquet.large(t.schema)) for t in tables])
    parts = [piece.inputs["part"].uri for piece in plan.pieces]
    rows, first_rows = gathered(rows)
    check_ids(rows.combine_chunks(), np.repeat(parts, list(map(len, tables)))[first_rows])


def check_ids(rows: pa.Table, parts: np.ndarray) -> None:
    """Refuses an empty id, and one that is there twice; `parts` are of the rows."""
    if unnamed := pc.sum(pc.equal(rows["image_id"].fill_null(""), "")).as_py():
        raise InputError(f"{unnamed} images have an empty id; give every image an id of its own")
    captions = rows["captions"].combine_chunks()
    owners = pc.list_parent_indices(captions).to_numpy()
    of_captions = captions.flatten().field("caption_id"), parts[owners]
    for kind, ids, of, advice in (
        ("image", rows["image_id"].combine_chunks(), parts, ADVICE),
        ("caption", *of_captions, "give every caption an id of its own"),
    ):
        if not len(twice := _repeated(ids)):
            continue
        one, two = of[np.flatnonzero(pc.equal(ids, twice[0]).to_numpy(zero_copy_only=False))[:2]]
        where = f"twice in {one}" if one == two else f"in {one} and in {two}"
        raise InputError(
            f"{len(twice)} {kind} ids appear more than once, the first is {twice[0].as_py()!r}, "
            f"{where}; {advice}"
        )


def gathered(rows: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The rows, those that their source knows to be of one image made one; and the first of each.

    As where every caption is a sample of its own, and an image's samples are in several tars.
    """
    if not len(twice := _repeated(rows["image_id"])):
        return rows, np.arange(rows.num_rows)
    at = np.flatnonzero(pc.is_in(rows["image_id"], twice).to_numpy())
    found: dict[str, list[int]] = {}
    for row, image_id in zip(at.tolist(), rows["image_id"].take(at).to_pylist(), strict=True):
        found.setdefault(image_id, []).append(row)
    one = {id_: _one_image(rows.take(places).to_pylist()) for id_, places in found.items()}
    made = {found[id_][0]: row for id_, row in one.items() if row}
    gone = [place for id_, row in one.items() if row for place in found[id_]]
    kept = np.setdiff1d(np.arange(rows.num_rows), gone)
    table = pa.concat_tables([rows.take(kept), pa.Table.from_pylist([*made.values()], rows.schema)])
    first = np.concatenate([kept, np.array([*made], np.int64)])
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


def _repeated(ids: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The values that are there more than once."""
    counts = pc.value_counts(ids)
    return counts.filter(pc.greater(counts.field("counts"), 1)).field("values")


def told(index: dict) -> list[str]:
    """Where the splits came from, and what was passed over: a line each."""
    pieces = index["pieces"]
    said = splits_rule.told({entry["part"]: entry["said"] for entry in pieces})
    return [f"splits: {said}", *notes.told(notes.summed([entry["passed"] for entry in pieces]))]


def totals(folder: str) -> dict[str, int]:
    """Images of each split of the source, those in several parts counted once."""
    index = need_index(folder, "ingest")
    source = sources.source(index["settings"]["kind"])
    if not hasattr(source, "one_image"):  # an id is there once: it was checked
        return dict(sum((Counter(entry["splits"]) for entry in index["pieces"]), Counter()))
    rows = read(folder, ["image_id", "split"]).group_by(["split", "image_id"]).aggregate([])
    counts = pc.value_counts(rows["split"]).to_pylist()
    return {count["values"]: count["counts"] for count in counts}


def images(folder: str) -> pa.Table:
    """The manifest's rows as `read` has them, one for each image."""
    return gathered(read(folder))[0]


def read(folder: str, columns: list[str] | None = None) -> pa.Table:
    """The manifest's rows, all parts in order, with offsets of 64 bits: it may be of any size."""
    schema = MANIFEST if columns is None else pa.schema([MANIFEST.field(c) for c in columns])
    schema = parquet.large(schema)
    tables = [parquet.read_table(uri, columns) for uri in _files(folder, "part-")]
    return pa.concat_tables([t.cast(schema) for t in tables] or [schema.empty_table()])


def splits(manifest: pa.Table, settings: SourceSettings) -> dict[str, np.ndarray]:
    """Row numbers of each split, what is cut off train moved to val and test.

    The holdout is the end of train; a share is drawn by a hash of each image's id, so that an image
    stays where it is when others come.
    """
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
    _cut(order, manifest["image_id"], settings)
    names = [s for s in SPLITS if s in order] + sorted(set(order) - set(SPLITS))
    return {split: order[split] for split in names}


def _cut(order: dict[str, np.ndarray], ids: pa.ChunkedArray, settings: SourceSettings) -> None:
    """Moves `cut_val` and `cut_test` of the train rows."""
    shares = {"val": settings.cut_val, "test": settings.cut_test}
    if not any(shares.values()):
        return
    train = order.get("train", np.zeros(0, np.int64))
    for split, share in shares.items():
        if share and split in order:
            raise InputError(
                f"source.cut_{split} {share:g} makes a {split} split, and there is one of "
                f"{len(order[split])} images; leave it out, or drop the other by "
                f"source.splits.{split} drop"
            )
    if sum(shares.values()) >= 1:
        raise InputError("source.cut_val and source.cut_test together leave nothing of train")
    place = _places(ids.take(pa.array(train)), settings.cut_seed)
    begin = 0.0
    for split, share in shares.items():
        end = begin + share
        chosen = (place >= begin) & (place < end)
        if share and not chosen.any():
            raise InputError(
                f"source.cut_{split} {share:g} of {len(train)} train images is none; give more"
            )
        if share:
            order[split] = train[chosen]
        begin = end
    order["train"] = train[place >= begin]


def _places(ids: pa.ChunkedArray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each id, of its hash."""
    hashed = (
        hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=8).digest() for i in ids.to_pylist()
    )
    return np.frombuffer(b"".join(hashed), "<u8") / 2.0**64


def digest(rows: pa.Table) -> str:
    """Hash of what manifest rows hold, whatever chunks and buffers it lies in."""
    hashed = hashlib.sha256()
    rows = rows.cast(parquet.large(rows.schema))
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


def _batch(rows: list[dict], where: str) -> pa.RecordBatch:
    try:
        return pa.RecordBatch.from_pylist(rows, MANIFEST)
    except UnicodeEncodeError as error:  # a name: captions were looked at when they were read
        wrong = error.object[error.start : error.end]
        raise InputError(
            f"{where}: the name {error.object[:80]!r} holds {wrong!r}, half a character or a byte "
            "that is not UTF-8; rename it"
        ) from error


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
