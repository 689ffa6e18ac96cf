"""Places by counting, and the metrics that follow, against full sorts and the dense formulas."""

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.formulas import metrics, metrics_from_ranks
from pipeline.retrieval import ranks
from pipeline.retrieval.ranks import Pairs
from tests import reference

torch.set_num_threads(1)


def pairs_of(positive_QN) -> Pairs:
    return Pairs(*np.nonzero(np.asarray(positive_QN)))


def gallery(seed, images=37, texts=90, width=24, copies=False):
    """Vectors, some of them copies of others, and positives of any count."""
    generator = torch.Generator().manual_seed(seed)
    a_MD, b_ND = (torch.randn(n, width, generator=generator) for n in (images, texts))
    if copies:
        b_ND[1::3] = b_ND[::3][: len(b_ND[1::3])]
        a_MD[20:30] = a_MD[:10]
    of_images = torch.rand(images, texts, generator=generator) < 0.06
    of_texts = torch.rand(texts, images, generator=generator) < 0.05
    return a_MD, b_ND, of_images, of_texts


def dense(metric, scores, positive, **more):
    return metric(scores, positive, **more).numpy()


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("block", [16, 2048])
def test_places_and_metrics_are_those_of_the_dense_formulas(monkeypatch, copies, fast, block):
    monkeypatch.setattr(ranks, "BLOCK", block)
    a_MD, b_ND, of_images, of_texts = gallery(block, copies=copies)
    exact_MN = (a_MD.double() @ b_ND.double().T).float()
    pairs = pairs_of(of_images), pairs_of(of_texts)
    found = ranks.of_vectors(a_MD, b_ND, *pairs, fast=fast)
    given = ranks.of_matrix(exact_MN, *pairs, fast=fast)
    for side, pair, scores, positive, same in zip(
        found, pairs, (exact_MN, exact_MN.T), (of_images, of_texts), given, strict=True
    ):
        mine = scores[pair][:, None]
        assert side.above_P.tolist() == (scores[pair.query_P] > mine).sum(1).tolist()
        assert side.tied_P.tolist() == (scores[pair.query_P] == mine).sum(1).tolist()
        assert np.array_equal(side, same)
        extra = torch.arange(len(positive)) % 3 * positive.any(1)
        values = per_query(pair, side, len(positive), positive.sum(1) + extra)
        for k in (1, 5, 10):
            expected = dense(metrics.recall_at, scores, positive, k=k)
            assert values[f"R_at_{k}"] == pytest.approx(expected, abs=1e-12, nan_ok=True)
        expected = dense(metrics.expected_rank, scores, positive)
        assert values["rank"] == pytest.approx(expected, nan_ok=True)
        rows = [x.tolist() for x in (scores, positive, positive.sum(1) + extra)]
        for name in ("map_at_r", "r_precision"):
            twin = getattr(reference, f"long_{name}")
            expected = [twin(*row) for row in zip(*rows, strict=True)]
            assert values[name] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def per_query(pair, side, queries, total_Q=None):
    parts = (torch.from_numpy(part) for part in (pair.query_P, *side))
    values = metrics_from_ranks.per_query(*parts, queries, total_Q=total_Q)
    return {name: value.numpy() for name, value in values.items()}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("width", [1, 250, 384])
def test_equal_vectors_tie_at_any_width(fast, width):
    vector = torch.randn(1, width, generator=torch.Generator().manual_seed(width))
    a_MD, b_ND = vector.repeat(11, 1), vector.repeat(33, 1)
    own = torch.arange(33)[None, :] // 3 == torch.arange(11)[:, None]
    pairs = pairs_of(own), pairs_of(own.T)
    for side, others, pair in zip(
        ranks.of_vectors(a_MD, b_ND, *pairs, fast=fast), (33, 11), pairs, strict=True
    ):
        assert set(side.above_P) == {0} and set(side.tied_P) == {others}
        found = per_query(pair, side, 11 if others == 33 else 33)["R_at_1"]
        assert found == pytest.approx((3 if others == 33 else 1) / others)


