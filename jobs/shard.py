"""halftone shard: images are checked and packed into WebDataset tars."""

from functools import partial

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.run import Run
from pipeline.storage import store


def run(run: Run) -> None:
    from pipeline.sharding import shard

    with run.stage("shard") as stage:
        plan = shard.finished(run.recipe, run.root) or shard.plan(run.recipe, run.root)
        check = partial(shard.check, plan, recipe=run.recipe)
        index = stage.make(plan, shard.write_shard, check=check)
        if not run.dry:
            stage.note(**shard.totals(index), version=index["version"])
            rejected = store.join(plan.folder, shard.REJECTED)
            if store.exists(rejected):
                run.show.line(f"  what was rejected, and why: {rejected}")


COMMAND = Command(scopes.data, run, ("shard", "source"))

if __name__ == "__main__":
    main.main("shard")
