"""halftone run: all eight stages for every model of the recipe, and a table of them all."""

from jobs import embed, evaluate, ingest, label, rerank, search, shard, train
from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.commands import report
from jobs.cli.run import Run
from schemas.settings import SECTIONS

STAGES = (
    ingest.run,
    shard.run,
    embed.run,
    label.run,
    train.run,
    evaluate.run,
    rerank.run,
    search.page,
)


def run(run: Run) -> None:
    for stage in STAGES:
        stage(run)


COMMAND = Command(scopes.each_model, run, SECTIONS, closing=report.closing)

if __name__ == "__main__":
    main.main("run")
