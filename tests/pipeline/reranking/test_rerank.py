"""The re-ranking stage: settings chosen on val, scores, rankings and what they say, end to end."""

import json
import math
import re

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import InputError
from pipeline.reranking import baselines, rerank
from pipeline.reranking.problem import Problem
from pipeline.reranking.similarities import Towers
from pipeline.storage import parquet
from pipeline.storage.run_folder import RunFolder
from schemas.embedding import tower_schema
from tests.helpers.stages import finish
from tests.pipeline.evaluation.test_ranking import (
    ALL,
    candidates_of,
    constant,
    ids_of,
    image_of,
    ranked,
    recipe_of,
    unit,
    write_run,
    write_stage,
)


def slow_hubness(candidates, bank, beta) -> list[float]:
    """Log of the mean over the bank of exp(beta s), over beta; in float64."""
    return [
        math.log(sum(math.exp(beta * float(q @ c)) for q in bank) / len(bank)) / beta
        for c in candidates
    ]


def hubness(candidates, bank, beta: float) -> torch.Tensor:
    """Of text candidates by image queries of the bank."""
    images, texts = (torch.tensor(np.asarray(v)).float() for v in (bank, candidates))
    none = torch.arange(0)
    problem = Problem(
        Towers(images, texts),
        gallery={"image": none, "text": torch.arange(len(texts))},
        bank={"image": torch.arange(len(images)), "text": none},
        owner={"image": none, "text": none},
    )
    return baselines.hubness(next(problem.views("i2t")), beta)


@pytest.mark.parametrize("beta", [0.5, 5.0, 80.0])
def test_hubness_is_that_of_a_slow_loop(beta):
    rng = np.random.default_rng(0)
    candidates, bank = unit(rng.normal(size=(7, 5))), unit(rng.normal(size=(11, 5)))
    expected = torch.tensor(slow_hubness(candidates, bank, beta)).float()
    assert torch.allclose(hubness(candidates, bank, beta), expected, atol=1e-6)


def test_hubness_does_not_overflow_and_is_the_nearest_query_at_a_low_temperature():
    rng = np.random.default_rng(0)
    candidates, bank = unit(rng.normal(size=(7, 5))), unit(rng.normal(size=(11, 5)))
    found = hubness(candidates, bank, 1e4)
    nearest = torch.tensor(candidates @ bank.T).float().amax(1)
    assert torch.isfinite(found).all() and torch.allclose(found, nearest, atol=1e-3)


def test_hubness_is_the_same_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    candidates, bank = unit(rng.normal(size=(7, 4))), unit(rng.normal(size=(99, 4)))
    whole = hubness(candidates, bank, 10.0)
    monkeypatch.setattr("pipeline.reranking.problem.CELLS", 30)
    assert torch.allclose(hubness(candidates, bank, 10.0), whole, atol=1e-6)


def reranked(root, recipe) -> tuple[dict, list[dict], list[dict]]:
    """The settings chosen by direction, what was tried, and every query's new ranking."""
    root = str(root)
    plan = rerank.plan(recipe, root, "main")
    index = finish(plan, rerank.write_reranker)
    trials = parquet.read_table(plan.pieces[0].output).to_pylist()
    plan = rerank.plan_reranked(recipe, root, "main")
    finish(plan, rerank.write_rankings)
    rows = [row for piece in plan.pieces for row in parquet.read_table(piece.output).to_pylist()]
    return index["pieces"][0]["steps"][0], trials, rows


def slow_recalls(vectors: dict, direction: str, beta: float, bank_images: int) -> float:
    """Sum of R@1, R@5 and R@10 on val in percent, after inverted softmax over the bank."""
    bank_ids = ids_of("train", "i2t")[:bank_images]
    if direction == "t2i":
        bank_ids = [i for i in ids_of("train", "t2i") if image_of(i) in bank_ids]
    bank = [vectors[i].astype(float) for i in bank_ids]
    queries = ids_of("val", direction)
    total = 0.0
    for query in queries:
        ids = candidates_of(vectors, query)
        bias = slow_hubness([vectors[i].astype(float) for i in ids], bank, beta)
        scores = [vectors[i].astype(float) @ vectors[query] for i in ids]
        order = np.argsort(-(np.array(scores) - bias))
        own = [image_of(ids[n]) == image_of(query) for n in order]
        total += sum(any(own[:k]) for k in (1, 5, 10))
    return 100 * total / len(queries)


