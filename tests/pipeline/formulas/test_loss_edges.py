"""Gradients of settings, second derivatives, half precision, and scores that are not finite."""

import inspect

import pytest
import torch

from pipeline.formulas.kernels.rows import CACHE
from pipeline.formulas.kernels.smooth_rank import smooth_rank
from pipeline.formulas.losses import GRADED, LOSSES, both_directions
from pipeline.formulas.streaming import both_directions_streamed

torch.set_num_threads(1)
SECOND = "cannot be differentiated again"
# Losses in plain torch, whose second derivatives are right.
PLAIN = ["info_nce", "siglip", "list_net", "list_mle", "soft_label_kl"]
PLAIN += ["masked_info_nce", "adaptive_info_nce"]
# Settings that may be learned: (loss, setting, its value, other settings).
LEARNED = [
    ("smooth_ndcg", "tau", 0.3, {}),
    ("kendall_smooth", "tau", 0.3, {}),
    ("triplet", "tau", 0.3, {"negatives": "soft", "margin": 0.4}),
    ("triplet", "tau", 0.3, {"negatives": "soft", "mining": 0.4}),
    ("siglip", "scale", 10.0, {}),
    ("siglip", "bias", -3.0, {}),
    *[(name, "temperature", 0.3, {}) for name in PLAIN if name != "siglip"],
    *[(name, "target_temperature", 0.3, {}) for name in ("list_net", "soft_label_kl")],
]
OTHERS = [
    ("kendall_rank", "margin", 0.2, {}),
    ("kendall_rank", "gap", 0.2, {}),
    ("kendall_rank", "margin", 0.2, {"window": 2}),
    ("triplet", "margin", 0.2, {}),
    ("triplet", "mining", 0.5, {}),
    ("triplet", "tau", 0.5, {}),
    ("smooth_ndcg", "error", 1e-4, {}),
    ("smooth_ndcg", "score_range", 2.0, {}),
    ("masked_info_nce", "ignore_above", 0.5, {}),
    ("masked_info_nce", "positive_at", 1.0, {}),
    ("adaptive_info_nce", "margin", 0.2, {}),
    ("adaptive_info_nce", "positive_at", 1.0, {}),
]


