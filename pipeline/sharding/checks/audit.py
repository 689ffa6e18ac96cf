"""Duplicates within and across splits, and the list by which `shard` and `evaluate` go on without.

Pictures with equal pixels, pictures that look alike, and captions that say the same.

Rows stand in order of what is kept: test before val before train, and in each the shards' order.
"""

import csv
import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.sharding.checks import hashes
from pipeline.sharding.images import open_picture
from pipeline.sharding.sidecar import EXCLUDED, read_sidecar
from pipeline.sources.readers import tars
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import RunFolder, contents
from schemas.hashes import HASHES
from schemas.settings import Recipe

HASHING = 1  # counts up when the hashes change, so that they are made again
COLOURS = 32  # mean difference of the 4 × 4 colours up to which two pictures can be one (of 255)
PAIRS = ("kind", "id", "split", "shard", "like", "like_split", "like_shard", "distance", "evidence")
EXCLUSIONS = ("kind", "id", "split", "reason", "like")


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every shard: the hashes of its samples."""
    folder, shards, pieces = folder_of(root), RunFolder(root).files("shard"), []
    for entry, sidecar in zip(shards.entries, shards.uris, strict=True):
        tar = sidecar.removesuffix(".parquet") + ".tar"
        inputs = {"tar": tar, "sidecar": sidecar, "split": entry["split"]}
        fingerprint = store.fingerprint("audit", HASHING, contents(entry))
        output = store.join(folder, f"{entry['name']}.parquet")
        pieces.append(Piece(entry["name"], output, fingerprint, inputs))
    return Plan.of("audit", folder, pieces, {})


def folder_of(root: str) -> str:
    return store.join(root, "audit")


def write_hashes(piece: Piece) -> dict:
    """Write the hashes of one shard's samples; a summary with their number."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    columns = ["image_id", "captions", "member", "offset", "size"]
    rows = []
    with tars.opened(piece.inputs["tar"], whole=True) as file:
        for row in read_sidecar(piece.inputs["sidecar"], columns).to_pylist():
            file.seek(row["offset"])
            rows.append(_hashed(row, file.read(row["size"])))
    table = pa.Table.from_pylist(rows, schema=HASHES)
    summary = {"split": piece.inputs["split"], "samples": len(rows)}
    return parquet.write_table(piece.output, table, piece.fingerprint, summary)


def _hashed(row: dict, data: bytes) -> dict:
    captions = [{**c, "text": hashes.normalised(c["text"])} for c in row["captions"]]
    out = {"image_id": row["image_id"], "captions": captions}
    if row["member"].endswith(".npy"):
        return out | {"exact": bytes.fromhex(store.sha256(data))}
    pixels, perceptual, colours = hashes.of_picture(open_picture(data))
    return out | {"exact": pixels, "perceptual": perceptual, "colours": colours}


class Pair(NamedTuple):
    """Two rows that are alike; `like` stands before `row`."""

    like: int
    row: int
    kind: str
    distance: int  # bits of 64 in which perceptual hashes differ
    evidence: str


@dataclass(frozen=True)
class Duplicates:
    """The pairs among N images, or among N captions, in the order of what is kept."""

    what: str  # "image" or "caption"
    table: pa.Table  # (N,) id, split, shard
    pairs: list[Pair]

    def rows(self) -> list[dict]:
        """As `duplicates.csv` has them."""
        return [
            {"kind": pair.kind, "distance": pair.distance, "evidence": pair.evidence}
            | self._place(pair.row, "id", "split", "shard")
            | self._place(pair.like, "like", "like_split", "like_shard")
            for pair in self.pairs
        ]

    def excluded(self) -> list[dict]:
        """As `exclusions.csv` has them: of those that are alike, all but the first."""
        sides = np.array([pair[:2] for pair in self.pairs], np.int64).reshape(-1, 2)
        like = hashes.originals(len(self.table), sides[:, 0], sides[:, 1])
        kinds = {pair[:2]: pair.kind for pair in reversed(self.pairs)}
        out = []
        for row in np.flatnonzero(like >= 0).tolist():
            there = self._place(int(like[row]), "like", "split", "shard")
            reason = f"{kinds[int(like[row]), row]} of {there['like']} ({there['split']})"
            place = self._place(row, "id", "split", "shard")
            of_row = {"kind": self.what, "id": place["id"], "split": place["split"]}
            out.append(of_row | {"reason": reason, "like": there["like"]})
        return out

    def _place(self, row: int, *names: str) -> dict:
        values = (self.table[name][row].as_py() for name in ("id", "split", "shard"))
        return dict(zip(names, values, strict=True))


