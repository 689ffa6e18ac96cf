"""Scenes drawn here and now: the demo's data, with the true relevance in closed form.

    relevance = Σ weight · truth / Σ weight      over what the caption asserts

An assertion is one of

- a mention of a thing; its weight is the sum of its attributes' (`WEIGHTS`). Its truth for a thing
  of the scene is half the (weighted) share of the mentioned attributes that agree, and half whether
  all of them do: a blue circle makes "a red circle" true by 2/7. Neighbouring sizes agree by half;
- a relation of the first two mentions; truth 1 if it holds between the two things they stand for,
  times the truth of both mentions;
- the number of things in the scene; truth 1/2 if it is off by one, 0 if by more;
- the ground; truth 1 or 0.

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

from pipeline._errors import InputError
from pipeline.sources import _scenes, _sentences
from pipeline.sources._scenes import COLOURS, GROUNDS, MOST_THINGS, SHAPES, SIZES, TEXTURES
from schemas.settings import SourceSettings

PART_SCENES = 1000  # scenes of a part
SCENES_BLOCK = 32  # scenes whose relevance is computed at once: keeps the work in cache

WEIGHTS = {  # what a person would mind most being wrong
    "shape": 4,
    "colour": 3,
    "size": 1,
    "texture": 1,
    "relation": 2,
    "number": 2,
    "ground": 3,
}
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}
RELATIONS = ("left", "above")


def parts(settings: SourceSettings) -> list[str]:
    """'train:0:1000' and so on: a split and a range of its scenes."""
    counts = {split: getattr(settings, f"{split}_images") for split in ("train", "val", "test")}
    return [
        f"{split}:{start}:{min(start + PART_SCENES, count)}"
        for split, count in counts.items()
        for start in range(0, count, PART_SCENES)
    ]


def rows(settings: SourceSettings, part: str) -> Iterator[dict]:
    """Manifest rows of a range of scenes, each with the facts of the scene and of its captions."""
    split, start, stop = part.split(":")
    for index in range(int(start), int(stop)):
        scene = _scenes.scene(settings.seed, split, index)
        rng = random.Random(f"captions {settings.seed}/{split}/{index}")
        written = _sentences.captions(scene, rng)
        image_id = f"{split}-{index:06d}"
        ids = [f"{image_id}-{k}" for k in range(len(written))]
        facts = [scene_facts(scene), *map(caption_facts, written)]
        yield {
            "image_id": image_id,
            "uri": f"drawn:{settings.seed}/{split}/{index}/{settings.image_size}",
            "split": split,
            "captions": [
                {"caption_id": id_, "text": caption.text}
                for id_, caption in zip(ids, written, strict=True)
            ],
            "width": settings.image_size,
            "height": settings.image_size,
            "sha256": None,
            "source": "drawn",
            "truth": [
                {"id": id_, "facts": fact}
                for id_, fact in zip([image_id, *ids], facts, strict=True)
            ],
        }


def inputs(settings: SourceSettings) -> list[str]:
    """Nothing: a scene depends on the settings alone."""
    return []


def load(uri: str) -> bytes:
    """The picture as JPEG bytes, the same ones wherever it is drawn (by one version of Pillow)."""
    try:
        seed, split, index, size = uri.removeprefix("drawn:").split("/")
        seed, index, size = int(seed), int(index), int(size)
    except ValueError:
        raise InputError(
            f"{uri!r} is not a drawn scene; expected drawn:SEED/SPLIT/INDEX/SIZE"
        ) from None
    scene = _scenes.scene(seed, split, index)
    return _scenes.picture(scene, size, f"{seed}/{split}/{index}")


# ---- the truth ---------------------------------------------------------------------------------


def scene_facts(scene: _scenes.Scene) -> str:
    """JSON of a scene: its things as [shape, colour, size, texture, x, y], and its ground."""
    return json.dumps(
        {"things": [astuple(thing) for thing in scene.things], "ground": scene.ground}
    )


def caption_facts(caption: _sentences.Caption) -> str:
    """JSON of what a caption asserts; null where it does not say."""
    facts = asdict(caption)
    del facts["text"]
    return json.dumps(facts)


def relevance(scenes: list[str], captions: list[str]) -> np.ndarray:
    """True relevance of M scenes (facts) to N captions (facts): float32 [M, N] in [0, 1]."""
    things_MTA, holds_MRTT, number_M, ground_M = _scene_arrays([json.loads(s) for s in scenes])
    said = [json.loads(caption) for caption in captions]
    relevance_MN = np.empty((len(scenes), len(said)), np.float32)
    for group in _alike(said):
        claims = _caption_arrays([said[j] for j in group])
        for start in range(0, len(scenes), SCENES_BLOCK):
            block = slice(start, start + SCENES_BLOCK)
            relevance_MN[block, group] = _relevance(
                things_MTA[block], holds_MRTT[block], number_M[block], ground_M[block], *claims
            )
    return relevance_MN


def _alike(said: list[dict]) -> list[list[int]]:
    """Captions grouped by their number of mentions and whether they state a relation."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for j, facts in enumerate(said):
        groups.setdefault((len(facts["mentions"]), facts["relation"] is not None), []).append(j)
    return list(groups.values())


