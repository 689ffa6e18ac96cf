"""halftone rerank: inverted softmax fitted on val, and the rankings it gives."""

from jobs import _cli
from jobs._run import Run
from pipeline import _store, evaluate, rerank


def run(run: Run) -> None:
    with run.stage("rerank") as stage:
        fitted = stage.make(rerank.plan(run.recipe, run.root, run.name), rerank.write_reranker)
        chosen = fitted["pieces"][0]["chosen"]
        plan = rerank.plan_reranked(run.recipe, run.root, run.name)
        index = stage.make(plan, rerank.write_rankings)
        if not run.dry:
            metrics = evaluate.metrics(plan)
            stage.metrics("reranked", metrics)
            stage.note(**{f"beta_{d}": c["beta"] for d, c in chosen.items()})
            if stage.made:
                result = {"metrics": metrics, "protocol": index["settings"]}
                _store.write_json(_store.join(plan.folder, "metrics.json"), result)


if __name__ == "__main__":
    _cli.main("rerank")
