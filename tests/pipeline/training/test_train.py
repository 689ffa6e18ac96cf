"""Training: resuming, choosing, refusing."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from jobs.cli import options, recipes
from jobs.cli.command import command_of
from pipeline.errors import InputError
from pipeline.formulas.metrics import ndcg
from pipeline.labels import embed
from pipeline.labels.caption_vectors import Captions
from pipeline.sharding.images import Rejected
from pipeline.sharding.reading import Shards
from pipeline.sources import drawn
from pipeline.storage import store
from pipeline.training import sampler, saved_model, train
from pipeline.training.distributed import ProcessGroup
from pipeline.training.trainer import TowerTrainer
from pipeline.training.weights import validation
from schemas.checkpoint import Checkpoint
from tests.helpers.stages import TINY


class Killed(BaseException):
    """Ends a training the hard way."""


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_encoder, first_stages):
    """A copy of stages 1 to 3 of a small run, and its recipe."""
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(first_stages, root, dirs_exist_ok=True)
    return recipe_with(tiny_encoder), str(root)


def recipe_with(encoder: str, *flags: str):
    argv = [*TINY, "--encoder", encoder, *flags]
    given, overrides = options.parse("train", command_of("train"), argv)
    return recipes.resolve(given.recipe, overrides, None)[0][1]


def fit(recipe, root: str, name: str, report=lambda records: None) -> dict:
    """Train, and the finished stage's index."""
    plan = train.plan(recipe, root, name)
    train.fit(plan.pieces[0], report)
    return plan.finish({"model": saved_model.summary(plan.pieces[0])})


def weights(root: str, name: str) -> dict[str, torch.Tensor]:
    return load(store.read_bytes(f"{root}/5-model/{name}/model.safetensors"))


