"""Models made of weights without a step: as they come, between two, and means of several."""

import pytest
import torch
from safetensors.torch import load

from pipeline import models
from pipeline.errors import InputError
from pipeline.storage import store
from pipeline.training import saved_model, train
from pipeline.training.weights import interpolation, norms
from tests.pipeline.models.test_pretrained import clip  # noqa: F401  (a fixture)
from tests.pipeline.training.test_train import (
    data,  # noqa: F401  (a fixture, and its users)
    fit,
    recipe_with,
    weights,
)

CLIP = ("--model.image", "pretrained", "--model.text", "pretrained", "--model.image_size", "48")
FEW = ("--train.pairs", "image", "--train.lr", "1e-3")


def put_together(recipe, root: str, name: str) -> dict:
    """The entry of a model that no step is taken for, its settings kept beside it."""
    plan = train.plan(recipe, root, name)
    index = plan.finish({"model": train.put_together(plan.pieces[0])})
    keep_settings(root, name)
    return index["pieces"][0]


def keep_settings(root: str, name: str) -> None:
    store.write_bytes(f"{root}/settings-{name}.yaml", b"name: t\n")


@pytest.fixture(scope="module")
def tuned(data, clip):  # noqa: F811
    """A run folder with a CLIP as it came, tuned, and tuned with another seed."""
    recipe, root = data
    flags = (*CLIP, *FEW, "--model.pretrained", clip)
    put_together(recipe_with(recipe.embed.encoder, *flags, "--epochs", "0"), root, "before")
    kept = (*flags, "--train.keep_epochs", "9", "--train.select", "last")
    for name, more in {"a": (), "b": ("--train.seed", "1")}.items():
        fit(recipe_with(recipe.embed.encoder, *kept, "--epochs", "3", *more), root, name)
        keep_settings(root, name)
    return recipe.embed.encoder, root, flags


def test_no_epochs_give_the_model_as_it_came(tuned, clip):  # noqa: F811
    from transformers import CLIPModel

    encoder, root, flags = tuned
    own = CLIPModel.from_pretrained(clip).state_dict()
    found = weights(root, "before")
    for side, name in (("image", "vision_model"), ("text", "text_model")):
        for key, value in found.items():
            inner = key.removeprefix(f"{side}.encoder.")
            if inner != key:
                assert torch.equal(value, own[f"{name}.{inner}"]), key
    plan = train.plan(recipe_with(encoder, *flags, "--epochs", "0"), root, "before")
    assert plan.complete
    loaded = saved_model.load_model(f"{root}/5-model/before")
    assert loaded.embed_texts(["a red circle"]).shape == (1, 24)


def test_an_index_says_of_such_models_what_loading_takes(tuned):
    _, root, _ = tuned
    soup(tuned, "said", "[a, b]", "--train.soup_choice", "uniform")
    trained, *others = (
        store.read_json(f"{root}/5-model/{name}/index.json")["pieces"][0]
        for name in ("a", "before", "said")
    )
    of_training = {"torn_checkpoints", "collapsed", "cut_captions", "frozen", "not_compiled"}
    for entry in others:
        assert trained.keys() - of_training <= entry.keys()


def test_what_was_there_before_is_the_first_record_of_a_training(tuned):
    _, root, _ = tuned
    before = store.read_json(f"{root}/5-model/before/history.json")["records"]
    records = store.read_json(f"{root}/5-model/a/history.json")["records"]
    assert records[0] == before[0] and records[0]["epoch"] == records[0]["step"] == 0
    for record in (r for r in records if r.get("epoch")):
        over = record["val/rsum"] - records[0]["val/rsum"]
        assert record["val/rsum_over_zero_shot"] == over


def test_a_random_model_may_stay_untouched_too(data):  # noqa: F811
    recipe, root = data
    entry = put_together(recipe_with(recipe.embed.encoder, "--epochs", "0"), root, "random")
    assert entry["metrics"]["val/rsum"] > 0 and entry["epoch"] == 0
    assert len(saved_model.load_model(f"{root}/5-model/random").vocabulary) > 2


def test_a_training_below_zero_shot_says_so_and_stops_if_asked(tuned, monkeypatch, caplog):
    encoder, root, flags = tuned
    figures = iter([300.0, 310.0, 290.0, 280.0, 270.0])
    monkeypatch.setattr(
        "pipeline.training.trainer.TowerTrainer.validate",
        lambda self: {"val/rsum": next(figures)},
    )
    recipe = recipe_with(encoder, *flags, "--epochs", "9", "--train.stop_below", "2")
    entry = fit(recipe, root, "stopped")["pieces"][0]
    assert next(figures) == 270.0  # three epochs
    assert entry["epoch"] == 1 and train.warnings(entry) == []
    assert [r.args for r in caplog.records if "below zero-shot" in r.message] == [
        (2, 290.0, 300.0),
        (3, 280.0, 300.0),
    ]
    entry["metrics"]["val/rsum_over_zero_shot"] = -20.0
    assert "20.0 below zero-shot" in train.warnings(entry)[0]


