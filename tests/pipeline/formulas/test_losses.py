"""Every loss against its slow twin, and at the edges where losses go wrong."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.formulas.kernels.rows import CACHE
from pipeline.formulas.losses import GRADED, LOSSES, both_directions
from pipeline.formulas.losses.kendall import pair_count
from tests import reference

torch.set_num_threads(1)

# (name, settings of the loss, the slow twin where it is not the one of that name)
CASES = [
    ("smooth_ndcg", {"tau": 0.1}, None),
    ("smooth_ndcg", {"tau": 0.1, "method": "dense"}, None),
    ("kendall_rank", {"gap": 0.0, "margin": 0.2}, None),
    ("kendall_rank", {"window": 2}, reference.kendall_window),
    ("kendall_rank", {"window": 1, "hardest": 3, "gap": 0.1}, reference.kendall_window),
    ("kendall_smooth", {"tau": 0.3}, None),
    ("soft_label_kl", {"temperature": 0.5}, None),
    ("adaptive_info_nce", {"margin": 0.3}, None),
    ("triplet", {"negatives": "soft"}, None),
    ("triplet", {"negatives": "all"}, None),
    ("triplet", {"mining": 0.3, "margin": 0.5}, None),
    ("info_nce", {"positives": "each"}, None),
]
TESTED_WITH_SETTINGS = {"smooth_ndcg", "kendall_smooth"}  # by themselves nearly steps
CASES += [(name, {}, None) for name in LOSSES if name not in TESTED_WITH_SETTINGS]
IDS = [f"{name}-{'-'.join(map(str, given.values()))}" for name, given, _ in CASES]
every_case = pytest.mark.parametrize(("name", "given", "twin"), CASES, ids=IDS)
every_loss = pytest.mark.parametrize("name", LOSSES)


def target_of(name, relevance):
    return relevance if name in GRADED else relevance == 1


def make(queries=6, n=9, seed=0, ties=False, dtype=torch.float64):
    """Scores, relevance with some ones, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, n, generator=generator, dtype=dtype) / 3
    relevance = torch.rand(queries, n, generator=generator, dtype=dtype)
    relevance[torch.rand(queries, n, generator=generator) < 0.3] = 1
    mask = torch.rand(queries, n, generator=generator) < 0.7
    if ties:
        scores, relevance = (scores * 3).round() / 3, (relevance * 3).round() / 3
    return scores, relevance, mask


def slow(name, given, twin, scores, target, mask):
    values = []
    for s, t, m in zip(scores.tolist(), target.tolist(), mask.tolist(), strict=True):
        s, t = list(itertools.compress(s, m)), list(itertools.compress(t, m))
        options = {k: v for k, v in given.items() if k != "method"}
        values.append((twin or getattr(reference, name))(s, t, **options) if s else 0.0)
    return torch.tensor(values, dtype=torch.float64)


def test_every_loss_has_a_twin_of_its_name():
    assert [name for name in LOSSES if not hasattr(reference, name)] == []


