"""Stage 4: caption similarity becomes relevance, the top candidates of every query.

Lists from images or texts to the images or texts of the query's own split.

Legend of the shape suffixes: M images, N captions, Q queries, K candidates.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from pipeline.errors import InputError
from pipeline.labels import decisions, embed
from pipeline.labels.caption_vectors import Captions
from pipeline.labels.encoders import encoder_label, sentences
from pipeline.labels.relevance_lists import Direction, Lists
from pipeline.storage import parquet, store, text_files
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import Files, RunFolder
from schemas.relevance import ENCODINGS, RELEVANCE
from schemas.settings import LabelSettings, Recipe

BLOCK = 256  # images whose captions are compared with each other at a time
BINS = 50  # of the relevance histograms
COUNTED = 10_000_000  # pairs of a piece that its histogram counts, of evenly spaced images
CELLS = 2**22  # of a block of relevance
BYTES = 6.5  # of memory for a number of the split's vectors, measured: docs/scale.md


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every shard: its images and captions against all of their split."""
    run, settings = RunFolder(root), recipe.label
    embeddings = embed.files(recipe, root)
    splits = {entry["split"] for entry in embeddings.entries}
    everyone_of = {split: embeddings.of_split(split) for split in splits}
    numbers = {
        split: sum(entry["captions"] * entry["dim"] for entry in everyone.entries)
        for split, everyone in everyone_of.items()
    }
    folder = run.folder("label", encoder_label(recipe.embed.encoder))
    _check_calibration(recipe)
    matters = {**depends_on(settings), **settings.relevant("lists")}
    if settings.cross_encoder is not None:
        matters["cross_encoder"] = sentences.fingerprint(settings.cross_encoder)
    shared = {"shards": run.folder("shard"), "settings": settings, "embed": recipe.embed}
    pieces = []
    for entry in embeddings.entries:
        name, split = entry["name"], entry["split"]
        everyone = everyone_of[split]
        fingerprint = store.fingerprint("label", matters, name, everyone.version)
        inputs = shared | {"embeddings": everyone, "shard": name, "split": split}
        output = store.join(folder, f"{name}.parquet")
        pieces.append(Piece(name, output, fingerprint, inputs, int(BYTES * numbers[split])))
    return Plan.of("label", folder, pieces, matters)


def check_decided(recipe: Recipe, root: str) -> None:
    """Tells how many of the decided pairs are of nobody here; refuses where all are."""
    if recipe.label.overrides is None:
        return
    uris = embed.files(recipe, root).uris
    tables = [parquet.read_columns(uri, ["image_id", "caption_id"]) for uri in uris]
    here = pa.concat_tables(tables).columns
    decisions.tell(recipe.label.overrides, *(set(column.to_pylist()) for column in here))


def _check_calibration(recipe: Recipe) -> None:
    """Stop where the fitted map is of another encoder's cosines."""
    uri, embed_ = recipe.label.calibration, recipe.embed
    fitted_to = uri and decisions.calibration(uri).encoder
    mine = "ensemble" if embed_.members else embed_.encoder
    if fitted_to and encoder_label(fitted_to) != encoder_label(mine):
        raise InputError(
            f"label.calibration {uri} was fitted to {fitted_to}, embed.encoder is "
            f"{embed_.encoder}; give the map of that encoder, or choose the encoder of that map"
        )


def depends_on(settings: LabelSettings) -> dict:
    """What the relevance of a pair depends on, files by their contents."""
    out = settings.relevant() | {"calibration": None, "overrides": None}
    if settings.calibration is not None:
        out["calibration"] = store.sha256(text_files.data(settings.calibration, "a fitted map"))
    if settings.overrides is not None:
        decided = decisions.overrides(settings.overrides)
        out["overrides"] = decided and store.fingerprint(sorted(decided))
    return out


