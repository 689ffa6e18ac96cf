"""Rankings and their averages, against brute force."""

import math
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import InputError
from pipeline.evaluation import (
    evaluate,
    graded_relevance,
    ranking,
    results,
    tower_vectors,
)
from pipeline.formulas.metrics import expected_rank, ndcg, recall_at
from pipeline.sharding.exclusions import Excluded
from pipeline.sources import drawn
from pipeline.sources.part import Part
from pipeline.storage import parquet, run_folder, store
from pipeline.storage.run_folder import RunFolder
from schemas.embedding import embedding_schema, tower_schema
from schemas.manifest import TRUTH
from schemas.settings import Recipe, SourceSettings
from tests.helpers.stages import finish

# Captions of each image, shard by shard.
TEST = {"test-000000": [2, 1, 3], "test-000001": [5, 1, 1, 2]}
OTHERS = {"val-000000": [2, 2, 1, 3], "train-000000": [1, 2, 3, 1, 2], "train-000001": [2, 1, 1]}
ALL = {**TEST, **OTHERS}


def unit(vectors) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def random_unit(rng, dim: int) -> np.ndarray:
    return unit(rng.normal(size=dim))


def write_run(root, counts=ALL, draw=random_unit, dim=16, seed=0) -> dict[str, np.ndarray]:
    """The files that stages 3 and 6 leave behind, with drawn vectors; {id: tower vector}."""
    rng = np.random.default_rng(seed)
    root, made = str(root), {}
    towers, labels = [], []
    for name, of_images in counts.items():
        images = [f"{name}/{n}" for n in range(len(of_images))]
        texts = [(f"{i}#{k}", i) for i, n in zip(images, of_images, strict=True) for k in range(n)]
        rows = [{"id": i, "image_id": i, "modality": "image"} for i in images]
        rows += [{"id": t, "image_id": i, "modality": "text"} for t, i in texts]
        for row in rows:
            row["vector"] = made[row["id"]] = draw(rng, dim).astype(np.float32)
        encoded = [
            {"caption_id": t, "image_id": i, "vector": random_unit(rng, 8).astype(np.float16)}
            for t, i in texts
        ]
        about = {"split": name.split("-")[0], "images": len(images), "captions": len(texts)}
        towers.append((name, pa.Table.from_pylist(rows, schema=tower_schema(dim)), about))
        encoded = pa.Table.from_pylist(encoded, schema=embedding_schema(8))
        labels.append((name, encoded, about | {"dim": 8}))
    write_stage(RunFolder(root).folder("evaluate", "main", "vectors"), towers)
    write_stage(RunFolder(root).folder("embed", "hand"), labels)
    write_stage(RunFolder(root).folder("ingest"), [])
    return made


def write_stage(folder: str, tables: list) -> None:
    pieces = []
    for name, table, about in tables:
        written = parquet.write_table(f"{folder}/{name}.parquet", table, "hand", about)
        pieces.append({**written, "name": name, "fingerprint": "hand"})
    index = {"pieces": pieces, "version": run_folder.version(pieces)}
    store.write_json(f"{folder}/index.json", index)


def recipe_of(**sections) -> Recipe:
    return Recipe(name="t", embed={"encoder": "hand"}, **sections)


def ranked(root, recipe=None) -> tuple[list[dict], dict[str, float]]:
    """Every query's ranking and the averages."""
    recipe = recipe or recipe_of()
    plan = evaluate.plan(recipe, str(root), "main")
    finish(plan, evaluate.write_rankings)
    rows = [row for piece in plan.pieces for row in parquet.read_table(piece.output).to_pylist()]
    return rows, results.of_ranking(plan, recipe, {}, "main").metrics


def candidates_of(vectors: dict, query: str) -> list[str]:
    """Ids of the other modality in the query's split, in shard order."""
    split, is_image = query.split("-")[0], "#" not in query
    return [i for i in vectors if i.startswith(split) and ("#" in i) == is_image]


def ids_of(split: str, direction: str, counts=ALL) -> list[str]:
    """The queries of a direction, in the order of the rankings."""
    out = []
    for name in (name for name in counts if name.startswith(split)):
        images = [f"{name}/{n}" for n in range(len(counts[name]))]
        texts = [f"{i}#{k}" for i, n in zip(images, counts[name], strict=True) for k in range(n)]
        out += images if direction == "i2t" else texts
    return out


