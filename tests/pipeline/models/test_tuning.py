"""What of each tower is trained: modes, rates, low-rank updates and their merging."""

import pytest
import torch
from torch import nn

from pipeline import models as towers
from pipeline.models.tuning import merged
from pipeline.training.learner.optimizer import optimizer_of
from schemas.settings import ModelSettings, TrainSettings
from tests.pipeline.models.test_pretrained import (
    CAPTIONS,
    build,
    clip,  # noqa: F401  (a fixture, and its users)
    pictures,
)


def from_scratch(**changed):
    words = towers.Vocabulary.of(CAPTIONS, min_count=1)
    settings = ModelSettings(**{"image_size": 48, "width": 4, "dim": 8, "word_dim": 6} | changed)
    return towers.build(settings, vocabulary=words, features=None), words


def trained(model, side: str) -> set[str]:
    named = getattr(model, side).named_parameters()
    return {name for name, parameter in named if parameter.requires_grad}


def blocks(names: set[str]) -> set[int]:
    return {int(name.split("layers.")[1].split(".")[0]) for name in names if "layers." in name}


def test_each_tower_by_itself(clip):  # noqa: F811
    model, _ = build(clip, tune_image={"mode": "frozen"}, tune_text={"mode": "last", "layers": 2})
    text = trained(model, "text")
    assert not trained(model, "image")
    assert blocks(text) == {1, 2} and {"project.weight", "encoder.final_layer_norm.bias"} <= text
    assert not any("embeddings" in name for name in text)
    # Settings of both towers hold for the one that says nothing.
    model, _ = build(clip, freeze=2, tune_image={"mode": "full"})
    assert blocks(trained(model, "text")) == {2}
    assert len(trained(model, "image")) == len([*model.image.parameters()])


def test_a_new_projection_on_a_frozen_tower_is_trained(clip):  # noqa: F811
    model, _ = build(clip, text="gru", dim=8, tune_image={"mode": "frozen"})
    assert trained(model, "image") == {"project.weight", "project.bias"}
    assert trained(model, "text") and not model.train().image.encoder.training
    assert model.image.project.training and model.text.training and not model.eval().text.training


@pytest.mark.parametrize("side", ["image", "text"])
def test_towers_from_scratch_can_be_frozen(side):
    model, _ = from_scratch(**{f"tune_{side}": {"mode": "frozen"}})
    other = {"image": "text", "text": "image"}[side]
    assert not trained(model, side) and trained(model, other)
    before = {k: v.clone() for k, v in getattr(model, side).state_dict().items()}
    model.train()
    model.encode_image(pictures())
    for key, value in getattr(model, side).state_dict().items():
        assert torch.equal(value, before[key]), key  # no batch norm's moments move


