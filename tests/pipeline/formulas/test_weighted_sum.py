"""Both directions of a loss, under autocast too; weighted sums of losses and their schedules."""

import pytest
import torch

from pipeline.formulas.losses import GRADED, LOSSES, WeightedSum, both_directions, scheduled


def make():
    """Scores, relevance with some ones, and a mask."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 9, generator=generator, dtype=torch.float64) / 3
    relevance = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    relevance[relevance > 0.7] = 1
    return scores, relevance, torch.rand(6, 9, generator=generator) < 0.7


def test_both_directions_of_a_learned_temperature_and_of_a_function_of_ones_own():
    scores, relevance, _ = make()
    positive = relevance == 1
    temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    scores.requires_grad_()
    both_directions("info_nce", scores, positive, temperature=temperature).backward()
    assert temperature.grad != 0 and scores.grad.isfinite().all()

    def worst(scores_QN, positive_QN):  # not a mean over queries: must see all of them at once
        return LOSSES["triplet"](scores_QN, positive_QN).max()

    expected = (worst(scores, positive) + worst(scores.T, positive.T)) / 2
    torch.testing.assert_close(both_directions(worst, scores, positive), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name):
    """Long lists: their losses go through matrix products, which autocast would do in bfloat16."""
    scores, relevance = torch.rand(2, 6, 300, generator=torch.manual_seed(0))
    relevance[relevance > 0.7] = 1
    target = relevance if name in GRADED else relevance == 1

    def found():
        own, both = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        loss = LOSSES[name](own, target)
        loss.sum().backward()
        both_directions(name, both, target).backward()
        return loss.detach(), own.grad, both.grad

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        same = found()
    assert all(torch.equal(a, b) for a, b in zip(same, expected, strict=True))


def test_weighted_sum_is_the_sum():
    scores, relevance, mask = make()
    positive = relevance == 1
    loss = WeightedSum(
        {
            "triplet": {"weight": 0.2, "margin": 0.3},
            "smooth_ndcg": {"weight": 0.8, "tau": 0.1},
            "siglip": {"weight": 0.0},
        }
    )
    expected = 0.2 * LOSSES["triplet"](scores, positive, margin=0.3, mask_QN=mask)
    expected = expected + 0.8 * LOSSES["smooth_ndcg"](scores, relevance, tau=0.1, mask_QN=mask)
    torch.testing.assert_close(loss(scores, positive, relevance, mask_QN=mask), expected)
    terms = loss.terms(scores, positive, relevance, mask_QN=mask)
    torch.testing.assert_close(sum(terms.values()), expected)
    assert list(terms) == ["triplet", "smooth_ndcg", "siglip"] and not terms["siglip"].any()


def test_weighted_sum_follows_its_schedules():
    scores, relevance, _ = make()
    positive = relevance == 1
    ramp = {"from": 0.0, "to": 1.0, "over": 10}
    cooling = {"from": 0.5, "to": 0.1, "over": 2, "start": 4}
    loss = WeightedSum(
        {"triplet": {"mining": ramp}, "smooth_ndcg": {"weight": ramp, "tau": cooling}}
    )
    for time, mining, tau in ((0, 0.0, 0.5), (2.5, 0.25, 0.5), (5, 0.5, 0.3), (50, 1.0, 0.1)):
        expected = LOSSES["triplet"](scores, positive, mining=mining)
        expected = expected + mining * LOSSES["smooth_ndcg"](scores, relevance, tau=tau)
        torch.testing.assert_close(loss(scores, positive, relevance, time=time), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_sum_whose_weights_are_all_0_yet_has_a_gradient_of_0(dtype):
    scores, relevance, _ = make()
    scores = scores.to(dtype).requires_grad_()
    loss = WeightedSum({"smooth_ndcg": {"weight": {"from": 0, "to": 1, "over": 3, "start": 1}}})
    value = loss(scores, relevance == 1, relevance, time=1)
    value.sum().backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == (6,) and not value.any() and not scores.grad.any()


def test_schedule_shapes():
    def at(time, **more):
        return scheduled({"from": 1.0, "to": 3.0, "over": 4, **more}, time)

    assert [at(t) for t in (0, 1, 4, 9)] == [1.0, 1.5, 3.0, 3.0]
    assert [at(t, shape="jump") for t in (0, 3.9, 4)] == [1.0, 1.0, 3.0]
    assert at(2, shape="cosine") == pytest.approx(2.0) and at(1, shape="cosine") < 1.5
    assert [at(t, start=10) for t in (0, 12, 14)] == [1.0, 2.0, 3.0]
    assert [at(t, over=0.5) for t in (0, 0.25, 0.5)] == [1.0, 2.0, 3.0]
    assert [at(t, over=0, start=2) for t in (1.9, 2, 3)] == [1.0, 3.0, 3.0]
    assert at(1e9) == 3.0 and scheduled({"from": 0.1, "to": 0.7, "over": 3}, 3) == 0.7


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ({}, "at least one"),
        ({"triplets": {}}, "triplets"),
        ({"triplet": {"marign": 0.1}}, "marign"),
        ({"triplet": {"mask_QN": 0.1}}, "mask_QN"),
        ({"triplet": {"weight": "five"}}, "must be a number"),
        ({"triplet": {"weight": {"from": 0.0}}}, "schedule"),
        ({"triplet": {"margin": {"from": 0, "to": 1, "steps": 2}}}, "schedule"),
        ({"triplet": {"margin": {"from": 0, "to": "1", "over": 2}}}, "all numbers"),
        ({"triplet": {"margin": {"from": 0, "to": 1, "over": -2}}}, "schedule"),
        ({"triplet": {"margin": {"from": 0, "to": 1, "over": 2, "star": 3}}}, "schedule"),
        ({"triplet": {"margin": {"from": 0, "to": float("nan"), "over": 2}}}, "schedule"),
        ({"triplet": {"weight": {"from": 0, "to": 1, "over": 2, "shape": "z"}}}, "shape"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(losses, word):
    with pytest.raises(ValueError, match=word):
        WeightedSum(losses)
