"""halftone rerank: re-rankers fitted on train and val, and the rankings they give."""

from jobs.cli import main, rerank_external
from jobs.cli.command import Command
from jobs.cli.run import Run, Stage
from pipeline.storage import store


def run(run: Run) -> None:
    from pipeline.reranking import rerank

    with run.stage("rerank") as stage:
        recipe, root, name = run.recipe, run.root, run.name
        fitted = stage.make(rerank.plan(recipe, root, name), rerank.write_reranker)
        for plan in rerank.plan_training(recipe, root, name, fitted):
            stage.train(plan, rerank.fit, rerank.summary, epochs=recipe.leaprr.epochs)
        chosen, _ = rerank.best(recipe, root, name)
        rows = {method: _ranked(stage, method, method == chosen) for method in recipe.rerank.method}
        if len(rows) > 1 and not run.dry:
            run.show.table("", *rerank.table(recipe, root, name, rows), "")


def _ranked(stage: Stage, method: str, chosen: bool) -> dict:
    """Make a method's rankings; its metrics, and what they took."""
    from pipeline.evaluation import results
    from pipeline.reranking import rerank

    run = stage.run
    plan = rerank.plan_reranked(run.recipe, run.root, run.name, method)
    index = stage.make(plan, rerank.write_rankings)
    if run.dry:
        return {}
    metrics, cost = results.metrics(plan), rerank.cost(index)
    uri = store.join(plan.folder, "metrics.json")
    if stage.made or not store.exists(uri):
        store.write_json(uri, {**results.results(plan, run.recipe), "cost": cost})
    if chosen:
        stage.metrics("reranked", metrics)
        stage.note(**{k: v for k, v in index["settings"].items() if "_i2t" in k or "_t2i" in k})
    return metrics | cost


COMMAND = Command(
    rerank_external.scope,
    run,
    ("rerank", "leaprr", "evaluate"),
    arguments=rerank_external.arguments,
)

if __name__ == "__main__":
    main.main("rerank")
