"""The stage that makes a model: by training, or of weights that are there."""

from jobs.cli.run import Run, Stage
from pipeline.storage import store
from pipeline.storage.plan import Plan


def run(run: Run) -> None:
    from pipeline.training import saved_model, train

    with run.stage("train") as stage:
        plan = train.plan(run.recipe, run.root, run.name)
        steps = train.trains(run.recipe.train)
        if run.dry and steps and plan.pending:
            forecast(run, plan)
        elif plan.index and plan.pending and not run.recipe.train.resume:
            run.show.line(
                "  the model there is of other data or settings and is trained anew; "
                "--resume latest goes on from it, --name NEW keeps it"
            )
        if steps:
            index = stage.train(plan, train.fit, saved_model.summary)
        else:
            index = stage.make(plan, train.put_together, gpu=True)
        entry = index["pieces"][0]
        stage.note(**train.notes(entry, run.name))
        tell(stage, plan, entry)
        if stage.made:
            stage.note(**train.unknown_words(run.root, plan.folder))
        if stage.untold and not run.dry:
            run.track.model("train", plan.folder, entry["metrics"].get("val/rsum", -1.0))


def tell(stage: Stage, plan: Plan, entry: dict) -> None:
    """What was tried on val beside the training, to MLflow; a warning, on the screen too."""
    from pipeline.training import train

    run, warnings = stage.run, train.warnings(entry)
    for sentence in warnings:
        run.show.line(f"  {sentence}")
    if run.dry or not stage.untold:
        return
    if not train.trains(run.recipe.train):
        run.track.records("train", store.read_json(plan.pieces[0].output)["records"])
    for step, metrics in train.tried(entry):
        run.track.log("train", metrics=metrics, step=step)
    if warnings:
        run.track.log("train", tags={"halftone.warning": " ".join(warnings)})


def forecast(run: Run, plan: Plan) -> None:
    """What the training will be like, by a few steps of it."""
    from jobs.cluster import estimate
    from pipeline.training.train import probe

    found, settings = probe(plan.pieces[0]), run.recipe.train
    size, minutes = settings.batch_size, found["steps_per_epoch"] * found["seconds_per_step"] / 60
    found["loss_bytes"] = estimate.loss_bytes(settings)
    run.results["forecast"] = found
    trained = f"{found['trained']:,} of them trained"
    run.show.line(
        f"  {found['steps']:,} steps in {settings.epochs} epochs of {found['steps_per_epoch']:,}, "
        f"{found['parameters']:,} parameters, {trained}; the loss of lists of {size:,} takes "
        f"{found['loss_bytes'] / 1e6:,.1f} MB a worker\n"
        f"  {1000 * found['seconds_per_step']:.0f} ms a step with one process here "
        f"({found['device']}), {found['data_wait']:.0%} of it waiting for data: about "
        f"{minutes:.1f} min an epoch, {minutes * settings.epochs:.0f} min in all\n"
        f"  {found['state_bytes'] / 1e9:.2f} GB of weights, gradients and optimizer; the "
        f"{found['taken']} steps taken here had {found['peak_bytes'] / 1e9:.2f} GB at most"
    )
