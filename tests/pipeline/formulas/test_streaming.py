"""Streamed losses and metrics are those of the whole matrix; the package imports light."""

import subprocess
import sys

import pytest
import torch

from pipeline.formulas import metrics
from pipeline.formulas.losses import GRADED, LOSSES, WeightedSum, both_directions
from pipeline.formulas.streaming import (
    both_directions_streamed,
    lists_streamed,
    metric_streamed,
)
from tests.helpers import live_bytes

torch.set_num_threads(1)


def make(images=11, texts=23, width=6):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(images, width, generator=generator, dtype=torch.float64, requires_grad=True)
    text = torch.randn(texts, width, generator=generator, dtype=torch.float64, requires_grad=True)
    relevance = torch.rand(images, texts, generator=generator, dtype=torch.float64)
    relevance[relevance > 0.8] = 1
    return image, text, relevance, torch.rand(images, texts, generator=generator) < 0.8


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [1, 4, None])
def test_streamed_loss_is_the_whole_one(name, rows):
    image, text, relevance, mask = make()
    target = relevance if name in GRADED else relevance == 1
    whole = both_directions(name, image @ text.T, target, mask_QN=mask)
    for given in (target, lambda rows, columns: target[rows, columns]):
        streamed = both_directions_streamed(name, image, text, given, mask=mask, rows=rows)
        torch.testing.assert_close(streamed, whole)
        expected = torch.autograd.grad(3 * whole, (image, text), retain_graph=True)
        found = torch.autograd.grad(3 * streamed, (image, text))
        torch.testing.assert_close(found, expected)


def test_low_precision_embeddings_are_multiplied_in_float32():
    image, text, relevance, _ = make()
    low = [x.detach().bfloat16().requires_grad_() for x in (image, text)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = both_directions_streamed("smooth_ndcg", *low, relevance, rows=4, tau=0.5)
    loss.backward()
    exact = both_directions("smooth_ndcg", low[0].double() @ low[1].double().T, relevance, tau=0.5)
    assert loss.dtype == torch.float32 and low[0].grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_what_cannot_be_streamed_is_refused():
    image, text, relevance, mask = make()
    for wrong in ({"average": "pairs"}, {"weight_QN": relevance}):
        with pytest.raises(ValueError, match="streamed"):
            both_directions_streamed("kendall_rank", image, text, relevance, **wrong)


@pytest.mark.parametrize(
    ("name", "setting"), [("info_nce", "temperature"), ("smooth_ndcg", "tau"), ("siglip", "bias")]
)
def test_learned_settings_get_their_gradient(name, setting):
    image, text, relevance, _ = make()
    target = relevance if name in GRADED else relevance == 1
    raw = torch.tensor(-1.5, dtype=torch.float64, requires_grad=True)
    learned = {setting: raw.exp()}  # no leaf: what it was made of gets the gradient
    whole = both_directions(name, image @ text.T, target, **learned)
    streamed = both_directions_streamed(name, image, text, target, rows=3, **learned)
    torch.testing.assert_close(streamed, whole)
    expected = torch.autograd.grad(whole, (image, text, raw), retain_graph=True)
    assert expected[2].abs() > 1e-3
    torch.testing.assert_close(torch.autograd.grad(streamed, (image, text, raw)), expected)


def test_a_weighted_sum_of_streamed_lists_has_its_terms_and_its_gradients():
    image, text, relevance, _ = make()
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss = WeightedSum(
        {"triplet": {"weight": 0.5}, "smooth_ndcg": {"tau": tau}, "siglip": {"weight": 0.0}}
    )

    def terms(scores, positive, relevance):
        return loss.terms(scores, positive, relevance, time=2)

    seen = []

    def given(some):
        seen.append((some.start, some.stop))
        return (relevance == 1)[some], relevance[some]

    whole = terms(image @ text.T, relevance == 1, relevance)
    total, means = lists_streamed(terms, image, text, given, rows=4, learned=loss.learned)
    assert seen == [(0, 4), (4, 8), (8, 11)] and loss.learned == [tau]
    torch.testing.assert_close(
        means, {name: value.mean().detach() for name, value in whole.items()}
    )
    expected = sum(value.mean() for value in whole.values())
    torch.testing.assert_close(total, expected)
    wanted = (image, text, tau)
    torch.testing.assert_close(
        torch.autograd.grad(total * 7, wanted), torch.autograd.grad(expected * 7, wanted)
    )


def test_what_streamed_lists_keep_is_gradients_alone():
    image, text, relevance, _ = make(images=64, texts=256)
    with live_bytes.saved() as kept:
        both_directions_streamed("smooth_ndcg", image, text, relevance, rows=4)
    assert sum(kept.values()) == 8 * 6 * (64 + 256)


def test_streamed_metrics_are_the_whole_ones():
    image, text, relevance, _ = make()
    image, text = image.detach(), text.detach()
    for metric, target, given in (
        (metrics.recall_at, relevance == 1, {"k": 3}),
        (metrics.ndcg, relevance, {"k": 5}),
        (metrics.kendall_tau, relevance, {}),
    ):
        whole = metric(image @ text.T, target, **given)
        for rows in (1, 4, None):
            torch.testing.assert_close(
                metric_streamed(metric, image, text, target, rows=rows, **given), whole
            )
    assert metric_streamed(metrics.ndcg, image[:0], text, relevance[:0]).shape == (0,)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_rows_and_columns_by_worker_make_the_whole(workers):
    """Each worker's own rows and columns of the global list add up to one worker's loss."""
    image, text, relevance, _ = make(images=12, texts=12)
    loss = WeightedSum({"triplet": {"weight": 0.5}, "smooth_ndcg": {}, "info_nce": {}})

    def mean(scores, relevance):
        return loss(scores, relevance == 1, relevance).sum() / 12

    whole = (mean(image @ text.T, relevance) + mean(text @ image.T, relevance.T)) / 2
    parts = torch.arange(12).chunk(workers)
    split = sum(
        (mean(image[own] @ text.T, relevance[own]) + mean(text[own] @ image.T, relevance.T[own]))
        / 2
        for own in parts
    )
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(
        torch.autograd.grad(split, (image, text)), torch.autograd.grad(whole, (image, text))
    )


def test_importing_the_formulas_brings_torch_alone():
    heavy = "ray mlflow pyarrow sentence_transformers transformers pandas numba sklearn scipy"
    code = (
        "import sys\n"
        "from pipeline.formulas import losses, metrics, relevance, streaming\n"
        f"print(sorted(set({heavy!r}.split()) & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
