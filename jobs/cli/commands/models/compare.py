"""halftone compare RUN RUN …: what differs between finished models, beside what they do."""

import json

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.show import Show
from pipeline.errors import InputError


def arguments(parser) -> None:
    parser.add_argument(
        "runs", nargs="*", help="run folders, or RUN:MODEL; the first is what others differ from"
    )
    parser.add_argument(
        "--reranked", action="store_true", default=False, help="the rankings after re-ranking"
    )


def run(root: str, options) -> None:
    from pipeline.evaluation import compare
    from pipeline.reports import tables

    if len(options.runs) < 2:
        said = f"compare was given {len(options.runs)} runs"
        raise InputError(f"{said}; name two or more, RUN or RUN:MODEL")
    base, *others = (compare.read(run, reranked=options.reranked) for run in options.runs)
    if options.json:
        found = {}
        for other in others:
            found[other.label] = {
                "against": base.label,
                "changes": {what: [a, b] for what, a, b in compare.changes(base, other)},
                "metrics": [base.metrics, other.metrics],
                "intervals": [base.intervals, other.intervals],
                "p": compare.p_values(base, other),
            }
        print(json.dumps(found))
        return
    show = Show()
    for other in others:
        changed = compare.changes(base, other)
        title = f"{other.label} against {base.label}"
        cells = ["what changed", base.label, other.label], [list(c) for c in changed]
        show.table(title, *cells, compare.same_versions(base, other))
    about = (
        "In brackets: the middle 95 % of a bootstrap over images. p: paired permutation test over "
        f"images, {compare.PERMUTATIONS:,} permutations, two-sided, for each figure alone; "
        "–: other queries, other graded protocol, or a median."
    )
    show.table("", *tables.compared(base, others), about)


COMMAND = Command(scopes.folder, run, arguments=arguments)
