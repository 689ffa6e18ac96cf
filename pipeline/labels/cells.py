"""Neighbours by cells, for splits in which the exact search takes too long: four steps of pieces.

1. centroids: of a sample of the split's shards; and the captions whose recall is measured
2. parts: the vectors of some shards, sorted by their cell; the exact neighbours there of those
   captions
3. groups: the captions of some cells against the cells near to them, read out of the parts
4. recall: of what was found for the sampled captions

A task holds the captions of a part or of a group and the cells that it reads, whatever the split
holds. `label` then gathers a shard's lists out of the groups. Records of vectors and of keys lie in
files of one length a record, of which a task reads the ranges that it needs.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.labels.caption_vectors import Captions
from pipeline.retrieval import cells, nearest
from pipeline.storage import parquet, store
from pipeline.storage.piece_table import column
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import Files, contents, need_index
from pipeline.storage.vector_columns import vector_column, vector_matrix
from schemas.settings import LabelSettings

VERSION = 1  # counts up when other neighbours are found
PER_PART = 100_000  # captions of a part, about
SHARDS, SAMPLED = 32, 1000  # shards that are sampled; captions whose recall is measured
NUMBER = {"t": "row", "i": "image"}  # of a record, what a kind of candidates goes by
# Bytes of memory of a task, measured: docs/scale.md.
FIXED = 200e6
OF_PART, OF_GROUP = 8, 6  # a number of the vectors of a part, and of what a group reads
OF_KEY = 24  # a neighbour of a group's captions


def of_part(captions: int, dim: int) -> int:
    """Bytes that a part's task takes beside Python and torch."""
    return int(FIXED + OF_PART * dim * captions)


def of_group(captions: float, dim: int, keys: int) -> int:
    """Bytes that a group's task takes beside Python and torch; `keys`: neighbours of a caption."""
    return int(FIXED + captions * (OF_GROUP * dim * (1 + cells.AGAIN) + OF_KEY * keys))


class Split(NamedTuple):
    """A split that is searched by cells."""

    files: Files
    folder: str  # of its steps
    k: int  # neighbours kept
    kinds: tuple[str, ...]  # of candidates: "t" captions, "i" images


def split_of(files: Files, folder: str, settings: LabelSettings, k: int) -> Split:
    kinds = tuple(sorted({name[2] for name in settings.lists}))
    return Split(files, folder, k, kinds)


def steps(split: Split) -> Iterator[tuple[Plan, Callable[[Piece], dict]]]:
    """The plans and what makes their pieces; each is drawn up when those before it are finished."""
    yield _plan_centroids(split), write_centroids
    yield _plan_parts(split), write_part
    yield _plan_groups(split), write_group
    yield _plan_recall(split), write_recall


def index_of(split: Split, step: str) -> dict:
    """What a finished step left."""
    return need_index(store.join(split.folder, step), "label")


def _plan(split: Split, step: str, pieces: list[tuple[str, list, dict, int]]) -> Plan:
    folder = store.join(split.folder, step)
    matters = {"version": VERSION, "k": split.k, "kinds": split.kinds, "of": split.files.version}
    matters |= {"cell": cells.PER_CELL, "group": cells.PER_GROUP, "part": PER_PART}
    made = []
    for name, depends, inputs, memory in pieces:
        output = store.join(folder, f"{name}.parquet")
        fingerprint = store.fingerprint("cells", step, matters, name, depends)
        made.append(Piece(name, output, fingerprint, {"split": split, **inputs}, memory))
    return Plan.of("label", folder, made, matters)


# ---- centroids ---------------------------------------------------------------------------------


def _plan_centroids(split: Split) -> Plan:
    counts = column(split.files.entries, "captions")
    starts = [0, *itertools.accumulate(counts)]
    shards = [(split.files.uris[n], starts[n]) for n in _sampled(split)]
    inputs = {"shards": shards, "of": starts[-1]}
    memory = of_part(cells.count_of(starts[-1])[1], split.files.entries[0]["dim"])
    return _plan(split, "centroids", [("centroids", [], inputs, memory)])


def _sampled(split: Split) -> list[int]:
    """The shards that are sampled, evenly spaced."""
    full = np.flatnonzero(column(split.files.entries, "captions"))
    return full[_spaced(len(full), SHARDS)].tolist()


