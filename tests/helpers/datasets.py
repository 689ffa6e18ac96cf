"""Small data sets and their shards, for the tests of `ingest` and `shard`."""

import csv
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.sharding import shard
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece
from schemas.manifest import MANIFEST
from schemas.settings import Recipe, ShardSettings, SourceSettings
from tests.helpers.stages import ingested, sharded

DRAWN = {"kind": "drawn", "train_images": 20, "val_images": 5, "test_images": 7, "image_size": 32}
SIZE = 24  # pixels: less than the side of the scenes of `shards`, more than half of it
FIVE = [(f"{name}.jpg", f"caption {name}", "train") for name in "abcde"]


def drawn(**sections) -> Recipe:
    source = DRAWN | sections.pop("source", {})
    sections = {"shard": {"samples": 8}} | sections
    return Recipe(name="t", source=source, **sections)


def shards(root, **shard_settings) -> str:
    """A run folder with shards of 21 train scenes and 3 of val."""
    source = {"kind": "drawn", "train_images": 21, "val_images": 3, "test_images": 0}
    recipe = Recipe(name="t", source={**source, "image_size": 32}, shard=shard_settings)
    sharded(recipe, root)
    return str(root)


def table_of(folder, rows, name="captions.csv") -> Recipe:
    """A recipe that reads a CSV of (image, caption, split) rows."""
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption", "split"), *rows])
    return Recipe(name="t", source={"kind": "csv", "path": str(folder / name)})


def with_source(recipe: Recipe, **changes) -> Recipe:
    return recipe.model_copy(update={"source": recipe.source.model_copy(update=changes)})


def with_shard(recipe: Recipe, **changes) -> Recipe:
    return recipe.model_copy(update={"shard": recipe.shard.model_copy(update=changes)})


def checked(recipe: Recipe, root) -> list[dict]:
    """The sidecars' rows, after the whole stage with its budget."""
    ingested(recipe, root)
    plan = shard.plan(recipe, str(root))
    made = {piece.name: shard.write_shard(piece) for piece in plan.pending}
    shard.check(plan, made, recipe)
    plan.finish(made)
    return samples(root)


def from_files(folder, rows, **settings) -> list[dict]:
    """The sidecar's rows of a CSV's (image, caption) rows, after the stage has checked them."""
    recipe = table_of(folder, [(name, caption, "train") for name, caption in rows])
    return checked(with_shard(recipe, **settings), folder / "run")


def files(root, stage="2-shards") -> dict[str, str]:
    """Hash of every file of a stage, by name."""
    folder = Path(root) / stage
    return {file.name: store.sha256(file.read_bytes()) for file in sorted(folder.iterdir())}


def samples(root) -> list[dict]:
    """The sidecars' rows of all shards, each with its tar."""
    return [
        {**row, "tar": str(file.with_suffix(".tar"))}
        for file in sorted((Path(root) / "2-shards").glob("*.parquet"))
        for row in parquet.read_table(str(file)).to_pylist()
    ]


def member(row: dict) -> bytes:
    """The picture's or the features' bytes in the tar."""
    return store.read_bytes(row["tar"], row["offset"], row["size"])


def piece(folder, rows: list[dict], name="train-000000", excluded=None, source=None, **settings):
    """A piece of hand-written manifest rows; what a row does not say is filled in."""
    plain = {"split": "train", "source": "csv"}
    rows = [
        plain | {"captions": [{"caption_id": f"{r['image_id']}#0", "text": "a dog"}]} | r
        for r in rows
    ]
    inputs = {"rows": pa.Table.from_pylist(rows, MANIFEST), "split": "train"}
    inputs |= {"settings": ShardSettings(**settings), "source": SourceSettings(**(source or {}))}
    inputs |= {"excluded": excluded or {}}
    return Piece(name, f"{folder}/{name}.parquet", "f", inputs)


def written(folder, rows: list[dict], **how) -> list[dict]:
    """The sidecar's rows of one shard of hand-written manifest rows."""
    made = piece(folder, rows, **how)
    shard.write_shard(made)
    tar = made.output.replace(".parquet", ".tar")
    return [row | {"tar": tar} for row in parquet.read_table(made.output).to_pylist()]


def picture(path, mode="RGB", size=(24, 16), form=None, **how) -> Path:
    """A picture of noise, which does not compress away."""
    noise = np.frombuffer(random.Random(Path(path).name).randbytes(size[0] * size[1] * 3), np.uint8)
    image = Image.fromarray(noise.reshape(size[1], size[0], 3)).convert(mode)
    image.save(path, form, **how)
    return Path(path)
