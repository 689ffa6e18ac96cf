"""halftone preview: a page of a split's pictures and captions, and of what was rejected."""

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.run import Run
from pipeline.errors import InputError


def arguments(parser) -> None:
    parser.add_argument("--split", default="train", help="the split to show (default train)")
    parser.add_argument("--images", default="60", help="pictures on the page (count, default 60)")


def run(run: Run) -> None:
    from pipeline.reports import preview

    options = run.options
    if not options.images.isdigit() or not (images := int(options.images)):
        raise InputError(f"--images {options.images} is no count; give a number from 1")
    with run.stage("preview") as stage:
        page = preview.page(run.root, options.split, images)
        stage.page(page)
    if not run.dry:
        run.show.where({"preview": page.uri})


COMMAND = Command(scopes.data, run, arguments=arguments)