def write_centroids(piece: Piece) -> dict:
    """Write the centroids and the groups of cells, and the captions that recall is measured on."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    shards, total = piece.inputs["shards"], piece.inputs["of"]
    count, sampled = cells.count_of(total)
    sample, measured = [], []
    for uri, first in shards:
        captions = Captions(parquet.read_tables([uri]))
        rows = _spaced(len(captions.caption_ids), -(-sampled // len(shards)))
        sample.append(captions.vectors[rows])
        rows = _spaced(len(captions.caption_ids), -(-SAMPLED // len(shards)))
        owner = first + captions.first[captions.image_of[rows]]
        vectors = vector_column(captions.vectors[rows].numpy())
        measured.append(pa.table({"row": first + rows, "owner": owner, "vector": vectors}))
    found_CD, share_C = cells.centroids(torch.cat(sample), count)
    groups = cells.groups(found_CD, share_C, -(-total // cells.PER_GROUP))
    order = np.concatenate(groups)  # cells are numbered so that a group's stand together
    table = {
        "vector": vector_column(found_CD[order].numpy()),
        "group": np.repeat(np.arange(len(groups)), [len(g) for g in groups]).astype(np.int32),
    }
    uri = store.join(piece.output.rpartition("/")[0], "asked.parquet")
    rows = parquet.joined(measured)
    summary = {"cells": len(order), "groups": len(groups)}
    summary |= parquet.write_table(uri, rows, piece.fingerprint, {})
    return parquet.write_table(piece.output, pa.table(table), piece.fingerprint, summary)


def _spaced(count: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))


def _centroids(split: Split) -> tuple[torch.Tensor, np.ndarray]:
    """(C, D), and the group (C,) of every cell."""
    table = parquet.read_table(store.join(split.folder, "centroids", "centroids.parquet"))
    return torch.from_numpy(vector_matrix(table["vector"])), table["group"].to_numpy()


def asked(split: Split) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """The captions whose recall is measured, in order: rows, owners, vectors.

    An owner is the row of the first caption of a caption's image.
    """
    table = parquet.read_table(store.join(split.folder, "centroids", "asked.parquet"))
    vectors = torch.from_numpy(vector_matrix(table["vector"]))
    return table["row"].to_numpy(), table["owner"].to_numpy(), vectors


# ---- parts -------------------------------------------------------------------------------------


def record(dim: int) -> np.dtype:
    """A caption in a part: its row, its image's row counted from the part's first, its vector."""
    return np.dtype([("row", "<i4"), ("image", "<i4"), ("vector", "<f2", (dim,))])


def _plan_parts(split: Split) -> Plan:
    index = index_of(split, "centroids")
    counts = column(split.files.entries, "captions")
    starts = np.array([0, *itertools.accumulate(counts)])
    edges = [0]
    for n in range(len(counts)):
        if starts[n + 1] - starts[edges[-1]] >= PER_PART or n == len(counts) - 1:
            edges.append(n + 1)
    pieces = []
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        entries = split.files.entries[a:b]
        shards = list(zip(split.files.uris[a:b], starts[a:b].tolist(), strict=True))
        depends = [index["version"], [contents(entry) for entry in entries]]
        memory = of_part(int(starts[b] - starts[a]), entries[0]["dim"])
        pieces.append((f"part-{number:05d}", depends, {"shards": shards}, memory))
    return _plan(split, "parts", pieces)


def write_part(piece: Piece) -> dict:
    """Write the captions of some shards, sorted by cell, and where each cell ends."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    split: Split = piece.inputs["split"]
    centroids_CD, _ = _centroids(split)
    sorted_, cell, images, queries = [], [], [], asked(split)
    exact = {kind: np.full((len(queries[0]), split.k), nearest.EMPTY) for kind in split.kinds}
    for uri, first in piece.inputs["shards"]:
        table = parquet.read_tables([uri])
        captions = Captions(table)
        records = np.empty(len(table), record(centroids_CD.shape[1]))
        records["row"] = first + np.arange(len(records))
        records["image"] = sum(images) + captions.image_of
        records["vector"] = vector_matrix(table["vector"])  # as they are stored
        owners = queries[1], first + captions.first[captions.image_of]
        for kind, known in exact.items() if len(records) else ():
            number = records[NUMBER[kind]]
            keys = cells.top_k(queries[2], captions.vectors, split.k, number, owners)
            exact[kind] = cells.best(known, keys)
        sorted_.append(records)
        cell.append(cells.nearest_cell(captions.vectors, centroids_CD).numpy())
        images.append(len(captions.image_ids))
    cell_N = np.concatenate(cell)
    order = np.argsort(cell_N, kind="stable")
    ends_C = np.bincount(cell_N, minlength=len(centroids_CD)).cumsum()
    names = (piece.output.removesuffix(".parquet") + ending for ending in (".vectors", ".exact"))
    whole = np.concatenate(sorted_)
    sorted_.clear()
    data = whole[order], np.stack([exact[kind] for kind in split.kinds])
    del whole
    files = dict(map(_write, names, data))
    summary = {"images": images, "captions": len(order), "files": files}
    return parquet.write_table(piece.output, pa.table({"end": ends_C}), piece.fingerprint, summary)


