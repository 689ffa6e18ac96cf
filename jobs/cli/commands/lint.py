"""halftone lint: what is wrong with a run folder's shards, or with any WebDataset tars."""

import json

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.show import Show
from jobs.cluster import tasks


def arguments(parser) -> None:
    parser.add_argument(
        "uri", nargs="?", default=None, help="run folder, folder of tars, or a tar (default --root)"
    )
    fast(parser)


def fast(parser) -> None:
    parser.add_argument(
        "--fast", action="store_true", default=False, help="decode no picture and no features"
    )


def run(root: str, options) -> None:
    """Prints the findings; ends the process with 1 where there are any."""
    uri, show = options.uri or root, Show(quiet=options.json)
    findings, shards, samples = look(uri, show, decode=not options.fast)
    if options.json:
        about = [{"file": f.file, "what": f.what, "do": f.do} for f in findings]
        print(json.dumps({"uri": uri, "shards": shards, "samples": samples, "findings": about}))
    else:
        show.findings([(f.file, f.what, f.do) for f in findings])
        plural = "s" if len(findings) > 1 else ""
        verdict = f"{len(findings)} finding{plural} in" if findings else "clean:"
        show.out.print(f"{verdict} {counted(shards, samples)}")
    if findings:
        raise SystemExit(1)


def counted(shards: int, samples: int) -> str:
    return f"{shards:,} shard{'s' * (shards != 1)}, {samples:,} samples"


def look(uri: str, show: Show, *, decode: bool = True) -> tuple[list, int, int]:
    """Findings, number of shards, number of samples; each shard is looked at by a Ray task."""
    from pipeline.sharding.checks import lint

    pieces, findings = lint.plan(uri, decode=decode)
    with show.progress("lint", len(pieces)) as advance:
        checked = tasks.fan_out(lint.check, pieces, done=lambda *_: advance())
    findings += [found for piece in pieces for found in checked[piece.name]["findings"]]
    findings += lint.across(checked)
    shards = sum(piece.inputs["kind"] == "shard" for piece in pieces)
    return findings, shards, sum(done["samples"] for done in checked.values())


COMMAND = Command(scopes.folder, run, arguments=arguments)
