"""halftone evaluate: tower vectors, rankings and metrics of a trained model."""

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.run import Run, Stage
from pipeline.storage import store
from pipeline.storage.plan import Plan


def run(run: Run) -> None:
    from pipeline.evaluation import evaluate, protocols, tower_vectors
    from pipeline.reports.results import protocol_line

    with run.stage("evaluate") as stage:
        vectors = tower_vectors.plan_vectors(run.recipe, run.root, run.name)
        stage.make(vectors, tower_vectors.write_vectors, gpu=True)
        plan = evaluate.plan(run.recipe, run.root, run.name)
        stage.make(plan, evaluate.write_rankings)
        if not run.dry:
            found = _results(stage, plan)
            stage.metrics("base", found["metrics"])
            for table in [protocols.Table(**table) for table in found["tables"].values()]:
                cells = ["", run.name, "95 %"], protocols.rows(table)
                run.show.table("", *cells, protocols.line(table))
            run.show.line(f"  {protocol_line(found['protocol'])}")


def _results(stage: Stage, plan: Plan) -> dict:
    """metrics.json, made again where it was of something else."""
    from pipeline.evaluation import results

    run, uri = stage.run, results.results_uri(plan)
    found = store.read_json(uri) if store.exists(uri) else {}
    if found.get("version") != results.results_version(plan, run.recipe):
        stage.start()
        found = results.all_results(plan, run.recipe, run.root, run.name)
        store.write_json(uri, found)
    return found


COMMAND = Command(scopes.each_model, run, ("evaluate", "label"))

if __name__ == "__main__":
    main.main("evaluate")