def make(queries=5, n=8, dtype=torch.float64):
    """Scores and relevance with some ones."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(queries, n, generator=generator, dtype=dtype) / 3
    relevance = torch.rand(queries, n, generator=generator, dtype=dtype)
    relevance[torch.rand(queries, n, generator=generator) < 0.3] = 1
    return scores, relevance


def target_of(name, relevance):
    return relevance if name in GRADED else relevance == 1


@pytest.mark.parametrize(("name", "setting", "value", "more"), LEARNED)
def test_what_may_be_learned_gets_its_gradient(name, setting, value, more):
    scores, relevance = make()
    target = target_of(name, relevance)
    learned = torch.tensor(value, dtype=torch.float64, requires_grad=True)

    def loss(scores, learned):
        return LOSSES[name](scores, target, **{setting: learned}, **more)

    plain = LOSSES[name](scores, target, **{setting: value}, **more)
    torch.testing.assert_close(loss(scores, learned), plain)
    assert torch.autograd.gradcheck(loss, (scores.clone().requires_grad_(), learned))
    both_directions(name, scores, target, **{setting: learned}, **more).backward()
    assert learned.grad != 0


@pytest.mark.parametrize(("name", "setting", "value", "more"), OTHERS)
def test_what_gets_no_gradient_is_refused_and_no_other(name, setting, value, more):
    scores, relevance = make()
    target, learned = target_of(name, relevance), torch.tensor(value, requires_grad=True)
    for loss in (LOSSES[name], lambda *given, **how: both_directions(name, *given, **how)):
        for given in (scores, scores.clone().requires_grad_()):
            with pytest.raises(ValueError, match=f"gives {setting} no gradient.*{setting}.detach"):
                loss(given, target, **{setting: learned}, **more)
            loss(given, target, **{setting: learned.detach()}, **more)
            with torch.no_grad():  # nothing is learned here
                loss(given, target, **{setting: learned}, **more)


def test_every_setting_is_among_those_tried():
    """A new setting of a loss is either learned or refused; words and whole numbers are neither."""
    tried = {(name, setting) for name, setting, *_ in [*LEARNED, *OTHERS]}
    neither = {"mask_QN", "method", "negatives", "positives", "window", "hardest", "average"}
    for name, loss in LOSSES.items():
        settings = list(inspect.signature(loss.function).parameters)[2:]
        assert {(name, s) for s in settings if s not in neither} <= tried, name


def test_a_temperature_must_be_above_zero():
    scores, relevance = make()
    for name, setting, _, more in LEARNED:
        if setting in ("scale", "bias"):
            continue
        target = target_of(name, relevance)
        with pytest.raises(ValueError, match="above 0"):
            LOSSES[name](scores, target, **{setting: 0.0}, **more)
        learned = torch.tensor(-0.1, requires_grad=True)  # seen without waiting for a device
        assert LOSSES[name](scores, target, **{setting: learned}, **more).isnan().any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_right_or_refused(name):
    scores, relevance = make(3, 5)
    scores.requires_grad_()
    target = target_of(name, relevance)
    if name in PLAIN:
        assert torch.autograd.gradgradcheck(lambda s: LOSSES[name](s, target), scores)
    losses = [both_directions(name, scores, target)]
    losses += [] if name in PLAIN else [LOSSES[name](scores, target).sum()]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
        again = torch.autograd.grad(both_directions(name, scores, target), scores)[0]
        if loss is losses[0]:
            torch.testing.assert_close(gradient.detach(), again)
        with pytest.raises(RuntimeError, match=SECOND):
            (loss + gradient.square().sum()).backward()


def test_a_second_derivative_of_ranks_and_of_streamed_losses_is_refused():
    scores, relevance = make(3, 5)
    scores.requires_grad_()
    images, texts = torch.randn(2, 4, 3, requires_grad=True).unbind()
    for of in (
        smooth_rank(scores, tau=0.1).square().sum(),
        both_directions_streamed("info_nce", images, texts, torch.eye(4) > 0),
    ):
        given = scores if of.dtype == torch.float64 else images
        (gradient,) = torch.autograd.grad(of, given, create_graph=True)
        with pytest.raises(RuntimeError, match=SECOND):
            gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("name", "size", "worst"),
    [("info_nce", 2048, 1e-3), ("smooth_ndcg", 1024, 2e-3), ("soft_label_kl", 1024, 1e-3)],
)
def test_half_precision_loses_no_gradient_below_its_range(name, size, worst):
    """Entries of a long list's gradient times the loss scale are in float16's range, by itself not.

    The error is that of rounding the gradient once, as for the plain sum of both sides.
    """
    scale = 65_536.0
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, size, 64, generator=generator)
    scores = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
    positive = torch.eye(size, dtype=torch.bool)
    relevance = torch.rand(size, size, generator=generator).masked_fill(positive, 1)
    target = relevance if name in GRADED else positive

    def gradient(scores, loss) -> torch.Tensor:
        scores = scores.clone().requires_grad_()
        (loss(scores) * scale).backward()
        return scores.grad.double() / scale

    def both(scores):
        return both_directions(name, scores, target)

    def plain(scores):
        of_rows = LOSSES[name](scores, target).mean()
        return (of_rows + LOSSES[name](scores.T, target.T).mean()) / 2

    half = scores.half()
    exact = gradient(half.float() if name == "smooth_ndcg" else half.double(), plain)
    found, of_plain = (gradient(half, loss) for loss in (both, plain))
    errors = [((one - exact).norm() / exact.norm()).item() for one in (found, of_plain)]
    assert errors[0] < worst and errors[0] < 2 * errors[1] + 1e-5
    assert (found == 0).float().mean() < (exact.abs() < 1e-12).float().mean() + 0.01


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_a_score_of_minus_infinity_is_outside_the_list(name, masked, monkeypatch):
    scores, relevance = make()
    target = target_of(name, relevance)
    mask = torch.ones_like(target, dtype=torch.bool)
    if masked:
        mask[:, -1] = False
    unscored = torch.zeros_like(mask)
    unscored[0, 2] = unscored[1, :5] = unscored[3] = True  # of the fourth query all
    for width in (8, 300):  # smooth ranks of long lists go over a grid
        monkeypatch.setitem(CACHE, "cpu", 2**17 if width == 8 else 2**9)
        wide = [x.repeat(1, -(-width // 8))[:, :width] for x in (scores, target, mask, unscored)]
        s, t, m, u = wide
        if width == 300:
            s = s.float()
        clean, filled = s.clone().requires_grad_(), s.masked_fill(u, -torch.inf).requires_grad_()
        expected = LOSSES[name](clean, t, mask_QN=m & ~u)
        found = LOSSES[name](filled, t, mask_QN=m if masked else None)
        torch.testing.assert_close(found, expected)
        assert found[3] == 0 and found.isfinite().all()
        expected.sum().backward()
        found.sum().backward()
        torch.testing.assert_close(filled.grad, clean.grad)
        both = both_directions(name, s.masked_fill(u, -torch.inf).requires_grad_(), t)
        plain = both_directions(name, s, t, mask_QN=~u)
        torch.testing.assert_close(both, plain)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_other_numbers_that_are_not_finite_make_their_query_nan(name, value):
    scores, relevance = make()
    target = target_of(name, relevance)
    for place in (0, 3):
        bad = scores.clone()
        bad[2, place] = value
        bad[2, 5] = -torch.inf
        bad.requires_grad_()
        loss = LOSSES[name](bad, target)
        loss.sum().backward()
        assert loss.isnan().tolist() == [False, False, True, False, False]
        assert bad.grad[2].isnan().any() and bad.grad[[0, 1, 3, 4]].isfinite().all()
    if name in GRADED:
        for wrong in (value, -torch.inf):
            target = relevance.clone()
            target[1, 1] = wrong
            assert LOSSES[name](scores, target).isnan().tolist() == [False, True] + [False] * 3


def test_large_finite_scores_are_finite():
    """Their sum is not."""
    scores = torch.full((2, 40), 3e37)
    assert LOSSES["triplet"](scores, torch.eye(40)[:2] > 0).isfinite().all()