def test_a_killed_training_ends_with_the_same_weights(data):
    recipe, root = data
    fit(recipe, root, "whole")

    def kill(records):
        raise Killed

    with pytest.raises(Killed):
        fit(recipe, root, "killed", kill)
    epochs = []
    fit(recipe, root, "killed", lambda records: epochs.append(records[-1]["epoch"]))
    assert epochs == [2]
    whole, killed = weights(root, "whole"), weights(root, "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    files = [f"{root}/5-model/{name}/history.json" for name in ("whole", "killed")]
    records = [store.read_json(file)["records"] for file in files]
    losses = [[r["train/loss"] for r in found if "train/loss" in r] for found in records]
    assert losses[0] == losses[1]


def without_times(record: dict) -> dict:
    """A record without what depends on the machine."""
    timed = ("samples_per_second", "_wait", "_worst", "_busy")
    return {name: value for name, value in record.items() if not name.endswith(timed)}


SCHEDULES = """{
    triplet: {weight: {from: 1, to: 0, over: 2}},
    smooth_ndcg: {
        weight: {from: 0, to: 5, over: 1, start: 0.5}, tau: {from: 0.2, to: 0.02, over: 2}}}"""


def test_a_killed_training_goes_on_in_its_schedules(data, tiny_encoder):
    _, root = data
    recipe = recipe_with(tiny_encoder, "--train.losses", SCHEDULES, "--train.log_every", "1")
    fit(recipe, root, "scheduled")

    def kill(records):
        raise Killed

    with pytest.raises(Killed):
        fit(recipe, root, "stopped", kill)
    fit(recipe, root, "stopped")
    whole, stopped = (
        store.read_json(f"{root}/5-model/{name}/history.json")["records"]
        for name in ("scheduled", "stopped")
    )
    same = [[without_times(record) for record in records] for records in (whole, stopped)]
    assert same[0] == same[1]
    steps = [r for r in whole if "train/smooth_ndcg" in r]
    half = len(steps) // 4  # an epoch's half: until then S-NDCG has no weight
    assert all(r["train/smooth_ndcg"] == 0 for r in steps[:half])
    assert all(r["train/smooth_ndcg"] > 0 for r in steps[half + 1 :])
    assert steps[0]["train/triplet"] > 0.1 > steps[-1]["train/triplet"] * 2


def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(data):
    recipe, root = data
    fit(recipe, root, "torn")
    newest = f"{root}/5-model/torn/checkpoints/step-00000060/model.safetensors"
    store.write_bytes(newest, store.read_bytes(newest)[:-10])
    epochs = []
    fit(recipe, root, "torn", lambda records: epochs.append(records[-1]["epoch"]))
    assert epochs == [2]


def test_other_settings_do_not_resume_from_what_is_there(data, tiny_encoder):
    _, root = data
    fit(recipe_with(tiny_encoder), root, "changed")
    epochs = []
    other = recipe_with(tiny_encoder, "--lr", "0.002")
    fit(other, root, "changed", lambda records: epochs.append(records[-1]["epoch"]))
    assert epochs == [1, 2]


def test_the_loss_falls(data):
    recipe, root = data
    fit(recipe, root, "falls")
    records = store.read_json(f"{root}/5-model/falls/history.json")["records"]
    losses = [r["train/info_nce"] for r in records if "train/info_nce" in r]
    assert losses[-1] < losses[0] - 0.1


def test_best_and_last_choose_their_checkpoint(data, tiny_encoder):
    _, root = data
    last = recipe_with(tiny_encoder, "--train.select", "last")
    assert fit(last, root, "last")["pieces"][0]["epoch"] == 2
    best = recipe_with(tiny_encoder, "--train.epochs", "4")
    entry = fit(best, root, "best")["pieces"][0]
    records = store.read_json(f"{root}/5-model/best/history.json")["records"]
    rsums = [r["val/rsum"] for r in records if "val/rsum" in r]
    assert entry["epoch"] == 1 + rsums.index(max(rsums))
    assert entry["metrics"]["val/rsum"] == max(rsums)


def test_without_val_the_last_epoch_is_handed_on(data, tiny_encoder, monkeypatch):
    _, root = data
    monkeypatch.setattr(TowerTrainer, "validate", lambda self: {})
    recipe = recipe_with(tiny_encoder, "--train.patience", "1")
    entry = fit(recipe, root, "unseen")["pieces"][0]
    assert entry["epoch"] == 2 and "val/rsum" not in entry["metrics"]


def test_the_checkpoint_of_the_best_graded_order_can_be_chosen(data, tiny_encoder, monkeypatch):
    _, root = data
    recipe = recipe_with(tiny_encoder, "--train.select", "best_ndcg", "--train.epochs", "3")
    values = iter([0.3, 0.5, 0.4])
    entry = fit(recipe, root, "graded")["pieces"][0]
    records = store.read_json(f"{root}/5-model/graded/history.json")["records"]
    seen = [r["val/ndcg_label"] for r in records if "epoch" in r]
    assert entry["metrics"]["val/ndcg_label"] == max(seen) and all(0 < v < 1 for v in seen)
    graded = validation.ndcg_on_val
    monkeypatch.setattr(
        validation, "ndcg_on_val", lambda *a: {**graded(*a), "val/ndcg_label": next(values)}
    )
    assert fit(recipe, root, "planted")["pieces"][0]["epoch"] == 2


def test_ndcg_on_val_is_that_of_the_whole_matrix(data):
    recipe, root = data
    captions = Captions.read(embed.files(recipe, root).of_split("val"))
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(len(captions.image_ids), 6), dim=1)
    texts = torch.nn.functional.normalize(torch.randn(len(captions.caption_ids), 6), dim=1)
    relevance = captions.relevance(captions.image_ids, recipe.label)
    scores = images @ texts.T
    found = validation.ndcg_on_val(images, texts, captions, recipe.label, ProcessGroup())
    for name, s, r in (("i2t", scores, relevance), ("t2i", scores.T, relevance.T)):
        expected = float(ndcg(s, r, k=10).mean())
        assert found[f"val/{name}_ndcg_label"] == pytest.approx(expected, rel=1e-6)


def test_a_loaded_model_encodes_as_the_trained_one(data):
    recipe, root = data
    fit(recipe, root, "loaded")
    model = saved_model.load_model(f"{root}/5-model/loaded")
    texts = ["a red circle", "two stars on the sand"]
    together, alone = model.embed_texts(texts), model.embed_texts(texts[:1])
    torch.testing.assert_close(together[:1], alone)  # padding and company change nothing
    torch.testing.assert_close(together, model.embed_texts(texts, batch_size=1))
    assert model.embed_texts([]).shape == model.embed_images([]).shape == (0, together.shape[1])
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))


def test_words_that_the_model_does_not_know_are_counted(data):
    recipe, root = data
    fit(recipe, root, "loaded")
    folder = f"{root}/5-model/loaded"
    found = train.unknown_words(root, folder)
    assert set(found) == {"unknown_words_of_val", "unknown_words_of_test"}
    kept = set(store.read_json(f"{folder}/vocabulary.json"))
    words = [w for sample in Shards(root).samples("test") for c in sample.captions
             for w in re.findall(r"[^\W_]+", c["text"].lower())]  # fmt: skip
    expected = sum(word not in kept for word in words) / len(words)
    assert 0 < found["unknown_words_of_test"] == pytest.approx(expected)


