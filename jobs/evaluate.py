"""halftone evaluate: tower vectors, rankings and metrics of a trained model."""

from jobs import _cli
from jobs._run import Run
from pipeline import _store, evaluate


def run(run: Run) -> None:
    with run.stage("evaluate") as stage:
        vectors = evaluate.plan_vectors(run.recipe, run.root, run.name)
        stage.make(vectors, evaluate.write_vectors, gpu=True)
        plan = evaluate.plan(run.recipe, run.root, run.name)
        stage.make(plan, evaluate.write_rankings)
        if not run.dry:
            uri = _store.join(plan.folder, "metrics.json")
            stage.metrics("base", evaluate.metrics(plan))
            if stage.made or not _store.exists(uri):
                _store.write_json(uri, evaluate.results(plan, run.recipe))


if __name__ == "__main__":
    _cli.main("evaluate")
