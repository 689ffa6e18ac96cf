"""halftone run: all eight stages for every model of the recipe, and a table of them all."""

from jobs import embed, evaluate, ingest, label, rerank, search, shard, train
from jobs.cli import main
from jobs.cli.commands import report
from jobs.cli.run import Run

STAGES = (ingest, shard, embed, label, train, evaluate, rerank, search)


def run(run: Run) -> None:
    for stage in STAGES:
        stage.run(run)


closing = report.closing

if __name__ == "__main__":
    main.main("run")
