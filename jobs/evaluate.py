"""halftone evaluate: tower vectors, rankings and metrics of a trained model."""

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.run import Run


def run(run: Run) -> None:
    from pipeline.evaluation import evaluate, tower_vectors
    from pipeline.evaluation.results import sentence
    from pipeline.reports import tables

    with run.stage("evaluate") as stage:
        recipe, root, name = run.recipe, run.root, run.name
        vectors = tower_vectors.plan_vectors(recipe, root, name)
        made = stage.make(vectors, tower_vectors.write_vectors, gpu=True)
        stage.note(**tower_vectors.notes(made, recipe.evaluate.split))
        plan = evaluate.plan(recipe, root, name)
        stage.make(plan, evaluate.write_rankings)
        if not run.dry:
            version = evaluate.results_version(plan, recipe)
            found = stage.result(plan, name, version, evaluate.result, recipe, root)
            stage.metrics("base", found.metrics)
            for table in found.tables.values():
                run.show.table("", *tables.figures(table, name), sentence(table.protocol))
            run.show.line(f"  {sentence(found.protocol)}")


COMMAND = Command(scopes.each_model, run, ("evaluate", "label"))

if __name__ == "__main__":
    main.main("evaluate")