@pytest.mark.parametrize("tuning", [(), ("--model.freeze", "1"), ("--model.lora_rank", "2")])
def test_weights_between_are_chosen_on_val(tuned, clip, tuning):  # noqa: F811
    encoder, root, flags = tuned
    how = ("--epochs", "2", "--train.interpolate", "[0.25, 0.5]", "--train.select", "last")
    entry = fit(recipe_with(encoder, *flags, *how, *tuning), root, "between")["pieces"][0]
    curve = entry["interpolation"]
    assert [point["alpha"] for point in curve] == [0, 0.25, 0.5, 1]
    records = store.read_json(f"{root}/5-model/between/history.json")["records"]
    assert curve[0]["val/rsum"] == records[0]["val/rsum"]
    assert curve[-1]["val/rsum"] == records[-1]["val/rsum"]
    best = max(point["val/rsum"] for point in curve)
    chosen = next(p for p in curve if p["alpha"] == entry["alpha"])
    assert chosen["val/rsum"] == entry["metrics"]["val/rsum"] == best
    assert train.notes(entry, "between")["alpha"] == entry["alpha"]
    steps = [(step, figures["interpolation/rsum"]) for step, figures in train.tried(entry)]
    assert steps == [(round(100 * p["alpha"]), p["val/rsum"]) for p in curve]
    (last,) = store.list_folders(f"{root}/5-model/between/checkpoints")[-1:]
    folder = f"{root}/5-model/between/checkpoints"
    after = load(store.read_bytes(f"{folder}/{last}/model.safetensors"))
    before = load(store.read_bytes(f"{folder}/before.safetensors"))
    handed_on = weights(root, "between")
    for name, value in interpolation.between(before, after, entry["alpha"]).items():
        assert torch.equal(handed_on[name], value), name


def test_a_share_of_a_low_rank_update_is_a_share_of_the_update():
    a, b = torch.randn(2, 5), torch.randn(7, 2)
    before = {"q.lora_A.default.weight": torch.randn(2, 5), "q.lora_B.default.weight": 0 * b}
    after = {"q.lora_A.default.weight": a, "q.lora_B.default.weight": b}
    for share in (0, 0.3, 1):
        found_a, found_b = interpolation.between(before, after, share).values()
        torch.testing.assert_close(found_b @ found_a, share * b @ a)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--train.interpolate", "true"), "towers pixels . gru begin at random"),
        (
            (*CLIP, "--model.pretrained", "x", "--train.interpolate", "true", "--resume", "y"),
            "weights before training, which",
        ),
        (("--train.soup", "[nobody, else]"), "'nobody', which is no other model of"),
        (("--train.soup", "[a]"), "comes to 1 model; name two or more"),
        (("--train.soup", "[a, a@7]"), "the epochs of a whose checkpoints are kept are 1, 2, 3"),
    ],
)
def test_what_cannot_be_put_together_is_refused_with_a_sentence(tuned, flags, said):
    encoder, root, _ = tuned
    with pytest.raises(InputError, match=said):
        train.plan(recipe_with(encoder, *flags), root, "refused")


def test_a_training_that_began_without_it_has_nothing_to_go_back_to(tuned):
    encoder, root, flags = tuned
    fit(recipe_with(encoder, *flags, "--epochs", "1"), root, "late")
    later = ("--epochs", "2", "--train.interpolate", "true", "--resume", "latest")
    with pytest.raises(InputError, match="goes on from a checkpoint of one without it"):
        fit(recipe_with(encoder, *flags, *later), root, "late")


def soup(tuned, name: str, of: str, *more: str) -> dict:
    encoder, root, flags = tuned
    return put_together(recipe_with(encoder, *flags, "--train.soup", of, *more), root, name)


def test_a_uniform_soup_is_the_mean_of_all(tuned):
    _, root, _ = tuned
    entry = soup(tuned, "uniform", "[a, b]", "--train.soup_choice", "uniform")
    a, b, mean = (weights(root, name) for name in ("a", "b", "uniform"))
    for name, value in mean.items():
        own = (a[name].double() + b[name].double()) / 2 if value.is_floating_point() else a[name]
        torch.testing.assert_close(value, own.to(value.dtype), rtol=0, atol=1e-7)
    index = store.read_json(f"{root}/5-model/a/index.json")["pieces"][0]["metrics"]
    other = store.read_json(f"{root}/5-model/b/index.json")["pieces"][0]["metrics"]
    best = max(index["val/rsum"], other["val/rsum"])
    assert entry["soup"]["over_best"] == entry["metrics"]["val/rsum"] - best
    lost = entry["soup"]["over_best"] < 0
    assert bool(train.warnings(entry)) == lost


