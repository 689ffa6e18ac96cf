"""A loss of one's own in a recipe: found by its place, held to what every loss is."""

import pytest
import torch

from pipeline.errors import InputError
from pipeline.formulas.losses import WeightedSum, both_directions, info_nce, loss_named
from pipeline.training import train
from pipeline.training.objective import check, needs_relevance
from schemas.settings import Recipe, TrainSettings

SOURCE = """
import torch

def squared(scores_QN, relevance_QN, *, mask_QN=None, scale=1.0):
    return scale * (scores_QN - relevance_QN).square().mean(-1)

def contrastive(scores_QN, positive_QN, *, mask_QN=None, temperature=0.05):
    return -(scores_QN / temperature).log_softmax(-1).masked_fill(~positive_QN, 0).sum(-1)

def unlike(scores, targets):
    return scores.sum(-1)

number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of one's own, by a name that no other test's has."""
    name = f"losses_of_mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_it_is_a_loss_like_any_other(mine):
    scores, relevance = torch.randn(3, 4), torch.rand(3, 4)
    loss = WeightedSum({f"{mine}:squared": {"weight": 2.0, "scale": 3.0}, "info_nce": {}})
    found = loss.terms(scores, relevance > 0.5, relevance, score_range=2.0)
    expected = 6 * (scores - relevance).square().mean(-1)
    torch.testing.assert_close(found[f"{mine}:squared"], expected)
    torch.testing.assert_close(found["info_nce"], info_nce(scores, relevance > 0.5))
    square = torch.randn(4, 4)
    own = both_directions(f"{mine}:contrastive", square, torch.eye(4) > 0)
    torch.testing.assert_close(own, both_directions("info_nce", square, torch.eye(4) > 0))


def test_its_second_argument_says_whether_it_is_graded(mine):
    graded = {kind: loss_named(f"{mine}:{kind}").graded for kind in ("squared", "contrastive")}
    assert graded == {"squared": True, "contrastive": False}
    assert needs_relevance(TrainSettings(losses={f"{mine}:squared": {}}))
    assert not needs_relevance(TrainSettings(losses={f"{mine}:contrastive": {}}))


def test_a_number_that_is_not_finite_is_not_passed_over(mine):
    scores = torch.tensor([[torch.nan, 0.0], [1.0, 0.0]])
    value = loss_named(f"{mine}:squared")(scores, torch.eye(2))
    assert value.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{}:unlike", r"takes \(scores, targets\); a loss takes \(scores_QN, relevance_QN"),
        ("{}:number", r"takes \(\); a loss takes"),
        ("{}:missing", "cannot be imported: module .* has no attribute 'missing'"),
        ("no_such_module_at_all:loss", "cannot be imported: No module named"),
        ("infonce", "unknown loss 'infonce'"),
    ],
)
def test_what_is_no_loss_is_refused(mine, name, said):
    with pytest.raises(InputError, match=said):
        check(TrainSettings(losses={name.format(mine): {}}))


def test_settings_it_does_not_have_are_refused(mine):
    with pytest.raises(InputError, match="no setting margin: it has scale, weight"):
        check(TrainSettings(losses={f"{mine}:squared": {"margin": 1}}))


def test_another_file_makes_another_model(mine, tmp_path):
    recipe = Recipe(name="own", train=TrainSettings(losses={f"{mine}:squared": {}}))
    before = train._own_code(recipe)
    (tmp_path / f"{mine}.py").write_text(SOURCE + "\n# changed")
    assert before.keys() == {mine} and train._own_code(recipe) != before
    assert not train._own_code(Recipe(name="own"))
