"""Scenes drawn here and now: the demo's data, with the true relevance in closed form.

    relevance = Σ weight · truth / Σ weight      over what the caption asserts

An assertion is one of

- a mention of a thing; its weight is the sum of its attributes' (`WEIGHTS`). Its truth for a thing
  of the scene is half the (weighted) share of the mentioned attributes that agree, and half whether
  all of them do: a blue circle makes "a red circle" true by 2/7. Neighbouring sizes agree by half;
- a relation of the first two mentions; truth 1 if it holds between the two things they stand for,
  times the truth of both mentions;
- the number of all things in the scene, and the ground; truth 1 or 0.

Every mention stands for another thing of the scene, and of all ways to assign them the best counts.
So relevance is 1 exactly for scenes of which all the caption says is true, its own among them.

Arrays: M scenes (B in a block), N captions, T things of a scene, K mentions of a caption, A values
of all attributes, R relations.
"""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, astuple

import numpy as np
import PIL

from pipeline.errors import InputError
from pipeline.sources.drawn import captions as drawn_captions
from pipeline.sources.drawn import scenes as drawn_scenes
from pipeline.sources.drawn.scenes import COLOURS, GROUNDS, MOST_THINGS, SHAPES, SIZES, TEXTURES
from pipeline.sources.part import Part
from pipeline.sources.readers import annotations
from pipeline.sources.readers.cells import Caption
from schemas.settings import SourceSettings

SETTINGS = {"train_images", "val_images", "test_images", "image_size", "seed"}
PART_SCENES = 1000  # scenes of a part
DRAWN_BY = f"Pillow={PIL.__version__}"  # in a row's uri, so that a shard is redone by another one
SCENES_BLOCK = 32  # scenes whose relevance is computed at once: keeps the work in cache

# What a person would mind most being wrong.
WEIGHTS = {
    "shape": 4,
    "colour": 3,
    "size": 1,
    "texture": 1,
    "relation": 2,
    "number": 2,
    "ground": 3,
}
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}
_VALUES = [(name, value) for name, values in ATTRIBUTES.items() for value in values]
COLUMNS = {pair: column for column, pair in enumerate(_VALUES)}  # of A
RELATIONS = ("left", "above")


def parts(settings: SourceSettings) -> list[str]:
    """'train:0:1000' and so on: a split and a range of its scenes."""
    counts = {split: getattr(settings, f"{split}_images") for split in ("train", "val", "test")}
    return [
        f"{split}:{start}:{min(start + PART_SCENES, count)}"
        for split, count in counts.items()
        for start in range(0, count, PART_SCENES)
    ]


def rows(settings: SourceSettings, part: Part) -> Iterator[dict]:
    """Manifest rows of a range of scenes, each with the facts of the scene and of its captions."""
    split, start, stop = part.uri.split(":")
    for index in range(int(start), int(stop)):
        scene = drawn_scenes.scene(settings.seed, split, index)
        rng = random.Random(f"captions {settings.seed}/{split}/{index}")
        written = drawn_captions.captions(scene, rng)
        image_id = f"{split}-{index:06d}"
        ids = [f"{image_id}#{k}" for k in range(len(written))]
        facts = [scene_facts(scene), *map(caption_facts, written)]
        truth = zip([image_id, *ids], facts, strict=True)
        uri = f"drawn:{settings.seed}/{split}/{index}/{settings.image_size}?{DRAWN_BY}"
        texts = [Caption(id_, caption.text) for id_, caption in zip(ids, written, strict=True)]
        yield annotations.row(image_id, uri, texts, split=split) | {
            "width": settings.image_size,
            "height": settings.image_size,
            "truth": [{"id": id_, "facts": fact} for id_, fact in truth],
        }


def inputs(settings: SourceSettings, part: str) -> list:
    """What draws: another version may draw other pixels."""
    return [DRAWN_BY]


def files_of(uri: str) -> tuple[str, ...]:
    """None: a scene lies in no file."""
    return ()


def load(uri: str) -> bytes:
    """The picture as JPEG bytes, the same ones wherever it is drawn (by one version of Pillow)."""
    try:
        given, split, *numbers = uri.removeprefix("drawn:").partition("?")[0].split("/")
        seed, (index, size) = int(given), map(int, numbers)
    except ValueError:
        expected = "drawn:SEED/SPLIT/INDEX/SIZE"
        raise InputError(f"{uri!r} is not a drawn scene; expected {expected}") from None
    scene = drawn_scenes.scene(seed, split, index)
    return drawn_scenes.picture(scene, size, f"{seed}/{split}/{index}")


# ---- the truth ---------------------------------------------------------------------------------


def scene_facts(scene: drawn_scenes.Scene) -> str:
    """JSON of a scene: its things as [shape, colour, size, texture, x, y], and its ground."""
    return json.dumps({"things": [astuple(t) for t in scene.things], "ground": scene.ground})


def caption_facts(caption: drawn_captions.Caption) -> str:
    """JSON of what a caption asserts; null where it does not say."""
    facts = asdict(caption)
    del facts["text"]
    return json.dumps(facts)