def test_a_greedy_soup_is_never_below_its_best_on_val(tuned):
    _, root, _ = tuned
    entry = soup(tuned, "greedy", "[a@all, b]")
    tried = entry["soup"]["tried"]
    assert [one["with"] for one in tried if one["taken"]] == entry["soup"]["of"]
    assert {one["with"] for one in tried} == {"a@1", "a@2", "a@3", "b"}
    assert entry["soup"]["over_best"] >= 0 and tried[0]["taken"]
    taken = [one["val/rsum"] for one in tried if one["taken"]]
    assert taken == sorted(taken) and entry["metrics"]["val/rsum"] == taken[-1]
    assert not train.warnings(entry)
    assert train.notes(entry, "greedy")["soup_of"] == ", ".join(entry["soup"]["of"])


def test_other_towers_are_no_ingredient(tuned):
    encoder, root, _ = tuned
    recipe = recipe_with(encoder, "--epochs", "0", "--model.dim", "32")
    put_together(recipe, root, "other")
    with pytest.raises(InputError, match="other has other towers than the first model"):
        soup(tuned, "mixed", "[a, other]", "--train.soup_choice", "uniform")


def test_a_mean_of_low_rank_updates_is_refused(tuned):
    encoder, root, flags = tuned
    for name in ("low", "lower"):
        recipe = recipe_with(encoder, *flags, "--epochs", "0", "--model.lora_rank", "2")
        put_together(recipe, root, name)
    with pytest.raises(InputError, match="models with LoRA are not averaged"):
        soup(tuned, "lora", "[low, lower]")


def test_batch_norms_of_a_mean_have_the_moments_of_train(data):  # noqa: F811
    recipe, root = data
    for name in ("first", "second"):
        seed = str(len(name))
        flags = ("--epochs", "0", "--train.seed", seed)
        put_together(recipe_with(recipe.embed.encoder, *flags), root, name)
    flags = ("--train.soup", "[first, second]", "--train.soup_choice", "uniform")
    put_together(recipe_with(recipe.embed.encoder, *flags), root, "normed")
    loaded = saved_model.load_model(f"{root}/5-model/normed")
    assert norms.has_any(loaded.towers)
    own = {n: v for n, v in weights(root, "normed").items() if n.endswith("running_mean")}
    known = weights(root, "first")
    assert own and not any(torch.equal(value, known[name]) for name, value in own.items())
    split = train_split(recipe, root)
    again = norms.renew(loaded.towers, loaded.vocabulary, split, loaded.recipe, torch.device("cpu"))
    for name, value in own.items():
        torch.testing.assert_close(again[name], value)


def train_split(recipe, root: str):
    from pipeline.training.data import Split

    how = models.preprocessing_of(recipe.model)
    return Split(root, "train", preprocessing=how)


def test_texts_are_read_by_prompts(tuned):
    _, root, _ = tuned
    folder, text = f"{root}/5-model/before", "red circle"
    plain = saved_model.load_model(folder)
    one = saved_model.load_model(folder, ("a {} on the sand",)).embed_texts([text])
    assert torch.equal(one, plain.embed_texts(["a red circle on the sand"]))
    both = saved_model.load_model(folder, ("a {} on the sand", "{} and a star")).embed_texts([text])
    each = plain.embed_texts(["a red circle on the sand", "red circle and a star"])
    mean = torch.nn.functional.normalize(each.mean(0, keepdim=True), dim=1)
    torch.testing.assert_close(both, mean)
    assert not torch.equal(one, plain.embed_texts([text]))


@pytest.mark.parametrize("prompt", ["a photo", "{} and {}"])
def test_a_prompt_has_one_place(tiny_encoder, prompt):
    with pytest.raises(InputError, match="needs one {}"):
        recipe_with(tiny_encoder, "--evaluate.prompts", f'["{prompt}"]')


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--epochs", "0", "--resume", "latest"), "epochs 0 trains nothing, and resume"),
        (("--epochs", "0", "--train.interpolate", "true"), "trains nothing, and interpolate"),
        (("--train.interpolate", "[0.5, 2]"), "a list of numbers from 0 to 1"),
        (("--train.soup", "[a, a]"), "names a model twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tiny_encoder, flags, said):
    with pytest.raises(InputError, match=said):
        recipe_with(tiny_encoder, *flags)


def test_interpolate_true_stands_for_tenths(tiny_encoder):
    recipe = recipe_with(tiny_encoder, "--train.interpolate", "true")
    assert recipe.train.interpolate == tuple(tenth / 10 for tenth in range(11))
