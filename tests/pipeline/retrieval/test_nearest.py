"""The engine of nearest neighbours, against brute force."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.formulas import relevance
from pipeline.retrieval import nearest
from pipeline.retrieval.nearest import largest, top_k

SCANS = ("fp32", "bf16", "int8")


def brute_force(queries, candidates, k, query_group=None, candidate_group=None, owners=None):
    """Scores and rows (G, k) by sorting all products: float64 rounded to float32, lowest first."""
    scores = (queries.double() @ candidates.double().T).float()
    if owners is not None:
        scores[owners[0][:, None] == owners[1][None, :]] = -torch.inf
    for dim, group in enumerate((query_group, candidate_group)):
        if group is not None:
            best = torch.full((int(group.max()) + 1, scores.shape[1 - dim]), -torch.inf)
            scores = scores.T if dim else scores
            scores = best.scatter_reduce(0, group[:, None].expand_as(scores), scores, "amax")
            scores = scores.T if dim else scores
    scores = scores.numpy()
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(scores, rows, 1)
    rows[values == -np.inf] = -1
    return torch.from_numpy(values), torch.from_numpy(rows)


def assert_same(found, expected):
    assert torch.equal(found[1].long(), expected[1])
    assert torch.equal(found[0], expected[0])


def vectors(count, width, seed, twins=True):
    """Directions, the second half of them the first again."""
    v = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    if twins:
        v[count - count // 2 :] = v[: count // 2].clone()
    return v


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("scan", SCANS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_neighbours_are_those_of_brute_force_in_any_arithmetic(scan, fast, data):
    count, width, k = (data.draw(st.integers(1, most)) for most in (70, 24, 30))
    block = data.draw(st.sampled_from([7, 16, 1024]))
    candidates = vectors(count, width, data.draw(st.integers(0, 99)))
    queries = vectors(data.draw(st.integers(1, 40)), width, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "BLOCK", block)
        found = top_k(queries, candidates, k, scan=scan, fast=fast)
        assert_same(found, brute_force(queries, candidates, k))
        found = top_k(candidates, None, k, scan=scan, fast=fast)
        assert_same(found, brute_force(candidates, candidates, k))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=16),
    groups=st.sampled_from(["queries", "candidates", "both"]),
    own=st.booleans(),
    k=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_grouped_neighbours_are_those_of_brute_force(fast, symmetric, counts, groups, own, k, seed):
    group = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    of = {
        "query_group": group if groups != "candidates" else None,
        "candidate_group": group if groups != "queries" else None,
    }
    v = vectors(len(group), 5, seed)
    owners = {"query_owner": group, "candidate_owner": group} if own else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "BLOCK", 8)
        found = top_k(
            v, None if symmetric else v.clone(), k, scan="int8", fast=fast, **of, **owners
        )
    assert_same(found, brute_force(v, v, k, *of.values(), (group, group) if own else None))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("reduce", ["max", "mean"])
@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=2, max_size=20), seed=st.integers(0, 99))
def test_aggregated_relevance_is_that_of_the_formula(fast, reduce, counts, seed):
    image_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    v = torch.nn.functional.normalize(vectors(len(image_N), 6, seed, twins=False), dim=1)
    first = np.cumsum([0, *counts[:-1]])
    step = np.arange(max(counts))
    mask = torch.from_numpy(step[None] < np.array(counts)[:, None])
    padded = v[torch.from_numpy(np.minimum(first[:, None] + step, len(v) - 1))]
    r = relevance.from_captions(padded, v, map="half", reduce=reduce, mask_MC=mask)
    if reduce == "max":
        image, group = v, image_N
    else:
        image, group = (padded * mask[..., None]).sum(1) / mask.sum(1)[:, None], None
    everyone = len(v)
    value, row = top_k(image, v, everyone, query_group=group, fast=fast)
    assert torch.allclose(relevance.half(value), r.gather(1, row.long()), atol=1e-6)
    value, row = top_k(v, image, everyone, candidate_group=group, fast=fast)
    assert torch.allclose(relevance.half(value), r.T.gather(1, row.long()), atol=1e-6)


@pytest.mark.parametrize("fast", [False, True])
def test_a_guess_of_the_kth_score_that_was_too_high_is_put_right(fast):
    count, k = 5000, 50
    v = torch.nn.functional.normalize(vectors(count, 8, 0, twins=False), dim=1)
    sample = torch.linspace(0, count - 1, 1024).long()  # those whom the guess is read off
    v[sample] = v[0] + 1e-3 * v[sample]
    queries = torch.cat([v[:200], -v[:50]])
    for scan in SCANS:
        assert_same(top_k(queries, v, k, scan=scan, fast=fast), brute_force(queries, v, k))
    v = vectors(count, 8, 1, twins=False)
    v[sample[:40]] = 100 * v[0]  # fewer than K lie above any guess
    queries = v[:20]
    assert_same(top_k(queries, v, k, fast=fast), brute_force(queries, v, k))


@pytest.mark.parametrize("fast", [False, True])
def test_vectors_that_are_all_the_same_have_the_lowest_rows_as_neighbours(fast):
    v = torch.ones(300, 16) / 4
    value, row = top_k(v, None, 5, query_owner=torch.arange(300), candidate_owner=torch.arange(300),
                       fast=fast)  # fmt: skip
    assert row[7].tolist() == [0, 1, 2, 3, 4] and row[2].tolist() == [0, 1, 3, 4, 5]
    assert (value == 1).all()


@pytest.mark.parametrize("fast", [False, True])
def test_places_without_a_candidate_are_empty(fast):
    v = vectors(3, 4, 0)
    own = {"query_owner": torch.zeros(3), "candidate_owner": torch.tensor([0, 0, 1])}
    value, row = top_k(v, None, 9, fast=fast, **own)
    assert value.shape == row.shape == (3, 3)
    assert row.tolist() == [[2, -1, -1]] * 3
    assert (value[:, 1:] == -torch.inf).all() and torch.isfinite(value[:, 0]).all()
    for queries, candidates in ((v[:0], v), (v, v[:0]), (v[:0], v[:0])):
        value, row = top_k(queries, candidates, 2, fast=fast)
        assert value.shape == row.shape == (len(queries), min(2, len(candidates)))


def cancelling(pairs: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose products cancel but for x² − next(x) previous(x): sums in float64 lose that."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.exp(2 * torch.randn(pairs, width // 2, generator=generator))
    sign = torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1
    after, before = x.nextafter(torch.tensor(1e9)), x.nextafter(torch.tensor(0.0))
    a, b = torch.cat([x, after], 1), torch.cat([sign * x, -sign * before], 1)
    order = torch.randperm(a.shape[1], generator=generator)
    return a[:, order].contiguous(), b[:, order].contiguous()


def test_a_score_is_the_exact_product_rounded_whatever_adds_it_up():
    from pipeline.retrieval import compiled

    rows = np.arange(400)
    for seed in range(3):
        a, b = cancelling(400, 200, seed)
        terms = a.double() * b.double()  # exact
        exact = [np.float32(math.fsum(row)) for row in terms.tolist()]
        assert np.unique(exact).size > 200  # no zeros alone
        plain = [np.float32(float(row.sum())) for row in terms.flip(1)]
        assert plain != exact  # a sum in float64 is not enough here
        of_torch = nearest.products(a, b, torch.arange(400), torch.arange(400))
        assert of_torch.tolist() == exact
        assert compiled.products(a.numpy(), b.numpy(), rows, rows).tolist() == exact
        backwards = (x.flip(1).contiguous() for x in (a, b))
        assert nearest.products(*backwards, torch.arange(400), torch.arange(400)).tolist() == exact


@pytest.mark.parametrize("symmetric", [False, True])
def test_lists_are_the_same_byte_for_byte_with_a_gpu_s_blocks_and_with_numba(symmetric):
    """What a GPU does differently: larger blocks, nothing compiled, another order of sums."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(5200, 48, generator=generator)
    v[3000:4000] = v[:1000].clone()  # captions that come twice
    v = torch.nn.functional.normalize(v, dim=1)
    image = torch.arange(5200) // 5
    of = {"query_owner": image, "candidate_owner": image, "candidate_group": image}
    everyone = None if symmetric else v.clone()
    expected = top_k(v, everyone, 20, fast=True, **of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "BLOCK", 3000)
        found = top_k(v, everyone, 20, fast=False, scan="fp32", **of)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("scan", SCANS)
