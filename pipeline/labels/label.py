"""Stage 4: caption similarity becomes relevance, the top candidates of every query.

Lists from images or texts to the images or texts of the query's own split.

Legend of the shape suffixes: M images, N captions, Q queries, K candidates.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.errors import InputError
from pipeline.labels import cells, decisions, embed
from pipeline.labels.candidates import Block, Decided, blocks, is_small
from pipeline.labels.caption_vectors import Captions, relevance_of
from pipeline.labels.encoders import encoder_label, sentences
from pipeline.labels.relevance_lists import Direction, Lists
from pipeline.storage import parquet, store, text_files
from pipeline.storage.piece_table import column, split_names
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import Files, RunFolder
from schemas.relevance import ENCODINGS, RELEVANCE
from schemas.settings import LabelSettings, Recipe

BLOCK = 256  # images whose captions are compared with each other at a time
BINS = 50  # of the relevance histograms
COUNTED = 10_000_000  # pairs of a piece that its histogram counts, of evenly spaced images
CELLS = 2**22  # of a block of relevance
# Bytes of memory of a task, measured: docs/scale.md.
FIXED = 150e6  # blocks of the product, and what is compiled
OWN, OTHER = 8.0, 10.0  # a number of the own captions' vectors, and of another shard's
KEY = 24.0  # a candidate of a list, while it is sorted
KEPT, CAPTION = 4.0, 500.0  # a number of what is kept, and a caption with its ids


class Step(NamedTuple):
    """One plan of the stage, and what makes its pieces."""

    plan: Plan
    make: Callable[[Piece], dict]


def steps(recipe: Recipe, root: str) -> Iterator[Step]:
    """The stage's plans in order; each is drawn up when those before it are finished.

    Of a split that is searched by cells these come first.
    """
    if recipe.label.approximate_above is not None:
        everyone = embed.files(recipe, root)
        for split in sorted(split_names(everyone.entries)):
            if by_cells := _by_cells(split, everyone.of_split(split), recipe, root):
                yield from (Step(*step) for step in cells.steps(by_cells))
    yield Step(plan(recipe, root), write_relevance)


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every shard: its images and captions against all of their split."""
    run, settings = RunFolder(root), recipe.label
    embeddings = embed.files(recipe, root)
    files = {s: embeddings.of_split(s) for s in split_names(embeddings.entries)}
    found = {s: _found(s, files[s], recipe, root) for s in files}
    folder = run.folder("label", encoder_label(recipe.embed.encoder))
    _check_calibration(recipe)
    matters = {**depends_on(settings), **settings.relevant("lists")}
    if settings.cross_encoder is not None:
        matters["cross_encoder"] = sentences.fingerprint(settings.cross_encoder)
    # Of each split what its lists depend on.
    depends = {s: [files[s].version, *([found[s].version] if found[s] else [])] for s in files}
    shared = {"shards": run.folder("shard"), "settings": settings, "embed": recipe.embed}

    def draw() -> Iterator[Piece]:
        shared_of = {s: {**shared, **_of_split(files[s], found[s], recipe)} for s in files}
        for split, of_split in shared_of.items():
            yield from _pieces(split, of_split, folder, [matters, depends[split]])

    follows = store.fingerprint("label", matters, embeddings.names, depends)
    return Plan.of("label", folder, lambda: list(draw()), matters, follows)


def _pieces(split: str, shared: dict, folder: str, depends: list) -> Iterator[Piece]:
    """A piece for every shard of a split."""
    matters, versions = depends
    entries, settings = shared["embeddings"].entries, shared["settings"]
    counts, dims = column(entries, "captions"), column(entries, "dim")
    names = shared["embeddings"].names
    for number, (name, captions, dim) in enumerate(zip(names, counts, dims, strict=True)):
        fingerprint = store.fingerprint("label", matters, name, *versions)
        inputs = {**shared, "shard": name, "split": split, "number": number}
        memory = task_memory(settings, captions, shared["largest"], dim, shared["captions"])
        output = store.join(folder, f"{name}.parquet")
        yield Piece(name, output, fingerprint, inputs, memory)


def _of_split(files: Files, found: cells.Found | None, recipe: Recipe) -> dict:
    """What all tasks of a split are told of it."""
    remote = not store.is_local(files.folder)
    made = column(files.entries, "files") if remote else []
    counts = column(files.entries, "captions")
    return {
        "embeddings": files,
        "captions": sum(counts),
        "largest": max(counts),
        "copies": {n: f[f"{n}.parquet"] for n, f in zip(files.names, made, strict=False)},
        "limit": recipe.train.cache_gb * 1e9,
        "small": is_small(sum(counts), max(column(files.entries, "dim"))),
        "cells": found,
    }