@every_case
@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_value_is_the_slow_twins(name, given, twin, ties):
    scores, relevance, mask = make(ties=ties)
    target = target_of(name, relevance)
    everything = torch.ones_like(mask)
    expected = slow(name, given, twin, scores, target, everything)
    torch.testing.assert_close(
        LOSSES[name](scores, target, **given), expected, rtol=1e-9, atol=1e-9
    )
    expected = slow(name, given, twin, scores, target, mask)
    found = LOSSES[name](scores, target, mask_QN=mask, **given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@every_case
def test_gradient_is_that_of_the_value(name, given, twin):
    scores, relevance, mask = make(queries=3, n=7)
    target = target_of(name, relevance)
    for some in (None, mask[:3]):
        assert torch.autograd.gradcheck(
            lambda s, some=some: LOSSES[name](s, target, mask_QN=some, **given),
            scores.clone().requires_grad_(),
        )


@every_case
def test_order_of_candidates_does_not_matter(name, given, twin):
    scores, relevance, mask = make(n=12, ties=twin is None)
    if twin is not None:  # among equal relevance a window's order is the list's
        relevance = torch.rand(relevance.shape, generator=torch.manual_seed(2), dtype=torch.float64)
    target, order = target_of(name, relevance), torch.randperm(12, generator=torch.manual_seed(1))
    loss = LOSSES[name]
    for some in (None, mask):
        turned = loss(
            scores[:, order],
            target[:, order],
            mask_QN=None if some is None else some[:, order],
            **given,
        )
        torch.testing.assert_close(loss(scores, target, mask_QN=some, **given), turned)


@every_case
def test_queries_do_not_see_each_other(name, given, twin):
    """Rows by worker: what the others hold changes neither value nor gradient."""
    scores, relevance, mask = make(queries=8)
    target = target_of(name, relevance)
    whole = scores.clone().requires_grad_()
    LOSSES[name](whole, target, mask_QN=mask, **given).mean().backward()
    for workers in (2, 4):
        total, gradients = 0, []
        for part in torch.arange(8).chunk(workers):
            own = scores[part].clone().requires_grad_()
            loss = LOSSES[name](own, target[part], mask_QN=mask[part], **given).sum() / 8
            loss.backward()
            total, gradients = total + loss.detach(), [*gradients, own.grad]
        torch.testing.assert_close(
            total, LOSSES[name](scores, target, mask_QN=mask, **given).mean()
        )
        torch.testing.assert_close(torch.cat(gradients), whole.grad)


@every_case
def test_what_is_masked_out_is_not_seen(name, given, twin):
    scores, relevance, mask = make()
    target = target_of(name, relevance)
    clean = scores.clone().requires_grad_()
    loss = LOSSES[name](clean, target, mask_QN=mask, **given)
    loss.sum().backward()
    dirty = scores.masked_fill(~mask, torch.nan).requires_grad_()
    if name in GRADED:
        target = target.masked_fill(~mask, torch.nan)
    same = LOSSES[name](dirty, target, mask_QN=mask, **given)
    same.sum().backward()
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(dirty.grad, clean.grad)
    assert (dirty.grad[~mask] == 0).all()


@every_case
def test_nan_comes_out_as_nan_and_only_where_it_went_in(name, given, twin):
    scores, relevance, _ = make()
    target = target_of(name, relevance)
    scores[1, 3] = torch.nan
    if name in GRADED:
        target[4, 0] = torch.nan
    scores.requires_grad_()
    loss = LOSSES[name](scores, target, **given)
    loss.sum().backward()
    bad = [1, 4] if name in GRADED else [1]
    assert loss.isnan().nonzero().flatten().tolist() == bad
    assert scores.grad[bad].isnan().any(-1).all()
    assert not scores.grad[[0, 2, 3, 5]].isnan().any()


@every_case
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (2, 1), (1, 7), (3, 2)], ids=str)
def test_small_and_empty_lists(name, given, twin, shape):
    relevance = torch.linspace(1, 0, shape[1], dtype=torch.float64).expand(shape).clone()
    scores = (
        torch.linspace(0, 1, shape[1], dtype=torch.float64).expand(shape).clone().requires_grad_()
    )
    target = target_of(name, relevance)
    loss = LOSSES[name](scores, target, **given)
    assert loss.shape == shape[:1]
    loss.sum().backward()
    assert scores.grad.shape == shape and not scores.grad.isnan().any()
    expected = slow(name, given, twin, scores.detach(), target, torch.ones(shape, dtype=torch.bool))
    torch.testing.assert_close(loss.detach(), expected)


@every_case
def test_nothing_to_learn_gives_zero_without_gradient(name, given, twin):
    """An empty list; and, for losses about order, no pair, no positive, no gain."""
    scores = make()[0].requires_grad_()
    nothing = target_of(name, torch.zeros_like(scores))
    nobody = torch.zeros(scores.shape, dtype=torch.bool)
    loss = LOSSES[name](scores, nothing, mask_QN=nobody, **given)
    if name not in ("list_net", "list_mle", "soft_label_kl", "siglip"):
        loss = loss + LOSSES[name](scores, nothing, **given)
    loss.sum().backward()
    assert (loss == 0).all() and (scores.grad == 0).all()


