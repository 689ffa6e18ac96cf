"""Vectors in a file of the machine: what is found among them is brute force's, or told."""

import numpy as np
import pytest
import torch

from pipeline.retrieval import near_cells, nearest, stored
from pipeline.storage import cache

TOPICS, WIDTH = 40, 16


@pytest.fixture
def made(tmp_path, monkeypatch) -> tuple[stored.Source, torch.Tensor]:
    """A source of 3,000 vectors in parts of any size, and 80 queries of them."""
    monkeypatch.setenv("HALFTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stored, "ROWS", 700)
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((TOPICS, WIDTH))
    drawn = topics[rng.integers(0, TOPICS, 3080)] + 0.5 * rng.standard_normal((3080, WIDTH))
    drawn = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    vectors, queries = drawn[:3000], drawn[3000:]
    vectors[1500:1520] = vectors[:20]  # twins: the lowest row comes first

    def parts():
        return iter((vectors[:1000], vectors[1000:1000], vectors[1000:]))

    source = stored.Source("1", vectors.shape, parts, lambda: queries)
    return source, torch.from_numpy(queries)


def assert_same(found, expected) -> None:
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("large", [0, 2**17])
@pytest.mark.parametrize("cells", [0, 20])
def test_what_is_found_in_any_order_is_what_brute_force_finds(made, monkeypatch, cells, large):
    monkeypatch.setattr(stored, "LARGE", large)
    monkeypatch.setattr(stored, "COMPILED", "nothing.loaded.yet")
    source, queries = made
    vectors = torch.from_numpy(np.concatenate(list(source.parts())))
    kept = np.random.default_rng(1).random(len(vectors)) < 0.02
    rows = np.flatnonzero(kept)
    for number in range(2):  # made, and found again
        there = stored.stored(source, 1e9, cells=cells)
        assert_same(there.top_k(queries, 7), nearest.top_k(queries, vectors, 7))
        assert_same(there.top_k(3 * queries, 7), nearest.top_k(3 * queries, vectors, 7))
        scores, places = nearest.top_k(queries, vectors[kept], 90)
        found, at = there.top_k(queries, 90, kept)
        expected = np.pad(rows[places.numpy()], ((0, 0), (0, 90 - len(rows))), constant_values=-1)
        assert np.array_equal(at.numpy(), expected) and torch.equal(found[:, : len(rows)], scores)
        assert len(there.cells) == cells, number
    assert len(list(cache.folder().glob("*.vectors*"))) == 1


def test_a_look_into_near_cells_finds_what_it_says_and_more_cells_find_more(made):
    source, queries = made
    there = stored.stored(source, 1e9, cells=20)
    exact = there.top_k(queries, near_cells.NEIGHBOURS)[1]
    recalls = []
    for probes in (1, 3, 20):
        found = there.top_k(queries, near_cells.NEIGHBOURS, probes=probes)[1]
        same = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
        recalls.append(np.mean(same[1::2]) / near_cells.NEIGHBOURS)
        assert there.cells.recall(probes) == pytest.approx(recalls[-1], abs=1e-6)
    assert recalls == sorted(recalls) and recalls[0] < recalls[2] == 1
    least = there.cells.probes(0.95)
    assert there.cells.recall_2C[0, least - 1] >= 0.95 > there.cells.recall_2C[0, least - 2]
    assert there.cells.probes(1.0) <= 20


def test_without_room_they_are_held_in_memory_and_the_same(made):
    source, queries = made
    held = stored.stored(source, 0)
    assert not cache.folder().exists()
    assert_same(held.top_k(queries, 5), stored.stored(source, 1e9).top_k(queries, 5))


def test_a_torn_file_is_made_again(made):
    source, queries = made
    expected = stored.stored(source, 1e9).top_k(queries, 5)
    (file,) = cache.folder().glob("*.vectors*")
    file.write_bytes(file.read_bytes()[:1000])
    assert_same(stored.stored(source, 1e9).top_k(queries, 5), expected)


def test_nobody_is_found_among_none(made):
    source, queries = made
    none = source._replace(shape=(0, WIDTH), parts=lambda: iter(()))
    assert stored.stored(none, 1e9).top_k(queries, 5)[1].shape == (len(queries), 0)
