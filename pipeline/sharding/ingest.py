"""Stage 1: annotations of any known kind become a manifest, one row an image."""

import itertools
from collections import Counter
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sharding.manifest import contents, unique
from pipeline.sharding.manifest.spans import Manifest
from pipeline.sources import notes
from pipeline.sources import splits as splits_rule
from pipeline.sources.splits import Splits
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import RunFolder, need_index, read_index
from schemas.manifest import MANIFEST, TRUTH
from schemas.settings import Recipe, SourceSettings

UNUSABLE = "images that cannot be used"
BLOCK = 10_000  # rows that are held as Python objects at a time


def make_here(make: Callable[[Piece], dict], pieces: list[Piece]) -> dict[str, dict]:
    """Summaries by name of pieces that this process makes."""
    return {piece.name: make(piece) for piece in pieces}


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
    changed: dict[str, str] = {}
    try:
        with parquet.opened(output) as file:
            columns = ["uri", "stamp", "source"]
            for rows in pq.ParquetFile(file).iter_batches(2**17, columns=columns):
                before = rows["uri"].to_pylist(), rows["stamp"].to_pylist()
                changed |= sources.changed(rows["source"][0].as_py(), *before)
    except OSError:  # it is gone, and made again
        return entry["seen"]
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
    summary["contents"] = [contents.digest(table.drop_columns(["stamp"])), contents.digest(facts)]
    if facts.num_rows:
        uri = piece.output.replace("part-", "truth-")
        summary |= parquet.write_table(uri, facts, piece.fingerprint, {})
    return parquet.write_table(piece.output, table, piece.fingerprint, summary)


def check(
    plan: Plan,
    made: dict[str, dict],
    settings: SourceSettings,
    fan_out: Callable[..., dict[str, dict]] = make_here,
) -> None:
    """Refuses an empty data set, an id that is there twice, splits that only some parts name.

    Of a large one `fan_out` makes the pieces that look for ids, as tasks.
    """
    summaries = plan.done | made
    splits_rule.check({s["part"]: s["said"] for s in summaries.values()}, settings)
    entries = [{**summaries[piece.name], "name": piece.name} for piece in plan.pieces]
    manifest = Manifest.of(plan.folder, entries)
    if not manifest.rows:
        raise InputError(f"{settings.path or settings.kind} holds no image")
    passed = notes.summed([summary["passed"] for summary in summaries.values()])
    unusable, first = passed.get(UNUSABLE, (0, ""))
    if unusable == manifest.rows:
        raise InputError(f"none of {unusable} images can be used, the first: {first}")
    if not manifest.is_large:
        rows = parquet.joined(parquet.read_table(part.uri) for part in manifest.parts)
        unique.check_rows(*contents.gathered(rows), manifest)
        return
    for step, make in unique.steps(manifest, settings.kind):
        step.finish(fan_out(make, step.pending))
    unique.check(manifest, settings.kind)


def told(index: dict) -> list[str]:
    """Where the splits came from, and what was passed over: a line each."""
    pieces = index["pieces"]
    said = splits_rule.told({entry["part"]: entry["said"] for entry in pieces})
    return [f"splits: {said}", *notes.told(notes.summed([entry["passed"] for entry in pieces]))]


def totals(folder: str) -> dict[str, int]:
    """Images of each split of the source, those in several parts counted once."""
    index = need_index(folder, "ingest")
    counts = sum((Counter(entry["splits"]) for entry in index["pieces"]), Counter())
    kind = index["settings"]["kind"]
    if not unique.is_gathered(kind):  # an id is there once: it was checked
        return dict(counts)
    manifest = Manifest.of(folder, index["pieces"])
    if manifest.is_large:
        for bucket in unique.moves(manifest)[2]:
            counts.subtract({split: sum(fewer) for split, fewer in bucket["gone"].items()})
        return dict(counts)
    rows = read(folder, ["image_id", "split"]).group_by(["split", "image_id"]).aggregate([])
    found = pc.value_counts(rows["split"]).to_pylist()
    return {count["values"]: count["counts"] for count in found}


def images(folder: str) -> pa.Table:
    """The manifest's rows as `read` has them, one for each image."""
    return contents.gathered(read(folder))[0]


def read(folder: str, columns: list[str] | None = None) -> pa.Table:
    """The manifest's rows, all parts in order, with offsets of 64 bits: it may be of any size."""
    schema = MANIFEST if columns is None else pa.schema([MANIFEST.field(c) for c in columns])
    schema = parquet.large(schema)
    names = sorted(name for name in store.list_files(folder) if name.startswith("part-"))
    tables = [parquet.read_table(store.join(folder, name), columns) for name in names]
    return parquet.joined([t.cast(schema) for t in tables] or [schema.empty_table()])


def _batch(rows: list[dict], where: str) -> pa.RecordBatch:
    try:
        return pa.RecordBatch.from_pylist(rows, MANIFEST)
    except UnicodeEncodeError as error:  # a name: captions were looked at when they were read
        wrong = error.object[error.start : error.end]
        raise InputError(
            f"{where}: the name {error.object[:80]!r} holds {wrong!r}, half a character or a byte "
            "that is not UTF-8; rename it"
        ) from error