@every_case
def test_extreme_scores_stay_finite(name, given, twin):
    for scale in (1e4, 1e-30, 0.0):
        scores, relevance, _ = make(dtype=torch.float32)
        scores = (scores * scale).requires_grad_()
        loss = LOSSES[name](scores, target_of(name, relevance), **given)
        loss.sum().backward()
        assert loss.isfinite().all() and scores.grad.isfinite().all()


@every_case
def test_bfloat16_scores_are_worked_on_in_float32(name, given, twin):
    scores, relevance, _ = make()
    low = scores.bfloat16().requires_grad_()
    target = target_of(name, relevance.float())
    loss = LOSSES[name](low, target, **given)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    exact = LOSSES[name](low.detach().double(), target, **given)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)


@every_loss
def test_columns_are_the_rows_of_the_transposed(name):
    scores, relevance, mask = make()
    target = target_of(name, relevance)
    rows = LOSSES[name](scores, target, mask_QN=mask).mean()
    columns = LOSSES[name](
        scores.T.contiguous(), target.T.contiguous(), mask_QN=mask.T.contiguous()
    ).mean()
    both = both_directions(name, scores, target, mask_QN=mask)
    torch.testing.assert_close(both, (rows + columns) / 2)


@every_loss
def test_both_directions_by_blocks_is_the_sum_of_the_two(name, monkeypatch):
    scores, relevance, mask = make(queries=12, n=7)
    target = target_of(name, relevance)
    plain, blocked = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    rows = LOSSES[name](plain, target, mask_QN=mask).mean()
    whole = (rows + LOSSES[name](plain.T, target.T, mask_QN=mask.T).mean()) / 2
    monkeypatch.setitem(CACHE, "cpu", 2)  # so that blocks are of two rows
    both = both_directions(name, blocked, target, mask_QN=mask)
    torch.testing.assert_close(both, whole)
    whole.backward()
    both.backward()
    torch.testing.assert_close(blocked.grad, plain.grad)


@every_loss
def test_gradients_of_transposed_scores_lie_right(name):
    scores, relevance, _ = make()
    target = target_of(name, relevance)
    one, other = scores.clone().requires_grad_(), scores.T.clone().requires_grad_()
    LOSSES[name](one.T, target.T).sum().backward()
    LOSSES[name](other, target.T.contiguous()).sum().backward()
    torch.testing.assert_close(one.grad, other.grad.T)


@every_loss
def test_wrong_shapes_are_refused(name):
    scores, relevance, mask = make()
    target = target_of(name, relevance)
    with pytest.raises(ValueError, match="candidates"):
        LOSSES[name](scores, target[:, 1:])
    with pytest.raises(ValueError, match="candidates"):
        LOSSES[name](scores, target, mask_QN=mask[1:])
    with pytest.raises(ValueError, match="boolean"):
        LOSSES[name](scores, target, mask_QN=mask.long())
    if name not in GRADED:
        with pytest.raises(ValueError, match="boolean"):
            LOSSES[name](scores, relevance)


def test_bad_settings_are_refused():
    scores, relevance, _ = make()
    for name, wrong in [
        ("smooth_ndcg", {"tau": 0.0}),
        ("smooth_ndcg", {"method": "magic"}),
        ("kendall_smooth", {"tau": -1.0}),
        ("kendall_rank", {"hardest": 3}),
        ("smooth_ndcg", {"error": 0.0}),
        ("kendall_rank", {"window": 0}),
        ("kendall_rank", {"window": 2, "hardest": 1.5}),
        ("kendall_rank", {"average": "pairs", "window": 2}),
        ("triplet", {"negatives": "easiest"}),
        ("info_nce", {"positives": "none"}),
    ]:
        with pytest.raises(ValueError):
            LOSSES[name](scores, target_of(name, relevance), **wrong)


def test_soft_triplet_and_smooth_losses_reach_their_limits():
    scores, relevance, _ = make()
    positive = relevance == 1
    soft = LOSSES["triplet"](scores, positive, negatives="soft", tau=1e-5)
    torch.testing.assert_close(soft, LOSSES["triplet"](scores, positive), rtol=0, atol=1e-4)
    for first, last in ((0.0, "all"), (1.0, "hardest")):
        mixed = LOSSES["triplet"](scores, positive, mining=first)
        torch.testing.assert_close(mixed, LOSSES["triplet"](scores, positive, negatives=last))