def test_the_bound_of_a_scan_s_error_holds(scan):
    generator = torch.Generator().manual_seed(0)
    for spread in (0.0, 1.0, 3.0):  # all alike, unlike, and a few large numbers among small ones
        v = torch.randn(200, 96, generator=generator)
        v = v.sign() * v.abs() ** spread * (1 + torch.rand(200, 1, generator=generator))
        rows = nearest._rows(v, float(v.norm(dim=1).max()), scan, None, None)
        scanned = nearest._product(rows.codes, rows.codes, torch.empty(200 * 200))
        scanned = scanned * rows.scale * rows.scale[:, None]
        error = (scanned.double() - v.double() @ v.double().T).abs()
        assert (error <= rows.error[:, None] + rows.error).all()


def test_an_unknown_scan_is_refused():
    with pytest.raises(ValueError, match="scan is auto, int8, bf16 or fp32, got 'fp8'"):
        top_k(vectors(3, 4, 0), None, 1, scan="fp8")


def test_without_numba_neighbours_are_found_all_the_same(monkeypatch):
    v = vectors(1100, 4, 0)
    monkeypatch.setattr(nearest, "has_numba", lambda: False)
    monkeypatch.setitem(sys.modules, "pipeline.retrieval.compiled", None)
    assert_same(top_k(v, None, 3), brute_force(v, v, 3))


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 15), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_largest_of_a_block_have_the_lowest_rows_in_ties(queries, count, k, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (queries, count), generator=generator) / 2
    value, row = largest(scores, k)
    expected = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :k]
    assert np.array_equal(row.numpy(), expected)
    assert np.array_equal(value.numpy(), np.take_along_axis(scores.numpy(), expected, 1))
