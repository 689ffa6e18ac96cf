"""Batches made ahead: those of the sampler, the same ones whoever makes them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pipeline.errors import InputError
from pipeline.models import Vocabulary
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.vocabulary import PretrainedTokens
from pipeline.training.data import Split
from pipeline.training.loading import loader as loading
from pipeline.training.loading.augmentation import Augment
from pipeline.training.loading.loader import Loader, workers_for
from pipeline.training.sampler import Sampler
from schemas.settings import Recipe
from tests.helpers.datasets import SIZE, shards
from tests.helpers.stages import sharded
from tests.pipeline.training.test_sampler import steps_of

VIEW = Augment(crop=0.3, flip=True, colour=0.3)
WORKERS = (0, 1, 2, 3)


def loader_of(split, rank=0, size=1, workers=0, batch_size=4, **given) -> Loader:
    order = Sampler(split, batch_size=batch_size, lanes=2, pairs="caption", seed=0)
    vocabulary = given.pop("vocabulary", None) or Vocabulary.of(split.captions, min_count=1)
    given = {"max_words": 9, **given}
    return Loader(order, vocabulary, rank=rank, size=size, workers=workers, **given)


@pytest.fixture
def closed():
    """A function that returns a loader, which is closed when the test ends."""
    made = []

    def keep(loader: Loader) -> Loader:
        made.append(loader)
        return loader

    yield keep
    for loader in made:
        loader.close()


def contents(batches) -> list[list[tuple]]:
    """What batches hold, taken while nothing else is kept of them."""
    return [
        [(name, tuple(x.shape), x.numpy().tobytes()) for name, x in batch.tensors().items()]
        for batch in batches
    ]


@pytest.mark.parametrize("workers", (0, 2))
def test_the_loader_brings_the_pairs_of_the_order(split, workers, closed):
    loader = closed(loader_of(split, workers=workers))
    batches = list(loader.epoch(1))  # all are kept: none may lie where another one lay
    steps = steps_of(loader.order, 1)
    assert len(batches) == len(steps) == loader.order.steps
    vocabulary = Vocabulary.of(split.captions, min_count=1)
    for batch, (rows, captions) in zip(batches, steps, strict=True):
        assert batch.image_rows.tolist() == rows.tolist()
        assert batch.caption_rows.tolist() == captions.tolist()
        words, lengths = vocabulary.encode([split.captions[row] for row in captions], 9)
        assert torch.equal(batch.words, words) and torch.equal(batch.lengths, lengths)
        images = np.stack([split.image(row) for row in rows])
        assert np.array_equal(batch.images.numpy(), images) and batch.images.dtype == torch.uint8


@pytest.mark.parametrize("view", [None, VIEW])
def test_batches_are_the_same_whoever_makes_them_and_from_any_step_on(split, view, closed):
    known = None
    for workers in WORKERS:
        loader = closed(loader_of(split, workers=workers, augment=view, epochs=3))
        whole = {epoch: contents(loader.epoch(epoch)) for epoch in (0, 1, 2)}
        known = known or whole
        assert whole == known
        last = len(whole[1])
        for epoch, start in ((1, 0), (1, 1), (0, last - 1), (2, 5), (1, last), (0, 0)):
            assert contents(loader.epoch(epoch, start)) == known[epoch][start:]
    if view is not None:
        assert known[0] != contents(loader_of(split).epoch(0))


def test_an_epoch_that_is_left_and_begun_again_has_the_same_batches(split, closed):
    loader = closed(loader_of(split, workers=2, epochs=2))
    whole = contents(loader.epoch(0))
    for left_after in (0, 1, 3):
        batches = loader.epoch(0)
        assert contents(next(batches) for _ in range(left_after)) == whole[:left_after]
        batches.close()
    assert contents(loader.epoch(0)) == whole
    stale = loader.epoch(0)
    next(stale)
    assert contents(loader.epoch(0)) == whole
    with pytest.raises(RuntimeError, match="another epoch"):
        next(stale)


@pytest.mark.parametrize("workers", (0, 2))
def test_two_loaders_share_the_batches_of_one(split, workers, closed):
    whole = list(closed(loader_of(split)).epoch(0))
    two = [closed(loader_of(split, rank=rank, size=2, workers=workers)) for rank in (0, 1)]
    halves = [list(loader.epoch(0)) for loader in two]
    assert [len(half) for half in halves] == [len(whole)] * 2
    for batch, *parts in zip(whole, *halves, strict=True):
        found = torch.cat([part.caption_rows for part in parts]).tolist()
        places = [batch.caption_rows.tolist().index(row) for row in found]
        assert sorted(places) == list(range(len(batch)))
        images = torch.cat([part.images for part in parts])
        assert torch.equal(images, batch.images[places])


def test_frames_are_used_again_once_a_batch_is_gone(split, closed):
    loader = closed(loader_of(split, workers=1))
    for _ in loader.epoch(0):
        pass
    assert loader.order.steps > 12 and len(loader.frames._maps) <= loading.AHEAD + 3
    kept = [batch.images for batch in loader.epoch(0)]  # a view holds a frame
    assert len({x.data_ptr() for x in kept}) == len(kept)


@pytest.mark.parametrize("workers", (0, 2))
def test_images_are_decoded_once_where_all_have_room(tmp_path, workers, closed, monkeypatch):
    split = Split(shards(tmp_path, samples=8), "train", preprocessing=Preprocessing.squash(SIZE))
    loader = closed(loader_of(split, workers=workers))
    known = [contents(loader.epoch(epoch)) for epoch in (0, 1)]
    monkeypatch.setattr(loading, "KEPT_BYTES", 100)
    short_of_room = closed(loader_of(split))
    assert contents(short_of_room.epoch(0)) == known[0]
    for tar in split.tars:
        Path(tar).unlink()
    assert [contents(loader.epoch(epoch)) for epoch in (0, 1)] == known
    with pytest.raises(FileNotFoundError):
        contents(short_of_room.epoch(0))


def test_captions_of_any_length_fit(split, closed):
    texts = split.texts
    split.texts = lambda rows: [f"{text} {'very ' * 2000}long" for text in texts(rows)]
    for workers in (0, 1):
        loader = closed(loader_of(split, workers=workers, max_words=2100))
        batch = next(loader.epoch(0))
        assert batch.words.shape[1] > 2000 and int(batch.lengths.min()) > 2000


@pytest.mark.parametrize("padded", [False, True])
def test_processes_cut_texts_as_pretrained_models_do(split, padded, closed):
    """By a tokenizer of the tokenizers package; those of transformers come by the same way."""
    known = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "circle", "star", "on"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=marks)
    tokens = PretrainedTokens(made.to_str(), pad=0, length=10, padded=padded)
    loader = closed(loader_of(split, workers=2, vocabulary=tokens))
    for batch in loader.epoch(0):
        texts = split.texts(batch.caption_rows.numpy())
        words, lengths = tokens.encode(texts, 9)
        assert torch.equal(batch.words, words) and torch.equal(batch.lengths, lengths)


# ---- what is wrong ------------------------------------------------------------------------------


def damaged(folder, workers: int, damage) -> Loader:
    """A loader of a split of which one tar was damaged: `damage` changes its bytes."""
    split = Split(shards(folder, samples=8), "train", preprocessing=Preprocessing.squash(SIZE))
    tar = Path(split.tars[1])
    data = bytearray(tar.read_bytes())
    damage(split, data)
    tar.write_bytes(data)
    return loader_of(split, workers=workers)


@pytest.mark.parametrize("workers", (0, 2))
def test_a_damaged_picture_is_named_and_nothing_hangs(tmp_path, workers, closed):
    def damage(split, data) -> None:
        ((*_, offset, size),) = split.places(np.array([9]))
        data[offset + 20 : offset + size] = bytes(size - 20)

    loader = closed(damaged(tmp_path, workers, damage))
    name = loader.split.name(9).split(" of ")[0]
    with pytest.raises(InputError, match=rf"{name} of .*train-000001.tar cannot be used: ") as e:
        list(loader.epoch(0))
    assert "halftone lint" in str(e.value)
    with pytest.raises(InputError, match=name):  # again, when it is asked for again
        list(loader.epoch(0))


@pytest.mark.parametrize("workers", (0, 2))
def test_a_torn_tar_is_named_with_what_to_do(tmp_path, workers, closed):
    def damage(split, data) -> None:
        ((*_, offset, _),) = split.places(np.array([8]))
        del data[offset + 20 :]

    loader = closed(damaged(tmp_path, workers, damage))
    with pytest.raises(InputError, match=r"train-000001.tar has \d+ bytes .* delete it and run"):
        list(loader.epoch(0))


@pytest.mark.parametrize("workers", (0, 2))
def test_a_lost_tar_ends_the_epoch_with_an_error_that_names_it(tmp_path, workers, closed):
    split = Split(shards(tmp_path, samples=8), "train", preprocessing=Preprocessing.squash(SIZE))
    Path(split.tars[1]).unlink()
    loader = closed(loader_of(split, workers=workers))
    with pytest.raises(FileNotFoundError, match=r"train-000001.tar") as error:
        list(loader.epoch(0))
    assert any("while reading" in note for note in error.value.__notes__)


@pytest.mark.parametrize("workers", (0, 2))
def test_batches_before_the_one_that_cannot_be_made_come_first(tmp_path, workers, closed):
    split = Split(shards(tmp_path, samples=8), "train", preprocessing=Preprocessing.squash(SIZE))
    known = contents(loader_of(split).epoch(0))
    steps = [set(rows.tolist()) for rows, _ in steps_of(loader_of(split).order)]
    step = 3
    (row, *_) = steps[step] - steps[0] - steps[1] - steps[2]
    ((_, uri, _, offset, size),) = split.places(np.array([row]))
    tar = Path(uri)
    data = bytearray(tar.read_bytes())
    data[offset : offset + size] = bytes(size)
    tar.write_bytes(data)
    batches = closed(loader_of(split, workers=workers)).epoch(0)
    assert contents(next(batches) for _ in range(step)) == known[:step]
    with pytest.raises(InputError, match="cannot be used"):
        next(batches)


# ---- features -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def regions(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("regions")
    features = np.random.default_rng(0).normal(size=(12, 3, 5)).astype(np.float32)
    np.save(folder / "train_ims.npy", features)
    (folder / "train_caps.txt").write_text("".join(f"caption {n}\n" for n in range(12)))
    sharded(Recipe(name="t", source={"kind": "precomp", "path": str(folder)}), folder)
    return str(folder)


@pytest.mark.parametrize("workers", (0, 2))
def test_features_come_as_they_were_stored(regions, workers, closed):
    split = Split(regions, "train", preprocessing=Preprocessing.squash(SIZE))
    for batch in closed(loader_of(split, workers=workers)).epoch(0):
        expected = np.stack([split.image(row) for row in batch.image_rows.tolist()])
        assert batch.images.dtype == torch.float32
        assert np.array_equal(batch.images.numpy(), expected)


def test_features_of_another_shape_are_refused_and_have_no_views(regions, tmp_path, closed):
    split = Split(regions, "train", preprocessing=Preprocessing.squash(SIZE))
    split.features  # noqa: B018  (of the first image, before others lie in its place)
    file = io.BytesIO()
    np.save(file, np.zeros((4, 5), np.float32))
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("odd.npy")
        info.size = len(file.getvalue())
        tar.addfile(info, io.BytesIO(file.getvalue()))
    place = 0, str(path), {"bytes": path.stat().st_size}, 512, len(file.getvalue())
    split.places = lambda rows: [place] * len(rows)
    split._cache[0] = np.zeros((3, 5), np.float32)
    said = r"float32 of shape \[4, 5\], the first image of the split float32 of shape \[3, 5\]"
    with pytest.raises(InputError, match=said):
        list(closed(loader_of(split)).epoch(0))
    with pytest.raises(InputError, match="these hold features"):
        list(closed(loader_of(split, augment=VIEW)).epoch(0))


# ---- how many -----------------------------------------------------------------------------------


def chosen(split, monkeypatch, cores: int, here: int = 1, asked: int = 0, **given) -> int:
    monkeypatch.setattr(loading, "cores", lambda: cores)
    settings = {"augment": None, "epochs": 1, **given}
    return workers_for(split, settings.pop("augment"), asked=asked, here=here, **settings)


def test_a_worker_takes_its_share_of_the_cores_but_one(split, regions, monkeypatch):
    assert chosen(split, monkeypatch, 16) == 0  # over before a process pays
    assert chosen(split, monkeypatch, 16, asked=3) == 3
    many = int(loading.PICTURE_BYTES / split.tar_bytes) + 1
    assert chosen(split, monkeypatch, 16, epochs=many) == 0  # decoded once
    assert chosen(split, monkeypatch, 16, epochs=many, augment=VIEW) == 15
    monkeypatch.setattr(loading, "PICTURE_BYTES", 1)
    cases = {(1, 1): 0, (2, 1): 1, (2, 2): 1, (16, 1): 15, (16, 4): 3, (96, 8): 11}
    cases[256, 1] = loading.MOST_WORKERS
    assert {(n, here): chosen(split, monkeypatch, n, here) for n, here in cases} == cases
    assert (
        chosen(Split(regions, "train", preprocessing=Preprocessing.squash(SIZE)), monkeypatch, 16)
        == 0
    )
