"""halftone run: all eight stages, for every model of the recipe, and the table that compares them."""

from jobs import _cli, embed, evaluate, ingest, label, rerank, search, shard, train
from jobs import report as report_job
from jobs._run import Run

STAGES = (ingest, shard, embed, label, train, evaluate, rerank, search)


def run(run: Run) -> None:
    for stage in STAGES:
        stage.run(run)


def closing(runs: list[Run]) -> None:
    report_job.write(runs[-1], [run.name for run in runs])
    report_job.table(runs)
    report_job.where_to_look(runs[-1])


if __name__ == "__main__":
    _cli.main("run")
