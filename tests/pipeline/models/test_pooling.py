"""Many vectors into one: what is padded and in which order they stand changes nothing."""

import pytest
import torch

from pipeline.models import Vocabulary, build
from pipeline.models.pooling import GPO, POOLINGS
from schemas.settings import ModelSettings

MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize("name", POOLINGS)
def test_padding_and_order_change_nothing(name):
    torch.manual_seed(0)
    pool, x = POOLINGS[name](), torch.randn(2, 3, 5)
    found = pool(x, MASK)
    other = x.clone()
    other[1, 1:] = 9.0
    torch.testing.assert_close(pool(other, MASK), found)
    torch.testing.assert_close(pool(x[:, [2, 0, 1]], MASK[:, [2, 0, 1]]), found)
    torch.testing.assert_close(found[1], x[1, 0])
    longer = torch.nn.functional.pad(x, (0, 0, 0, 4))
    torch.testing.assert_close(pool(longer, torch.nn.functional.pad(MASK, (0, 4))), found)


def test_gpo_learns_the_maximum():
    torch.manual_seed(0)
    pool, mask = GPO(), torch.ones(64, 6, dtype=torch.bool)
    optimizer = torch.optim.Adam(pool.parameters(), lr=0.02)
    for _ in range(150):
        x = torch.randn(64, 6, 4)
        loss = (pool(x, mask) - x.amax(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    weights = pool.weights(torch.tensor([6, 3]), 6)
    assert weights[:, 0].min() > 0.95 and weights[1, 3:].eq(0).all()


@pytest.mark.parametrize("text", ["gru", "bigru"])
@pytest.mark.parametrize("pooling", ["last", "max", "mean", "gpo"])
def test_a_caption_is_encoded_the_same_in_any_company(text, pooling):
    words = Vocabulary.of(["a red circle on the sand"], min_count=1)
    settings = ModelSettings(image="regions", text=text, text_pooling=pooling, dim=8)
    model = build(settings, vocabulary=words, features=7)
    alone = model.encode_text(*words.encode(["red circle"], 64))
    among = model.encode_text(*words.encode(["a", "red circle", "a red circle on the sand"], 64))
    torch.testing.assert_close(alone[0], among[1])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_regions_of_zeros_are_padding(pooling):
    words = Vocabulary.of(["a"], min_count=1)
    settings = ModelSettings(image="regions", image_pooling=pooling, dim=8)
    model = build(settings, vocabulary=words, features=7)
    x = torch.randn(3, 4, 7)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 2))
    torch.testing.assert_close(model.encode_image(padded), model.encode_image(x))
    assert model.encode_image(torch.zeros(1, 4, 7)).isfinite().all()
    assert model.encode_image(x[:, 0]).shape == (3, 8)  # one vector an image