def _found(split: str, files: Files, recipe: Recipe, root: str) -> cells.Found | None:
    by_cells = _by_cells(split, files, recipe, root)
    return by_cells and cells.Found.of(by_cells)


def _by_cells(split: str, files: Files, recipe: Recipe, root: str) -> cells.Split | None:
    """The split as it is searched by cells; None where it is searched exactly."""
    above = recipe.label.approximate_above
    if above is None or sum(column(files.entries, "captions")) <= above:
        return None
    if recipe.label.reduce != "max":
        raise InputError(
            f"label.approximate_above {above} needs label.reduce max, not {recipe.label.reduce}: "
            "cells hold captions, and no means of them; leave one of the two out"
        )
    encoder = encoder_label(recipe.embed.encoder)
    folder = RunFolder(root).folder("label", encoder, f"cells-{split}")
    many = 0
    if recipe.label.overrides is not None:
        pairs = decisions.overrides(recipe.label.overrides)
        of_each = (Counter(p.image_id for p in pairs), Counter(p.caption_id for p in pairs))
        many = max((n for of in of_each for n in of.values()), default=0)
    return cells.split_of(files, folder, recipe.label, recipe.label.top_k + many)


def task_memory(settings: LabelSettings, mine: int, largest: int, dim: int, split: int) -> int:
    """Bytes that a task takes beside Python and torch: of its captions, and of another shard's.

    A small `split` is kept whole by the process. Measured by `python -m bench.task_memory label`.
    """
    keys = len(settings.lists) * mine * settings.top_k
    kept = split * (KEPT * dim + CAPTION) * is_small(split, dim)
    return int(FIXED + dim * (OWN * mine + OTHER * largest) + KEY * keys + kept)


def check_decided(recipe: Recipe, root: str) -> None:
    """Tells how many of the decided pairs are of nobody here; refuses where all are."""
    if recipe.label.overrides is None:
        return
    names, pairs = ("image_id", "caption_id"), decisions.overrides(recipe.label.overrides)
    listed = {
        name: pa.array(sorted({getattr(p, name) for p in pairs}), pa.string()) for name in names
    }
    here: dict[str, set[str]] = {name: set() for name in names}
    for uri in embed.files(recipe, root).uris:
        table = parquet.read_columns(uri, list(names))
        for name, ids in listed.items():
            here[name].update(table[name].filter(pc.is_in(table[name], ids)).to_pylist())
    decisions.tell(recipe.label.overrides, *here.values())


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
    mine = Captions(parquet.read_tables(files.one(inputs["shard"]).uris))
    decided = Decided(mine, settings)
    directions = [Direction(name, mine, settings, decided) for name in settings.lists]
    counted = Histograms(mine, settings)
    look = _look_into_cells if inputs["cells"] else _look_at_all
    starts = look(inputs, directions, decided, counted)
    tables = [RELEVANCE.empty_table()]
    for direction in directions:
        lists = direction.lists()
        if settings.cross_encoder is not None:
            lists = direction.read_again(lists, starts, inputs["number"], inputs["embed"])
        tables.append(_table(direction, direction.decide(lists)))
    table = pa.concat_tables(tables)
    recall = inputs["cells"].recall if inputs["cells"] else {}
    summary = {
        "split": inputs["split"],
        "queries": len(table),
        "decided": sum(image in mine.image_row for image, _ in decided.pairs().ids),
        "recall": {name: recall[name[2]] for name in settings.lists if recall},
        **counted.summary(),
    }
    about = {"map": settings.map, "reduce": settings.reduce, "embeddings": files.version}
    return parquet.write_table(
        piece.output, table, piece.fingerprint, summary, encodings=ENCODINGS, **about
    )


Starts = list[tuple[str, int, int]]  # of shards: sidecar, row of the first caption, of the image


def _look_at_all(inputs: dict, directions: list[Direction], decided, counted) -> Starts:
    """Meet all captions of the split: memory is that of one shard's, whatever the split holds."""
    files, starts = inputs["embeddings"], []
    for name, block in zip(files.names, _blocks(inputs), strict=True):
        own, met = name == inputs["shard"], decided.see(block)
        for direction in directions:
            direction.add(block, own)
        here = block.captions
        of_mine = here.image_of if own else np.full(len(here.image_of), -1)
        counted.add(here.vectors, of_mine, inputs["captions"], met)
        starts.append((store.join(inputs["shards"], f"{name}.parquet"), *block[1:]))
    return starts


