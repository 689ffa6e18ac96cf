"""Neighbours by cells: how vectors are cut up, and what is found."""

import numpy as np
import pytest
import torch

from pipeline.retrieval import cells, nearest


@pytest.fixture
def topics() -> torch.Tensor:
    """2,400 directions around 60 centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 16, generator=generator)
    v = centres.repeat(40, 1) + 0.4 * torch.randn(2400, 16, generator=generator)
    return torch.nn.functional.normalize(v, dim=1)


def test_cells_are_those_of_the_nearest_centroid_and_none_is_lost(topics):
    found_CD, share_C = cells.centroids(topics, 30)
    assert found_CD.shape == (30, 16) and int(share_C.sum()) == len(topics)
    slow = (topics.double() @ found_CD.double().T).argmax(1)
    assert (cells.nearest_cell(topics, found_CD) == slow).float().mean() > 0.999
    assert torch.equal(cells.centroids(topics, 30)[0], found_CD)  # the same sample, the same cells


def test_groups_hold_every_cell_once_and_are_of_about_one_size(topics):
    found_CD, share_C = cells.centroids(topics, 64)
    groups = cells.groups(found_CD, share_C, 7)
    assert sorted(np.concatenate(groups).tolist()) == list(range(64)) and len(groups) == 7
    sizes = [int(share_C[g].sum()) for g in groups]
    assert max(sizes) < 2 * len(topics) / 7
    assert len(cells.groups(found_CD[:1], share_C[:1], 7)) == 1


def test_a_group_reads_no_more_than_it_may_and_a_cell_meets_itself(topics, monkeypatch):
    found_CD, share_C = cells.centroids(topics, 40)
    own = cells.groups(found_CD, share_C, 5)[2]
    size_C = share_C.numpy()
    for again in (0.0, 0.5, 2.0):
        monkeypatch.setattr(cells, "AGAIN", again)
        read, near = cells.read_by(own, found_CD, size_C)
        assert set(own) <= set(read) and size_C[read].sum() <= (1 + again) * size_C[own].sum()
        assert all(cell in near[cell] and set(near[cell]) <= set(read) for cell in own.tolist())
    assert len(read) > len(own)


@pytest.mark.parametrize("grouped", [False, True])
def test_keys_are_exact_and_by_number(topics, grouped):
    number = np.arange(2400)[::-1] // (5 if grouped else 1) + 7
    owner_Q, owner = np.arange(50), np.arange(2400) // 48
    keys = cells.top_k(topics[:50], topics, 12, number, (owner_Q, owner))
    value, row = nearest.unpacked(torch.from_numpy(keys))
    score = topics[:50].double() @ topics.double().T
    score[owner_Q[:, None] == owner[None, :]] = -torch.inf
    for q in range(50):
        best = {}
        for n in np.argsort(-score[q].numpy()):
            best.setdefault(number[n], float(score[q, n]))
        expected = sorted(best.values(), reverse=True)[:12]
        assert np.allclose(value[q], expected, atol=1e-6)
        assert all(
            abs(best[int(n)] - float(v)) < 1e-6 for n, v in zip(row[q], value[q], strict=True)
        )


def test_places_without_a_candidate_are_empty_and_stay_so(topics):
    keys = cells.top_k(topics[:3], topics[:2], 4, np.arange(2), (np.arange(3), np.array([0, 9])))
    assert (keys == nearest.EMPTY).sum(1).tolist() == [3, 2, 2]
    assert ((cells.moved(keys, 10) == nearest.EMPTY) == (keys == nearest.EMPTY)).all()
    moved = nearest.unpacked(torch.from_numpy(cells.moved(keys, 10)))[1]
    rows = nearest.unpacked(torch.from_numpy(keys.copy()))[1]
    assert torch.equal(torch.where(rows < 0, rows, rows + 10), moved)


def test_recall_is_the_share_of_exact_neighbours(topics):
    def keys(*rows):
        score = torch.linspace(1, 0, len(rows))
        return nearest.key(score, torch.tensor(rows)).numpy()[None]

    assert cells.recall(keys(1, 2, 3, 4), keys(1, 2, 5, 6)) == 0.5
    assert cells.recall(np.full((1, 4), nearest.EMPTY), np.full((1, 4), nearest.EMPTY)) == 1.0


def test_candidates_may_go_by_other_numbers(topics):
    before, after = np.random.default_rng(0).permutation(2400), np.arange(2400)[::-1] * 3
    owners = np.arange(20), np.arange(2400)
    keys = cells.top_k(topics[:20], topics, 12, before, owners)
    keys[3, 5:] = nearest.EMPTY
    expected = cells.top_k(topics[:20], topics, 12, after, owners)
    expected[3, 5:] = nearest.EMPTY
    assert np.array_equal(cells.renumbered(keys, before, after), expected)


def test_records_of_cells_are_gathered_in_order_out_of_all_files():
    """Of the cells 0, 2, 3 and 5; some are empty in a file, and neighbours are read at once."""
    kind = np.dtype([("cell", "<i4"), ("file", "<i4")])
    sizes = np.array([[2, 1, 0, 3, 1, 0], [0, 2, 2, 1, 0, 0]])
    files = []
    for number, size in enumerate(sizes):
        whole = np.empty(size.sum(), kind)
        whole["cell"], whole["file"] = np.repeat(np.arange(6), size), number
        files.append(whole)
    asked = []

    def read(file, start, end):
        asked.append((file, start, end))
        return files[file][start:end]

    records, where = cells.gathered(np.array([0, 2, 3, 5]), sizes.cumsum(1), kind, read)
    assert records["cell"].tolist() == [0, 0, 2, 2, 3, 3, 3, 3]
    assert records["file"].tolist() == [0, 0, 1, 1, 0, 0, 0, 1]
    assert [records[where[c]]["cell"].tolist() for c in (0, 2, 5)] == [[0, 0], [2, 2], []]
    assert asked == [(0, 0, 2), (0, 3, 6), (1, 2, 5)]


def test_a_huge_collection_has_no_more_cells_and_no_larger_sample_than_others():
    assert cells.count_of(100) == (1, 64)
    assert cells.count_of(5_000_000) == (1221, 64 * 1221)
    assert cells.count_of(10**9) == (cells.MOST, cells.SAMPLED)
