"""halftone train: a two-tower model is trained under Ray Train."""

from jobs import _cli
from jobs._run import Run
from pipeline import _store, train


def run(run: Run) -> None:
    with run.stage("train") as stage:
        plan = train.plan(run.recipe, run.root, run.name)
        entry = stage.train(plan, train.fit, train.summary)["pieces"][0]
        stage.note(model=run.name, parameters=entry["parameters"], epoch=entry["epoch"])
        if "val/rsum" in entry["metrics"]:
            stage.note(val_rsum=entry["metrics"]["val/rsum"])
        if entry.get("torn_checkpoints"):
            stage.note(passed_over_torn=", ".join(entry["torn_checkpoints"]))
        if entry.get("collapsed"):
            stage.note(collapsed_in_epochs=", ".join(map(str, entry["collapsed"])))
        if stage.made:
            run.track.records("train", _store.read_json(plan.pieces[0].output)["records"])
            run.track.model("train", plan.folder, entry["metrics"].get("val/rsum", -1.0))


if __name__ == "__main__":
    _cli.main("train")