def _write(uri: str, values: np.ndarray) -> tuple[str, dict]:
    data = values.tobytes()
    store.write_bytes(uri, data)
    return store.name_of(uri), {"bytes": len(data), "sha256": store.sha256(data)}


# ---- groups ------------------------------------------------------------------------------------


def _plan_groups(split: Split) -> Plan:
    centroids, parts = index_of(split, "centroids"), index_of(split, "parts")
    total, dim = sum(column(split.files.entries, "captions")), split.files.entries[0]["dim"]
    names = [entry["name"] for entry in parts["pieces"]]
    count = centroids["pieces"][0]["groups"]
    memory = of_group(total / count, dim, split.k * len(split.kinds))  # they are about of one size
    shards = column(split.files.entries, "captions")
    starts = np.array([0, *itertools.accumulate(shards)])
    common = {"parts": names, "images": image_starts(split)[1], "starts": starts}
    pieces = [
        (f"group-{g:05d}", [parts["version"], g], {**common, "group": g}, memory)
        for g in range(count)
    ]
    return _plan(split, "groups", pieces)


def image_starts(split: Split) -> tuple[list[int], list[int]]:
    """The row of the first image of every shard, and of every part."""
    pieces = index_of(split, "parts")["pieces"]
    of_shards = [0, *itertools.accumulate(n for entry in pieces for n in entry["images"])]
    of_parts = [0, *itertools.accumulate(sum(entry["images"]) for entry in pieces)]
    return of_shards, of_parts


def keys_of(split: Split) -> np.dtype:
    """A caption in a group's file: its row, and the keys of its neighbours of each kind."""
    return np.dtype([("row", "<i4"), *((kind, "<i8", (split.k,)) for kind in split.kinds)])


def write_group(piece: Piece) -> dict:
    """Write the neighbours of the captions of a group's cells, by rising row."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    split: Split = piece.inputs["split"]
    centroids_CD, group_C = _centroids(split)
    own = np.flatnonzero(group_C == piece.inputs["group"])
    folder, parts = store.join(split.folder, "parts"), piece.inputs["parts"]
    ends = [parquet.read_table(store.join(folder, f"{n}.parquet"))["end"].to_numpy() for n in parts]
    ends_PC = np.stack(ends)
    size_C = np.diff(ends_PC.sum(0), prepend=0)
    read, near = cells.read_by(own, centroids_CD, size_C)
    kind, images = record(centroids_CD.shape[1]), piece.inputs["images"]

    def read_range(part: int, start: int, end: int) -> np.ndarray:
        """Records of a part, images by their rows in the split."""
        uri = store.join(folder, f"{parts[part]}.vectors")
        data = store.read_bytes(uri, start * kind.itemsize, (end - start) * kind.itemsize)
        found = np.frombuffer(data, kind).copy()
        found["image"] += images[part]
        return found

    records, where = cells.gathered(read, ends_PC, kind, read_range)
    out, at = np.empty(size_C[own].sum(), keys_of(split)), 0
    for cell in own.tolist():
        queries = records[where[cell]]
        if not len(queries):
            continue
        found = np.concatenate([records[where[c]] for c in near[cell].tolist()])
        found = found[np.argsort(found["row"])]  # of equal ones the lowest row comes first
        out[at : at + len(queries)] = _neighbours(queries, found, split)
        at += len(queries)
    out = out[np.argsort(out["row"], kind="stable")]
    name, file = _write(piece.output.removesuffix(".parquet") + ".keys", out)
    below = np.searchsorted(out["row"], piece.inputs["starts"])  # where a shard's begin
    bytes_read = len(records) * records.dtype.itemsize
    summary = {"captions": len(out), "read": bytes_read, "files": {name: file}}
    return parquet.write_table(piece.output, pa.table({"below": below}), piece.fingerprint, summary)


def _neighbours(queries: np.ndarray, found: np.ndarray, split: Split) -> np.ndarray:
    """The keys of one cell's captions among the candidates that were read."""
    out = np.empty(len(queries), keys_of(split))
    out["row"] = queries["row"]
    asking, asked = (torch.from_numpy(r["vector"].astype(np.float32)) for r in (queries, found))
    for v in (asking, asked):
        F.normalize(v, dim=1, out=v)
    owners = queries["image"], found["image"]
    single = len(np.unique(found["image"])) == len(found)  # a caption each: one search for both
    for kind in split.kinds:
        if single and kind == "t" and "i" in split.kinds:
            out["t"] = cells.renumbered(out["i"], found["image"], found["row"])
        else:
            out[kind] = cells.top_k(asking, asked, split.k, found[NUMBER[kind]], owners)
    return out


