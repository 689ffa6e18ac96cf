"""halftone repair: what is broken in manifest and shards is made again, and nothing else."""

from jobs import ingest, shard
from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.commands import lint
from jobs.cli.run import Run
from jobs.cluster import tasks

STAGES = {"ingest": ingest.run, "shard": shard.run}


def run(run: Run) -> None:
    """Looks as `halftone lint` does, and runs the stages for what is broken."""
    from pipeline.sharding.checks import repair

    findings, count, samples = lint.look(run.root, run.show, decode=not run.options.fast)
    broken = repair.broken(run.root, findings)
    outcome = run.results["repair"] = {}
    left = [finding for finding in findings if not finding.shard]
    run.results["left"] = [f"{f.file}: {f.what}; {f.do}" for f in left]
    if not findings:
        run.show.line(f"clean: {lint.counted(count, samples)}; nothing to repair")
    for stage, make in STAGES.items():
        if not (names := broken[stage]):
            continue
        if run.dry:
            run.show.line(f"would make again: {', '.join(sorted(names))}")
            continue
        recorded = repair.clear(run.recipe, run.root, stage, names)
        make(run)
        outcome |= repair.verdicts(run.root, stage, recorded)
    for name, verdict in outcome.items():
        run.show.out.print(f"{name}: made again, {verdict}")


def closing(runs: list[Run]) -> None:
    """Ends the command with 1 where something is still not as it was."""
    results = runs[0].results
    other = [name for name, verdict in results["repair"].items() if verdict == "other bytes"]
    problems = [*results["left"]]
    if other:
        problems.append(
            f"{', '.join(other)}: the bytes are not those of before, so the source has changed; "
            "`halftone run` makes what depends on them again"
        )
    if problems:
        raise tasks.WorkFailed("\n".join(["not repaired:", *problems]))


COMMAND = Command(scopes.data, run, ("shard", "source"), arguments=lint.fast, closing=closing)
