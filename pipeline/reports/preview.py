"""A contact sheet of a split: pictures with their captions, and what was rejected and why."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.errors import InputError, did_you_mean
from pipeline.reports import render
from pipeline.reports.pictures import data_uri, small, spaced
from pipeline.reports.render import Made, Page
from pipeline.sharding.reading import COLUMNS, Sample, Shards
from pipeline.storage import parquet, store
from pipeline.storage.run_folder import Files, RunFolder

LAYOUT = 1  # counts up when the page changes, so that it is made again
SIDE = 256  # pixels of a picture's longer side
REJECTED = 60  # rejected samples that are shown


def page(root: str, split: str, images: int) -> Page:
    """The page of a split in the run folder."""
    uri = store.join(root, f"preview-{split}.html")
    depends = [files(root, split).version, split, images]
    return Page(uri, LAYOUT, depends, lambda version: Made(html(root, split, images, version)))


def files(root: str, split: str) -> Files:
    """The sidecars of a split's shards, or a sentence that names the splits."""
    every = RunFolder(root).files("shard")
    if not (found := every.of_split(split)):
        known = dict.fromkeys(entry["split"] for entry in every.entries)
        raise InputError(f"no split {split!r} in {root}{did_you_mean(split, known)}")
    return found


def html(root: str, split: str, images: int, version: str = "") -> str:
    """The page of `images` samples, evenly spaced over the split's shards."""
    shards, sidecars = Shards(root), files(root, split)
    found = sidecars.entries
    reasons = sum((Counter(entry["rejected"]) for entry in found), Counter())
    return render.render(
        "preview.html.j2",
        version=version,
        split=split,
        root=root,
        shards=len(found),
        samples=sum(entry["samples"] for entry in found),
        captions=sum(entry["captions"] for entry in found),
        megabytes=sum(e["files"][f"{e['name']}.tar"]["bytes"] for e in found) / 1e6,
        cards=[
            _card(shards, name, row)
            for name, rows in _spaced(found, images).items()
            for row in shards.table(name, COLUMNS).take(rows).to_pylist()
        ],
        reasons=reasons.most_common(),
        rejected=_rejected(sidecars),
    )


def _spaced(found: Sequence[dict], images: int) -> dict[str, list[int]]:
    """Rows by shard of evenly spaced samples, the split's first and last among them."""
    counts = np.array([entry["samples"] for entry in found])
    ends = np.cumsum(counts)
    rows = spaced(ends[-1], images)
    out: dict[str, list[int]] = {}
    for shard, row in zip(np.searchsorted(ends, rows, side="right"), rows, strict=True):
        out.setdefault(found[shard]["name"], []).append(int(row - (ends - counts)[shard]))
    return out


def _card(shards: Shards, name: str, row: dict) -> dict:
    sample = Sample(**row, tar=shards.tar(name))
    texts, loaded = [caption["text"] for caption in sample.captions], sample.load()
    about = {"id": sample.image_id, "shard": name, "captions": texts}
    if isinstance(loaded, np.ndarray):
        return about | {"size": " × ".join(map(str, loaded.shape)), "picture": None}
    size = f"{loaded.width} × {loaded.height}"
    return about | {"size": size, "picture": data_uri(small(loaded, SIDE))}


def _rejected(sidecars: Files) -> list[dict]:
    """The first rejected samples, with their reasons."""
    out: list[dict] = []
    for entry, uri in zip(sidecars.entries, sidecars.uris, strict=True):
        if entry["rejected"] and len(out) < REJECTED:
            table = parquet.read_table(uri, ["image_id", "uri", "captions", "reason"])
            rows = table.filter(table["reason"].is_valid()).to_pylist()
            out += [{**row, "shard": entry["name"]} for row in rows]
    return out[:REJECTED]
