"""One shard against itself, its sidecar and its entry in the index."""

import json
from collections import Counter
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sharding.checks import tar_reader
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece

# Of every sample, for what only shows over all shards: ids, split, hash of the picture's bytes.
IDS = pa.schema(
    [(name, pa.string()) for name in ("image_id", "split", "sha256", "tar")]
    + [("caption_ids", pa.list_(pa.string()))]
)
AGAIN = "write or copy the tar again"
EXCLUDE = "list it in `shard.exclude`, or mend the source, and run `halftone shard`"
# What can be wrong inside a tar, and what to do where no repair from a manifest would help.
ADVICE = {
    "torn tar": AGAIN,
    "a member that is no plain file": "write the tar from plain files",
    "a member without a key": "name members KEY.ending",
    "a key with a slash": "name members KEY.ending without folders",
    "a dot in the key, which WebDataset cuts at its first dot": "take the dots out of the keys",
    "a member that is there twice": "give every sample a key of its own",
    "a sample whose members are not adjacent": "sort the members by key before packing",
    "a sample without picture or features": "add KEY.jpg, KEY.png or KEY.npy, or take it out",
    "a sample without caption": "add KEY.txt, or KEY.json with a caption, or take it out",
    "a member that cannot be used": EXCLUDE,
}


class Finding(NamedTuple):
    """One thing that is wrong; `shard` names the piece that `halftone repair` can make again."""

    file: str
    what: str
    do: str
    shard: str = ""


class Found:
    """Findings about one piece: those of one kind about one file are counted, the first shown."""

    def __init__(self, name: str, repair: str):
        self.name, self.repair = name, repair
        self.first: dict[tuple[str, str], str] = {}
        self.count: Counter[tuple[str, str]] = Counter()
        self.intact = False  # all files have the recorded bytes: writing them again changes nothing

    def add(self, file: str, kind: str, example: str) -> None:
        self.first.setdefault((file, kind), example)
        self.count[file, kind] += 1

    def findings(self) -> list[Finding]:
        out = []
        for (file, kind), example in self.first.items():
            more = self.count[file, kind] - 1
            what = f"{kind}: {example}" + (f" (and {more:,} more)" if more else "")
            mends = bool(self.repair) and not (self.intact and kind in ADVICE)
            do = self.repair if mends else ADVICE.get(kind, AGAIN)
            out.append(Finding(file, what, do, self.name if mends else ""))
        return out


def check_shard(piece: Piece) -> dict:
    """What is wrong with one shard: {"findings", "samples", "ids": a table of `IDS`}."""
    about = piece.inputs
    found = Found(piece.name, about["repair"])
    rows = _sidecar(about, found) if about["sidecar"] else None
    records: list[dict] = []
    with tar_reader.open_tar(about["tar"]) as file:
        _same_bytes(about, about["tar"], *tar_reader.digest(file), found)
        found.intact = bool(about["entry"]) and not found.first
        samples, whole = _samples(file, about["tar"], found)
        rows = rows if whole else None  # of half a tar nothing more needs to be said
        for sample in samples:
            records.append(_sample(file, sample, about, found))
            if rows is not None:
                row = rows.pop(sample.key, None)
                _same_as_sidecar(sample, records[-1], row, about["sidecar"], found)
    for key in rows or ():
        found.add(about["tar"], "a sample of the sidecar that is not in the tar", repr(key))
    counted = {"samples": len(records), "captions": sum(len(r["captions"]) for r in records)}
    for name, count in counted.items() if whole else ():
        told = about["entry"].get(name, count)  # by the index, or by the sidecar's summary
        if told != count:
            found.add(about["tar"], "wrong count", f"{count:,} {name} in it, {told:,} recorded")
    ids = pa.Table.from_pylist(records, schema=IDS)
    return {"findings": found.findings(), "samples": len(records), "ids": ids}


def _sidecar(about: dict, found: Found) -> dict[str, dict] | None:
    """The accepted samples by key; None where the sidecar cannot be read."""
    uri = about["sidecar"]
    data = store.read_bytes(uri)
    _same_bytes(about, uri, len(data), store.sha256(data), found)
    try:
        table = pq.read_table(pa.BufferReader(data))
        rows = {row["key"]: row for row in table.to_pylist() if not row["reason"]}
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        found.add(uri, "torn sidecar", " ".join(str(error).split())[:120])
        return None
    summary = json.loads((table.schema.metadata or {}).get(parquet.SUMMARY, b"{}"))
    about["entry"] = about["entry"] or {**summary, "split": summary.get("split", about["split"])}
    for key, row in rows.items():
        if row["split"] != about["entry"]["split"]:
            found.add(uri, f"a sample of another split than {about['entry']['split']}", key)
    return rows


