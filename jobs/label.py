"""halftone label: caption similarity becomes relevance, the top candidates of every query."""

from jobs import _cli
from jobs._run import Run
from pipeline import _store, label


def run(run: Run) -> None:
    with run.stage("label") as stage:
        plan = label.plan(run.recipe, run.root)
        index = stage.make(plan, label.write_relevance)
        stage.note(lists=sum(entry["queries"] for entry in index["pieces"]))
        if stage.made:
            histograms = label.calibration(index["pieces"])
            _store.write_json(_store.join(plan.folder, "calibration.json"), histograms)


if __name__ == "__main__":
    _cli.main("label")
