"""`halftone rerank` on a run folder: what it leaves beside the rankings, and when it is renewed."""

import pytest
import yaml

from jobs.cli import main
from pipeline.evaluation import evaluate
from pipeline.storage import store
from pipeline.storage.run_folder import RunFolder
from tests.helpers.stages import finish, make_here
from tests.pipeline.evaluation.test_ranking import recipe_of, write_run


@pytest.fixture
def evaluated(tmp_path, monkeypatch) -> str:
    """A run folder of drawn vectors that was evaluated."""
    root = str(tmp_path / "run")
    write_run(root)
    recipe = recipe_of(rerank={"bank_images": 8})
    finish(evaluate.plan(recipe, root, "main"), evaluate.write_rankings)
    settings = yaml.safe_dump(recipe.model_dump(mode="json")).encode()
    store.write_bytes(store.join(root, "settings-main.yaml"), settings)
    make_here(monkeypatch)
    monkeypatch.setattr("jobs.tracking.tracker.Tracker._write", lambda *_: None)
    return root


def test_other_resamples_renew_the_intervals_of_a_re_ranking(evaluated):
    uri = RunFolder(evaluated).folder("reranked", "main", "metrics.json")
    main.main("rerank", ["--root", evaluated])
    first = store.read_json(uri)
    before = store.stamp(uri)
    main.main("rerank", ["--root", evaluated])
    assert store.stamp(uri) == before  # nothing has changed
    main.main("rerank", ["--root", evaluated, "--evaluate.resamples", "20"])
    again = store.read_json(uri)
    assert again["intervals"] != first["intervals"]
    assert again["metrics"] == first["metrics"] and again["cost"] == first["cost"]