def image_of(id_: str) -> str:
    return id_.split("#")[0]


# ---- rankings ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of_random_vectors(tmp_path_factory):
    root = tmp_path_factory.mktemp("rankings")
    vectors = write_run(root)
    return str(root), vectors, *ranked(root, recipe_of(evaluate={"top_k": 5}))


def test_every_query_is_ranked_once_image_queries_first_in_each_shard(run_of_random_vectors):
    rows = run_of_random_vectors[2]
    expected = [
        (query, direction)
        for name, direction in product(TEST, ("i2t", "t2i"))
        for query in ids_of(name, direction)
    ]
    assert [(row["query_id"], row["direction"]) for row in rows] == expected


def test_ranks_recalls_and_candidates_are_those_of_a_full_sort(run_of_random_vectors):
    _, vectors, rows, _ = run_of_random_vectors
    for row in rows:
        ids = candidates_of(vectors, row["query_id"])
        scores = np.array([vectors[i].astype(float) @ vectors[row["query_id"]] for i in ids])
        order = np.argsort(-scores)
        assert row["candidate_id"] == [ids[n] for n in order[:5]]
        assert np.allclose(row["score"], scores[order[:5]], atol=1e-6)
        own = [image_of(ids[n]) == image_of(row["query_id"]) for n in order]
        assert row["rank"] == own.index(True) + 1
        assert [row[f"R_at_{k}"] for k in (1, 5, 10)] == [float(any(own[:k])) for k in (1, 5, 10)]


def slow_ndcg(vectors: dict, query: str, r: np.ndarray, k: int = 10) -> float:
    """Sum of (2^r - 1) / log2(1 + place) over the first k places, over that of the best order."""
    ids = candidates_of(vectors, query)
    order = np.argsort([-(vectors[i].astype(float) @ vectors[query]) for i in ids])
    discounts = [1 / math.log2(place + 2) for place in range(min(k, len(ids)))]
    found = sum(d * (2**v - 1) for d, v in zip(discounts, r[order], strict=False))
    return found / sum(d * (2**v - 1) for d, v in zip(discounts, np.sort(r)[::-1], strict=False))


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_label_ndcg_is_that_of_a_slow_loop(tmp_path, reduce):
    vectors = write_run(tmp_path)
    rows, _ = ranked(tmp_path, recipe_of(label={"reduce": reduce}))
    encoded = {}
    for name in TEST:
        table = parquet.read_table(
            RunFolder(str(tmp_path)).folder("embed", "hand", f"{name}.parquet")
        )
        for row in table.to_pylist():
            encoded[row["caption_id"]] = unit(np.array(row["vector"], np.float64))

    def relevance(image: str, text: str) -> float:
        if image_of(text) == image:
            return 1.0
        cosines = [v @ encoded[text] for t, v in encoded.items() if image_of(t) == image]
        return max(0.0, max(cosines) if reduce == "max" else sum(cosines) / len(cosines))

    for row in rows:
        query = row["query_id"]
        ids = candidates_of(vectors, query)
        pairs = [(query, i) if row["direction"] == "i2t" else (i, query) for i in ids]
        r = [relevance(*pair) for pair in pairs]
        expected = slow_ndcg(vectors, query, np.array(r))
        assert row["ndcg_label"] == pytest.approx(expected, abs=1e-6)
        assert row["ndcg_truth"] is None


def test_averages_are_the_means_and_medians_of_the_rows(run_of_random_vectors):
    _, _, rows, metrics = run_of_random_vectors
    total = 0.0
    for direction in ("i2t", "t2i"):
        mine = [row for row in rows if row["direction"] == direction]
        for k in (1, 5, 10):
            mean = 100 * sum(row[f"R_at_{k}"] for row in mine) / len(mine)
            assert metrics[f"{direction}_R_at_{k}"] == pytest.approx(mean)
            total += mean
        assert metrics[f"{direction}_MedR"] == np.median([row["rank"] for row in mine])
        mean = np.mean([row["ndcg_label"] for row in mine])
        assert metrics[f"{direction}_ndcg_label"] == pytest.approx(mean)
        assert f"{direction}_ndcg_truth" not in metrics
    assert metrics["rsum"] == pytest.approx(total)