def images(plan: Plan, distance: int) -> Duplicates:
    """Pictures or features with equal content, and pictures that look alike."""
    table = _in_order(plan, ["image_id", "exact", "perceptual", "colours"])
    exact, splits = hashes.codes(table["exact"]), hashes.codes(table["split"])
    first = hashes.first_of(exact, splits)
    pairs = [
        Pair(i, j, "exact copy", 0, f"sha256 {table['exact'][j].as_py().hex()[:16]}…")
        for i, j in zip(*(side.tolist() for side in hashes.equal_pairs(exact, first)), strict=True)
    ]
    # Of exact copies the first alone is compared further.
    seen = pc.is_valid(table["perceptual"]).to_numpy() & (first == np.arange(len(first)))
    rows = np.flatnonzero(seen)
    bits = table["perceptual"].take(rows).to_numpy().astype(np.uint64)
    colours = np.frombuffer(b"".join(table["colours"].take(rows).to_pylist()), np.uint8)
    colours = colours.reshape(-1, 48).astype(np.int16)
    i, j = hashes.near_pairs(bits, distance)
    off = np.abs(colours[i] - colours[j]).mean(axis=1)
    for n in np.flatnonzero((off <= COLOURS) & (exact[rows[i]] != exact[rows[j]])):
        differ = int(np.bitwise_count(bits[i[n]] ^ bits[j[n]]))
        evidence = f"{differ} of 64 bits differ, colours by {off[n]:.0f} of 255"
        pairs.append(Pair(int(rows[i[n]]), int(rows[j[n]]), "near copy", differ, evidence))
    table = table.select(["image_id", "split", "shard"]).rename_columns(["id", "split", "shard"])
    return Duplicates("image", table, sorted(pairs, key=lambda pair: (pair.row, pair.like)))


def captions(plan: Plan) -> Duplicates:
    """Captions that say the same but for case, punctuation and spacing."""
    table = _in_order(plan, ["captions"])
    listed = table["captions"].combine_chunks()
    table = table.select(["split", "shard"]).take(pc.list_parent_indices(listed))
    table = table.add_column(0, "id", listed.flatten().field("caption_id"))
    texts = pa.chunked_array([listed.flatten().field("text")])
    keys = hashes.codes(texts)
    first = hashes.first_of(keys, hashes.codes(table["split"]))
    pairs = [
        Pair(i, j, "same caption", 0, texts[j].as_py())
        for i, j in zip(*(side.tolist() for side in hashes.equal_pairs(keys, first)), strict=True)
    ]
    return Duplicates("caption", table, sorted(pairs, key=lambda pair: (pair.row, pair.like)))


def _in_order(plan: Plan, columns: list[str]) -> pa.Table:
    """The hashes of all shards with split and shard, in the order of what is kept."""
    tables = []
    for piece in sorted(plan.pieces, key=lambda piece: _rank(piece.inputs["split"])):
        table = parquet.read_table(piece.output, columns).replace_schema_metadata()
        for name, value in (("split", piece.inputs["split"]), ("shard", piece.name)):
            table = table.append_column(name, pa.array([value] * len(table), pa.string()))
        tables.append(table)
    return parquet.joined(tables)


def _rank(split: str) -> tuple[int, str]:
    return {"test": 0, "val": 1, "train": 3}.get(split, 2), split


def write(plan: Plan, recipe: Recipe, root: str) -> dict[str, Duplicates]:
    """The duplicates found; `duplicates.csv` and `exclusions.csv` are written in the folder.

    What `shard.exclude` has taken out of the shards already stays on the list.
    """
    settings = recipe.audit
    found = {"image": images(plan, settings.distance), "caption": captions(plan)}
    listed = _left_out(root) + found["image"].excluded()
    if settings.exclude_captions:
        listed += found["caption"].excluded()
    pairs = [row for duplicates in found.values() for row in duplicates.rows()]
    files = ("duplicates.csv", PAIRS, pairs), ("exclusions.csv", EXCLUSIONS, listed)
    for name, header, rows in files:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, header, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        store.write_bytes(store.join(plan.folder, name), text.getvalue().encode())
    return found


def _left_out(root: str) -> list[dict]:
    """What the shards were made without, as their sidecars tell, in the list's columns."""
    shards, out, prefix = RunFolder(root).files("shard"), [], f"{EXCLUDED}: "
    columns = ["image_id", "split", "reason", "captions_rejected"]
    for entry, uri in zip(shards.entries, shards.uris, strict=True):
        if EXCLUDED not in entry["rejected"] | entry["captions_rejected"]:
            continue
        for row in parquet.read_table(uri, columns).to_pylist():
            things = [("image", row["image_id"], row["reason"] or "")]
            things += [("caption", c["caption_id"], c["reason"]) for c in row["captions_rejected"]]
            for kind, id_, reason in things:
                if reason.startswith(prefix):
                    out.append({"kind": kind, "id": id_, "split": row["split"], "like": ""})
                    out[-1]["reason"] = reason.removeprefix(prefix)
    return out


def summary(found: dict[str, Duplicates]) -> dict[tuple[str, str], tuple[int, str]]:
    """How many pairs there are by kind and by split, each with an example."""
    out: dict[tuple[str, str], tuple[int, str]] = {}
    for row in (row for duplicates in found.values() for row in duplicates.rows()):
        splits = sorted((row["split"], row["like_split"]), key=_rank, reverse=True)
        where = row["kind"], " and ".join(dict.fromkeys(splits))
        count, example = out.get(where, (0, f"{row['id']} = {row['like']}: {row['evidence']}"))
        out[where] = count + 1, example
    return out