def test_neighbours_in_float32_are_told_apart():
    """Scores that differ by less than a float32 product's rounding."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 512, generator=generator)
    texts = query.repeat(200, 1)
    texts[:, 0] += torch.linspace(0, 1e-4, 200)
    exact = (query.double() @ texts.double().T).float()[0]
    assert len(set((query @ texts.T)[0].tolist())) < 200
    pairs = Pairs(np.zeros(200, int), np.arange(200))
    none = Pairs(np.zeros(0, int), np.zeros(0, int))
    for fast in (False, True):
        side, _ = ranks.of_vectors(query, texts, pairs, none, fast=fast)
        assert side.above_P.tolist() == (exact[None] > exact[:, None]).sum(1).tolist()


def test_a_positive_that_no_list_holds_is_never_found():
    query_P, above_P = torch.tensor([0, 1]), torch.tensor([metrics_from_ranks.NOWHERE, 0])
    values = metrics_from_ranks.per_query(
        query_P, above_P, torch.ones(2, dtype=int), 3, total_Q=torch.tensor([1, 2, 4])
    )
    assert values["R_at_10"].tolist() == [0, 1, 0]
    assert values["rank"].tolist() == [np.inf, 1, np.inf]
    assert values["map_at_r"].tolist() == [0, 0.5, 0] == values["r_precision"].tolist()
    nowhere = torch.full((3,), metrics_from_ranks.NOWHERE)
    values = metrics_from_ranks.per_query(
        torch.tensor([0, 0, 1]), nowhere, torch.ones(3, dtype=int), 2
    )
    assert values["R_at_10"].tolist() == [0, 0] and values["rank"].tolist() == [np.inf] * 2


def test_scores_that_are_no_numbers_are_refused():
    pairs = Pairs(np.array([0]), np.array([0]))
    bad = torch.tensor([[float("nan"), 1.0]])
    with pytest.raises(InputError, match="NaN"):
        ranks.of_vectors(bad, bad, pairs, pairs)
    scores = torch.zeros(3, 5)
    for value in (torch.nan, torch.inf):
        scores[2, 4] = value
        with pytest.raises(InputError, match=f"score in row 2, column 4 .from 0. is {value}; give"):
            ranks.of_matrix(scores, pairs, pairs)


@pytest.mark.parametrize("fast", [False, True])
def test_a_pair_without_a_score_is_never_found_and_takes_no_place(monkeypatch, fast):
    monkeypatch.setattr(ranks, "BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, 50, generator=generator)
    scores[torch.rand(30, 50, generator=generator) < 0.4] = -torch.inf
    scores[3], scores[:, 7] = -torch.inf, -torch.inf
    positive = torch.rand(30, 50, generator=generator) < 0.2
    pairs = pairs_of(positive), pairs_of(positive.T)
    found = ranks.of_matrix(scores, *pairs, fast=fast)
    for side, pair, rows, own in zip(
        found, pairs, (scores, scores.T), (positive, positive.T), strict=True
    ):
        values = per_query(pair, side, len(own))
        for query, (row, mine) in enumerate(zip(rows, own, strict=True)):
            listed = row[row > -torch.inf].sort(descending=True).values.tolist()
            places = [listed.index(s) + 1 for s in row[mine].tolist() if s > -torch.inf]
            if mine.any():
                first = min(places, default=np.inf)
                assert values["rank"][query] == first
                assert values["R_at_5"][query] == (first <= 5)


@pytest.mark.parametrize("fast", [False, True])
def test_scores_in_float64_are_told_apart(fast):
    scores = 1e6 + torch.arange(12, dtype=torch.float64).reshape(2, 6) * 1e-6
    assert len(scores.float().unique()) == 1
    pairs = Pairs(np.array([0, 1]), np.array([4, 0])), Pairs(np.array([3]), np.array([0]))
    i2t, t2i = ranks.of_matrix(scores, *pairs, fast=fast)
    assert i2t.above_P.tolist() == [1, 5] and i2t.tied_P.tolist() == [1, 1]
    assert t2i.above_P.tolist() == [1]
