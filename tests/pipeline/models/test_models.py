"""Towers: shapes, padding, norms, workers."""

import pytest
import torch
import torch.distributed as dist

from pipeline import models
from pipeline.models.convolution import GlobalBatchNorm
from pipeline.models.vocabulary import Vocabulary
from schemas.settings import ModelSettings
from tests.helpers import gloo

WORDS = Vocabulary.of(["a red circle on the sand", "two blue fish"], min_count=1)


@pytest.mark.parametrize(
    ("settings", "features", "images"),
    [
        ({"image": "pixels", "width": 8}, None, torch.zeros(5, 3, 64, 64, dtype=torch.uint8)),
        ({"image": "pixels", "width": 8}, None, torch.zeros(5, 3, 97, 97, dtype=torch.uint8)),
        ({"image": "regions"}, 7, torch.randn(5, 4, 7, dtype=torch.float16)),
    ],
)
def test_both_towers_give_unit_vectors_of_one_size(settings, features, images):
    model = models.build(ModelSettings(dim=24, **settings), vocabulary=WORDS, features=features)
    words, lengths = WORDS.encode(["a red fish", "circle", "two", "the the", "?"], 8)
    for vectors in model(images, words, lengths):
        assert vectors.shape == (5, 24) and vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))


def test_a_caption_is_encoded_the_same_in_any_company():
    model = models.build(ModelSettings(image="regions"), vocabulary=WORDS, features=7).eval()
    alone = model.encode_text(*WORDS.encode(["two blue fish"], 64))
    among = model.encode_text(*WORDS.encode(["a", "two blue fish", "a red circle on the sand"], 64))
    torch.testing.assert_close(alone[0], among[1])


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({"image": "regions"}, None),
        ({"image": "pixels"}, 7),
        ({"image": "pixel"}, None),
        ({"text": "bert"}, None),
    ],
)
def test_a_tower_that_does_not_fit_the_data_is_refused(settings, features):
    with pytest.raises(ValueError, match="use|known"):
        models.build(ModelSettings(**settings), vocabulary=WORDS, features=features)


def test_rare_words_become_unknown_and_long_captions_are_cut():
    words = Vocabulary.of(["dog dog cat"], min_count=2)
    assert words.words == ["<pad>", "<unk>", "dog"]
    assert words.ids(["Cat DOG dog dog"], 3) == [[1, 2, 2]]


def norm_worker(rank, size, folder):
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float32) * 2 + 1
    target = torch.randn(8, 3, 4, 4)
    mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
    x = x[mine].requires_grad_()
    norm = GlobalBatchNorm(3)
    (norm(x) * target[mine]).sum().backward()
    if size > 1:
        for parameter in norm.parameters():
            dist.all_reduce(parameter.grad)
    found = {
        "x": x.grad,
        "weight": norm.weight.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
    }
    torch.save(found, f"{folder}/{size}-{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


def test_batch_norm_of_two_workers_is_that_of_one(tmp_path):
    gloo.together(2, norm_worker, str(tmp_path))
    norm_worker(0, 1, str(tmp_path))
    one, *two = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(torch.cat([two[0]["x"], two[1]["x"]]), one["x"], **close)
    for name in ("weight", "mean", "var"):
        torch.testing.assert_close(two[1][name], one[name], **close)
