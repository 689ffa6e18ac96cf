"""halftone audit: duplicates within and across splits, and a list to leave them out by."""

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.run import Run
from pipeline.storage import store


def run(run: Run) -> None:
    from pipeline.reports import tables
    from pipeline.sharding.checks import audit

    with run.stage("audit") as stage:
        plan = audit.plan(run.recipe, run.root)
        stage.make(plan, audit.write_hashes)
        if run.dry:
            return
        found = audit.write(plan, run.recipe, run.root)
        stage.note(**{f"{kind}_pairs": len(d.pairs) for kind, d in found.items()})
    if pairs := audit.summary(found):
        kept = "kept: test before val before train, then the first"
        run.show.table("", *tables.duplicates(pairs), kept)
    else:
        run.show.out.print("no duplicates")
    names = {"pairs": "duplicates.csv", "list": "exclusions.csv"}
    places = {word: store.join(plan.folder, file) for word, file in names.items()}
    run.show.where(places | {"then": f"halftone shard --shard.exclude {places['list']}"})


COMMAND = Command(scopes.data, run, ("audit",), flags={"audit.distance": "--distance"})