def test_list_mle_of_untied_relevance_is_the_likelihood_of_the_order():
    scores = torch.tensor([[0.3, 0.1, 0.2]], dtype=torch.float64)
    first, second = (
        scores[0, [2, 1, 0]] / 0.1,
        scores[0, [2, 1]] / 0.1,
    )  # order by relevance: 0, 2, 1
    expected = first.logsumexp(0) - 3 + second.logsumexp(0) - 2
    found = LOSSES["list_mle"](scores, torch.tensor([[0.9, 0.1, 0.5]]), temperature=0.1)
    torch.testing.assert_close(found[0], expected)


def test_learned_temperature_gets_a_gradient():
    scores, relevance, _ = make()
    for name in ("info_nce", "masked_info_nce", "soft_label_kl", "list_net", "list_mle"):
        temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
        target = target_of(name, relevance)
        assert torch.autograd.gradcheck(
            lambda t, name=name, target=target: LOSSES[name](scores, target, temperature=t),
            temperature,
        )


@pytest.mark.parametrize("window", [1, 8, 9, 30])
def test_a_window_may_be_as_long_as_the_list_or_longer(window):
    scores, relevance, mask = make()
    given = {"window": window, "margin": 1.0}
    found = LOSSES["kendall_rank"](scores, relevance, mask_QN=mask, **given)
    expected = slow("", given, reference.kendall_window, scores, relevance, mask)
    torch.testing.assert_close(found, expected)


def test_average_over_pairs_weighs_queries_by_their_pairs():
    scores, relevance, mask = make()
    per_query = LOSSES["kendall_rank"](scores, relevance, mask_QN=mask)
    pairs = pair_count(relevance, mask_QN=mask)
    expected = (per_query * pairs).sum() / pairs.sum()
    found = LOSSES["kendall_rank"](scores, relevance, mask_QN=mask, average="pairs").mean()
    torch.testing.assert_close(found, expected)


def test_repeated_backward_gives_the_same():
    scores, relevance, _ = make()
    scores.requires_grad_()
    loss = both_directions("smooth_ndcg", scores, relevance)
    (first,) = torch.autograd.grad(loss, scores, retain_graph=True)
    (second,) = torch.autograd.grad(loss, scores)
    assert torch.equal(first, second)


def test_a_bank_of_candidates_longer_than_the_batch():
    scores, relevance, _ = make(queries=3, n=700, dtype=torch.float32)
    for name, loss in LOSSES.items():
        target = target_of(name, relevance)
        exact = loss(scores.double(), target.double() if name in GRADED else target)
        torch.testing.assert_close(loss(scores, target).double(), exact, rtol=1e-4, atol=1e-4)


lists = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([-0.5, 0.0, 0.1, 0.2, 0.7]), min_size=n, max_size=n),
        st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)


@settings(max_examples=60, deadline=None)
@given(lists)
def test_any_list_has_its_twins_value(rows):
    scores, relevance = (torch.tensor([row], dtype=torch.float64) for row in rows[:2])
    mask = torch.tensor([rows[2]])
    for name, given_, twin in CASES:
        if twin is not None and len(set(rows[1])) < len(rows[1]):
            continue  # among equal relevance a window's order is the list's
        target = target_of(name, relevance)
        found = LOSSES[name](scores, target, mask_QN=mask, **given_)
        torch.testing.assert_close(
            found, slow(name, given_, twin, scores, target, mask), rtol=1e-8, atol=1e-8
        )


@settings(max_examples=40, deadline=None)
@given(lists, st.floats(-3, 3))
def test_losses_of_order_do_not_change_when_all_scores_move(rows, shift):
    scores, relevance = (torch.tensor([row], dtype=torch.float64) for row in rows[:2])
    for name in (
        "smooth_ndcg",
        "kendall_rank",
        "kendall_smooth",
        "list_net",
        "triplet",
        "info_nce",
    ):
        target = target_of(name, relevance)
        moved = LOSSES[name](scores + shift, target)
        torch.testing.assert_close(LOSSES[name](scores, target), moved, rtol=1e-7, atol=1e-7)
