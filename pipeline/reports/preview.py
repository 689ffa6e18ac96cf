"""A contact sheet of a split: pictures with their captions, and what was rejected and why."""

from collections import Counter

import numpy as np

from pipeline.errors import InputError, did_you_mean
from pipeline.reports import render
from pipeline.reports.pictures import data_uri
from pipeline.sharding.reading import COLUMNS, Sample, Shards
from pipeline.storage import parquet, run_folder, store

LAYOUT = 1  # counts up when the page changes, so that it is made again
SIDE = 256  # pixels of a picture's longer side
REJECTED = 60  # rejected samples that are shown


def uri(root: str, split: str) -> str:
    """Where the page of a split lies."""
    return store.join(root, f"preview-{split}.html")


def entries(root: str, split: str) -> list[dict]:
    """The index's entries of a split's shards, or a sentence that names the splits."""
    index = run_folder.need_index(run_folder.folder(root, "shard"), "shard")
    found = run_folder.of_split(index, split)
    if not found:
        known = dict.fromkeys(entry["split"] for entry in index["pieces"])
        raise InputError(f"no split {split!r} in {root}{did_you_mean(split, known)}")
    return found


def version(root: str, split: str, images: int) -> str:
    """What the page depends on."""
    shards = run_folder.version(entries(root, split))
    return store.fingerprint("preview", LAYOUT, shards, split, images)


def page(root: str, split: str, images: int) -> str:
    """The page of `images` samples, evenly spaced over the split's shards."""
    shards, found = Shards(root), entries(root, split)
    reasons = sum((Counter(entry["rejected"]) for entry in found), Counter())
    return render.render(
        "preview.html.j2",
        version=version(root, split, images),
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
    rows = np.unique(np.linspace(0, ends[-1] - 1, min(images, ends[-1])).round().astype(int))
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
    loaded = loaded.convert("RGB")
    loaded.thumbnail((SIDE, SIDE))
    return about | {"size": size, "picture": data_uri(loaded)}


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
