"""Numbers of losses that are learned: from where they start, between which ends, who may be."""

import math

import pytest
import torch

from pipeline.formulas.losses import LOSSES, Learned, WeightedSum, scale_and_bias

CLIP = {"logit_scale": math.log(50), "logit_bias": -3.0}


def values_of(learned: Learned) -> dict:
    values = learned.values(learned.parameters())
    return {key: float(value) for key, value in values.items()}


def test_it_starts_where_it_is_told_to_at_the_checkpoint_or_at_the_default():
    asked = {
        "info_nce": {"temperature": "learned"},
        "masked_info_nce": {"temperature": {"learned": 0.5}},
        "siglip": {"scale": "learned", "bias": "learned"},
        "triplet": {"tau": "learned", "negatives": "soft", "weight": 2},
    }
    alone = {
        ("info_nce", "temperature"): 0.05,
        ("masked_info_nce", "temperature"): 0.5,
        ("siglip", "scale"): 10,
        ("siglip", "bias"): -10,
        ("triplet", "tau"): 0.05,
    }
    tuned = alone | {
        ("info_nce", "temperature"): 0.02,
        ("siglip", "scale"): 50,
        ("siglip", "bias"): -3,
    }
    assert values_of(Learned(asked)) == pytest.approx(alone)
    assert values_of(Learned(asked, CLIP)) == pytest.approx(tuned)
    plain = Learned(asked, CLIP).losses
    assert plain["siglip"] == pytest.approx({"scale": 50, "bias": -3})
    assert plain["triplet"] == {"tau": pytest.approx(0.05), "negatives": "soft", "weight": 2}
    WeightedSum(plain)


def test_scales_stay_between_1_and_100_or_where_the_checkpoint_had_it():
    asked = {"info_nce": {"temperature": "learned"}, "siglip": {"bias": "learned"}}
    for came_with, most in (({}, 100), ({"logit_scale": math.log(118)}, 118)):
        learned = Learned(asked, came_with)
        parameters = learned.parameters()
        for given, scale in ((9.0, most), (-1.0, 1), (2.0, math.exp(2))):
            for parameter in parameters.values():
                parameter.data.fill_(given)
            learned.clamp_(parameters)
            values = {k: float(v) for k, v in learned.values(parameters).items()}
            wanted = {("info_nce", "temperature"): 1 / scale, ("siglip", "bias"): given}
            assert values == pytest.approx(wanted)


def test_a_follower_goes_with_the_temperature_and_pulls_it_nowhere():
    asked = {
        "siglip": {"scale": {"learned": 10}, "bias": -3},
        "smooth_ndcg": {"tau": {"follows": "siglip", "times": 0.5}},
    }
    learned = Learned(asked)
    parameters = learned.parameters()
    assert values_of(learned)["smooth_ndcg", "tau"] == pytest.approx(0.05)
    parameters["siglip_scale"].data.fill_(math.log(20))
    values = learned.values(parameters)
    assert float(values["smooth_ndcg", "tau"]) == pytest.approx(0.025)
    scores, relevance = torch.tensor([[0.1, 0.9, 0.3]]), torch.tensor([[1.0, 0.2, 0.0]])
    loss = WeightedSum(learned.losses).having(values)
    terms = loss.terms(scores, relevance > 0.5, relevance)
    expected = LOSSES["smooth_ndcg"](scores, relevance, tau=0.025)
    torch.testing.assert_close(terms["smooth_ndcg"], expected)
    assert not terms["smooth_ndcg"].requires_grad and terms["siglip"].requires_grad


@pytest.mark.parametrize("name", [n for n, x in LOSSES.items() if "info_nce" in n] + ["siglip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_float64(name, dtype):
    torch.manual_seed(0)
    scores = torch.rand(6, 9).to(dtype)
    relevance = torch.rand(6, 9)
    relevance[:, 0] = 1
    target = relevance if LOSSES[name].graded else relevance > 0.9
    setting = "scale" if name == "siglip" else "temperature"
    learned = Learned({name: {setting: "learned"}})

    def gradient(scores, target, dtype) -> float:
        parameter = torch.tensor(learned.starts[f"{name}_{setting}"], dtype=dtype)
        parameter.requires_grad_()
        own = learned.values({f"{name}_{setting}": parameter})
        loss = WeightedSum(learned.losses).having(own)
        terms = loss.terms(scores, target.bool(), target if LOSSES[name].graded else None)
        terms[name].mean().backward()
        return float(parameter.grad)

    wide = target.double() if LOSSES[name].graded else target
    exact = gradient(scores.double(), wide, torch.float64)
    assert gradient(scores, target, torch.float32) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"info_nce": {"positives": "learned"}}, "positives cannot be learned.temperature may be"),
        ({"list_net": {"target_temperature": "learned"}}, "target_temperature cannot be learned"),
        ({"kendall_rank": {"gap": {"learned": 1}}}, "nothing of it may be"),
        ({"info_nce": {"temperature": {"learned": 0}}}, "give {learned: NUMBER}"),
        ({"info_nce": {"temperature": {"learned": 1, "to": 2}}}, "give {learned: NUMBER}"),
        ({"smooth_ndcg": {"tau": {"follows": "info_nce"}}, "info_nce": {}}, "learns no temp"),
        ({"smooth_ndcg": {"tau": {"follows": "siglip", "times": 0}}}, "is no rule"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_a_sentence(asked, said):
    with pytest.raises(ValueError, match=said.replace("{", r"\{").replace(".temp", r" \(temp")):
        Learned(asked)


def test_what_was_learned_is_told_as_pretrained_models_have_it():
    asked = {"siglip": {"scale": "learned", "bias": "learned"}}
    assert scale_and_bias(Learned(asked, CLIP).parameters()) == pytest.approx(CLIP)
    assert scale_and_bias(Learned({"info_nce": {}}, CLIP).parameters()) == {}
