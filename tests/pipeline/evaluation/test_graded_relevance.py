"""Which encoder's relevance rankings are judged by."""

import contextlib

import numpy as np
import pyarrow as pa
import pytest

from jobs import embed, ingest, shard
from jobs.cli.show import Show
from pipeline.evaluation import evaluate, graded_relevance, results
from pipeline.labels.embed import KIND
from pipeline.storage import run_folder, store
from pipeline.storage.run_folder import RunFolder
from schemas.embedding import embedding_schema
from schemas.settings import Recipe
from tests.helpers.stages import finish
from tests.pipeline.evaluation.test_ranking import (
    ALL,
    random_unit,
    recipe_of,
    write_run,
    write_stage,
)


def write_encoder(root, name: str, backend: str | None = "torch", files="hand") -> None:
    """Vectors of another encoder, as `halftone embed` leaves them."""
    rng = np.random.default_rng(len(name))
    made, shards = [], []
    settings = {"encoder": f"someone/{name}", **({"backend": backend} if backend else {})}
    for piece, of_images in ALL.items():
        rows = [
            {"caption_id": f"{piece}/{n}#{k}", "image_id": f"{piece}/{n}"}
            | {"vector": random_unit(rng, 8).astype(np.float16)}
            for n, count in enumerate(of_images)
            for k in range(count)
        ]
        about = {"split": piece.split("-")[0], "captions": len(rows), "dim": 8}
        made.append((piece, pa.Table.from_pylist(rows, schema=embedding_schema(8)), about))
        shards.append({"name": piece, "files": "hand", "split": about["split"]})
    folder = RunFolder(str(root)).folder("embed", name)
    write_stage(folder, made)
    index = run_folder.read_index(folder)
    for entry in index["pieces"]:
        entry["fingerprint"] = store.fingerprint(*KIND, settings, files, [])
    store.write_json(f"{folder}/index.json", {**index, "settings": settings})
    place = RunFolder(str(root)).folder("shard", "index.json")
    store.write_json(place, {"pieces": shards, "version": "hand"})


def judge(root, **sections) -> str:
    return graded_relevance.recipe_of_judge(recipe_of(**sections), str(root)).embed.encoder


def test_unset_it_is_another_sentence_model_that_is_here_or_else_the_labels(tmp_path):
    write_run(tmp_path)
    assert judge(tmp_path) == "hand"
    write_encoder(tmp_path, "fitted", backend=None)
    write_encoder(tmp_path, "stale", files="other shards")
    assert judge(tmp_path) == "hand"
    write_encoder(tmp_path, "zebra")
    write_encoder(tmp_path, "aardvark")
    assert judge(tmp_path) == "someone/aardvark"
    assert judge(tmp_path, evaluate={"encoder": "zebra"}) == "zebra"
    assert judge(tmp_path, evaluate={"encoder": "hand"}) == "hand"


def test_a_map_of_the_labels_cosines_is_not_used_on_anothers(tmp_path):
    recipe = recipe_of(label={"map": "logistic", "overrides": "x.csv"}, evaluate={"encoder": "b"})
    found = graded_relevance.recipe_of_judge(recipe, str(tmp_path))
    assert (found.label.map, found.label.overrides) == ("clip", "x.csv")
    halved = recipe_of(label={"map": "half"}, evaluate={"encoder": "b"})
    assert graded_relevance.recipe_of_judge(halved, str(tmp_path)).label.map == "half"


def test_rankings_follow_their_judge_and_name_it(tmp_path):
    write_run(tmp_path)
    write_encoder(tmp_path, "another")
    found = {}
    for encoder in ("hand", "another"):
        losses = {"smooth_ndcg": {"weight": 1.0}}
        recipe = recipe_of(evaluate={"encoder": encoder}, train={"losses": losses})
        plan = evaluate.plan(recipe, str(tmp_path), "main")
        assert len(plan.pending) == 2
        finish(plan, evaluate.write_rankings)
        plan = evaluate.plan(recipe, str(tmp_path), "main")
        assert plan.settings["label_encoder"] == encoder and not plan.pending
        assert plan.settings["labels_trained_on"] == (encoder == "hand")
        found[encoder] = results.of_ranking(plan, recipe, {}, "main").metrics
    assert found["hand"]["rsum"] == found["another"]["rsum"]
    assert found["hand"]["i2t_ndcg_label"] != found["another"]["i2t_ndcg_label"]


def test_an_ensemble_does_not_judge():
    with pytest.raises(ValueError, match="one encoder"):
        recipe_of(evaluate={"encoder": "ensemble"})


class Here:
    """A run whose pieces are made here, one after the other, and tracked nowhere."""

    def __init__(self, recipe: Recipe, root: str):
        self.recipe, self.root, self.name, self.dry = recipe, root, "main", False
        self.run, self.made, self.notes, self.show = self, 0, {}, Show(quiet=True)

    @contextlib.contextmanager
    def stage(self, name: str):
        yield self

    def make(self, plan, make, *, check=lambda made: None, **more) -> dict:
        made = {piece.name: make(piece) for piece in plan.pending}
        check(made)
        return plan.finish(made)

    def note(self, **notes) -> None:
        self.notes |= notes


def test_embed_makes_the_judges_vectors_too(tmp_path):
    scenes = {"train_images": 16, "val_images": 4, "test_images": 8, "image_size": 32}
    recipe = Recipe(
        name="t",
        source={"kind": "drawn", **scenes},
        embed={"encoder": "tfidf"},
        evaluate={"encoder": "trigrams"},
    )
    here = Here(recipe, str(tmp_path))
    for job in (ingest, shard, embed):
        job.run(here)
    for encoder in ("tfidf", "trigrams"):
        index = RunFolder(here.root).known("embed", encoder)
        assert sum(entry["captions"] for entry in index["pieces"]) == 5 * 28
    assert here.notes["encoder"] == "tfidf"
