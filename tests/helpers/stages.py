"""Stages made in this process, without Ray, and a small collection to make them on."""

from pipeline.sharding import ingest, shard
from schemas.settings import Recipe

# The settings of every small run: seconds, not minutes.
TINY = [
    *("--recipe", "drawn_tiny"),
    *("--source.train_images", "96", "--source.val_images", "16", "--source.test_images", "32"),
    *("--shard.samples", "32", "--rerank.bank_images", "64"),
    *("--train.batch_size", "16", "--train.workers", "1"),
]


SCENES = {"kind": "drawn", "train_images": 12, "val_images": 3, "test_images": 4, "image_size": 32}


def finish(plan, make, *, backwards=False) -> dict:
    """The index, after the pending pieces were made."""
    pieces = plan.pending[::-1] if backwards else plan.pending
    return plan.finish({piece.name: make(piece) for piece in pieces})


def ingested(recipe: Recipe, root) -> str:
    finish(ingest.plan(recipe, str(root)), ingest.write_part)
    return str(root)


def sharded(recipe: Recipe, root, **how) -> dict:
    ingested(recipe, root)
    return finish(shard.plan(recipe, str(root)), shard.write_shard, **how)


def without_the_second_shard(recipe: Recipe, root) -> None:
    """All shards, and of train-000001 a sidecar alone: each of its samples is rejected."""
    ingested(recipe, root)
    plan = shard.plan(recipe, str(root))
    refusing = recipe.shard.model_copy(update={"max_pixels": 1, "failures_in_a_row": 99})
    plan.pieces[1].inputs["settings"] = refusing
    finish(plan, shard.write_shard)


def make_here(monkeypatch) -> None:
    """From now on a command makes its pieces in this process."""

    def fan_out(make, pieces, **how):
        return {piece.name: make(piece) for piece in pieces}

    monkeypatch.setattr("jobs.cluster.tasks.fan_out", fan_out)
