"""What tasks say they take of a node's memory: more of what is larger, and no less than it is."""

from pathlib import Path

import pytest

from jobs.cli import recipes
from pipeline.evaluation import evaluate, graded_relevance, task_memory, tower_vectors
from pipeline.labels import embed
from pipeline.labels.encoders import sentences
from pipeline.reranking import rerank
from pipeline.storage import run_folder
from pipeline.storage.run_folder import RunFolder


@pytest.fixture
def finished(finished_run):
    """The settings and the folder of a finished run."""
    ((_, recipe),) = recipes.saved(finished_run, {}, None)
    return recipe, finished_run


def test_embedding_takes_the_encoders_files(finished):
    recipe, root = finished
    folder = sentences.path(recipe.embed.encoder)
    weights = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    memory = {piece.memory for piece in embed.plan(recipe, root).pieces}
    assert len(memory) == 1 and weights <= memory.pop() < 3 * weights


def test_vectors_take_the_decoded_pictures_or_the_regions_and_the_model(finished):
    recipe, root = finished
    shards = RunFolder(root).known("shard")
    model = RunFolder(root).known("train", "main")
    (entry,) = run_folder.of_split(shards, "test")
    weights = model["pieces"][0]["files"]["model.safetensors"]["bytes"]
    pixels = 3 * recipe.model.image_size**2 * entry["samples"]
    by_name = {p.name: p.memory for p in tower_vectors.plan_vectors(recipe, root, "main").pieces}
    assert pixels + weights < by_name[entry["name"]] < 2 * (pixels + 2 * weights)
    regions = recipe.model.model_copy(update={"image": "regions"})
    held = task_memory.of_vectors(entry, recipe.model_copy(update={"model": regions}), model)
    assert held - by_name[entry["name"]] == entry["files"][f"{entry['name']}.tar"]["bytes"] - pixels


def test_rankings_take_more_where_other_scores_are_made_and_re_ranking_asks_for_it(finished):
    recipe, root = finished
    (plain,) = evaluate.plan(recipe, root, "main").pieces
    (again,) = rerank.plan_reranked(recipe, root, "main").pieces
    (chosen,) = rerank.plan(recipe, root, "main").pieces
    assert 0 < plain.memory < again.memory and chosen.memory > 0


def test_rankings_take_rows_of_a_large_gallery_and_no_vectors():
    """Of 1,000 images and of more, a caption each: MB."""
    _, recipe = recipes.resolve("drawn", {"rerank": {"bank_images": 2000}}, None)[0]

    def megabytes(images: int, dim: int = 256, scored: bool = False) -> float:
        own = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dim": dim})})
        return task_memory.rankings(images, images, 384 * images, own, scored) / 1e6

    small, large, huge = (megabytes(images) for images in (1000, 100_000, 1_000_000))
    assert small < large < huge < large + 1e-6 * task_memory.ROW * 2_000_000
    assert megabytes(100_000, dim=1024) == large
    assert megabytes(100_000, 1024, True) - megabytes(100_000, 256, True) > 1000
    assert task_memory.SPAN == graded_relevance.SPAN