def _same_bytes(about: dict, uri: str, size: int, sha256: str, found: Found) -> None:
    """A finding where a file's bytes are not those the index (or the sidecar) recorded."""
    known = about["entry"].get("files", {}).get(store.name_of(uri))
    if known and (known["bytes"], known["sha256"]) != (size, sha256):
        told = f"{known['bytes']:,} bytes, sha256 {known['sha256'][:12]}… were written"
        found.add(uri, "other bytes", f"{size:,} bytes, sha256 {sha256[:12]}…, where {told}")


def _samples(file: BinaryIO, tar: str, found: Found) -> tuple[list[tar_reader.Sample], bool]:
    """The tar's whole samples in order, and whether it could be read to its end."""
    samples: list[tar_reader.Sample] = []
    seen: set[str] = set()
    try:
        for info in tar_reader.members(file):
            if info.isdir():
                continue
            name = tar_reader.NAME.fullmatch(info.name)
            if not name or not info.isfile():
                kind = (
                    "a member without a key" if info.isfile() else "a member that is no plain file"
                )
                found.add(tar, kind, repr(info.name))
                continue
            key, ending = name.groups()
            if "/" in key:
                found.add(tar, "a key with a slash", repr(info.name))
            if "." in ending:
                kind = "a dot in the key, which WebDataset cuts at its first dot"
                found.add(tar, kind, repr(info.name))
            if not samples or samples[-1].key != key:
                if key in seen:
                    found.add(tar, "a sample whose members are not adjacent", repr(info.name))
                seen.add(key)
                samples.append(tar_reader.Sample(key))
            if ending in samples[-1].members:
                found.add(tar, "a member that is there twice", repr(info.name))
            samples[-1].members[ending] = info
    except tar_reader.Torn as error:
        found.add(tar, "torn tar", str(error))
        return samples[:-1], False
    return samples, True


def _sample(file: BinaryIO, sample: tar_reader.Sample, about: dict, found: Found) -> dict:
    """Ids, split and hash of a sample whose members were looked at."""
    texts: dict[str, bytes] = {}
    sha256, payload, tar = None, sample.payload(), about["tar"]
    for ending, info in sample.members.items():
        data = tar_reader.content(file, info)
        if problem := tar_reader.unusable(info.name, data, about["settings"]):
            found.add(tar, "a member that cannot be used", f"{info.name!r}: {problem}")
        elif ending in ("json", "txt"):
            texts[ending] = data
        if info is payload:
            sha256 = store.sha256(data)
    described = json.loads(texts.get("json", b"{}"))
    captions = described.get("captions", [])
    captions = captions if isinstance(captions, list) else [captions]
    if payload is None:
        found.add(tar, "a sample without picture or features", repr(sample.key))
    if "txt" not in sample.members and not captions and not described.get("caption"):
        found.add(tar, "a sample without caption", repr(sample.key))
    return {
        "image_id": str(described.get("image_id", sample.key)),
        "split": str(described.get("split", about["split"])),
        "sha256": sha256,
        "tar": tar,
        "caption_ids": [c.get("caption_id") for c in captions if isinstance(c, dict)],
        "captions": captions,
        "text": texts.get("txt", b"").decode(),
    }


def _same_as_sidecar(
    sample: tar_reader.Sample, record: dict, row: dict | None, sidecar: str, found: Found
) -> None:
    if row is None:
        found.add(sidecar, "a sample of the tar that is not in the sidecar", repr(sample.key))
        return
    payload = sample.payload()
    place = payload and (payload.name, payload.offset_data, payload.size)
    told = row["captions"][0]["text"] if row["captions"] else ""
    for kind, same in (
        ("a member at another place than the sidecar says",
         place == (row["member"], row["offset"], row["size"])),
        ("a member with another sha256 than the sidecar says", record["sha256"] == row["sha256"]),
        ("a sample described otherwise in the sidecar",
         all(record[name] == row[name] for name in ("image_id", "split", "captions"))
         and record["text"] == told),
    ):  # fmt: skip
        if not same:
            found.add(sidecar, kind, repr(sample.key))
