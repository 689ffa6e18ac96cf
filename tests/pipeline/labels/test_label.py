"""Relevance lists, against slow loops."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.labels import embed, label, relevance_lists
from pipeline.labels.candidates import Decided
from pipeline.labels.caption_vectors import Captions
from pipeline.labels.encoders import sentences
from pipeline.labels.relevance_lists import Direction, Lists
from pipeline.sharding import sidecar
from pipeline.storage import run_folder
from pipeline.storage.parquet import read_table, write_table
from pipeline.storage.run_folder import RunFolder
from pipeline.storage.vector_columns import vector_column
from schemas.relevance import ENCODINGS
from schemas.settings import LabelSettings, Recipe
from tests.helpers.relevance_lists import COUNTS, cosine, embeddings, labelled
from tests.helpers.stages import SCENES, finish, sharded, without_the_second_shard


@pytest.fixture(scope="module")
def recipe(tiny_encoder) -> Recipe:
    return Recipe(name="t", source=SCENES, shard={"samples": 5}, embed={"encoder": tiny_encoder})


def test_a_shard_of_which_nothing_was_accepted_has_no_embeddings_and_no_labels(recipe, tmp_path):
    root = str(tmp_path)
    without_the_second_shard(recipe, root)
    assert [e["samples"] for e in run_folder.read_index(f"{root}/2-shards")["pieces"]] == [
        5,
        0,
        2,
        3,
        4,
    ]
    index = finish(embed.plan(recipe, root), embed.write_embeddings)
    assert [entry["captions"] > 0 for entry in index["pieces"]] == [True, False, True, True, True]
    index = finish(label.plan(recipe, root), label.write_relevance)
    assert [entry["queries"] > 0 for entry in index["pieces"]] == [True, False, True, True, True]


# ---- label -------------------------------------------------------------------------------------


def by_hand(captions: dict, image: str, caption: str, how: LabelSettings) -> float:
    """R of an image and a caption, from METHODS: map(max or mean over the image's captions)."""
    cosines = [cosine(v, captions[caption][1]) for owner, v in captions.values() if owner == image]
    value = max(cosines) if how.reduce == "max" else sum(cosines) / len(cosines)
    return (1 + value) / 2 if how.map == "half" else max(value, 0)


@pytest.mark.parametrize("map", ["half", "clip"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("top_k", [3, 64])
def test_relevance_lists_are_those_of_a_slow_loop(tmp_path, map, reduce, top_k):
    captions = embeddings(str(tmp_path), COUNTS)
    images = list(dict.fromkeys(image for image, _ in captions.values()))
    how = LabelSettings(map=map, reduce=reduce, top_k=top_k)
    lists = labelled(str(tmp_path), **how.model_dump())
    expected_queries = [
        (q, d)
        for name in COUNTS
        for d, ids in (("i2t", images), ("t2i", list(captions)))
        for q in ids
        if q.startswith(name)
    ]
    assert [(row["query_id"], row["direction"]) for row in lists] == expected_queries
    for row in lists:
        if row["direction"] == "i2t":
            own, ids = row["query_id"], list(captions)
            others = {n: (own, c) for n, c in enumerate(ids) if captions[c][0] != own}
        else:
            own = captions[row["query_id"]][0]
            others = {n: (i, row["query_id"]) for n, i in enumerate(images) if i != own}
        slow = {n: by_hand(captions, *pair, how) for n, pair in others.items()}
        assert len(row["candidate"]) == len(set(row["candidate"])) == min(top_k, len(slow))
        assert set(row["candidate"]) <= set(slow)  # own image left out
        assert row["candidate"] == sorted(row["candidate"])
        of_candidates = [slow[n] for n in row["candidate"]]
        assert np.allclose(row["relevance"], of_candidates, atol=1e-3)
        best = sorted(slow.values(), reverse=True)[:top_k]
        assert np.allclose(sorted(of_candidates, reverse=True), best, atol=1e-5)


def test_text_to_image_relevance_is_the_transposed_one_and_not_the_same_rows(tmp_path):
    captions = embeddings(str(tmp_path), COUNTS, twins=False)
    images, ids = list(dict.fromkeys(i for i, _ in captions.values())), list(captions)
    lists = labelled(str(tmp_path), map="half", top_k=64)
    r = {}
    for row in lists:
        for n, value in zip(row["candidate"], row["relevance"], strict=True):
            if row["direction"] == "i2t":
                pair = (row["query_id"], ids[n])
            else:
                pair = (images[n], row["query_id"])
            r.setdefault(pair, []).append(value)
    assert all(len(both) == 2 for both in r.values())
    assert all(abs(a - b) < 1e-3 for a, b in r.values())
    # r is not symmetric: the relevance of A's caption to B is not that of B's caption to A.
    a, b = "train-000000/1", "train-000001/0"
    assert abs(r[a, f"{b}#0"][0] - r[b, f"{a}#0"][0]) > 0.01


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.sampled_from(["half", "clip"]),
    st.sampled_from(["max", "mean"]),
)
def test_every_pair_is_counted_in_a_histogram(tmp_path_factory, counts, seed, map, reduce):
    root = str(tmp_path_factory.mktemp("r"))
    embeddings(root, {"train-000000": counts, "train-000001": [2]}, seed=seed)
    recipe = Recipe(name="t", embed={"encoder": "hand"}, label={"map": map, "reduce": reduce})
    entries = finish(label.plan(recipe, root), label.write_relevance)["pieces"]
    found = label.histograms(entries)
    counts = [*counts, 2]
    pairs = sum(sum(counts) - count for count in counts)
    held_out = sum(count for count in counts if count > 1)
    assert sum(found["splits"]["train"]["histogram_negatives"]) == pairs
    assert sum(found["splits"]["train"]["histogram_positives"]) == held_out
    assert len(found["edges"]) == label.BINS + 1
    json.dumps(found)


def test_held_out_positives_are_those_of_a_slow_loop(tmp_path):
    captions = embeddings(str(tmp_path), COUNTS)
    everyone = Captions.read(RunFolder(str(tmp_path)).files("embed", "hand"))
    for how in (LabelSettings(), LabelSettings(map="half", reduce="mean")):
        found = everyone.held_out(everyone.image_ids, how).tolist()
        expected = []
        for caption, (image, vector) in captions.items():
            rest = {c: known for c, known in captions.items() if c != caption}
            if image in {owner for owner, _ in rest.values()}:
                rest["held out"] = ("no image", vector)
                expected.append(by_hand(rest, image, "held out", how))
        assert np.allclose(found, expected, atol=1e-5)


def test_relevance_stays_between_0_and_1_for_captions_that_are_the_same_or_opposite(tmp_path):
    rng = np.random.default_rng(0)
    vectors = torch.from_numpy(rng.normal(size=(200, 384)).astype(np.float16)).float()
    table = pa.table(
        {
            "caption_id": [str(n) for n in range(400)],
            "image_id": [str(n) for n in range(400)],
            "vector": vector_column(torch.cat([vectors, -vectors]).half().numpy()),
        }
    )
    captions = Captions(table)
    for map in ("half", "clip"):
        found = captions.relevance_of_texts([*range(400)], LabelSettings(map=map))
        assert found.min() >= 0 and found.max() <= 1


def test_a_split_is_labelled_with_its_own_captions_alone(tmp_path):
    counts = {"train-000000": [2, 2], "val-000000": [1, 3]}
    captions = embeddings(str(tmp_path), counts)
    for row in labelled(str(tmp_path), map="half"):
        split = row["query_id"].split("-")[0]
        mine = [c for c in captions if c.startswith(split)]
        size = len(mine) if row["direction"] == "i2t" else 2
        assert max(row["candidate"]) < size


def test_a_changed_caption_elsewhere_in_the_split_makes_all_its_lists_anew(tmp_path):
    root = str(tmp_path)
    recipe = Recipe(name="t", embed={"encoder": "hand"})
    embeddings(root, {"val-000000": [2], **COUNTS})
    finish(label.plan(recipe, root), label.write_relevance)
    assert label.plan(recipe, root).complete
    embeddings(root, {"val-000000": [2], **COUNTS, "train-000002": [3]})
    assert [piece.name for piece in label.plan(recipe, root).pending] == list(COUNTS)


def test_lists_within_one_modality_leave_the_own_image_out(tmp_path):
    captions = embeddings(str(tmp_path), COUNTS)
    images, ids = list(dict.fromkeys(i for i, _ in captions.values())), list(captions)
    of = {i: [v for owner, v in captions.values() if owner == i] for i in images}
    for reduce, best in (("max", max), ("mean", lambda c: sum(c) / len(c))):
        lists = labelled(str(tmp_path), map="half", reduce=reduce, lists=["i2i", "t2t"], top_k=64)
        assert [r["query_id"] for r in lists if r["direction"] == "i2i"] == images
        assert [r["query_id"] for r in lists if r["direction"] == "t2t"] == ids
        for row in lists:
            q, found = row["query_id"], dict(zip(row["candidate"], row["relevance"], strict=True))
            if row["direction"] == "i2i":
                pairs = {
                    n: best([cosine(a, b) for a in of[q] for b in of[i]])
                    for n, i in enumerate(images)
                    if i != q
                }
            else:
                own = captions[q][0]
                pairs = {
                    n: cosine(captions[q][1], captions[c][1])
                    for n, c in enumerate(ids)
                    if captions[c][0] != own
                }
            assert found.keys() == pairs.keys()
            assert all(abs(found[n] - (1 + c) / 2) < 1e-3 for n, c in pairs.items())


def test_a_pair_takes_no_more_than_four_bytes(tmp_path):
    queries, k, gallery = 2000, 64, 500_000
    rng = np.random.default_rng(0)
    captions = embeddings(str(tmp_path), {"train-000000": [1] * queries})
    mine = Captions.read(RunFolder(str(tmp_path)).files("embed", "hand"))
    lists = Lists(
        torch.from_numpy(rng.normal(0.4, 0.1, (queries, k)).clip(0, 1)).float(),
        torch.from_numpy(rng.integers(0, gallery, (queries, k), np.int32)),
    )
    table = label._table(
        Direction("t2i", mine, LabelSettings(), Decided(mine, LabelSettings())), lists
    )
    written = write_table(f"{tmp_path}/l.parquet", table, "f", {}, encodings=ENCODINGS)
    with_ids = written["files"]["l.parquet"]["bytes"]
    written = write_table(f"{tmp_path}/i.parquet", table.select(["query_id"]), "f", {})
    pairs = sum(len(row) for row in table["candidate"].to_pylist())
    assert len(captions) == queries and pairs == queries * k
    assert (with_ids - written["files"]["i.parquet"]["bytes"]) / pairs < 4
    parquet = pq.ParquetFile(f"{tmp_path}/l.parquet").metadata.row_group(0)
    encodings = {parquet.column(c).path_in_schema: parquet.column(c).encodings for c in range(4)}
    assert all(encoding in encodings[column] for column, encoding in ENCODINGS.items())
    back = read_table(f"{tmp_path}/l.parquet")
    row, order = lists.row_QK.sort(dim=1)
    assert np.array_equal(np.stack(back["candidate"].to_numpy()), row.numpy())
    error = np.stack(back["relevance"].to_numpy()) - lists.relevance_QK.gather(1, order).numpy()
    assert np.abs(error).max() <= 2**-12


# ---- other ways to find and to score -----------------------------------------------------------


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_a_cross_encoder_scores_the_lists_again(recipe, tmp_path, monkeypatch, reduce):
    def overlap(pairs, cross_encoder, settings):
        words = [(set(a.split()), set(b.split())) for a, b in pairs]
        return np.array([len(a & b) / len(a | b) for a, b in words], np.float32)

    monkeypatch.setattr(relevance_lists, "rescore", overlap)
    weights = tmp_path / "cross"
    weights.mkdir()
    (weights / "weights").write_text("some")
    root = str(tmp_path / "run")
    sharded(recipe, root)
    finish(embed.plan(recipe, root), embed.write_embeddings)
    how = {"cross_encoder": str(weights), "reduce": reduce, "top_k": 4}
    other = recipe.model_copy(update={"label": LabelSettings(**how)})
    plan = label.plan(other, root)
    finish(plan, label.write_relevance)
    samples = [
        sample
        for name in ("test-000000",)
        for sample in sidecar.read_sidecar(
            RunFolder(root).folder("shard", f"{name}.parquet")
        ).to_pylist()
    ]
    texts = [[c["text"] for c in sample["captions"]] for sample in samples]
    flat = {c["caption_id"]: c["text"] for sample in samples for c in sample["captions"]}
    piece = next(piece for piece in plan.pieces if piece.name == "test-000000")
    lists = read_table(piece.output).to_pylist()
    assert lists
    for row in lists:
        if row["direction"] != "t2i":
            continue
        for n, value in zip(row["candidate"], row["relevance"], strict=True):
            scores = overlap([(text, flat[row["query_id"]]) for text in texts[n]], None, None)
            assert abs(value - getattr(np, reduce)(scores)) < 1e-3
    (weights / "weights").write_text("others")
    sentences.fingerprint.cache_clear()
    assert len(label.plan(other, root).pending) == len(plan.pieces)
