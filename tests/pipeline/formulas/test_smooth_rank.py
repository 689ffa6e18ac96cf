"""Smooth ranks: three methods, one meaning; the binned one within its stated error."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.formulas.kernels.binned import REACH, Grid, grid_length
from pipeline.formulas.kernels.rows import CACHE
from pipeline.formulas.kernels.smooth_rank import Exact, smooth_rank, stepper
from pipeline.formulas.losses import both_directions, smooth_ndcg
from tests import reference

torch.set_num_threads(1)


def cosines(queries, n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(queries, n, generator=generator, dtype=dtype) / 5).clamp(-1, 1)


def exact_rank(scores, tau, mask=None):
    step = torch.sigmoid((scores[:, None, :] - scores[:, :, None]) / tau)
    return 0.5 + (step if mask is None else step * mask[:, None, :]).sum(-1)


def allowed(scores, tau, error):
    """The stated bound on |rank error| / rank: the grid, what is beyond its reach, and rounding."""
    spread = (scores.max() - scores.min()).item()
    rounding = 2 * torch.finfo(scores.dtype).eps * spread / tau + 20 * torch.finfo(scores.dtype).eps
    return error + scores.shape[1] * math.exp(-REACH) + rounding


@pytest.mark.parametrize("method", ["auto", "dense", "chunked"])
@pytest.mark.parametrize("tau", [1e-3, 0.1, 2.0])
def test_exact_methods_are_the_slow_twin(method, tau):
    scores = cosines(3, 11)
    expected = torch.tensor([reference.smooth_rank(row, tau) for row in scores.tolist()])
    found = smooth_rank(scores, tau=tau, method=method)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found, exact_rank(scores, tau), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", [1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("error", [4e-5, 1e-6])
def test_binned_rank_and_gradient_are_within_their_error(tau, error, dtype):
    scores = cosines(6, 300, dtype=dtype)
    weight = torch.rand(scores.shape, generator=torch.manual_seed(1), dtype=torch.float64)
    precise = scores.double().clone().requires_grad_()
    expected = exact_rank(precise, tau)
    (slope,) = torch.autograd.grad((expected * weight).sum(), precise)
    binned = scores.clone().requires_grad_()
    found = smooth_rank(binned, tau=tau, method="binned", error=error)
    (found_slope,) = torch.autograd.grad((found * weight).sum(), binned)
    bound = allowed(scores, tau, error)
    assert ((found - expected).abs() / expected).max() < bound
    assert (found_slope - slope).abs().max() < 10 * bound * slope.abs().max()
    assert not torch.equal(
        found.double(), expected
    )  # the grid was used: exact ranks would be equal


def test_a_grid_of_a_known_width_does_not_look_at_the_scores():
    """As on a device that is not to be waited for; a row that is wider after all is NaN."""
    scores = cosines(4, 200, dtype=torch.float32)
    scores[2, 5], scores[3, 7] = 9.0, torch.nan
    length = grid_length(scores, 0.1, 3, widest=2.04)
    assert length == 65
    grid = Grid(4, scores, tau=0.1, cells=3, length=length, bounded=True)
    rank = grid.rank(scores, None, torch.empty_like(scores)).clone()
    expected = exact_rank(scores.double(), 0.1)
    assert ((rank - expected).abs() / expected)[:2].max() < allowed(scores[:2], 0.1, 4e-5)
    assert rank[2:].isnan().all()
    assert grid.gradient(torch.ones_like(scores), None, rank)[:2].isfinite().all()


def test_compiled_passes_are_those_of_torch():
    scores = cosines(40, 300, dtype=torch.float32)
    weight = cosines(40, 300, seed=1, dtype=torch.float32)
    for mask in (None, torch.rand(40, 300, generator=torch.manual_seed(2)) < 0.7):
        results = []
        for method in ("binned", "fast"):
            own = scores.clone().requires_grad_()
            rank = smooth_rank(own, tau=0.01, method=method, mask_QN=mask)
            rank.masked_fill(rank == torch.inf, 0).mul(weight).sum().backward()
            results.append((rank.detach(), own.grad))
        (rank, gradient), (fast_rank, fast_gradient) = results
        torch.testing.assert_close(fast_rank, rank, rtol=3e-6, atol=0)
        assert (fast_gradient - gradient).abs().max() < 1e-4 * gradient.abs().max()


def test_a_smaller_error_is_bought_with_a_finer_grid():
    scores = cosines(2, 200)
    expected = exact_rank(scores, 0.01)
    worst = [
        ((smooth_rank(scores, tau=0.01, method="binned", error=e) - expected) / expected)
        .abs()
        .max()
        for e in (4e-5, 4e-7, 4e-9)
    ]
    assert worst[0] < 4e-5 and worst[1] < 4e-7 and worst[2] < 4e-9 + 200 * math.exp(-REACH)
    assert worst[0] > worst[1] > worst[2]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 300),
    tau=st.sampled_from([1e-3, 0.03, 1.0]),
    spread=st.floats(0, 3),
    offset=st.floats(-50, 50),
    seed=st.integers(0, 99),
)
def test_binned_holds_for_any_list(n, tau, spread, offset, seed):
    scores = cosines(2, n, seed) * spread + offset
    mask = torch.rand(2, n, generator=torch.manual_seed(seed)) < 0.8
    found = smooth_rank(scores, tau=tau, method="binned", mask_QN=mask)
    expected = exact_rank(scores, tau, mask)
    assert (found[~mask] == torch.inf).all()
    assert (
        ((found - expected).abs() / expected)[mask]
        .lt(allowed(scores, tau, 4e-5) + 1e-9 / tau)
        .all()
    )


def test_chunks_and_rows_do_not_show(monkeypatch):
    scores = cosines(7, 23)
    weight = cosines(7, 23, seed=1)
    mask = torch.rand(7, 23, generator=torch.manual_seed(2)) < 0.7
    results = []
    for cache in (1, 40, 23 * 23 * 3, 2**20):
        monkeypatch.setitem(CACHE, "cpu", cache)
        for method in ("chunked", "binned"):
            own = scores.clone().requires_grad_()
            rank = smooth_rank(own, tau=0.1, method=method, mask_QN=mask, error=1e-6)
            rank.masked_fill(~mask, 0).mul(weight).sum().backward()
            results.append((rank, own.grad))
    for rank, gradient in results[1:]:
        torch.testing.assert_close(rank, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dense", "chunked"])
def test_gradcheck_of_the_exact_methods(method):
    mask = torch.tensor([[True, True, False, True, True]] * 2)
    assert torch.autograd.gradcheck(
        lambda s: smooth_rank(s, tau=0.2, method=method, mask_QN=mask).masked_fill(~mask, 0),
        cosines(2, 5).requires_grad_(),
    )


def test_small_tau_is_the_average_rank():
    scores = torch.tensor([[0.5, 0.1, 0.5, 0.9]])
    for method in ("dense", "chunked"):
        found = smooth_rank(scores, tau=1e-6, method=method)
        torch.testing.assert_close(found, torch.tensor([[2.5, 4.0, 2.5, 1.0]]))


def test_equal_scores_share_the_middle_rank_whatever_the_method():
    for method in ("auto", "dense", "chunked", "binned"):
        found = smooth_rank(torch.full((2, 201), 0.3), tau=0.01, method=method)
        torch.testing.assert_close(found, torch.full((2, 201), 101.0))


def test_auto_takes_the_grid_for_long_lists_and_pairs_otherwise():
    def kind(scores, tau=0.01, method="auto"):
        return type(stepper(scores, tau=tau, method=method)[0]).__name__

    long = cosines(2, 512, dtype=torch.float32)
    grids = ("Grid", "FastGrid")
    assert kind(long) in grids and kind(long, tau=1e-3) in grids
    assert kind(long, method="binned") == "Grid"
    assert kind(cosines(2, 64, dtype=torch.float32)) == "Exact"
    assert kind(long.double()) == "Exact" and kind(long.double(), method="binned") == "Grid"
    assert kind(long * 1e5, tau=1e-3) == kind(long * 1e5, tau=1e-3, method="binned") == "Exact"
    assert kind(long * torch.inf) == kind(long * torch.nan) == "Exact"


def test_a_list_too_wide_for_the_grid_is_still_right():
    scores = cosines(2, 300, dtype=torch.float32) * 1e6
    torch.testing.assert_close(
        smooth_rank(scores, tau=1e-3), 1.0 + (scores[:, None, :] > scores[:, :, None]).sum(-1)
    )


def test_exact_in_pieces_needs_no_cube():
    n = 2000
    step, rows = stepper(cosines(1, n), tau=0.01, method="chunked")
    assert isinstance(step, Exact) and rows == 1 and step.chunk * n <= 2**17


@pytest.mark.parametrize("method", ["dense", "chunked", "binned"])
def test_nan_stays_in_its_row(method):
    scores = cosines(3, 200, dtype=torch.float32)
    scores[1, 7] = torch.nan
    rank = smooth_rank(scores, tau=0.1, method=method)
    assert rank[1].isnan().all() and rank[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("method", ["auto", "dense", "chunked", "binned"])
def test_empty_lists_and_lists_of_one(shape, method):
    scores = torch.zeros(shape, requires_grad=True)
    rank = smooth_rank(scores, tau=0.1, method=method)
    rank.sum().backward()
    assert rank.shape == shape and (rank == 1).all() and (scores.grad == 0).all()


@pytest.mark.parametrize("tau", [1e-3, 1e-2, 1e-1])
def test_binned_loss_and_gradient_are_those_of_the_exact_one(tau):
    scores, relevance = (
        cosines(256, 256, dtype=torch.float32),
        cosines(256, 256, seed=1).clamp(min=0),
    )
    results = []
    for method, dtype in (("binned", torch.float32), ("chunked", torch.float64)):
        own = scores.to(dtype, copy=True).requires_grad_()
        loss = both_directions(smooth_ndcg, own, relevance, tau=tau, method=method)
        loss.backward()
        results.append((loss.item(), own.grad.double()))
    (binned, gradient), (exact, expected) = results
    assert abs(binned - exact) < 1e-5
    assert (gradient - expected).abs().max() < 2e-3 * expected.abs().max()
    assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 1 - 1e-6
