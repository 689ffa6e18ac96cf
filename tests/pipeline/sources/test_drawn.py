"""Drawn scenes: the same everywhere, captions true and well formed, relevance equal to its twin."""

import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sources import drawn
from pipeline.sources.drawn.scenes import PALETTE, RADIUS
from schemas.manifest import MANIFEST
from schemas.settings import SourceSettings
from tests.helpers.paths import ROOT

SETTINGS = SourceSettings(train_images=60, val_images=0, test_images=40)


def rows_of(split, settings=SETTINGS):
    parts = [part for part in sources.parts(settings) if part.uri.startswith(f"{split}:")]
    return [row for part in parts for row in drawn.rows(settings, part)]


@pytest.fixture(scope="module")
def rows():
    return rows_of("train")


@pytest.fixture(scope="module")
def facts(rows):
    """Facts of the images and of their captions, five a piece."""
    return (
        [row["truth"][0]["facts"] for row in rows],
        [truth["facts"] for row in rows for truth in row["truth"][1:]],
    )


# ---- the truth, slowly -------------------------------------------------------------------------

SIZES = ["small", "medium", "large"]


def agreement(attribute, said, is_so):
    if attribute == "size" and said != is_so:
        return 0.5 if abs(SIZES.index(said) - SIZES.index(is_so)) == 1 else 0.0
    return float(said == is_so)


def weight_of(mention):
    return sum(drawn.WEIGHTS[a] for a, said in zip(drawn.ATTRIBUTES, mention, strict=True) if said)


def mention_truth(mention, thing):
    if thing is None:
        return 0.0
    weights, agreements = [], []
    for attribute, said, is_so in zip(drawn.ATTRIBUTES, mention, thing[:4], strict=True):
        if said:
            weights.append(drawn.WEIGHTS[attribute])
            agreements.append(agreement(attribute, said, is_so))
    share = sum(w * a for w, a in zip(weights, agreements, strict=True)) / sum(weights)
    return 0.5 * share + 0.5 * all(a == 1 for a in agreements)


def relation_holds(relation, one, other):
    axis = {"left": 4, "above": 5}[relation]
    return one is not None and other is not None and other[axis] - one[axis] >= 0.15


def slow_relevance(scene, caption):
    scene, caption = json.loads(scene), json.loads(caption)
    mentions, things, weights = caption["mentions"], scene["things"], drawn.WEIGHTS
    whole = sum(map(weight_of, mentions))
    best = 0.0
    slots = [*things, *[None] * (5 - len(things))]  # a mention may stand for no thing at all
    for chosen in itertools.permutations(slots, len(mentions)):
        truths = [mention_truth(m, thing) for m, thing in zip(mentions, chosen, strict=True)]
        score = sum(weight_of(m) * t for m, t in zip(mentions, truths, strict=True))
        if caption["relation"] and relation_holds(caption["relation"], *chosen[:2]):
            score += weights["relation"] * truths[0] * truths[1]
        best = max(best, score)
    if caption["relation"]:
        whole += weights["relation"]
    if caption["number"]:
        whole += weights["number"]
        best += weights["number"] * (caption["number"] == len(things))
    if caption["ground"]:
        whole += weights["ground"]
        best += weights["ground"] * (caption["ground"] == scene["ground"])
    return best / whole


def all_is_true(scene, caption):
    """Whether every assertion holds, without any arithmetic of relevance."""
    scene, caption = json.loads(scene), json.loads(caption)
    if caption["number"] not in (None, len(scene["things"])):
        return False
    if caption["ground"] not in (None, scene["ground"]):
        return False
    for chosen in itertools.permutations(scene["things"], len(caption["mentions"])):
        fits = all(
            said in (None, is_so)
            for mention, thing in zip(caption["mentions"], chosen, strict=True)
            for said, is_so in zip(mention, thing[:4], strict=True)
        )
        if fits and (not caption["relation"] or relation_holds(caption["relation"], *chosen[:2])):
            return True
    return False


def test_relevance_equals_its_slow_twin(facts):
    scenes, captions = facts
    slow = [[slow_relevance(s, c) for c in captions[:100]] for s in scenes]
    fast = drawn.relevance(scenes, captions[:100])
    assert fast.dtype == np.float32
    np.testing.assert_allclose(fast, slow, atol=1e-6)


