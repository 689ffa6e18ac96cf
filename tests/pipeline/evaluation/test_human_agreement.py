"""Agreement with people's judgements, against slow loops, scipy and scikit-learn."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import ndcg_score

from jobs.cli import main
from pipeline.errors import InputError
from pipeline.evaluation import (
    evaluate,
    human_agreement,
    results,
    tower_vectors,
    trec,
)
from pipeline.evaluation.results import sentence
from pipeline.reports import tables
from pipeline.retrieval.scores import Items, matrix_scores
from tests.helpers.stages import finish
from tests.pipeline.evaluation.test_ranking import recipe_of, write_run

torch.set_num_threads(1)


@pytest.fixture
def judged(tmp_path):
    """A run folder of hand-made vectors, and a CSV in which two people judge pairs of its split."""
    vectors = write_run(tmp_path)
    images = [i for i in vectors if i.startswith("test") and "#" not in i]
    texts = [i for i in vectors if i.startswith("test") and "#" in i]
    rng = np.random.default_rng(0)
    lines = ["caption_id,score,image_id,rater"]
    for image in images:
        for text in rng.choice(texts, 5, replace=False):
            lines += [f"{text},{rng.integers(1, 5)},{image},{rater}" for rater in "ab"]
    lines += ["gone#0,3,gone,a"]
    (tmp_path / "people.csv").write_text("\n".join(lines))
    return str(tmp_path), str(tmp_path / "people.csv"), vectors


def slow(uri: str, vectors: dict) -> tuple[dict, dict]:
    """Score and mean judgement, as relevance, by pair."""
    scores, judgements = {}, {}
    for line in Path(uri).read_text().splitlines()[1:]:
        text, score, image, _ = line.split(",")
        if image in vectors:
            judgements.setdefault((image, text), []).append((float(score) - 1) / 3)
            scores[image, text] = float(vectors[image].astype(float) @ vectors[text])
    return scores, {pair: np.mean(values) for pair, values in judgements.items()}


def test_figures_are_those_of_scipy_and_scikit_learn(judged):
    root, uri, vectors = judged
    gallery = evaluate_vectors(root)
    table = human_agreement.measure(gallery, human_agreement.read(uri), 50)
    scores, relevance = slow(uri, vectors)
    s, r = ([of[pair] for pair in scores] for of in (scores, relevance))
    found = table.metrics
    assert found["judged_spearman"] == pytest.approx(scipy.stats.spearmanr(s, r).statistic)
    assert found["judged_kendall"] == pytest.approx(scipy.stats.kendalltau(s, r).statistic)
    for way, side in (("i2t", 0), ("t2i", 1)):
        values = []
        for query in {pair[side] for pair in scores}:
            mine = [pair for pair in scores if pair[side] == query]
            gains = [2 ** relevance[pair] - 1 for pair in mine]
            if min(gains) < max(gains):
                values.append(ndcg_score([gains], [[scores[pair] for pair in mine]]))
        assert found[f"{way}_ndcg_judged"] == pytest.approx(np.mean(values))
        assert table.protocol.queries[way] == len(values)
    assert table.protocol.pairs == len(scores) and table.protocol.pairs_left_out == 1
    low, high = table.intervals["judged_spearman"]
    assert low < found["judged_spearman"] < high
    assert "people.csv" in sentence(table.protocol) and len(tables.figures(table)[1]) == 4


def evaluate_vectors(root: str):
    return tower_vectors.read_vectors([("main", recipe_of())], root)


def test_a_model_that_scores_all_alike_agrees_with_nobody(judged):
    root, uri, _ = judged
    items = evaluate_vectors(root).items
    alike = matrix_scores(items, torch.zeros(len(items.image_ids), len(items.text_ids)))
    found = human_agreement.measure(alike, human_agreement.read(uri), 20).metrics
    assert not {"judged_kendall", "judged_spearman"} & found.keys()  # there is no order
    assert found["i2t_ndcg_judged"] < 0.95  # the mean over all orders


def test_people_are_among_the_results_of_evaluate_and_their_file_is_followed(judged):
    root, uri, _ = judged
    settings = {"judgements": uri, "protocols": ("own",), "resamples": 20}
    recipe = recipe_of(evaluate=settings)
    plan = evaluate.plan(recipe, root, "main")
    finish(plan, evaluate.write_rankings)
    plan = evaluate.plan(recipe, root, "main")
    version, uri_of = evaluate.results_version(plan, recipe), f"{root}/metrics.json"
    results.write(uri_of, evaluate.result(plan, recipe, root, "main"), version)
    found = results.read(uri_of, "main", version)
    assert set(found.tables) == {"own", "judgements"}
    assert set(human_agreement.FIGURES) <= found.metrics.keys()
    assert set(human_agreement.FIGURES) == found.tables["judgements"].metrics.keys()
    own = found.tables["own"]
    assert own.metrics["rsum"] == pytest.approx(found.metrics["rsum"])
    assert "folds" in sentence(own.protocol) and found.protocol.label_encoder == "hand"
    assert not evaluate.plan(recipe_of(), root, "main").pending  # rankings do not depend on them
    with open(uri, "a") as file:
        file.write("\ntest-000000/0#0,1,test-000000/0,c")
    assert evaluate.results_version(plan, recipe) != version


def test_the_command_prints_them_for_any_models_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("matrix.npy", np.eye(4, 8) + np.arange(8) / 100)
    (tmp_path / "p.csv").write_text(
        "image_id,caption_id,score\n0,0,5\n0,1,1\n1,1,4\n1,7,1\n2,2,5\n2,3,2\n"
    )
    main.main("score", ["--matrix", "matrix.npy", "--people", "p.csv", "--json"])
    table = json.loads(capsys.readouterr().out)["judgements"]
    assert table["metrics"]["i2t_ndcg_judged"] == pytest.approx(1)
    assert table["protocol"]["scale"] == [1, 5]
    main.main("score", ["--matrix", "matrix.npy", "--people", "p.csv"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "judged_kendall" in printed and "6 pairs of 3 images and 5 captions" in printed


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("caption_id_1,caption_id_2,score\na,b,1\n", "pairs of captions"),
        ("image_id,caption_id,score\n0,0,1\n0,1,1\n", "judge pairs that differ"),
        ("image_id,caption_id,score\nx,0,1\ny,1,2\n", "of these"),
        ("image_id,caption_id,relevance\n0,0,1\n", "expected"),
        ("image_id,caption_id,score\n0,0,high\n", "no score"),
    ],
)
def test_judgements_that_say_nothing_are_refused(tmp_path, text, sentence):
    uri = tmp_path / "p.csv"
    uri.write_text(text)
    items = Items(["0"], ["0", "1"], ["0", "0"])
    gallery = matrix_scores(items, torch.tensor([[0.1, 0.2]]))
    with pytest.raises(InputError, match=sentence):
        human_agreement.measure(gallery, human_agreement.read(str(uri)), 20)


def test_one_judged_caption_an_image_orders_no_query_and_has_its_other_figures(tmp_path):
    uri = tmp_path / "p.csv"
    uri.write_text("Image_ID;Caption_ID;Score\n0;0;1\n1;1;2\n2;2;4\n3;3;3\n")
    items = Items([*"0123"], [*"0123"], [*"0123"])
    scores = torch.eye(4) * torch.tensor([0.1, 0.2, 0.4, -torch.inf])
    for last, pairs in ((0.3, 4), (-torch.inf, 3)):  # what has no score agrees with nobody
        scores[3, 3] = last
        scores = scores.nan_to_num(nan=0.0, neginf=-torch.inf)
        found = human_agreement.measure(
            matrix_scores(items, scores), human_agreement.read(str(uri)), 20
        )
        assert found.metrics == pytest.approx({"judged_spearman": 1, "judged_kendall": 1})
        assert found.protocol.pairs == pairs and found.protocol.pairs_left_out == 4 - pairs
        assert "whose judgements differ: none" in sentence(found.protocol)


def test_a_run_of_lists_has_no_score_for_every_pair(tmp_path):
    uri = tmp_path / "p.csv"
    uri.write_text("image_id,caption_id,score\ni,t,1\ni,u,2\n")
    runs = trec.RunScores.of({"i2t": {"i": {"t": 0.5, "u": 0.1}}, "t2i": {}})
    with pytest.raises(InputError, match="TREC run"):
        human_agreement.measure(runs, human_agreement.read(str(uri)), 20)