def _scene_arrays(scenes: list[dict]):
    """Things as one-hot attributes, which relations hold between them, their number, the ground."""
    width = sum(map(len, ATTRIBUTES.values()))
    things_MTA = np.zeros((len(scenes), MOST_THINGS, width), np.float32)
    places_MT2 = np.full((len(scenes), MOST_THINGS, 2), np.nan)
    for i, facts in enumerate(scenes):
        for t, (*look, x, y) in enumerate(facts["things"]):
            things_MTA[i, t, _columns(look)] = 1
            places_MT2[i, t] = x, y
    apart = places_MT2[:, None, :, :] - places_MT2[:, :, None, :]  # of things t, u: u's less t's
    holds_MRTT = (apart >= _scenes.APART).transpose(0, 3, 1, 2).astype(np.float32)
    number_M = np.array([len(facts["things"]) for facts in scenes])
    ground_M = np.array([GROUNDS.index(facts["ground"]) for facts in scenes])
    return things_MTA, holds_MRTT, number_M, ground_M


def _columns(look: list[str]) -> list[int]:
    offsets = itertools.accumulate(map(len, ATTRIBUTES.values()), initial=0)
    pairs = zip(offsets, ATTRIBUTES.values(), look, strict=False)
    return [offset + values.index(value) for offset, values, value in pairs]


def _caption_arrays(said: list[dict]):
    """Weights of the mentioned attributes, of relation, number and ground, and their values."""
    mentions = len(said[0]["mentions"])
    width = sum(map(len, ATTRIBUTES.values()))
    weights_KNA = np.zeros((mentions, len(said), width), np.float32)
    total_KN = np.zeros((mentions, len(said)), np.float32)
    for j, facts in enumerate(said):
        for k, mention in enumerate(facts["mentions"]):
            weights_KNA[k, j] = _agreement(tuple(mention))
            total_KN[k, j] = _weight(mention)
    relation_N = np.array([RELATIONS.index(f["relation"]) if f["relation"] else -1 for f in said])
    number_N = np.array([f["number"] or 0 for f in said])
    ground_N = np.array([GROUNDS.index(f["ground"]) if f["ground"] else -1 for f in said])
    return weights_KNA, total_KN, relation_N, number_N, ground_N


def _weight(mention) -> int:
    return sum(WEIGHTS[a] for a, value in zip(ATTRIBUTES, mention, strict=True) if value)


def _agreement(mention) -> np.ndarray:
    """Weight of each attribute's value for this mention, half of it for a neighbouring size."""
    agreement_A = []
    for (attribute, values), said in zip(ATTRIBUTES.items(), mention, strict=True):
        for value in values:
            agrees = float(value == said)
            if attribute == "size" and said and abs(values.index(value) - values.index(said)) == 1:
                agrees = 0.5
            agreement_A.append(WEIGHTS[attribute] * agrees)
    return np.array(agreement_A, np.float32)


def _relevance(
    things_BTA,
    holds_BRTT,
    number_B,
    ground_B,
    weights_KNA,
    total_KN,
    relation_N,
    number_N,
    ground_N,
) -> np.ndarray:
    """Relevance of a block of scenes to captions with equally many mentions, [B, N]."""
    mentions = len(weights_KNA)
    truth = {}  # of mention k for thing t, [B, N]
    for k, t in itertools.product(range(mentions), range(MOST_THINGS)):
        share = things_BTA[:, t] @ weights_KNA[k].T / total_KN[k]
        truth[k, t] = share / 2 + (share == 1) / np.float32(2)
    related = relation_N[0] >= 0
    if related:
        relation = {
            (t, u): WEIGHTS["relation"]
            * holds_BRTT[:, relation_N, t, u]
            * truth[0, t]
            * truth[1, u]
            for t, u in itertools.permutations(range(MOST_THINGS), 2)
        }
    for (k, t), value in truth.items():
        truth[k, t] = value * total_KN[k]
    best = np.zeros((len(things_BTA), weights_KNA.shape[1]), np.float32)
    for chosen in itertools.permutations(range(MOST_THINGS), mentions):
        score = relation[chosen[:2]].copy() if related else np.zeros_like(best)
        for k, t in enumerate(chosen):
            score += truth[k, t]
        np.maximum(best, score, out=best)
    off_BN = np.abs(number_B[:, None] - number_N)
    best += WEIGHTS["number"] * (number_N > 0) * np.maximum(0, 1 - off_BN / 2)
    best += WEIGHTS["ground"] * (ground_B[:, None] == ground_N)
    weight_N = total_KN.sum(0) + WEIGHTS["relation"] * (relation_N >= 0)
    weight_N += WEIGHTS["number"] * (number_N > 0) + WEIGHTS["ground"] * (ground_N >= 0)
    return best / weight_N
