"""One shard against itself, its sidecar and its entry in the index."""

import hashlib
import io
import json
from collections import Counter
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.sharding import images
from pipeline.sources.readers import samples, tars
from pipeline.sources.readers.samples import Sample
from pipeline.sources.splits import Splits
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece
from schemas.settings import SourceSettings

# Of every sample, for what only shows over all shards: ids, split, hash of the picture's bytes.
IDS = pa.schema(
    [(name, pa.string()) for name in ("image_id", "split", "sha256", "tar")]
    + [("caption_ids", pa.list_(pa.string()))]
)
AGAIN = "write or copy the tar again"
UNUSABLE = "a member that cannot be used"
NO_CAPTION = "a caption that cannot be used"
NO_SPLIT = "a split that cannot be used"
# What can be wrong inside a tar, and what to do where no repair from a manifest would help.
ADVICE = {
    **tars.FAULTS,
    **samples.FAULTS,
    NO_CAPTION: "mend it, or take it out",
    NO_SPLIT: "say what it is by source.splits",
    UNUSABLE: "list it in `shard.exclude`, or mend the source, and run `halftone shard`",
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
    read: list[Sample] = []
    hashes: dict[str, str] = {}  # of pictures and features by key
    with tars.opened(about["tar"], whole=True) as file:
        _same_bytes(about, about["tar"], *_digest(file), found)
        found.intact = bool(about["entry"]) and not found.first
        try:
            for sample in samples.read(file, samples.Reading(lines=samples.lines_of(about["tar"]))):
                read.append(sample)
                hashes[sample.key] = _check_payload(file, sample, about, found)
            whole = True
        except tars.Broken as broken:
            found.add(about["tar"], broken.kind, broken.detail)
            rows, whole = None, False  # of half a tar no more needs to be said
    if rows is not None:
        _same_as_sidecar(read, hashes, rows, about, found)
    table = [_ids(image, hashes, about, found) for image in samples.images(read, about["name"])]
    for sample in read if whole else ():
        for fault in sample.faults:
            found.add(about["tar"], *fault)
        for caption in sample.captions if not sample.faults else ():
            if caption.problem:
                found.add(about["tar"], NO_CAPTION, f"{sample.key!r}: {caption.problem}")
    counted = {"samples": len(read), "captions": sum(len(row["caption_ids"]) for row in table)}
    for name, count in counted.items() if whole else ():
        told = about["entry"].get(name, count)  # by the index, or by the sidecar's summary
        if told != count:
            found.add(about["tar"], "wrong count", f"{count:,} {name} in it, {told:,} recorded")
    ids = pa.Table.from_pylist(table, schema=IDS)
    return {"findings": found.findings(), "samples": len(read), "ids": ids}


def _digest(file: BinaryIO) -> tuple[int, str]:
    """Bytes and sha256 of a whole file."""
    value = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    return file.seek(0, io.SEEK_END), value


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


def _check_payload(file: BinaryIO, sample: Sample, about: dict, found: Found) -> str:
    """The sha256 of a sample's picture or features, which are checked as `shard` checks them."""
    if (member := sample.picture) is None:
        return ""
    file.seek(member.offset_data)
    data = file.read(member.size)
    try:
        if about["settings"]:
            images.checked(data, about["settings"])
    except images.Rejected as reason:
        found.add(about["tar"], UNUSABLE, f"{member.name!r}: {reason}")
    return store.sha256(data)


def _ids(image: samples.Image, hashes: dict[str, str], about: dict, found: Found) -> dict:
    """What of an image, of one sample or more, must fit those of other tars."""
    split = about["split"]
    try:
        split = Splits(SourceSettings(), split).of(image.sample.split)
    except InputError as why:
        found.add(about["tar"], NO_SPLIT, f"{image.sample.key!r}: {why}")
    return {
        "image_id": image.image_id,
        "split": split,
        "sha256": hashes[image.sample.key] or None,
        "tar": about["tar"],
        "caption_ids": [caption.id for caption in image.captions],
    }


def _same_as_sidecar(
    read: list[Sample], hashes: dict[str, str], rows: dict[str, dict], about: dict, found: Found
) -> None:
    sidecar = about["sidecar"]
    for sample in read:
        row = rows.pop(sample.key, None)
        if row is None:
            what = "a sample of the tar that is not in the sidecar"
            found.add(sidecar, what, repr(sample.key))
            continue
        payload = sample.picture
        place = payload and (payload.name, payload.offset_data, payload.size)
        captions = [{"caption_id": c.id, "text": c.text} for c in sample.captions]
        first = row["captions"][0]["text"] if row["captions"] else ""
        for kind, same in (
            ("a member at another place than the sidecar says",
             place == (row["member"], row["offset"], row["size"])),
            ("a member with another sha256 than the sidecar says",
             hashes[sample.key] == row["sha256"]),
            ("a sample described otherwise in the sidecar",
             (sample.image_id, sample.split, captions, sample.texts.get("txt"))
             == (row["image_id"], row["split"], row["captions"], first)),
        ):  # fmt: skip
            if not same:
                found.add(sidecar, kind, repr(sample.key))
    for key in rows:
        found.add(about["tar"], "a sample of the sidecar that is not in the tar", repr(key))