def test_ranks_do_not_depend_on_how_the_split_is_cut_into_shards_and_blocks(
    run_of_random_vectors, tmp_path, monkeypatch
):
    _, _, rows, metrics = run_of_random_vectors
    monkeypatch.setattr(ranking, "BLOCK", 2)
    monkeypatch.setattr(graded_relevance, "SPAN", 4)  # captions whose relevance is made together
    write_run(tmp_path)
    small = ranked(tmp_path, recipe_of(evaluate={"top_k": 5}))
    for row, other in zip(rows, small[0], strict=True):
        assert row["candidate_id"] == other["candidate_id"] and row["rank"] == other["rank"]
    assert small[1] == pytest.approx(metrics)


def test_truth_ndcg_is_that_of_the_true_relevance_where_the_source_knows_it(tmp_path):
    vectors = write_run(tmp_path)
    images, texts = ids_of("test", "i2t"), ids_of("test", "t2i")
    facts, scenes = {}, drawn.rows(SourceSettings(), Part("test:0:7"))
    for image, scene in zip(images, scenes, strict=True):
        own = [image, *(text for text in texts if image_of(text) == image)]
        known = [fact["facts"] for fact in scene["truth"]]
        facts |= dict(zip(own, known, strict=False))
    rows = [{"id": id_, "facts": fact} for id_, fact in facts.items()]
    table = pa.Table.from_pylist(rows, schema=TRUTH)
    write_stage(RunFolder(str(tmp_path)).folder("ingest"), [("truth-00000", table, {})])

    truth = drawn.relevance([facts[i] for i in images], [facts[t] for t in texts])
    rankings, metrics = ranked(tmp_path)
    for row in rankings:
        if row["direction"] == "i2t":
            r = truth[images.index(row["query_id"])]
        else:
            r = truth[:, texts.index(row["query_id"])]
        assert row["ndcg_truth"] == pytest.approx(slow_ndcg(vectors, row["query_id"], r), abs=1e-6)
    of_images = [row["ndcg_truth"] for row in rankings if row["direction"] == "i2t"]
    assert metrics["i2t_ndcg_truth"] == pytest.approx(np.mean(of_images))


def constant(rng, dim: int) -> np.ndarray:
    """The vector of a collapsed model: the same for everything."""
    return random_unit(np.random.default_rng(dim), dim)


