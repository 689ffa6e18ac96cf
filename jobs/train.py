"""halftone train: a two-tower model is trained under Ray."""

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.run import Run


def run(run: Run) -> None:
    from pipeline.training import saved_model, train

    with run.stage("train") as stage:
        plan = train.plan(run.recipe, run.root, run.name)
        if run.dry and plan.pending:
            forecast(run, plan)
        elif plan.index and plan.pending and not run.recipe.train.resume:
            run.show.line(
                "  the model there is of other data or settings and is trained anew; "
                "--resume latest goes on from it, --name NEW keeps it"
            )
        entry = stage.train(plan, train.fit, saved_model.summary)["pieces"][0]
        stage.note(**train.notes(entry, run.name))
        if stage.made:
            stage.note(**train.unknown_words(run.root, plan.folder))
        if stage.untold and not run.dry:
            run.track.model("train", plan.folder, entry["metrics"].get("val/rsum", -1.0))


def forecast(run: Run, plan) -> None:
    """What the training will be like, by a few steps of it."""
    from jobs.cluster import estimate
    from pipeline.training.train import probe

    found, settings = probe(plan.pieces[0]), run.recipe.train
    size, minutes = settings.batch_size, found["steps_per_epoch"] * found["seconds_per_step"] / 60
    found["loss_bytes"] = estimate.loss_bytes(settings)
    run.results["forecast"] = found
    return run.show.line(
        f"  {found['steps']:,} steps in {settings.epochs} epochs of {found['steps_per_epoch']:,}, "
        f"{found['parameters']:,} parameters; the loss of lists of {size:,} takes "
        f"{found['loss_bytes'] / 1e6:,.1f} MB a worker\n"
        f"  {1000 * found['seconds_per_step']:.0f} ms a step with one process here "
        f"({found['device']}), {found['data_wait']:.0%} of it waiting for data: about "
        f"{minutes:.1f} min an epoch, {minutes * settings.epochs:.0f} min in all"
    )


COMMAND = Command(scopes.each_model, run, ("train", "model", "label"))

if __name__ == "__main__":
    main.main("train")
