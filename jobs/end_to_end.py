"""halftone run: all eight stages for every model of the recipe, and a table of them all."""

from jobs import embed, evaluate, ingest, label, rerank, search, shard, train
from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.commands import report
from jobs.cli.run import Run
from schemas.settings import SECTIONS


def arguments(parser) -> None:
    parser.add_argument(
        "source",
        nargs="?",
        default=None,
        help="one's own data: a file, folder or pattern; the settings are chosen to fit it",
    )


def run(run: Run) -> None:
    for stage in (ingest, shard, embed, label, train, evaluate, rerank):
        stage.run(run)
    search.page(run)


COMMAND = Command(
    scopes.source_or_recipe, run, SECTIONS, arguments=arguments, closing=report.closing
)

if __name__ == "__main__":
    main.main("run")
