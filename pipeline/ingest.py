"""Stage 1: annotations of any known kind become a manifest, one row an image."""

import itertools
from collections import Counter

import pyarrow as pa

from pipeline import _plan, _store
from pipeline._errors import InputError
from pipeline._plan import Piece, Plan
from pipeline.sources import source
from schemas.manifest import MANIFEST, TRUTH
from schemas.settings import Recipe, SourceSettings

SPLITS = ("train", "val", "test")


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every part of the source."""
    settings = recipe.source
    folder = _plan.folder(root, "ingest")
    module = source(settings.kind)
    stamps = [[uri, _store.stamp(uri)] for uri in module.inputs(settings)]
    pieces = [
        Piece(
            name=f"part-{number:05d}",
            output=_store.join(folder, f"part-{number:05d}.parquet"),
            fingerprint=_store.fingerprint("ingest", settings.model_dump(), part, stamps),
            inputs={"part": part, "settings": settings},
        )
        for number, part in enumerate(module.parts(settings))
    ]
    return _plan.plan("ingest", folder, pieces, settings.model_dump())


def write_part(piece: Piece) -> dict:
    """Write the manifest rows of one part; a summary with the images of each split."""
    settings: SourceSettings = piece.inputs["settings"]
    if summary := _store.finished(piece.output, piece.fingerprint):
        return summary
    rows = list(source(settings.kind).rows(settings, piece.inputs["part"]))
    for row in rows:
        row["split"] = settings.splits.get(row["split"], row["split"])
    rows = [row for row in rows if row["split"] != "drop"]
    truth = [fact for row in rows for fact in row.pop("truth", [])]
    summary = {"splits": dict(Counter(row["split"] for row in rows))}
    if truth:
        uri = piece.output.replace("part-", "truth-")
        table = pa.Table.from_pylist(truth, schema=TRUTH)
        summary |= _store.write_table(uri, table, piece.fingerprint, {})
    table = pa.Table.from_pylist(rows, schema=MANIFEST)
    return _store.write_table(piece.output, table, piece.fingerprint, summary)


def check(plan: Plan) -> dict[str, int]:
    """Images of each split; refuses an empty data set and an id that is there twice."""
    rows = read(plan.folder, ["image_id", "split", "captions"])
    if not rows.num_rows:
        raise InputError(f"{plan.settings['path'] or plan.settings['kind']} holds no image")
    captions = rows["captions"].combine_chunks().flatten().field("caption_id")
    for kind, ids, advice in (
        ("image", rows["image_id"], "give every image one row, its captions in a list"),
        ("caption", captions, "give every caption an id of its own"),
    ):
        twice = [name for name, n in Counter(ids.to_pylist()).items() if n > 1]
        if twice:
            raise InputError(
                f"{len(twice)} {kind} ids appear more than once, the first is {twice[0]!r}; "
                f"{advice}"
            )
    return dict(Counter(rows["split"].to_pylist()))


def read(folder: str, columns: list[str] | None = None) -> pa.Table:
    """The manifest's rows, all parts in order."""
    names = sorted(name for name in _store.list_files(folder) if name.startswith("part-"))
    tables = [_store.read_table(_store.join(folder, name), columns) for name in names]
    schema = MANIFEST if columns is None else pa.schema([MANIFEST.field(c) for c in columns])
    return pa.concat_tables([t.replace_schema_metadata() for t in tables] or [schema.empty_table()])


def rows_by_split(folder: str, settings: SourceSettings) -> dict[str, pa.Table]:
    """The manifest's rows of each split, the holdout moved from the end of train to val."""
    table = read(folder)
    splits = table["split"].to_pylist()
    order = {split: [i for i, s in enumerate(splits) if s == split] for split in set(splits)}
    if settings.holdout:
        train = order.get("train", [])
        if "val" in order or settings.holdout >= len(train):
            raise InputError(
                f"source.holdout {settings.holdout} needs more than that many train images and no "
                f"val split of its own; found { ({k: len(v) for k, v in order.items()}) }"
            )
        cut = len(train) - settings.holdout
        order["train"], order["val"] = train[:cut], train[cut:]
    names = [s for s in SPLITS if s in order] + sorted(set(order) - set(SPLITS))
    return {split: table.take(order[split]) for split in names}


def truth(folder: str) -> dict[str, str]:
    """Facts by image and caption id, where the source knows the truth; empty elsewhere."""
    names = sorted(name for name in _store.list_files(folder) if name.startswith("truth-"))
    tables = [_store.read_table(_store.join(folder, name)) for name in names]
    pairs = (zip(t["id"].to_pylist(), t["facts"].to_pylist(), strict=True) for t in tables)
    return dict(itertools.chain.from_iterable(pairs))
