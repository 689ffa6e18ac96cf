"""halftone ingest: annotations of any known kind become a manifest, one row an image."""

from functools import partial

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.run import Run
from jobs.cluster import tasks


def run(run: Run) -> None:
    from pipeline.sharding import ingest

    with run.stage("ingest") as stage:
        plan = ingest.plan(run.recipe, run.root)
        fan_out = partial(tasks.fan_out, say=run.show.line)
        check = partial(ingest.check, plan, settings=run.recipe.source, fan_out=fan_out)
        index = stage.make(plan, ingest.write_part, check=check)
        if not run.dry:
            totals = ingest.totals(plan.folder)
            images = {f"{split}_images": n for split, n in totals.items()}
            stage.note(**images, version=index["version"])
            for line in ingest.told(index):
                run.show.line(f"  {line}")


COMMAND = Command(scopes.data, run, ("source",))

if __name__ == "__main__":
    main.main("ingest")
