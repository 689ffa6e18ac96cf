"""What a source holds, before anything is written: counts, samples, and what looks wrong."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sharding import images, loading
from pipeline.sharding.ingest import UNUSABLE
from pipeline.sources import notes
from pipeline.sources import splits as splits_rule
from pipeline.sources.splits import Splits
from pipeline.storage import store
from pipeline.storage.plan import Piece
from schemas.settings import ShardSettings, SourceSettings

SAMPLES = 3  # that are shown
LISTED = re.compile(r"\s*[\[{(]\s*['\"]")
FLOAT = re.compile(r"\d+\.\d+")
TEXTS = 100_000  # distinct captions of a part that are kept to find those that are repeated


def plan(settings: SourceSettings) -> list[Piece]:
    """A piece for every part of the source."""
    parts = sources.parts(settings)
    return [
        Piece(f"part-{k:05d}", "", "", {"part": part, "settings": settings})
        for k, part in enumerate(parts)
    ]


def look(piece: Piece) -> dict:
    """What one part holds; where it cannot be read, why."""
    settings, part = piece.inputs["settings"], piece.inputs["part"]
    splits, seen = Splits(settings, part.split), _Seen()
    error = ""
    with notes.collected() as passed:
        try:
            for row in sources.rows(settings, part, splits):
                seen.add(row)
        except InputError as said:
            error = str(said)
    return {
        "part": part.uri,
        "said": splits.summary(),
        "passed": passed,
        "error": error,
        **vars(seen) | {"texts": dict(seen.texts.most_common(2))},
    }


@dataclass
class _Seen:
    """What the rows of a part were like."""

    splits: Counter[str] = field(default_factory=Counter)
    captions: int = 0
    odd: dict[str, list] = field(default_factory=dict)  # what looks wrong: [how often, the first]
    texts: Counter[str] = field(default_factory=Counter)
    samples: list[dict] = field(default_factory=list)

    def add(self, row: dict) -> None:
        self.splits[row["split"]] += 1
        usable = (caption["text"] for caption in row["captions"] if not caption["problem"])
        texts = [text for text in usable if text and text.strip()]
        self.captions += len(texts)
        if len(self.samples) < SAMPLES and texts and not row["problem"]:
            about = {"image_id": row["image_id"], "split": row["split"], "uri": row["uri"]}
            self.samples.append({**about, "captions": texts})
        if len(self.texts) < TEXTS:
            self.texts.update(texts)
        for what, example in _odd(row, texts):
            self.odd.setdefault(what, [0, example])[0] += 1


def _odd(row: dict, texts: list[str]):
    """(what looks wrong, with what) of one row."""
    if row["problem"]:
        yield UNUSABLE, row["problem"]
    elif row["stamp"] is None and _is_file(row["uri"]):
        yield "files missing", row["uri"] + sources.missing(row["uri"])
    for caption in row["captions"]:
        if caption["problem"]:
            yield "captions that cannot be used", caption["problem"]
        elif not (caption["text"] or "").strip():
            yield "empty captions", caption["caption_id"]
    if not texts:
        yield "images without a caption", row["image_id"]
    for text in texts:
        if LISTED.match(text):
            yield "captions that look like lists", text[:80]
        elif "\N{REPLACEMENT CHARACTER}" in text or "Ã" in text:
            yield "captions that were decoded wrongly once", text[:80]
    if FLOAT.fullmatch(row["image_id"]):
        yield "ids that look like numbers with a fraction", row["image_id"]


def _is_file(uri: str) -> bool:
    return store.is_local(uri) and os.path.isabs(uri) and "#" not in uri


def summed(looked: list[dict], settings: SourceSettings) -> dict[str, Any]:
    """All parts as one: counts by split, what was passed over, what looks wrong, samples."""
    splits: Counter[str] = sum((Counter(part["splits"]) for part in looked), Counter())
    texts: Counter[str] = sum((Counter(part["texts"]) for part in looked), Counter())
    odd = notes.summed([part["odd"] for part in looked])
    captions = sum(part["captions"] for part in looked)
    wrong = notes.told(odd)
    if len(splits) == 1 and splits.total() > 1:
        wrong.append(f"all images are in one split, {next(iter(splits))}")
    for text, times in texts.most_common(1):
        if times > max(2, captions / 20):
            wrong.append(f"captions that are all equal: {times:,} of {captions:,}, {text[:80]!r}")
    errors = [part["error"] for part in looked if part["error"]]
    said = {part["part"]: part["said"] for part in looked if not part["error"]}
    try:
        splits_rule.check(said, settings)
    except InputError as error:
        errors.append(str(error))
    if not splits and not errors:
        errors.append(f"{settings.path or settings.kind} holds no image")
    unusable, first = odd.get(UNUSABLE, (0, ""))
    if splits and unusable == splits.total():  # as `ingest` refuses it
        errors.append(f"none of {unusable} images can be used, the first: {first}")
    origins = splits_rule.told(said)
    return {
        "images": splits.total(),
        "captions": captions,
        "splits": dict(splits),
        "told": [f"splits: {origins}"] if origins else [],
        "passed_over": notes.told(notes.summed([part["passed"] for part in looked])),
        "looks_wrong": wrong,
        "errors": errors,
        "samples": [_shown(s, settings) for p in looked[:SAMPLES] for s in p["samples"]][:SAMPLES],
    }


def _shown(sample: dict, settings: SourceSettings) -> dict:
    """A sample with its picture's size, or why it has none."""
    row = {"source": settings.kind, "uri": sample["uri"]}
    ((_, load),) = loading.in_order([row], settings, max_bytes=2**31)
    try:
        payload = images.checked(load(), ShardSettings())
    except images.Rejected as reason:
        return {**sample, "holds": str(reason)}
    size = f"{payload.width} × {payload.height}" if payload.width else payload.holds
    return {**sample, "holds": size}
