"""The losses give the numbers of the public reference code, and their corrected forms, to 1e-9.

The files hold inputs, values and gradients, in float64, of TripletSNDCGLoss
(github.com/AAA-Zheng/Listwise_ITR at 9c5d9fa) and RCLoss (github.com/AAA-Zheng/ITM_CLS at 53564e9).
Keys `corrected_*` have the texts' relevance transposed, as here; the others do not, which only this
file's `untransposed` imitates.
"""

import numpy as np
import pytest
import torch

from pipeline.formulas.losses import both_directions, kendall_rank, smooth_ndcg, triplet
from pipeline.formulas.losses.kendall import pair_count
from pipeline.formulas.metrics import ndcg
from pipeline.formulas.relevance import from_captions
from pipeline.formulas.streaming import both_directions_streamed
from tests.helpers.paths import GOLDEN

TOLERANCE = 1e-9
MAPS = {"half": lambda c: (1 + c) / 2, "clip": lambda c: c.clamp(0, 1)}


class Golden:
    """What the authors' code gave for one batch."""

    def __init__(self, name):
        with np.load(GOLDEN / f"loss_{name}.npz") as file:
            self.values = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
        self.image = self.values["image_emb"].requires_grad_()
        self.text = self.values["text_emb"].requires_grad_()
        self.scores = self.image @ self.text.T
        self.cosine = self.values["relevance_cos"]
        self.own = torch.eye(len(self.cosine), dtype=torch.bool)

    def check(self, name, loss, value="loss"):
        assert abs(loss.item() - self.values[f"{name}_{value}"].item()) < TOLERANCE
        for key, found in zip(
            ("image", "text"), torch.autograd.grad(loss, (self.image, self.text)), strict=True
        ):
            assert (found - self.values[f"{name}_grad_{key}"]).abs().max() < TOLERANCE, (name, key)


@pytest.fixture(params=["main_B32", "tiny_B4"])
def golden(request):
    return Golden(request.param)


def untransposed(loss, scores, relevance, **settings):
    """What the reference does: texts are given the rows of the images' relevance."""
    of_rows = loss(scores, relevance, **settings).mean()
    return of_rows, loss(scores.T, relevance, **settings).mean()


def test_relevance_is_that_of_the_file(golden):
    values = golden.values
    found = from_captions(
        values["image_caption_emb"],
        values["text_caption_emb"],
        map="half",
        same_image_MN=golden.own,
    )
    assert (found - (1 + golden.cosine) / 2).abs().max() < 1e-12


def test_triplet(golden):
    golden.check("triplet", both_directions(triplet, golden.scores, golden.own, margin=0.2))


@pytest.mark.parametrize("method", ["dense", "chunked", "auto"])
@pytest.mark.parametrize("tau", ["0.001", "0.01", "0.1", "1.0"])
def test_reference_s_ndcg(golden, tau, method):
    relevance = (1 + golden.cosine) / 2
    i2t, t2i = untransposed(smooth_ndcg, golden.scores, relevance, tau=float(tau), method=method)
    name = f"sndcg_tau{tau}"
    assert abs(1 - i2t.item() - golden.values[f"{name}_smooth_ndcg_i2t"].item()) < TOLERANCE
    assert abs(1 - t2i.item() - golden.values[f"{name}_smooth_ndcg_t2i"].item()) < TOLERANCE
    golden.check(name, (i2t + t2i) / 2, "listwise_loss")


def test_hard_ndcg(golden):
    relevance = (1 + golden.cosine) / 2
    with torch.no_grad():
        for side, scores in (("i2t", golden.scores), ("t2i", golden.scores.T)):
            found = ndcg(scores, relevance).mean().item()
            assert abs(found - golden.values[f"sndcg_tau0.01_hard_ndcg_{side}"].item()) < TOLERANCE


@pytest.mark.parametrize("weight", ["0.2", "0.5", "0.8"])
def test_reference_total(golden, weight):
    i2t, t2i = untransposed(smooth_ndcg, golden.scores, (1 + golden.cosine) / 2, tau=0.01)
    share = float(weight)
    pull = both_directions(triplet, golden.scores, golden.own)
    golden.check(f"total_w{weight}", (1 - share) * pull + share * (i2t + t2i) / 2)


@pytest.mark.parametrize("gap", ["0.1", "0.3"])
def test_reference_kendall(golden, gap):
    settings = {"gap": float(gap), "average": "pairs"}
    pairs = pair_count(golden.cosine, gap=float(gap)).sum().item()
    assert pairs == golden.values[f"kendall_gap{gap}_num_pairs"].item()
    i2t, t2i = untransposed(kendall_rank, golden.scores, golden.cosine, **settings)
    golden.check(f"kendall_gap{gap}", (i2t + t2i) / 2)


@pytest.mark.parametrize("gap", ["0.1", "0.3"])
def test_corrected_kendall(golden, gap):
    loss = both_directions(
        kendall_rank, golden.scores, golden.cosine, gap=float(gap), average="pairs"
    )
    golden.check(f"corrected_kendall_gap{gap}", loss)


@pytest.mark.parametrize("tau", ["0.01", "0.1"])
@pytest.mark.parametrize("map_name", ["half", "clip"])
def test_corrected_s_ndcg(golden, map_name, tau):
    relevance = MAPS[map_name](golden.cosine)
    name = f"corrected_sndcg_{map_name}_tau{tau}"
    whole = both_directions(smooth_ndcg, golden.scores, relevance, tau=float(tau))
    golden.check(name, whole, "listwise_loss")
    streamed = both_directions_streamed(
        smooth_ndcg, golden.image, golden.text, relevance, tau=float(tau), rows=3
    )
    golden.check(name, streamed, "listwise_loss")
