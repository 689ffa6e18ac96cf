"""Embeddings and relevance lists, against sentence-transformers and slow loops."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from pipeline import _plan, _store, embed, ingest, label, shard
from pipeline._errors import InputError
from schemas.embedding import embedding_schema
from schemas.settings import EmbedSettings, LabelSettings, Recipe

SOURCE = {"kind": "drawn", "train_images": 12, "val_images": 3, "test_images": 4, "image_size": 32}


def run(plan, write) -> dict:
    return plan.finish({piece.name: write(piece) for piece in plan.pending})


def cosine(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.fixture(scope="module")
def recipe(tiny_encoder) -> Recipe:
    return Recipe(name="t", source=SOURCE, shard={"samples": 5}, embed={"encoder": tiny_encoder})


@pytest.fixture(scope="module")
def embedded(recipe, tmp_path_factory) -> str:
    """A run folder with embeddings."""
    root = str(tmp_path_factory.mktemp("embedded"))
    run(ingest.plan(recipe, root), ingest.write_part)
    run(shard.plan(recipe, root), shard.write_shard)
    run(embed.plan(recipe, root), embed.write_embeddings)
    return root


def rows_of(root, stage, name, *folders) -> list[dict]:
    return _store.read_table(_plan.folder(root, stage, *folders, f"{name}.parquet")).to_pylist()


# ---- embed -------------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_in_the_order_of_the_sidecar(embedded):
    for entry in _plan.read_index(f"{embedded}/2-shards")["pieces"]:
        samples = rows_of(embedded, "shard", entry["name"])
        expected = [(c["caption_id"], s["image_id"]) for s in samples for c in s["captions"]]
        found = rows_of(embedded, "embed", entry["name"], "tiny")
        assert [(row["caption_id"], row["image_id"]) for row in found] == expected
        norms = np.linalg.norm([row["vector"] for row in found], axis=1)
        assert np.abs(norms - 1).max() < 2e-3  # float16


def test_an_embedding_is_the_encoder_s_own_vector_of_the_caption(embedded, tiny_encoder):
    encoder = SentenceTransformer(tiny_encoder, device="cpu")
    texts = {
        c["caption_id"]: c["text"]
        for s in rows_of(embedded, "shard", "test-000000")
        for c in s["captions"]
    }
    for row in rows_of(embedded, "embed", "test-000000", "tiny"):
        expected = encoder.encode(texts[row["caption_id"]])
        assert cosine(row["vector"], expected) > 1 - 1e-4


def test_embeddings_say_which_encoder_made_them(embedded, tiny_encoder):
    table = _store.read_table(f"{embedded}/3-embeddings/tiny/val-000000.parquet")
    assert table.schema.metadata[b"halftone.encoder"].decode() == tiny_encoder
    weights = table.schema.metadata[b"halftone.weights"].decode()
    assert weights == embed.encoder_fingerprint(tiny_encoder)


def test_a_text_has_the_same_vector_alone_and_among_others(tiny_encoder):
    texts = ["a red dog", "two cats", "a red dog", "", "zzz !?", "two cats"]
    vectors = embed.encode(texts, EmbedSettings(encoder=tiny_encoder, batch_size=2))
    assert vectors.shape == (6, 32) and vectors.dtype == np.float32
    assert np.array_equal(vectors[0], vectors[2]) and np.array_equal(vectors[1], vectors[5])
    alone = embed.encode(["two cats"], EmbedSettings(encoder=tiny_encoder))
    assert np.allclose(vectors[1], alone[0], atol=1e-6)


def test_bf16_changes_rounding_only(tiny_encoder):
    texts = ["a red dog", "two cats on a mat"]
    full = embed.encode(texts, EmbedSettings(encoder=tiny_encoder))
    fast = embed.encode(texts, EmbedSettings(encoder=tiny_encoder, precision="bf16"))
    assert np.allclose((full * fast).sum(1), 1, atol=1e-2)


def test_finished_embeddings_are_not_made_again(embedded, recipe):
    plan = embed.plan(recipe, embedded)
    assert plan.complete
    files = list(Path(plan.folder).iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    for piece in plan.pieces:
        embed.write_embeddings(piece)
    assert [file.stat().st_mtime_ns for file in files] == before


def test_other_weights_are_other_embeddings(embedded, recipe, tiny_encoder, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(tiny_encoder, copy)
    assert embed.encoder_fingerprint(str(copy)) == embed.encoder_fingerprint(tiny_encoder)
    embed.encoder_fingerprint.cache_clear()
    weights = next(copy.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    other = recipe.model_copy(update={"embed": EmbedSettings(encoder=str(copy))})
    assert embed.plan(other, embedded).folder == embed.plan(recipe, embedded).folder
    assert len(embed.plan(other, embedded).pending) == len(embed.plan(recipe, embedded).pieces)


def test_a_shard_of_which_nothing_was_accepted_has_no_embeddings_and_no_labels(recipe, tmp_path):
    root = str(tmp_path)
    run(ingest.plan(recipe, root), ingest.write_part)
    plan = shard.plan(recipe, root)
    settings = recipe.shard.model_copy(update={"max_pixels": 1})
    plan.pieces[1].inputs["settings"] = settings  # rejects all of train-000001
    run(plan, shard.write_shard)
    assert [e["samples"] for e in _plan.read_index(f"{root}/2-shards")["pieces"]] == [5, 0, 2, 3, 4]
    index = run(embed.plan(recipe, root), embed.write_embeddings)
    assert [entry["captions"] > 0 for entry in index["pieces"]] == [True, False, True, True, True]
    index = run(label.plan(recipe, root), label.write_relevance)
    assert [entry["queries"] > 0 for entry in index["pieces"]] == [True, False, True, True, True]


def test_an_encoder_that_is_not_there_is_named(tmp_path):
    gone = str(tmp_path / "no" / "such" / "encoder")
    with pytest.raises(InputError, match=f"no sentence encoder '{gone}'.*give a model folder"):
        embed.encode(["a"], EmbedSettings(encoder=gone))


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no sentence encoder"):
        embed.encode(["a"], EmbedSettings(encoder=str(tmp_path)))


def test_the_packaged_encoder_is_the_one_it_is_called_after():
    path = embed.encoder_path(embed.PACKAGED)
    assert path is not None, "install halftone-itr[minilm]"
    weights = (path / "model.safetensors").read_bytes()
    assert _store.sha256(weights) == embed.PACKAGED_SHA256


def test_packaged_weights_that_are_not_the_expected_ones_are_refused(monkeypatch):
    embed.encoder_fingerprint.cache_clear()
    monkeypatch.setattr(embed, "PACKAGED_SHA256", "0" * 64)
    with pytest.raises(InputError, match="other weights than all-MiniLM-L6-v2.*reinstall"):
        embed.encoder_fingerprint(embed.PACKAGED)
    embed.encoder_fingerprint.cache_clear()


@pytest.mark.parametrize(
    ("encoder", "folder"),
    [
        ("all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("/models/my encoder/", "my_encoder"),
    ],
)
def test_an_encoder_s_folder_is_called_after_it(encoder, folder):
    assert embed.encoder_label(encoder) == folder


# ---- label -------------------------------------------------------------------------------------

# Captions of each image of three shards: ragged, and more images than a shard's.
COUNTS = {"train-000000": [1, 3, 2], "train-000001": [5, 1], "train-000002": [2]}


def embeddings(root: str, counts: dict[str, list[int]], dim=6, seed=0, twins=True) -> dict:
    """Embeddings by hand: random directions, a few of them the same; {caption_id: (image, v)}."""
    rng = np.random.default_rng(seed)
    folder = _plan.folder(root, "embed", "hand")
    pieces, out = [], {}
    for name, of_images in counts.items():
        rows = []
        for number, count in enumerate(of_images):
            image = f"{name}/{number}"
            for k in range(count):
                vector = rng.normal(size=dim)
                if twins and out and rng.random() < 0.2:
                    vector = rng.choice([1, -1]) * list(out.values())[0][1]
                vector = (vector / np.linalg.norm(vector)).astype(np.float16)
                rows.append({"caption_id": f"{image}#{k}", "image_id": image, "vector": vector})
                out[f"{image}#{k}"] = (image, vector.astype(np.float64))
        table = pa.Table.from_pylist(rows, schema=embedding_schema(dim))
        summary = {"split": name.split("-")[0], "captions": len(rows), "dim": dim}
        written = _store.write_table(f"{folder}/{name}.parquet", table, "hand", summary)
        pieces.append({**written, "name": name, "fingerprint": "hand"})
    _store.write_json(f"{folder}/index.json", {"pieces": pieces, "version": _plan.version(pieces)})
    return out


def by_hand(captions: dict, image: str, caption: str, how: LabelSettings) -> float:
    """r of an image and a caption, from METHODS: map(max or mean over the image's captions)."""
    cosines = [cosine(v, captions[caption][1]) for owner, v in captions.values() if owner == image]
    value = max(cosines) if how.reduce == "max" else sum(cosines) / len(cosines)
    return (1 + value) / 2 if how.map == "half" else max(value, 0)


def labelled(root: str, **how) -> list[dict]:
    """The relevance lists of all shards in order."""
    recipe = Recipe(name="t", embed={"encoder": "hand"}, label=how)
    plan = label.plan(recipe, root)
    run(plan, label.write_relevance)
    return [row for piece in plan.pieces for row in _store.read_table(piece.output).to_pylist()]


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
        assert row["relevance"] == sorted(row["relevance"], reverse=True)
        of_candidates = [slow[n] for n in row["candidate"]]
        assert np.allclose(row["relevance"], of_candidates, atol=1e-3)
        best = sorted(slow.values(), reverse=True)[:top_k]
        assert np.allclose(of_candidates, best, atol=1e-5)


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
    entries = run(label.plan(recipe, root), label.write_relevance)["pieces"]
    found = label.calibration(entries)
    counts = [*counts, 2]
    pairs = sum(sum(counts) - count for count in counts)
    held_out = sum(count for count in counts if count > 1)
    assert sum(found["splits"]["train"]["histogram_negatives"]) == pairs
    assert sum(found["splits"]["train"]["histogram_positives"]) == held_out
    assert len(found["edges"]) == label.BINS + 1
    json.dumps(found)


def test_held_out_positives_are_those_of_a_slow_loop(tmp_path):
    captions = embeddings(str(tmp_path), COUNTS)
    uris = tuple(_plan.folder(str(tmp_path), "embed", "hand", f"{name}.parquet") for name in COUNTS)
    everyone = label.Captions.read(uris, str(tmp_path))
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
            "vector": embed.vector_column(torch.cat([vectors, -vectors]).half().numpy()),
        }
    )
    captions = label.Captions(table)
    for map in ("half", "clip"):
        found = captions.relevance_of_texts(captions.vectors, LabelSettings(map=map))
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
    run(label.plan(recipe, root), label.write_relevance)
    assert label.plan(recipe, root).complete
    embeddings(root, {"val-000000": [2], **COUNTS, "train-000002": [3]})
    assert [piece.name for piece in label.plan(recipe, root).pending] == list(COUNTS)