def test_a_picture_has_one_vector_however_it_is_given(data, tmp_path):
    recipe, root = data
    fit(recipe, root, "loaded")
    model = saved_model.load_model(f"{root}/5-model/loaded")
    data_ = drawn.load("drawn:0/test/3/48")
    path = tmp_path / "picture.jpg"
    path.write_bytes(data_)
    found = model.embed_images([data_, path, str(path)], batch_size=2)
    torch.testing.assert_close(found, found[:1].expand(3, -1))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    picture = Image.open(path)
    pixels = model.embed_images([picture, np.asarray(picture)])  # as they were decoded: a PNG
    torch.testing.assert_close(pixels[0], pixels[1])
    with pytest.raises(Rejected):
        model.embed_images([b"no picture"])


def test_a_run_without_graded_losses_does_not_depend_on_labels(data, tiny_encoder):
    _, root = data
    plain = ("--train.losses", "{info_nce: {weight: 1}}")
    one, two = (
        train.plan(recipe_with(tiny_encoder, *plain, "--label.map", m), root, "x")
        for m in ("clip", "half")
    )
    assert one.fingerprint == two.fingerprint
    graded = [
        train.plan(recipe_with(tiny_encoder, "--label.map", m), root, "x").fingerprint
        for m in ("clip", "half")
    ]
    assert graded[0] != graded[1]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model.image", "regions"], "use 'pixels'"),
        (["--train.losses", "{infonce: {}}"], "did you mean 'info_nce'?"),
        (["--train.losses", "{}"], "train.losses is empty"),
        (["--train.losses", "{triplet: {tau: learned}}"], "gives tau no gradient"),
        (["--train.losses", "{info_nce: {positives: learned}}"], "positives cannot be learned"),
        (["--train.batch_size", "256"], "lower --train.batch_size"),
        (["--lr", "1e30"], "not finite"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_sentence(data, tiny_encoder, flags, sentence):
    _, root = data
    with pytest.raises(InputError, match=sentence.replace("?", r"\?")):
        fit(recipe_with(tiny_encoder, *flags), root, "refused")


def test_neighbours_meet_in_a_batch(data, tiny_encoder):
    """Two images of a lane are of like captions more often than by chance."""
    _, root = data
    alike = {}
    for group in (1, 2):
        recipe = recipe_with(tiny_encoder, "--train.neighbours", str(group))
        piece = train.plan(recipe, root, f"near{group}").pieces[0]
        training = TowerTrainer(piece, ProcessGroup())
        captions = Captions.read(embed.files(recipe, root).of_split("train"))
        first = captions.vectors[torch.from_numpy(captions.first)]
        pairs = np.concatenate([r for r, _ in training.order.epoch(0)]).reshape(-1, 2)
        alike[group] = float((first[pairs[:, 0]] * first[pairs[:, 1]]).sum(1).mean())
    assert alike[2] > alike[1] + 0.05


def test_an_order_of_many_blocks_is_another_training_and_no_smaller_one(data, monkeypatch):
    recipe, root = data
    small = train.plan(recipe, root, "x").fingerprint
    monkeypatch.setattr(sampler, "SHUFFLE_BLOCK", 4)
    assert train.plan(recipe, root, "x").fingerprint != small


def test_a_checkpoint_of_another_order_begins_its_epoch_again(data):
    recipe, root = data
    training = TowerTrainer(train.plan(recipe, root, "order").pieces[0], ProcessGroup())
    fields = {"epoch": 0, "step": 3, "metrics": {}, "best": {}, "optimizer": {}, "files": {}}
    about = {**training.about, **fields, "fingerprint": "another"}
    assert training.same_batches(Checkpoint(**about))
    assert not training.same_batches(Checkpoint(**{**about, "order": 2}))
    del about["order"]  # as checkpoints were written before there were two
    assert training.same_batches(Checkpoint(**about))


def test_embeddings_of_other_captions_than_the_shards_are_refused(data, tiny_encoder, tmp_path):
    recipe, root = data
    copy = str(tmp_path / "copy")
    shutil.copytree(root, copy)
    index = store.read_json(f"{copy}/2-shards/index.json")
    index["pieces"][0]["contents"] = ["another"]
    store.write_json(f"{copy}/2-shards/index.json", index)
    graded = recipe_with(tiny_encoder, "--train.losses", "{smooth_ndcg: {weight: 1}}")
    with pytest.raises(InputError, match=r"of the captions of shard \S+-000000 as it is"):
        for split in ("train", "val", "test"):
            embed.of_shards(graded, copy, split)
    assert len(embed.of_shards(graded, root, "train")[0]) == 3