# ---- recall, and the lists ---------------------------------------------------------------------


def _plan_recall(split: Split) -> Plan:
    groups = index_of(split, "groups")
    parts = [entry["name"] for entry in index_of(split, "parts")["pieces"]]
    inputs = {"groups": [entry["name"] for entry in groups["pieces"]], "parts": parts}
    inputs |= {"images": image_starts(split)[1], "shards": _sampled(split)}
    return _plan(split, "recall", [("recall", [groups["version"]], inputs, 0)])


def write_recall(piece: Piece) -> dict:
    """Write what share of the sampled captions' exact neighbours was found, of each kind."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    split: Split = piece.inputs["split"]
    rows = asked(split)[0]
    exact = np.full((len(split.kinds), len(rows), split.k), nearest.EMPTY)
    for first, name in zip(piece.inputs["images"], piece.inputs["parts"], strict=False):
        data = store.read_bytes(store.join(split.folder, "parts", f"{name}.exact"))
        part = np.frombuffer(data, np.int64).reshape(exact.shape)
        for n, kind in enumerate(split.kinds):
            exact[n] = cells.best(exact[n], cells.moved(part[n], first if kind == "i" else 0))
    groups, shards = piece.inputs["groups"], piece.inputs["shards"]
    of_shards = (_records(split, groups, shard) for shard in shards)
    found = np.concatenate([found[np.isin(found["row"], rows)] for found in of_shards])
    recall = {kind: cells.recall(found[kind], exact[n]) for n, kind in enumerate(split.kinds)}
    summary = {"recall": recall, "asked": len(rows)}
    table = pa.table({"kind": list(recall), "recall": list(recall.values())})
    return parquet.write_table(piece.output, table, piece.fingerprint, summary)


def _records(split: Split, groups: Sequence[str], shard: int) -> np.ndarray:
    """The records of a shard's captions, in order, out of the groups' files."""
    kind, folder, out = keys_of(split), store.join(split.folder, "groups"), []
    for group in groups:
        below = parquet.read_table(store.join(folder, f"{group}.parquet"))["below"].to_numpy()
        a, b = (int(edge) * kind.itemsize for edge in below[shard : shard + 2])
        data = store.read_bytes(store.join(folder, f"{group}.keys"), a, b - a)
        out.append(np.frombuffer(data, kind))
    records = np.concatenate(out)
    return records[np.argsort(records["row"])]


class Found(NamedTuple):
    """What the groups of a split's cells have found."""

    split: Split
    groups: tuple[str, ...]
    version: str  # of what they hold, and of its recall
    recall: dict[str, float]  # of each kind of candidates
    starts: tuple[list[int], list[int]]  # of every shard: the first caption's row, the image's

    @classmethod
    def of(cls, split: Split) -> "Found":
        """Of steps that are finished."""
        groups, recall = index_of(split, "groups"), index_of(split, "recall")
        captions = [0, *itertools.accumulate(column(split.files.entries, "captions"))]
        return cls(
            split,
            tuple(entry["name"] for entry in groups["pieces"]),
            store.fingerprint(groups["version"], recall["version"]),
            recall["pieces"][0]["recall"],
            (captions, image_starts(split)[0]),
        )


def of_shard(found: Found, shard: int, count: int) -> np.ndarray:
    """The keys of the `count` captions of a split's shard, in order, out of all groups."""
    records = _records(found.split, found.groups, shard)
    if len(records) != count:
        raise InputError(
            f"{found.split.folder} holds {len(records)} of the {count} captions of shard {shard}; "
            "remove that folder and run `halftone label` again"
        )
    return records