def test_relevance_is_1_exactly_where_all_the_caption_says_is_true(facts):
    scenes, captions = facts
    true = np.array([[all_is_true(s, c) for c in captions] for s in scenes])
    relevance = drawn.relevance(scenes, captions)
    np.testing.assert_array_equal(relevance == 1, true)
    own = np.arange(len(captions)) // 5
    assert true[own, np.arange(len(captions))].all()
    assert true.sum() > len(captions), "vague captions are true of other scenes too"
    assert relevance.min() >= 0
    assert relevance.max() == 1


def caption_facts(*mentions, relation=None, number=None, ground=None):
    return json.dumps(
        {"mentions": mentions, "relation": relation, "number": number, "ground": ground}
    )


def test_relevance_of_near_misses_by_hand():
    scene = json.dumps(
        {
            "things": [
                ["circle", "red", "small", "plain", 0.2, 0.5],
                ["square", "blue", "large", "striped", 0.7, 0.5],
            ],
            "ground": "snow",
        }
    )
    circle, square = ["circle", "red", None, None], ["square", "blue", None, None]
    crossed = ["circle", "blue", None, None]
    captions = {
        caption_facts(circle, square, relation="left", number=2, ground="snow"): 1,
        caption_facts(square, circle, relation="left"): 14 / 16,  # the relation alone is wrong
        caption_facts(crossed): 0.5 * 4 / 7,  # both words are in the picture, not together
        caption_facts(["square", "red", None, None], ground="snow"): (0.5 * 4 + 3) / 10,
        caption_facts(circle, circle): 7 / 14,  # one circle is not two
        caption_facts(["circle", None, "medium", None]): 0.5 * 4.5 / 5,
        caption_facts(["star", None, None, None], number=2): 2 / 6,
        caption_facts(number=4, ground="snow"): 3 / 5,
    }
    found = drawn.relevance([scene], list(captions))[0]
    np.testing.assert_allclose(found, list(captions.values()), atol=1e-6)


def test_relevance_is_graded_and_is_not_word_overlap(rows, facts):
    relevance = drawn.relevance(*facts)
    assert len(np.unique(relevance)) > 100
    assert 0.05 < relevance.mean() < 0.3
    texts = [caption["text"] for row in rows for caption in row["captions"]]
    words = [set(re.findall(r"[a-z-]+", text.lower())) for text in texts]
    own = [set().union(*words[5 * i : 5 * i + 5]) for i in range(len(rows))]
    overlap = np.array([[len(w & o) / len(w) for w in words] for o in own])
    correlation = np.corrcoef(overlap.ravel(), relevance.ravel())[0, 1]
    assert 0.2 < correlation < 0.8


# ---- captions ----------------------------------------------------------------------------------


def test_captions_are_sentences(rows):
    vowel = re.compile(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]")
    for text in (caption["text"] for row in rows for caption in row["captions"]):
        assert re.fullmatch(r"[A-Z][a-z, -]+\.", text), text
        assert "  " not in text and not vowel.search(text), text
        assert not re.search(r"\b(two|three|four|five) (\w+ )*?(fishs|boxs|circle)\b", text), text


def test_captions_seldom_repeat_and_each_image_has_five():
    rows = rows_of("test", SourceSettings(test_images=500))
    texts = [[caption["text"] for caption in row["captions"]] for row in rows]
    assert {len(captions) for captions in texts} == {5}
    for kind, largest in ((0, 0.02), (1, 0.02), (4, 0.1)):
        counts = Counter(captions[kind] for captions in texts)
        assert sum(n for n in counts.values() if n > 1) / len(texts) <= largest
    assert len({text.split()[0] for captions in texts for text in captions}) > 15


def test_every_attribute_ground_and_number_is_spoken_of(rows):
    said = [json.loads(truth["facts"]) for row in rows for truth in row["truth"][1:]]
    for place, values in enumerate(drawn.ATTRIBUTES.values()):
        assert {mention[place] for facts in said for mention in facts["mentions"]} == {
            None,
            *values,
        }
    assert {facts["relation"] for facts in said} == {None, "left", "above"}
    assert {facts["number"] for facts in said} == {None, 2, 3, 4, 5}
    assert {facts["ground"] for facts in said} == {None, *drawn.GROUNDS}


# ---- rows and pictures -------------------------------------------------------------------------