@pytest.mark.parametrize("seed", range(4))
def test_the_temperature_is_the_one_with_the_best_recalls_on_val(tmp_path, seed):
    vectors = write_run(tmp_path, dim=4, seed=seed)
    betas = (1.0, 5.0, 25.0, 125.0)
    recipe = recipe_of(rerank={"betas": betas, "bank_images": 6})
    chosen, trials, _ = reranked(tmp_path, recipe)
    for direction in ("i2t", "t2i"):
        slow = [slow_recalls(vectors, direction, beta, 6) for beta in betas]
        found = [trial["val"] for trial in trials if trial["direction"] == direction]
        assert found == pytest.approx(slow, abs=1e-3)
        assert chosen[direction]["beta"] == betas[found.index(max(found))]


def test_without_val_the_middle_temperature_is_taken(tmp_path):
    write_run(tmp_path, {name: c for name, c in ALL.items() if not name.startswith("val")})
    chosen, _, _ = reranked(tmp_path, recipe_of(rerank={"betas": (3.0, 1.0, 2.0)}))
    assert [chosen[d]["beta"] for d in ("i2t", "t2i")] == [1.0, 1.0]


def test_a_reranked_score_is_the_score_less_the_candidate_s_bias(tmp_path):
    vectors = write_run(tmp_path)
    recipe = recipe_of(rerank={"betas": (7.0,), "bank_images": 3})
    base, _ = ranked(tmp_path, recipe)
    _, _, rows = reranked(tmp_path, recipe)
    bank_images = ids_of("train", "i2t")[:3]
    bank_texts = [i for i in ids_of("train", "t2i") if image_of(i) in bank_images]
    for before, after in zip(base, rows, strict=True):
        bank = [vectors[i] for i in (bank_images if after["direction"] == "i2t" else bank_texts)]
        scores = dict(zip(before["candidate_id"], before["score"], strict=True))
        bias = slow_hubness([vectors[i] for i in scores], bank, 7.0)
        expected = {i: s - b for (i, s), b in zip(scores.items(), bias, strict=True)}
        found = dict(zip(after["candidate_id"], after["score"], strict=True))
        assert found == pytest.approx(expected, abs=1e-5)
        assert after["score"] == sorted(after["score"], reverse=True)


def with_a_hub(rng, dim: int) -> np.ndarray:
    """Texts and images share a direction; one of them is nothing but that direction."""
    vector = rng.normal(size=dim) * 0.5
    vector[0] = 2.0
    return unit(vector)


def test_a_hub_is_demoted(tmp_path):
    counts = {"test-000000": [1] * 12, "val-000000": [1] * 8, "train-000000": [1] * 20}
    vectors = write_run(tmp_path, counts, with_a_hub)
    folder = RunFolder(str(tmp_path)).folder("evaluate", "main", "vectors")
    tables = []
    for name, of_images in counts.items():
        rows = parquet.read_table(f"{folder}/{name}.parquet").to_pylist()
        if name == "test-000000":
            rows[0]["vector"] = np.eye(16, dtype=np.float32)[0]  # the hub: image test-000000/0
        about = {"split": name.split("-")[0], "images": len(of_images), "captions": len(of_images)}
        tables.append((name, pa.Table.from_pylist(rows, schema=tower_schema(16)), about))
    write_stage(folder, tables)
    hub = "test-000000/0"
    base, _ = ranked(tmp_path)
    _, _, rows = reranked(tmp_path, recipe_of(rerank={"betas": (20.0,)}))

    def places(rankings) -> list[int]:
        texts = [row for row in rankings if row["direction"] == "t2i"]
        return [row["candidate_id"].index(hub) for row in texts]

    assert len(vectors) == 80 and np.mean(places(base)) < 1
    assert np.mean(places(rows)) > np.mean(places(base)) + 2


