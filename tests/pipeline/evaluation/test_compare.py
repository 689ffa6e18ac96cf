"""Intervals and tests against slow loops, and runs compared from their folders."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from jobs.cli import main
from pipeline.errors import InputError
from pipeline.evaluation import compare, evaluate, intervals, results
from pipeline.evaluation.intervals import Queries
from pipeline.storage import store
from pipeline.storage.run_folder import RunFolder
from tests.helpers.stages import finish
from tests.pipeline.evaluation.test_ranking import recipe_of, write_run


def ranking(seed=0, images=12, better=0.0) -> dict[str, Queries]:
    """Queries of images with one to three captions."""
    rng = np.random.default_rng(seed)
    own = np.repeat(np.arange(images), rng.integers(1, 4, images))
    out = {}
    for way, image_Q in (("i2t", np.arange(images)), ("t2i", own)):
        ids = np.array([f"i{i:03}" for i in image_Q])
        rank_Q = rng.integers(1, 30, len(image_Q)).astype(float)
        hit_Q = (rng.random(len(image_Q)) < 0.4 + better).astype(float)
        graded_Q = np.where(rng.random(len(image_Q)) < 0.2, np.nan, rng.random(len(image_Q)))
        values = {"rank": rank_Q, "R_at_1": hit_Q, "ndcg_label": graded_Q}
        out[way] = Queries(np.char.add(ids, [f"#{n}" for n in range(len(ids))]), ids, values)
    return out


@pytest.mark.parametrize("held", [2**24, 7 * 12])  # all resamples at once, or seven at a time
def test_bootstrap_is_that_of_a_slow_loop_over_drawn_images(held, monkeypatch):
    monkeypatch.setattr(intervals, "HELD", held)
    mine = ranking()
    images = sorted(set(mine["i2t"].image_ids))
    draws = np.random.default_rng(intervals.SEED).multinomial(12, np.full(12, 1 / 12), size=50)
    slow: dict[str, list[float]] = {}
    for draw in draws:
        chosen = [image for image, times in zip(images, draw, strict=True) for _ in range(times)]
        again = {}
        for way, queries in mine.items():
            rows = [r for image in chosen for r in np.nonzero(queries.image_ids == image)[0]]
            values = {name: value[rows] for name, value in queries.values.items()}
            again[way] = Queries(queries.query_ids[rows], queries.image_ids[rows], values)
        for name, value in intervals.figures(again).items():
            slow.setdefault(name, []).append(value)
    found = intervals.bootstrap(mine, 50)
    assert found.keys() == slow.keys() == intervals.figures(mine).keys()
    for name, values in slow.items():
        expected = np.nanpercentile(values, (2.5, 97.5), method="nearest")
        assert found[name] == pytest.approx(expected), name


def test_intervals_hold_the_figure_of_the_whole_95_times_in_a_hundred():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        chance_M = rng.beta(2, 2, 80)  # the images' own difficulty: their captions go together
        ids = np.repeat(np.arange(80).astype(str), 5)
        hit_Q = (rng.random(400) < np.repeat(chance_M, 5)).astype(float)
        low, high = intervals.bootstrap({"t2i": Queries(ids, ids, {"R_at_1": hit_Q})}, 200)["rsum"]
        inside += low <= 50 <= high
    assert 178 <= inside <= 198


def test_permutation_p_is_that_of_all_swaps():
    a, b = ranking(1, images=10), ranking(1, images=10, better=0.3)
    found = intervals.permutation(a, b, 20_000)
    for way in a:
        delta_Q = b[way].values["R_at_1"] - a[way].values["R_at_1"]
        delta_M = [delta_Q[a[way].image_ids == i].sum() for i in np.unique(a[way].image_ids)]
        signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
        all_swaps = np.abs(signs.T @ np.array(delta_M))
        p = (all_swaps >= abs(sum(delta_M)) - 1e-9).mean()
        assert found[f"{way}_R_at_1"] == pytest.approx(p, abs=0.015)
    assert "i2t_rank" not in found and 0 < found["rsum"] <= 1


def test_a_ranking_does_not_differ_from_itself():
    assert set(intervals.permutation(ranking(), ranking(), 100).values()) == {1.0}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> list[str]:
    """Two finished runs of the same queries and one of others."""
    counts = {"test-000000": [3] * 40}
    out = []
    for name, seed, counts_of in (
        ("a", 0, counts),
        ("b", 1, counts),
        ("c", 2, {"test-000000": [2]}),
    ):
        root = str(tmp_path_factory.mktemp("runs") / name)
        write_run(root, counts_of, seed=seed)
        for stage, *where in (("shard",), ("label", "hand"), ("train", "main")):
            index = {"pieces": [], "version": f"{stage}-{name if stage == 'train' else 'same'}"}
            store.write_json(RunFolder(root).folder(stage, *where, "index.json"), index)
        recipe = recipe_of(train={"seed": seed})
        plan = evaluate.plan(recipe, root, "main")
        finish(plan, evaluate.write_rankings)
        found = results.of_ranking(plan, recipe, {}, "main")
        results.write(store.join(plan.folder, results.FILE), found, "hand")
        settings = yaml.safe_dump(recipe.model_dump(mode="json")).encode()
        store.write_bytes(store.join(root, "settings-main.yaml"), settings)
        out.append(root)
    return out


def test_runs_are_compared_by_what_changed_and_by_what_it_did(roots, capsys):
    main.main("compare", [roots[0], f"{roots[1]}:main", "--json"])
    found = json.loads(capsys.readouterr().out)["b:main"]
    assert found["changes"] == {
        "train.seed": ["0", "1"],
        "caption vectors' version": found["changes"]["caption vectors' version"],
        "model version": ["train-a", "train-b"],
    }
    assert set(found["p"]) == set(found["metrics"][0]) - {"i2t_MedR", "t2i_MedR"}
    for name, (low, high) in found["intervals"][0].items():
        assert low <= found["metrics"][0][name] <= high
    main.main("compare", roots[:2])
    printed = capsys.readouterr().out
    assert "train.seed" in printed and "difference" in printed and "rsum" in printed
    assert "The same: data version" in " ".join(printed.split())


def test_runs_of_other_queries_get_no_p(roots):
    a, c = compare.read(roots[0]), compare.read(roots[2])
    assert compare.p_values(a, c) == {}
    assert ("protocol.images", "40", "1") in compare.changes(a, c)


def test_another_graded_protocol_leaves_ndcg_without_p(roots):
    a = compare.read(roots[0])
    b = judged(compare.read(roots[1]), label_map="other")
    assert not any("ndcg_label" in name for name in compare.p_values(a, b))
    c = judged(compare.read(roots[1]), ndcg_at=3)
    assert not any("ndcg" in name for name in compare.p_values(a, c))


def judged(model: compare.Model, **other) -> compare.Model:
    """The model, measured by another judge."""
    return replace(model, protocol=replace(model.protocol, **other))


def test_a_setting_that_an_older_run_does_not_know_has_its_default(roots, tmp_path):
    shutil.copytree(roots[0], tmp_path / "old")
    uri = tmp_path / "old" / "settings-main.yaml"
    settings = yaml.safe_load(uri.read_text())
    del settings["evaluate"]
    uri.write_text(yaml.safe_dump(settings))
    assert compare.changes(compare.read(roots[0]), compare.read(str(tmp_path / "old"))) == []


def test_what_cannot_be_compared_is_said_in_a_sentence(roots, tmp_path, capsys):
    with pytest.raises(InputError, match="no model 'man'.*main"):
        compare.read(f"{roots[0]}:man")
    with pytest.raises(InputError, match="holds no model"):
        compare.read(str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main.main("compare", [roots[0]])
    assert stop.value.code == 2 and "two or more" in capsys.readouterr().err
