"""Captions read with their shard are those that are held whole."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.labels.caption_vectors import Captions, StoredCaptions
from pipeline.retrieval import nearest
from pipeline.storage import parquet, store
from pipeline.storage.run_folder import Files
from pipeline.storage.vector_columns import vector_column
from pipeline.training.neighbours import Neighbours
from schemas.embedding import embedding_schema
from schemas.settings import LabelSettings

DIM = 16
UNEQUAL = [[3], [1, 9, 2, 1, 5], [2, 2], [1] * 7]
MANY = 10**9  # bytes: room for all


def files(folder, counts: list[list[int]]) -> tuple[Files, list[int]]:
    """Embeddings of shards whose images have so many captions each, and the images of each."""
    entries, rng = [], np.random.default_rng(0)
    for number, of_shard in enumerate(counts):
        name = f"train-{number:06d}"
        images = [f"{name}/{i}" for i, count in enumerate(of_shard) for _ in range(count)]
        ids = [f"{name}#{n}" for n in range(len(images))]
        vectors = rng.normal(size=(len(images), DIM)).astype(np.float16)
        columns = {"caption_id": ids, "image_id": images, "vector": vector_column(vectors)}
        table = pa.table(columns, schema=embedding_schema(DIM))
        summary = {"split": "train", "captions": len(ids), "dim": DIM, "name": name}
        entries.append(parquet.write_table(f"{folder}/{name}.parquet", table, "f", summary))
    return Files.of(str(folder), entries), [len(of_shard) for of_shard in counts]


@pytest.fixture
def both(tmp_path) -> tuple[StoredCaptions, Captions]:
    found = files(tmp_path, UNEQUAL)
    return StoredCaptions(*found, MANY), Captions.read(found[0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 31), min_size=1, max_size=40))
def test_the_vectors_of_pairs_are_those_of_captions_held_whole(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "embeddings"
    found = files(folder, UNEQUAL)
    stored, whole = StoredCaptions(*found, MANY), Captions.read(found[0])
    caption_rows = torch.tensor(rows)
    for mine, theirs in zip(
        stored.of_pairs(caption_rows), whole.of_pairs(caption_rows), strict=True
    ):
        assert torch.equal(mine, theirs)  # to the last bit, so that losses are too
    assert np.array_equal(stored.images_of(np.array(rows)), whole.image_of[rows])
    assert torch.equal(stored.vectors_of(np.array(rows)), whole.vectors[rows])


@pytest.mark.parametrize("limit", [0, MANY])
def test_all_rows_at_once_and_without_a_cache(tmp_path, limit):
    found = files(tmp_path, UNEQUAL)
    stored, whole = StoredCaptions(*found, limit), Captions.read(found[0])
    assert torch.equal(stored.vectors_of(np.arange(len(whole.vectors))), whole.vectors)
    assert not stored.single and not whole.single
    assert StoredCaptions(*files(tmp_path / "one", [[1, 1], [1]]), limit).single


def test_pairs_that_people_decided_are_found_shard_by_shard(both, tmp_path):
    lines = [
        "image_id,caption_id,relevance",
        "train-000001/1,train-000003#4,0.5",
        "train-000000/0,train-000001#9,1",
        "nobody,train-000001#9,1",
        "train-000003/6,nothing,0",
    ]
    store.write_bytes(f"{tmp_path}/decided.csv", "\n".join(lines).encode())
    how = LabelSettings(overrides=f"{tmp_path}/decided.csv")
    mine, theirs = (captions.decided(how) for captions in both)
    assert len(mine[0]) == 2
    for a, b in zip(mine, theirs, strict=True):
        assert np.array_equal(a, b)
    assert [len(part) for part in both[0].decided(LabelSettings())] == [0, 0, 0]


def test_neighbours_found_shard_by_shard_are_those_of_one_search(tmp_path, monkeypatch):
    found = files(tmp_path, UNEQUAL)
    whole = Captions.read(found[0])
    of_image = torch.from_numpy(whole.image_of)
    names = ("query_group", "candidate_group", "query_owner", "candidate_owner")
    groups = dict.fromkeys(names, of_image)
    _, expected = nearest.top_k(whole.vectors, None, 4, **groups)
    near = Neighbours(*found, 4, MANY)
    near.find(range(0, 4, 2))  # as the first of two workers
    near.find(range(1, 4, 2))
    assert np.array_equal([near[row] for row in range(sum(found[1]))], expected)
    monkeypatch.setattr(nearest, "top_k", None)  # once: they lie beside the embeddings
    again = Neighbours(*found, 4, MANY)
    again.find(range(4))
    assert np.array_equal(again[3], expected[3])