def relevance(scenes: list[str], captions: list[str]) -> np.ndarray:
    """True relevance of M scenes (facts) to N captions (facts): float32 [M, N] in [0, 1]."""
    arrays_M = _scene_arrays([json.loads(scene) for scene in scenes])
    said = [json.loads(caption) for caption in captions]
    relevance_MN = np.empty((len(scenes), len(said)), np.float32)
    alike: dict[tuple[int, bool], list[int]] = {}  # by their mentions, and whether they relate two
    for j, facts in enumerate(said):
        alike.setdefault((len(facts["mentions"]), facts["relation"] is not None), []).append(j)
    for group in alike.values():
        arrays_N = _caption_arrays([said[j] for j in group])
        for start in range(0, len(scenes), SCENES_BLOCK):
            block = slice(start, start + SCENES_BLOCK)
            arrays_B = [array_M[block] for array_M in arrays_M]
            relevance_MN[block, group] = _relevance(arrays_B, arrays_N)
    return relevance_MN


def _scene_arrays(scenes: list[dict]):
    """Things as one-hot attributes, which relations hold between them, their number, the ground."""
    things_MTA = np.zeros((len(scenes), MOST_THINGS, len(COLUMNS)), np.float32)
    places_MT2 = np.full((len(scenes), MOST_THINGS, 2), np.nan)
    for i, facts in enumerate(scenes):
        for t, (*look, x, y) in enumerate(facts["things"]):
            things_MTA[i, t, [COLUMNS[pair] for pair in zip(ATTRIBUTES, look, strict=True)]] = 1
            places_MT2[i, t] = x, y
    apart = places_MT2[:, None, :, :] - places_MT2[:, :, None, :]  # of things t, u: u's less t's
    holds_MRTT = (apart >= drawn_scenes.APART).transpose(0, 3, 1, 2).astype(np.float32)
    number_M = np.array([len(facts["things"]) for facts in scenes])
    ground_M = np.array([GROUNDS.index(facts["ground"]) for facts in scenes])
    return things_MTA, holds_MRTT, number_M, ground_M


def _caption_arrays(said: list[dict]):
    """Weights of the mentioned attributes, of relation, number and ground, and their values."""
    mentions = len(said[0]["mentions"])
    weights_KNA = np.zeros((mentions, len(said), len(COLUMNS)), np.float32)
    total_KN = np.zeros((mentions, len(said)), np.float32)
    for j, facts in enumerate(said):
        for k, mention in enumerate(facts["mentions"]):
            weights_KNA[k, j] = _agreement(mention)
            told = zip(ATTRIBUTES, mention, strict=True)
            total_KN[k, j] = sum(WEIGHTS[attribute] for attribute, value in told if value)
    relation_N = np.array([RELATIONS.index(f["relation"]) if f["relation"] else -1 for f in said])
    number_N = np.array([f["number"] or 0 for f in said])
    ground_N = np.array([GROUNDS.index(f["ground"]) if f["ground"] else -1 for f in said])
    return weights_KNA, total_KN, relation_N, number_N, ground_N


def _agreement(mention: list) -> np.ndarray:
    """Weight of each attribute's value for this mention, half of it for a neighbouring size."""
    agreement_A = []
    for (attribute, values), said in zip(ATTRIBUTES.items(), mention, strict=True):
        for value in values:
            agrees = float(value == said)
            if attribute == "size" and said and abs(values.index(value) - values.index(said)) == 1:
                agrees = 0.5
            agreement_A.append(WEIGHTS[attribute] * agrees)
    return np.array(agreement_A, np.float32)


def _relevance(arrays_B, arrays_N) -> np.ndarray:
    """Relevance of a block of scenes to captions with equally many mentions, [B, N]."""
    things_BTA, holds_BRTT, number_B, ground_B = arrays_B
    weights_KNA, total_KN, relation_N, number_N, ground_N = arrays_N
    mentions = len(weights_KNA)
    share_BTKN = np.tensordot(things_BTA, weights_KNA, axes=(2, 2)) / total_KN
    truth_KTBN = (share_BTKN / 2 + (share_BTKN == 1) / np.float32(2)).transpose(2, 1, 0, 3)
    score_KTBN = np.ascontiguousarray(truth_KTBN * total_KN[:, None, None])
    related = relation_N[0] >= 0
    if related:
        holds_RTTB = (WEIGHTS["relation"] * holds_BRTT).transpose(1, 2, 3, 0)
        related_BN = {
            (t, u): holds_RTTB[relation_N, t, u].T * truth_KTBN[0, t] * truth_KTBN[1, u]
            for t, u in itertools.permutations(range(MOST_THINGS), 2)
        }
    best_BN = np.zeros((len(things_BTA), len(number_N)), np.float32)
    for chosen in itertools.permutations(range(MOST_THINGS), mentions):
        score_BN = sum(score_KTBN[k, t] for k, t in enumerate(chosen))
        if related:
            score_BN = score_BN + related_BN[chosen[0], chosen[1]]
        np.maximum(best_BN, score_BN, out=best_BN)
    best_BN += WEIGHTS["number"] * (number_B[:, None] == number_N)
    best_BN += WEIGHTS["ground"] * (ground_B[:, None] == ground_N)
    weight_N = total_KN.sum(0) + WEIGHTS["relation"] * (relation_N >= 0)
    weight_N += WEIGHTS["number"] * (number_N > 0) + WEIGHTS["ground"] * (ground_N >= 0)
    return best_BN / weight_N