def test_the_bank_s_size_matters_up_to_that_of_the_train_split(tmp_path):
    write_run(tmp_path)
    found = []
    for images in (8, 99, 2):
        recipe = recipe_of(rerank={"betas": (7.0,), "bank_images": images})
        _, _, rows = reranked(tmp_path, recipe)
        found.append([row["score"] for row in rows])
    assert found[0] == found[1] != found[2]


def test_reranked_rankings_say_how_they_were_made(tmp_path):
    write_run(tmp_path)
    recipe = recipe_of(rerank={"betas": (7.0,), "bank_images": 3})
    reranked(tmp_path, recipe)
    index = RunFolder(str(tmp_path)).known("reranked", "main")
    protocol = index["settings"]
    assert (protocol["rerank"], protocol["pool"]) == ("inverted softmax", "inductive")
    assert (protocol["bank_images"], protocol["beta_i2t"], protocol["images"]) == (3, 7.0, 7)
    json.dumps(protocol)


def test_a_collapsed_model_scores_chance_after_re_ranking_too(tmp_path):
    write_run(tmp_path, ALL, constant, 250)
    base, _ = ranked(tmp_path)
    _, _, rows = reranked(tmp_path, recipe_of())
    for row, before in zip(rows, base, strict=True):
        assert len(set(row["score"])) == 1
        assert row["rank"] == before["rank"]


# ---- chains, LeaPRR, transfer ------------------------------------------------------------------

LEAPRR = {
    **{"candidates_i2t": 6, "candidates_t2i": 4, "pillars": 5, "neighbours": 3, "gallery": 4},
    **{"hidden": 8, "heads": 2, "epochs": 2, "batch_size": 4},
}


def stage(root, recipe) -> tuple[list, list[dict]]:
    """The whole stage without Ray: plans of the trainings, and the rows of the best ranking."""
    root = str(root)
    fitted = finish(rerank.plan(recipe, root, "main"), rerank.write_reranker)
    trainings = rerank.plan_training(recipe, root, "main", fitted)
    for plan in trainings:
        for piece in plan.pending:
            rerank.fit(piece, lambda records: None)
            plan.finish({piece.name: rerank.summary(piece)})
    plan = rerank.plan_reranked(recipe, root, "main")
    finish(plan, rerank.write_rankings)
    return trainings, [r for p in plan.pieces for r in parquet.read_table(p.output).to_pylist()]


@pytest.mark.parametrize("lists", ["train", "val"])
@pytest.mark.parametrize("pool", ["inductive", "transductive"])
def test_leaprr_ends_a_chain_and_moves_the_first_candidates_alone(tmp_path, pool, lists):
    write_run(tmp_path)
    settings = {"bank_images": 8, "betas": (7.0,), "pool": pool}
    before = recipe_of(rerank=settings)
    _, plain = stage(tmp_path, before)
    chain = {**settings, "method": "inverted_softmax+leaprr"}
    recipe = recipe_of(rerank=chain, leaprr={**LEAPRR, "lists": lists})
    trainings, rows = stage(tmp_path, recipe)
    assert len(trainings) == 1
    for a, b in zip(plain, rows, strict=True):
        k = {"i2t": 6, "t2i": 4}[a["direction"]]
        assert a["score"] == pytest.approx(b["score"])
        assert sorted(a["candidate_id"][:k]) == sorted(b["candidate_id"][:k])
        assert a["candidate_id"][k:] == b["candidate_id"][k:]
    protocol = RunFolder(str(tmp_path)).known("reranked", "main")["settings"]
    assert protocol["rerank"] == "inverted softmax, then leaprr" and protocol["pool"] == pool
    _, on_val = rerank.best(recipe, str(tmp_path), "main")
    assert on_val == -1 if lists == "val" else on_val > 0  # what it learned from is no measure


