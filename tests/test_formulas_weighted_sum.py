"""Both directions of a loss, weighted sums of losses and their schedules."""

import pytest
import torch

from pipeline.formulas.losses import LOSSES, WeightedSum, both_directions, scheduled


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


def test_weighted_sum_is_the_sum():
    scores, relevance, mask = make()
    positive = relevance == 1
    terms = [
        {"loss": "triplet", "weight": 0.2, "margin": 0.3},
        {"loss": "smooth_ndcg", "weight": 0.8, "tau": 0.1},
        {"loss": "siglip", "weight": 0.0},
    ]
    expected = 0.2 * LOSSES["triplet"](scores, positive, margin=0.3, mask_QN=mask)
    expected = expected + 0.8 * LOSSES["smooth_ndcg"](scores, relevance, tau=0.1, mask_QN=mask)
    torch.testing.assert_close(
        WeightedSum(terms)(scores, positive, relevance, mask_QN=mask), expected
    )


def test_weighted_sum_follows_its_schedules():
    scores, relevance, _ = make()
    positive = relevance == 1
    ramp = {"from": 0.0, "to": 1.0, "steps": 10}
    loss = WeightedSum(
        [{"loss": "triplet", "mining": ramp}, {"loss": "smooth_ndcg", "weight": ramp}]
    )
    start = LOSSES["triplet"](scores, positive, negatives="all")
    end = LOSSES["triplet"](scores, positive) + LOSSES["smooth_ndcg"](scores, relevance)
    torch.testing.assert_close(loss(scores, positive, relevance, step=0), start)
    torch.testing.assert_close(loss(scores, positive, relevance, step=50), end)


def test_schedule_shapes():
    def at(step, **more):
        return scheduled({"from": 1.0, "to": 3.0, "steps": 4, **more}, step)

    assert [at(s) for s in (0, 1, 4, 9)] == [1.0, 1.5, 3.0, 3.0]
    assert [at(s, shape="jump") for s in (0, 3, 4)] == [1.0, 1.0, 3.0]
    assert at(2, shape="cosine") == pytest.approx(2.0) and at(1, shape="cosine") < 1.5
    assert [at(s, start=10) for s in (0, 12, 14)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("terms", "word"),
    [
        ([], "at least one"),
        ([{"loss": "triplets"}], "triplets"),
        ([{"loss": "triplet", "marign": 0.1}], "marign"),
        ([{"loss": "triplet", "weight": {"from": 0.0}}], "schedule"),
        ([{"loss": "triplet", "weight": {"from": 0, "to": 1, "steps": 2, "shape": "z"}}], "shape"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(terms, word):
    with pytest.raises(ValueError, match=word):
        WeightedSum(terms)
