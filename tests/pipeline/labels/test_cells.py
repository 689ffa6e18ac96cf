"""Lists of a split that is searched by cells: what they hold, where they come from, crashes."""

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.labels import cells as steps_of_cells
from pipeline.labels import label
from pipeline.retrieval import cells
from pipeline.storage import store
from pipeline.storage.parquet import read_table
from schemas.settings import Recipe
from tests.helpers.relevance_lists import embeddings, labelled
from tests.helpers.stages import finish

COUNTS = {
    "train-000000": [2] * 120,
    "train-000001": [3],
    "train-000002": [1] * 200,
    "test-000000": [1, 2],
}


@pytest.fixture
def small(monkeypatch):
    """Cells, groups and parts of a few captions."""
    monkeypatch.setattr(cells, "PER_CELL", 16)
    monkeypatch.setattr(cells, "PER_GROUP", 100)
    monkeypatch.setattr(steps_of_cells, "PER_PART", 150)


def recipe_of(**how) -> Recipe:
    return Recipe(name="t", embed={"encoder": "hand"}, label={"approximate_above": 100, **how})


def by_cells(recipe: Recipe, root: str) -> list[dict]:
    """The lists of all shards in order."""
    for plan, make in label.steps(recipe, root):
        finish(plan, make)
    return [row for piece in plan.pieces for row in read_table(piece.output).to_pylist()]


def test_with_every_cell_read_the_lists_are_the_exact_ones(tmp_path, small, monkeypatch):
    root, lists = str(tmp_path), ["i2t", "t2i", "i2i", "t2t"]
    monkeypatch.setattr(cells, "REACH", 10**6)
    monkeypatch.setattr(cells, "AGAIN", 100.0)
    embeddings(root, COUNTS, dim=8)
    found = by_cells(recipe_of(lists=lists, top_k=9), root)
    entries = label.plan(recipe_of(lists=lists, top_k=9), root).index["pieces"]
    assert found == labelled(root, lists=lists, top_k=9)
    recalls = [entry["recall"] for entry in entries if entry["split"] == "train"]
    assert recalls == [dict.fromkeys(lists, 1.0)] * 3
    assert [entry["recall"] for entry in entries if entry["split"] == "test"] == [{}]  # exact


def test_one_caption_an_image_is_searched_once_and_the_same(tmp_path, small, monkeypatch):
    monkeypatch.setattr(cells, "REACH", 10**6)
    monkeypatch.setattr(cells, "AGAIN", 100.0)
    embeddings(str(tmp_path), {"train-000000": [1] * 90, "train-000001": [1] * 80}, dim=8)
    assert by_cells(recipe_of(top_k=9), str(tmp_path)) == labelled(str(tmp_path), top_k=9)


def test_the_recall_that_is_told_is_that_of_the_lists(tmp_path, small, monkeypatch):
    root = str(tmp_path)
    monkeypatch.setattr(cells, "REACH", 2)
    embeddings(root, COUNTS, dim=8)
    recipe = recipe_of(lists=["t2t"], top_k=10)
    found = by_cells(recipe, root)
    told = label.recalls(label.plan(recipe, root).index["pieces"])["recall_t2t"]
    exact = labelled(root, lists=["t2t"], top_k=10)
    hits = [
        len(set(a["candidate"]) & set(b["candidate"])) / len(b["candidate"])
        for a, b in zip(found, exact, strict=True)
        if a["query_id"].startswith("train")
    ]
    assert 0.2 < np.mean(hits) < 0.999 and abs(told - np.mean(hits)) < 0.02


def test_a_group_reads_its_own_cells_and_as_much_again_at_most(tmp_path, small):
    root = str(tmp_path)
    embeddings(root, COUNTS, dim=8)
    by_cells(recipe_of(), root)
    folder = f"{root}/4-relevance/hand/cells-train"
    groups = store.read_json(f"{folder}/groups/index.json")["pieces"]
    size = steps_of_cells.record(8).itemsize
    assert sum(entry["captions"] for entry in groups) == 443 and len(groups) == 5
    assert all(entry["read"] <= 2 * size * entry["captions"] for entry in groups)


def test_decisions_are_put_into_lists_found_by_cells(tmp_path, small):
    root = str(tmp_path)
    embeddings(root, COUNTS, dim=8)
    decided = tmp_path / "decided.csv"
    pair = "train-000000/5", "train-000002/7#0"
    decided.write_text(f"image_id,caption_id,relevance\n{','.join(pair)},1.0\n")
    for row in by_cells(recipe_of(overrides=str(decided)), root):
        known = dict(zip(row["candidate"], row["relevance"], strict=True))
        if (row["query_id"], row["direction"]) == (pair[0], "i2t"):
            assert known[240 + 3 + 7] == 1.0
        if (row["query_id"], row["direction"]) == (pair[1], "t2i"):
            assert known[5] == 1.0


def test_lost_files_of_a_step_are_made_again_and_nothing_else(tmp_path, small):
    root = str(tmp_path)
    embeddings(root, COUNTS, dim=8)
    before = by_cells(recipe_of(), root)
    folder = f"{root}/4-relevance/hand/cells-train"
    store.remove(f"{folder}/groups/group-00002.keys")
    pending = []
    for plan, make in label.steps(recipe_of(), root):
        pending += [piece.name for piece in plan.pending]
        finish(plan, make)
    assert pending == ["group-00002"]
    assert by_cells(recipe_of(), root) == before


def test_means_of_captions_are_in_no_cell(tmp_path, small):
    embeddings(str(tmp_path), COUNTS, dim=8)
    with pytest.raises(InputError, match="needs label.reduce max, not mean"):
        list(label.steps(recipe_of(reduce="mean"), str(tmp_path)))
