"""A contact sheet of a split: pictures with their captions, and what was rejected and why."""

from collections import Counter

import numpy as np

from pipeline.errors import InputError, did_you_mean
from pipeline.reports import render
from pipeline.reports.pictures import data_uri, small, spaced
from pipeline.reports.render import Made, Page
from pipeline.sharding.reading import COLUMNS, Sample, Shards
from pipeline.storage import parquet, run_folder, store
from pipeline.storage.run_folder import RunFolder

LAYOUT = 1  # counts up when the page changes, so that it is made again
SIDE = 256  # pixels of a picture's longer side
REJECTED = 60  # rejected samples that are shown


def page(root: str, split: str, images: int) -> Page:
    """The page of a split in the run folder."""
    uri = store.join(root, f"preview-{split}.html")
    depends = [run_folder.version(entries(root, split)), split, images]
    return Page(uri, LAYOUT, depends, lambda version: Made(html(root, split, images, version)))


def entries(root: str, split: str) -> list[dict]:
    """The index's entries of a split's shards, or a sentence that names the splits."""
    index = RunFolder(root).index("shard")
    found = run_folder.of_split(index, split)
    if not found:
        known = dict.fromkeys(entry["split"] for entry in index["pieces"])
        raise InputError(f"no split {split!r} in {root}{did_you_mean(split, known)}")
    return found


def html(root: str, split: str, images: int, version: str = "") -> str:
    """The page of `images` samples, evenly spaced over the split's shards."""
    shards, found = Shards(root), entries(root, split)
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
        rejected=_rejected(shards, found),
    )


def _spaced(found: list[dict], images: int) -> dict[str, list[int]]:
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
    about = {
        "id": sample.image_id,
        "shard": name,
        "captions": [caption["text"] for caption in sample.captions],
    }
    loaded = sample.load()
    if isinstance(loaded, np.ndarray):
        return about | {"size": " × ".join(map(str, loaded.shape)), "picture": None}
    size = f"{loaded.width} × {loaded.height}"
    return about | {"size": size, "picture": data_uri(small(loaded, SIDE))}


def _rejected(shards: Shards, found: list[dict]) -> list[dict]:
    """The first rejected samples, with their reasons."""
    out: list[dict] = []
    columns = ["image_id", "uri", "captions", "reason"]
    for name in (entry["name"] for entry in found if entry["rejected"]):
        sidecar = shards.tar(name).removesuffix(".tar") + ".parquet"
        table = parquet.read_table(sidecar, columns)
        rows = table.filter(table["reason"].is_valid()).to_pylist()
        out += [{**row, "shard": name} for row in rows]
        if len(out) >= REJECTED:
            break
    return out[:REJECTED]