@pytest.mark.parametrize("dim", [1, 16, 250, 256, 384])
@pytest.mark.parametrize("images", [3, 7, 33])
def test_a_collapsed_model_scores_chance(tmp_path, dim, images):
    counts = {"test-000000": [2, 1, 3] * (images // 3), "test-000001": [5] * (images % 3 + 1)}
    write_run(tmp_path, counts, constant, dim)
    rows, _ = ranked(tmp_path)
    texts = sum(map(sum, counts.values()))
    images = sum(map(len, counts.values()))
    for row in rows:
        own = 1
        if row["direction"] == "i2t":
            shard, number = row["query_id"].split("/")
            own = counts[shard][int(number)]
        others = (texts if row["direction"] == "i2t" else images) - own
        for k in (1, 5, 10):
            chance = 1 - math.comb(others, k) / math.comb(others + own, k) if others >= k else 1
            assert row[f"R_at_{k}"] == pytest.approx(chance)
        assert row["rank"] == pytest.approx((others + own + 1) / (own + 1))


def one_of_three(rng, dim: int) -> np.ndarray:
    """Vectors of which many are equal."""
    return random_unit(np.random.default_rng(rng.integers(3)), dim)


@pytest.mark.parametrize("span", [2**16, 5])
@pytest.mark.parametrize("ndcg_at", [1, 4, 10, 99])
@pytest.mark.parametrize("top_k", [1, 10])
def test_ties_are_those_of_the_dense_formulas_wherever_the_list_ends(
    tmp_path, monkeypatch, top_k, ndcg_at, span
):
    monkeypatch.setattr(graded_relevance, "SPAN", span)
    vectors = write_run(tmp_path, draw=one_of_three)
    recipe = recipe_of(evaluate={"top_k": top_k, "ndcg_at": ndcg_at})
    plan = evaluate.plan(recipe, str(tmp_path), "main")
    inputs = plan.pieces[0].inputs
    items = tower_vectors.read(inputs["vectors"]).items
    graded = ranking.GradedRelevance(inputs["judge"], items)
    for row in ranked(tmp_path, recipe)[0]:
        query = row["query_id"]
        ids = candidates_of(vectors, query)
        a, b = (torch.tensor(np.array([vectors[i] for i in side])) for side in ([query], ids))
        scores = (a.double() @ b.double().T).float()
        own = torch.tensor([[image_of(i) == image_of(query) for i in ids]])
        side = "image" if row["direction"] == "i2t" else "text"
        relevance = graded(row["direction"], [items.find(side, [query])[query]])["ndcg_label"]
        expected = ndcg(scores, relevance, k=ndcg_at).item()
        assert row["ndcg_label"] == pytest.approx(expected)
        assert row["rank"] == expected_rank(scores, own).item()
        assert row["R_at_5"] == pytest.approx(recall_at(scores, own, 5).item())
        assert len(row["candidate_id"]) == min(top_k, len(ids))


def test_rankings_that_are_finished_are_not_written_again(tmp_path):
    write_run(tmp_path)
    ranked(tmp_path)
    plan = evaluate.plan(recipe_of(), str(tmp_path), "main")
    assert plan.complete
    write_run(tmp_path, seed=1)
    plan = evaluate.plan(recipe_of(), str(tmp_path), "main")
    assert len(plan.pending) == len(TEST)


def test_sentence_vectors_of_other_captions_than_the_models_are_refused(tmp_path):
    write_run(tmp_path)
    folder = RunFolder(str(tmp_path)).folder("embed", "hand")
    uri = f"{folder}/test-000001.parquet"
    table, index = parquet.read_table(uri), store.read_json(f"{folder}/index.json")
    swapped = [1, 0, *range(2, len(table))]
    written = parquet.write_table(uri, table.take(swapped), "hand", {})
    for entry in index["pieces"]:
        if entry["name"] == "test-000001":
            entry["files"] = written["files"]
    store.write_json(f"{folder}/index.json", index)
    with pytest.raises(InputError, match="other captions than the model's vectors of test-000001"):
        ranked(tmp_path)


# ---- vectors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "excluded",
    [
        Excluded(),
        Excluded(frozenset({"test-000000/1"}), frozenset({"test-000000/1#0", "test-000001/0#3"})),
    ],
)
def test_stored_rows_are_those_that_are_not_excluded(tmp_path, excluded):
    made = write_run(tmp_path)
    found = tower_vectors.without(tower_vectors.files(str(tmp_path), "main", "test"), excluded)
    images = [i for i in ids_of("test", "i2t") if i not in excluded.images]
    texts = [i for i in ids_of("test", "t2i") if i not in excluded.captions]
    assert found.items.counts == (len(images), len(texts))
    assert found.items.ids("i2t") == (images, texts)
    assert [images[row] for row in found.items.image_of_N] == [image_of(i) for i in texts]
    assert found.items.find("text", [texts[3], "nobody", texts[0]]) == {texts[0]: 0, texts[3]: 3}
    assert np.array_equal(found.texts.numpy(), [made[i] for i in texts])
    rows = np.arange(len(images))
    scores, best = found.top("i2t", rows, 3)
    expected = found.block("i2t", rows).topk(3)
    assert torch.equal(scores, expected.values) and torch.equal(best.long(), expected.indices)


def test_vectors_are_read_in_shard_order(tmp_path):
    made = write_run(tmp_path)
    found = tower_vectors.read(tower_vectors.files(str(tmp_path), "main", "test"))
    images, texts = ids_of("test", "i2t"), ids_of("test", "t2i")
    assert found.items.ids("i2t") == (images, texts)
    assert found.items.text_image_ids == [image_of(i) for i in texts]
    assert np.array_equal(found.images.numpy(), [made[i] for i in images])
    assert np.array_equal(found.texts.numpy(), [made[i] for i in texts])


# ---- metrics ----------------------------------------------------------------------------------


def test_recall_of_the_metrics_is_what_the_rankings_hold(run_of_random_vectors):
    _, vectors, rows, _ = run_of_random_vectors
    images, texts = ids_of("test", "i2t"), ids_of("test", "t2i")
    scores = torch.tensor(np.array([[vectors[i] @ vectors[t] for t in texts] for i in images]))
    positive = torch.tensor([[image_of(t) == i for t in texts] for i in images])
    found = {row["query_id"]: row["R_at_5"] for row in rows}
    assert recall_at(scores, positive, 5).tolist() == [found[i] for i in images]
