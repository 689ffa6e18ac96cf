"""halftone evaluate: tower vectors, rankings and metrics of a trained model."""

from jobs.cli import main as _cli
from jobs.cli.run import Run, Stage
from pipeline.evaluation import evaluate, protocols
from pipeline.reports import report
from pipeline.storage import store as _store
from pipeline.storage.plan import Plan


def run(run: Run) -> None:
    with run.stage("evaluate") as stage:
        vectors = evaluate.plan_vectors(run.recipe, run.root, run.name)
        stage.make(vectors, evaluate.write_vectors, gpu=True)
        plan = evaluate.plan(run.recipe, run.root, run.name)
        stage.make(plan, evaluate.write_rankings)
        if not run.dry:
            found = _results(stage, plan)
            stage.metrics("base", found["metrics"])
            for table in [protocols.Table(**table) for table in found["tables"].values()]:
                cells = ["", run.name, "95 %"], protocols.rows(table)
                run.show.table("", *cells, protocols.line(table))
            run.show.line(f"  {report.protocol_line(found['protocol'])}")


def _results(stage: Stage, plan: Plan) -> dict:
    """metrics.json, made again where it was of something else."""
    run, uri = stage.run, evaluate.results_uri(plan)
    found = _store.read_json(uri) if _store.exists(uri) else {}
    if found.get("version") != evaluate.results_version(plan, run.recipe):
        stage.start()
        found = evaluate.all_results(plan, run.recipe, run.root, run.name)
        _store.write_json(uri, found)
    return found


if __name__ == "__main__":
    _cli.main("evaluate")