def test_rows_are_manifest_rows_with_their_truth(rows):
    assert [row["image_id"] for row in rows[:2]] == ["train-000000", "train-000001"]
    for row in rows:
        assert set(row) <= {*MANIFEST.names, "truth", "named"}
        ids = [row["image_id"], *(caption["caption_id"] for caption in row["captions"])]
        assert [truth["id"] for truth in row["truth"]] == ids
        assert row["split"] == "train"


def test_parts_cover_every_scene_once_and_do_not_change_it(monkeypatch):
    settings = SourceSettings(train_images=25, val_images=3, test_images=0)
    whole = [row for part in sources.parts(settings) for row in drawn.rows(settings, part)]
    monkeypatch.setattr(drawn, "PART_SCENES", 10)
    assert len(drawn.parts(settings)) == 4
    cut = [row for part in sources.parts(settings) for row in drawn.rows(settings, part)]
    assert cut == whole
    assert Counter(row["split"] for row in whole) == {"train": 25, "val": 3}


def test_another_process_draws_and_writes_the_same(rows):
    program = (
        "import hashlib, json\n"
        "from pipeline.sources import drawn\n"
        "from pipeline.sources.part import Part\n"
        "from schemas.settings import SourceSettings\n"
        "rows = list(drawn.rows(SourceSettings(), Part('train:3:6')))\n"
        "digests = [hashlib.sha256(drawn.load(row['uri'])).hexdigest() for row in rows]\n"
        "print(json.dumps([rows, digests]))"
    )
    there = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    digests = [hashlib.sha256(drawn.load(row["uri"])).hexdigest() for row in rows[3:6]]
    assert json.loads(there) == [rows[3:6], digests]


def test_seed_and_split_make_other_scenes():
    def facts(seed, split):
        settings = SourceSettings(train_images=20, test_images=20, val_images=0, seed=seed)
        return [row["truth"][0]["facts"] for row in rows_of(split, settings)]

    scenes = [*facts(0, "train"), *facts(1, "train"), *facts(0, "test")]
    assert len(set(scenes)) == 60


@pytest.mark.parametrize("size", [32, 64, 100])
def test_pictures_have_the_size_asked_for_and_show_something(size):
    settings = SourceSettings(train_images=8, val_images=0, test_images=0, image_size=size)
    for row in rows_of("train", settings):
        image = Image.open(io.BytesIO(drawn.load(row["uri"])))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (size, size))
        assert (row["width"], row["height"]) == (size, size)
        assert np.asarray(image).std() > 10


def test_things_show_their_colour_where_the_facts_say():
    """The colour at a plain thing's centre is nearest to its own of the palette."""
    palette = PALETTE
    nearest = []
    for row in rows_of("train"):
        pixels = np.asarray(Image.open(io.BytesIO(drawn.load(row["uri"]))), dtype=float)
        for shape, colour, _, texture, x, y in json.loads(row["truth"][0]["facts"])["things"]:
            if texture == "plain" and shape in ("circle", "square", "triangle", "heart", "diamond"):
                column, line = int(x * 64), int(y * 64)
                patch = pixels[line - 1 : line + 2, column - 1 : column + 2].reshape(-1, 3)
                apart = {c: np.abs(np.median(patch, 0) - rgb).sum() for c, rgb in palette.items()}
                nearest.append(min(apart, key=apart.get) == colour)
    assert len(nearest) > 20
    assert np.mean(nearest) == 1


@pytest.mark.parametrize("uri", ["drawn:0/train/7", "drawn:0/train/x/64", "drawn:zero/train/1/64"])
def test_a_uri_that_is_no_scene_is_an_input_error(uri):
    with pytest.raises(InputError, match="is not a drawn scene; expected drawn:SEED/SPLIT"):
        drawn.load(uri)


def test_things_do_not_touch_and_lie_inside(rows):
    radius = RADIUS
    for row in rows:
        things = json.loads(row["truth"][0]["facts"])["things"]
        assert 2 <= len(things) <= 5
        for _, _, size, _, x, y in things:
            assert radius[size] < min(x, y, 1 - x, 1 - y)
        for one, other in itertools.combinations(things, 2):
            apart = np.hypot(one[4] - other[4], one[5] - other[5])
            assert apart > radius[one[2]] + radius[other[2]]