def test_the_last_stages_of_a_convolutional_tower():
    model, _ = from_scratch(tune_image={"mode": "last", "layers": 2})
    assert {n.split(".")[1] for n in trained(model, "image") if "stages" in n} == {"3", "4"}
    model.train()
    norms = [m for m in model.image.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [norm.training for norm in norms] == [False, False, False, True, True]


def test_batch_norms_keep_their_moments_while_their_weights_are_trained():
    model, _ = from_scratch(tune_image={"frozen_batch_norm": True})
    norm = next(m for m in model.image.modules() if isinstance(m, nn.BatchNorm2d))
    model.train()
    model.encode_image(pictures())
    assert norm.weight.requires_grad and norm.running_mean.eq(0).all() and not norm.training


def test_rates_fall_with_depth_in_one_tower_and_decay_is_for_matrices(clip):  # noqa: F811
    model, _ = build(clip, tune_image={"layer_decay": 0.5}, tune_text={"lr": 1e-3}, layer_decay=0.9)
    model.learned["info_nce_temperature"] = nn.Parameter(torch.tensor(2.0))
    how = {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1, "temperature_lr": 0.5}
    how |= {"betas": (0.9, 0.98), "eps": 1e-6, "no_decay": "embeddings"}
    optimizer = optimizer_of(model, TrainSettings(**how))
    found = {
        id(p): (g["lr_scale"], g["weight_decay"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    named = {name: found[id(p)] for name, p in model.named_parameters()}

    def has(end: str) -> tuple[float, float]:
        return pytest.approx(next(v for name, v in named.items() if name.endswith(end)))

    assert has("image.encoder.embeddings.patch_embedding.weight") == (0.5**4, 0.1)
    assert has("image.encoder.embeddings.position_embedding.weight") == (0.5**4, 0.0)
    assert has("image.encoder.embeddings.class_embedding") == (0.5**4, 0.0)
    assert has("image.encoder.encoder.layers.2.mlp.fc1.weight") == (0.5, 0.1)
    assert has("image.encoder.encoder.layers.2.mlp.fc1.bias") == (0.5, 0.0)
    assert has("image.encoder.post_layernorm.weight") == (1, 0.0)
    assert has("text.encoder.encoder.layers.0.mlp.fc1.weight") == (0.1 * 0.9**3, 0.1)
    assert has("learned.info_nce_temperature") == (50, 0.0)
    assert optimizer.defaults["betas"] == (0.9, 0.98) and optimizer.defaults["eps"] == 1e-6


LORA = {"mode": "lora", "lora_rank": 2, "lora_alpha": 6, "lora_targets": ["q_proj", "mlp.fc1"]}


def test_low_rank_updates_of_the_layers_that_are_named(clip):  # noqa: F811
    model, _ = build(clip, tune_image=LORA)
    names = trained(model, "image")
    assert names and all("lora_" in name or name == "project.weight" for name in names)
    layers = {
        name.split(".lora_")[0].rpartition("layers.")[2] for name in names - {"project.weight"}
    }
    assert layers == {f"{n}.{part}" for n in range(3) for part in ("self_attn.q_proj", "mlp.fc1")}
    layer = model.get_submodule("image.encoder.encoder.layers.0.mlp.fc1")
    assert layer.scaling == {"default": 3} and layer.r == {"default": 2}
    assert len(trained(model, "text")) == len([*model.text.parameters()])


def test_merged_updates_give_the_same_vectors_without_adapters(clip):  # noqa: F811
    model, words = build(clip, tune_image=LORA, tune_text={"mode": "lora"})
    plain, _ = build(clip)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    own, given = merged(model.eval()), (pictures(), *words.encode(CAPTIONS, 64))
    with torch.inference_mode():
        ours, theirs, before = own(*given), model(*given), plain.eval()(*given)
    for one, two, other in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(one, other, atol=1e-2)
    plain.load_state_dict(own.state_dict())  # its names are those of a model without
    assert any("lora_" in name for name in model.state_dict())


def test_patches_are_left_out_of_training_alone(clip):  # noqa: F811
    model, _ = build(clip, tune_image={"patch_dropout": 0.5})
    seen = []
    model.image.encoder.encoder.register_forward_pre_hook(
        lambda module, given, how: seen.append(how["inputs_embeds"].shape[1]), with_kwargs=True
    )
    whole = model.eval().encode_image(pictures())
    torch.testing.assert_close(whole, build(clip)[0].eval().encode_image(pictures()))
    model.train().encode_image(pictures())
    assert seen == [10, 6]  # of nine patches five, and the class token


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"image": "pixels", "tune_image": {"mode": "lora"}}, "none of the layers of attention"),
        ({"text": "gru", "tune_text": {"mode": "last", "layers": 1}}, "not made of blocks"),
        ({"text": "gru", "tune_text": {"layer_decay": 0.5}}, "not made of blocks; set it to 1"),
        ({"tune_text": {"mode": "last", "layers": 9}}, "layers 9, and it has 3 blocks"),
        ({"tune_text": {"mode": "lora", "lora_targets": ["q"]}}, "no layer is called q; its lay"),
        ({"tune_text": {"frozen_batch_norm": True}}, "it has no batch norm"),
        ({"image": "pixels", "tune_image": {"patch_dropout": 0.5}}, "no image into patches"),
    ],
)
def test_what_a_tower_cannot_do_is_refused_with_a_sentence(clip, changed, said):  # noqa: F811
    settings = {"image": "pretrained", "text": "pretrained", "image_size": 48, "pretrained": clip}
    words = towers.Vocabulary.of(CAPTIONS, min_count=1)
    with pytest.raises(ValueError, match=rf"model.tune_\w+ of the \w+ tower: .*{said}"):
        towers.build(ModelSettings(**settings | changed), vocabulary=words, features=None)
