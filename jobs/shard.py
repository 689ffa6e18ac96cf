"""halftone shard: images are checked and packed into WebDataset tars."""

from functools import partial

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.run import Run
from pipeline.storage import store


def run(run: Run) -> None:
    from pipeline.sharding import shard

    with run.stage("shard") as stage:
        if plan := shard.finished(run.recipe, run.root):
            index = stage.make(plan, shard.write_shard)
        else:
            for plan, make in shard.steps(run.recipe, run.root):
                last = make is shard.write_shard
                check = partial(shard.check, plan, recipe=run.recipe) if last else nothing
                index = stage.make(plan, make, check=check)
        if not run.dry:
            stage.note(**shard.totals(index), version=index["version"])
            rejected = store.join(plan.folder, shard.REJECTED)
            if store.exists(rejected):
                run.show.line(f"  what was rejected, and why: {rejected}")


def nothing(made: dict[str, dict]) -> None:
    """What is to be checked of rows that were dealt out."""


COMMAND = Command(scopes.data, run, ("shard", "source"))

if __name__ == "__main__":
    main.main("shard")
