"""halftone check: what a source holds and what looks wrong in it, before anything is written."""

import json

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.show import Show
from jobs.cluster import tasks

HERE = 8  # parts that are looked at in this process: a Ray would take longer to start


def arguments(parser) -> None:
    parser.add_argument(
        "source", nargs="?", default=None, help="file, folder, pattern (default --source.path)"
    )


def run(root: str, models: list, options) -> None:
    """Prints what is there; ends the process with 1 where it cannot be read."""
    from pipeline.sharding.checks import source_check

    settings = models[0][1].source
    show = Show(quiet=options.json)
    pieces = source_check.plan(settings)
    if len(pieces) > HERE:
        with show.progress("check", len(pieces)) as advance:
            looked = tasks.fan_out(source_check.look, pieces, done=lambda *_: advance())
    else:
        looked = {piece.name: source_check.look(piece) for piece in pieces}
    found = source_check.summed([looked[piece.name] for piece in pieces], settings)
    if options.json:
        print(json.dumps({"kind": settings.kind, "path": settings.path, **found}))
    else:
        _print(show, f"{settings.kind} source {settings.path or ''}", found)
    if found["errors"]:
        raise SystemExit(1)


def _print(show: Show, what: str, found: dict) -> None:
    def line(text: str) -> None:
        show.out.print(text, soft_wrap=True, markup=False)

    line(what)
    counts = "  ".join(f"{split} {n:,}" for split, n in found["splits"].items())
    line(f"  {found['images']:,} images, {found['captions']:,} captions: {counts}")
    for text in found["told"] + [f"passed over: {text}" for text in found["passed_over"]]:
        line(f"  {text}")
    for sample in found["samples"]:
        line(f"  {sample['image_id']} ({sample['split']}, {sample['holds']})")
        for caption in sample["captions"][:5]:
            line(f"    {caption}")
    for text in found["looks_wrong"]:
        line(f"  looks wrong: {text}")
    for text in found["errors"]:
        line(f"  cannot be read: {text}")


COMMAND = Command(scopes.source, run, ("source",), arguments=arguments)