def write_relevance(piece: Piece) -> dict:
    """Write the relevance lists of one shard; a summary with histograms of the relevance."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    inputs = piece.inputs
    settings: LabelSettings = inputs["settings"]
    files: Files = inputs["embeddings"]
    everyone = Captions.read(files)
    mine = Captions.read(files.one(inputs["shard"]))
    tables, recalls = [RELEVANCE.empty_table()], {}
    for name in settings.lists:
        direction = Direction(name, mine, everyone, settings)
        lists, recall = direction.lists()
        if settings.cross_encoder is not None:
            sidecars = [store.join(inputs["shards"], f"{n}.parquet") for n in files.names]
            lists = direction.read_again(lists, sidecars, inputs["embed"])
        tables.append(_table(direction, direction.decide(lists)))
        recalls |= {name: recall} if recall is not None else {}
    table = pa.concat_tables(tables)
    image_P = everyone.decided(settings)[0]
    summary = {
        "split": inputs["split"],
        "queries": len(table),
        "decided": int(np.isin(image_P, everyone.rows_of(mine.image_ids)).sum()),
        "recall": recalls,
        **_histograms(mine, everyone, settings),
    }
    about = {"map": settings.map, "reduce": settings.reduce, "embeddings": files.version}
    return parquet.write_table(
        piece.output, table, piece.fingerprint, summary, encodings=ENCODINGS, **about
    )


def _table(direction: Direction, lists: Lists) -> pa.Table:
    """The lists as rows, each by rising candidate."""
    row_QK, order = lists.row_QK.sort(dim=1)
    kept_QK = row_QK >= 0
    ends = np.concatenate([[0], kept_QK.sum(1).cumsum(0).numpy()])
    offsets = pa.array(ends.astype(np.int32))
    relevance_QK = lists.relevance_QK.gather(1, order)
    columns = (row_QK[kept_QK].int(), relevance_QK[kept_QK].half())
    lists_of = [pa.ListArray.from_arrays(offsets, pa.array(c.numpy())) for c in columns]
    ids = pa.array(direction.query_ids, pa.string())
    return pa.table([ids, pa.array([direction.name] * len(ids)), *lists_of], schema=RELEVANCE)


def _histograms(mine: Captions, everyone: Captions, settings: LabelSettings) -> dict:
    """Counts of the relevance of annotated negatives, and of captions to their own images."""
    pairs = len(mine.image_ids) * len(everyone.caption_ids)
    images = mine.image_ids[:: max(1, -(-pairs // COUNTED))]
    negatives = np.zeros(BINS, np.int64)
    for part in _parts(images, max(1, CELLS // max(1, len(everyone.caption_ids)))):
        r_MN = everyone.relevance(part, settings)
        negatives += _histogram(r_MN[~everyone.same_image(part)])
    positives = np.zeros(BINS, np.int64)
    for part in _parts(mine.image_ids, BLOCK):
        positives += _histogram(mine.held_out(part, settings))
    return {"histogram_negatives": negatives.tolist(), "histogram_positives": positives.tolist()}


def _parts(images: list[str], size: int) -> Iterator[list[str]]:
    return (images[start : start + size] for start in range(0, len(images), size))


def _histogram(values: torch.Tensor) -> np.ndarray:
    return np.histogram(values.numpy(), bins=BINS, range=(0, 1))[0]


def histograms(entries: list[dict]) -> dict:
    """Histograms, by split, of the relevance of annotated negatives and of held-out positives.

    A held-out positive is a caption against the *other* captions of its own image. Of a large
    split the negatives of evenly spaced images are counted.
    """
    out = {}
    for split in sorted({entry["split"] for entry in entries}):
        mine = [entry for entry in entries if entry["split"] == split]
        names = ("histogram_negatives", "histogram_positives")
        out[split] = {name: np.sum([e[name] for e in mine], axis=0).tolist() for name in names}
    return {"edges": np.linspace(0, 1, BINS + 1).tolist(), "splits": out}


def recalls(entries: list[dict]) -> dict[str, float]:
    """{recall_<direction>: least recall of a piece} of lists that were found approximately."""
    out: dict[str, float] = {}
    for entry in entries:
        for direction, recall in entry["recall"].items():
            name = f"recall_{direction}"
            out[name] = min(recall, out.get(name, 1.0))
    return out