def _blocks(inputs: dict) -> Iterator[Block]:
    return blocks(inputs["embeddings"], inputs["copies"], inputs["limit"], inputs["small"])


def _look_into_cells(inputs: dict, directions: list[Direction], decided, counted) -> Starts:
    """Take what the groups of cells have found; histograms are of the sampled captions."""
    files, found = inputs["embeddings"], inputs["cells"]
    captions, images = found.starts
    mine, first = decided.mine, captions[inputs["number"]]
    records = cells.of_shard(found, inputs["number"], len(mine.caption_ids))
    for direction in directions:
        direction.take(records[direction.name[2]])
    _, owner, vectors = cells.asked(found.split)
    own = (owner >= first) & (owner < first + len(mine.caption_ids))
    of_mine = np.full(len(owner), -1)
    of_mine[own] = mine.image_of[owner[own] - first]
    counted.add(vectors, of_mine, len(owner), [])
    if decided.asked:
        for block in _blocks(inputs):
            decided.see(block)
    sidecars = (store.join(inputs["shards"], f"{name}.parquet") for name in files.names)
    return list(zip(sidecars, captions, images, strict=False))


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


class Histograms:
    """Counts of the relevance of annotated negatives, and of captions to their own images."""

    def __init__(self, mine: Captions, settings: LabelSettings):
        self.mine, self.settings = mine, settings
        self.negatives = np.zeros(BINS, np.int64)

    def add(self, texts_ND, image_N, of: int, decided: list[tuple[int, int, float]]) -> None:
        """Count pairs of my images with texts, of which there are `of` in all.

        `image_N` are the rows of the texts' images among mine, -1 for others; of `decided` ones
        are my image's row, the text's, and their relevance.
        """
        pairs = len(self.mine.image_ids) * of
        counted = self.mine.image_ids[:: max(1, -(-pairs // COUNTED))]
        for images in _parts(counted, max(1, CELLS // max(1, len(texts_ND)))):
            rows_MC, mask_MC = self.mine.captions_of(images)
            vectors_MCD, rows = self.mine.vectors[rows_MC], self.mine.rows_of(images)
            r_MN = relevance_of(vectors_MCD, texts_ND, self.settings, mask_MC=mask_MC)
            place = {row: m for m, row in enumerate(rows.tolist())}
            for image, text, value in decided:
                if image in place:
                    r_MN[place[image], text] = value
            self.negatives += _histogram(r_MN[torch.from_numpy(rows[:, None] != image_N)])

    def summary(self) -> dict:
        positives = np.zeros(BINS, np.int64)
        for part in _parts(self.mine.image_ids, BLOCK):
            positives += _histogram(self.mine.held_out(part, self.settings))
        names = ("histogram_negatives", "histogram_positives")
        counts = (self.negatives.tolist(), positives.tolist())
        return dict(zip(names, counts, strict=True))


def _parts(images: list[str], size: int) -> Iterator[list[str]]:
    return (images[start : start + size] for start in range(0, len(images), size))


def _histogram(values: torch.Tensor) -> np.ndarray:
    return np.histogram(values.numpy(), bins=BINS, range=(0, 1))[0]


def histograms(entries: Sequence[dict]) -> dict:
    """Histograms, by split, of the relevance of annotated negatives and of held-out positives.

    A held-out positive is a caption against the *other* captions of its own image. Of a large
    split the negatives of evenly spaced images are counted.
    """
    out = {}
    of = np.array(column(entries, "split"))
    names = ("histogram_negatives", "histogram_positives")
    counts = {name: np.array(column(entries, name)) for name in names}
    for split in sorted(set(of.tolist())):
        out[split] = {name: counts[name][of == split].sum(axis=0).tolist() for name in names}
    return {"edges": np.linspace(0, 1, BINS + 1).tolist(), "splits": out}


def recalls(entries: Sequence[dict]) -> dict[str, float]:
    """{recall_<direction>: least recall of a piece} of lists that were found approximately."""
    out: dict[str, float] = {}
    for of_piece in column(entries, "recall"):
        for direction, recall in of_piece.items():
            name = f"recall_{direction}"
            out[name] = min(recall, out.get(name, 1.0))
    return out
