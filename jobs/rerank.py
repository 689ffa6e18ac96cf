"""halftone rerank: re-rankers fitted on train and val, and the rankings they give."""

from jobs.cli import main
from jobs.cli.command import Command
from jobs.cli.rerank_external import arguments, scope
from jobs.cli.run import Run, Stage


def run(run: Run) -> None:
    from pipeline.evaluation import results
    from pipeline.reports import tables
    from pipeline.reranking import rerank
    from pipeline.storage.run_folder import RunFolder

    with run.stage("rerank") as stage:
        recipe, root, name = run.recipe, run.root, run.name
        plan = rerank.plan(recipe, root, name)
        fitted = stage.make(plan, rerank.write_reranker, gpu=True)
        for plan in rerank.plan_training(recipe, root, name, fitted):
            stage.train(plan, rerank.fit, rerank.summary, epochs=recipe.leaprr.epochs)
        chosen, val = rerank.best(recipe, root, name)
        found = [_ranked(stage, method, method == chosen) for method in recipe.rerank.method]
        if len(found) > 1 and not run.dry:
            base = results.need(RunFolder(root).folder("evaluate", name), "none", "evaluate")
            cells = tables.methods([base, *found], recipe.rerank.pool, chosen, val)
            run.show.table("", *cells, "")


def _ranked(stage: Stage, method: str, chosen: bool):
    """Make a method's rankings; the `Result`: what they do, and what they took."""
    from pipeline.evaluation import results
    from pipeline.reranking import rerank

    run = stage.run
    plan = rerank.plan_reranked(run.recipe, run.root, run.name, method)
    index = stage.make(plan, rerank.write_rankings, gpu=True)
    if run.dry:
        return None
    version, about = results.version(plan, run.recipe), (run.recipe, rerank.cost(index))
    found = stage.result(plan, method, version, results.of_ranking, *about)
    if chosen:
        stage.metrics("reranked", found.metrics)
        stage.note(**{k: v for k, v in index["settings"].items() if "_i2t" in k or "_t2i" in k})
    return found


COMMAND = Command(scope, run, ("rerank", "leaprr", "evaluate"), arguments=arguments)

if __name__ == "__main__":
    main.main("rerank")