def test_a_finished_training_is_not_done_again_and_other_settings_are_another(tmp_path):
    write_run(tmp_path)
    settings = {"method": "leaprr", "bank_images": 8}
    recipe = recipe_of(rerank=settings, leaprr=LEAPRR)
    (plan,), rows = stage(tmp_path, recipe)
    root = str(tmp_path)
    fitted = finish(rerank.plan(recipe, root, "main"), rerank.write_reranker)
    (again,) = rerank.plan_training(recipe, root, "main", fitted)
    assert again.complete and rerank.plan_reranked(recipe, root, "main").complete
    other = recipe_of(rerank=settings, leaprr={**LEAPRR, "seed": 1})
    (changed,) = rerank.plan_training(other, root, "main", fitted)
    assert changed.pending


def test_weights_trained_on_one_run_re_rank_another(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    write_run(here)
    write_run(there, seed=5)
    settings = {"method": "leaprr", "bank_images": 8}
    recipe = recipe_of(rerank=settings, leaprr=LEAPRR)
    stage(here, recipe)
    weights = RunFolder(str(here)).folder("rerank", "main", "leaprr")
    transferred = recipe_of(rerank={**settings, "weights": weights})
    trainings, rows = stage(there, transferred)
    assert trainings == []
    base, _ = ranked(there)
    moved = [a["candidate_id"] != b["candidate_id"] for a, b in zip(base, rows, strict=True)]
    assert any(moved)
    _, back = stage(here, recipe_of(rerank={**settings, "weights": weights}))
    _, own = stage(here, recipe)
    assert [row["candidate_id"] for row in back] == [row["candidate_id"] for row in own]


def test_lists_of_a_run_whose_towers_have_not_seen_them(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    write_run(here)
    write_run(there, seed=5)
    settings = {"method": "leaprr", "bank_images": 8}
    recipe = recipe_of(rerank=settings, leaprr={**LEAPRR, "lists": str(there)})
    (plan,), _ = stage(here, recipe)
    fitted = RunFolder(str(here)).known("rerank", "main")
    write_run(there, seed=6)
    (changed,) = rerank.plan_training(recipe, str(here), "main", fitted)
    assert plan.pieces[0].fingerprint != changed.pieces[0].fingerprint


def test_of_several_methods_the_best_on_val_is_the_stage_s_ranking(tmp_path):
    write_run(tmp_path)
    methods = ("inverted_softmax", "krnn", "query_expansion", "database_augmentation")
    recipe = recipe_of(rerank={"method": methods, "bank_images": 8})
    root = str(tmp_path)
    index = finish(rerank.plan(recipe, root, "main"), rerank.write_reranker)
    values = {entry["name"]: entry["val/rsum"] for entry in index["pieces"]}
    best, on_val = rerank.best(recipe, root, "main")
    assert values[best] == on_val == max(values.values())
    folders = {m: rerank.plan_reranked(recipe, root, "main", m).folder for m in methods}
    assert folders.pop(best) == RunFolder(root).folder("reranked", "main")
    assert all(folder.endswith(method) for method, folder in folders.items())


def test_sentence_vectors_compare_captions_where_they_are_asked_for(tmp_path):
    write_run(tmp_path)
    settings = {"method": "train_pairs", "bank_images": 8}
    _, rows = stage(tmp_path, recipe_of(rerank=settings))
    _, others = stage(tmp_path, recipe_of(rerank={**settings, "texts": "sentences"}))
    assert [row["score"] for row in rows] != [row["score"] for row in others]
    index = RunFolder(str(tmp_path)).known("reranked", "main")
    assert index["settings"]["texts"] == "hand"


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("inverted_sofmax", "unknown method 'inverted_sofmax'; did you mean 'inverted_softmax'"),
        ("leaprr+krnn", "'leaprr+krnn' goes on after leaprr; leaprr is a chain's last step"),
    ],
)
def test_a_method_that_there_is_not_is_refused(tmp_path, method, problem):
    write_run(tmp_path)
    with pytest.raises(InputError, match=re.escape(problem)):
        rerank.plan(recipe_of(rerank={"method": method}), str(tmp_path), "main")
