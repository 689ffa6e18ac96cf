"""halftone label: caption similarity becomes relevance, the top candidates of every query."""

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.run import Run
from pipeline.storage import store
from pipeline.storage.piece_table import column


def run(run: Run) -> None:
    from pipeline.labels import label
    from pipeline.reports import false_negatives, labels

    with run.stage("label") as stage:
        for plan, make in label.steps(run.recipe, run.root):
            lists = make is label.write_relevance
            if plan.pending and not run.dry and lists:
                label.check_decided(run.recipe, run.root)
            index = stage.make(plan, make, gpu=lists)
        entries = index["pieces"]
        stage.note(lists=sum(column(entries, "queries")), **label.recalls(entries))
        if run.recipe.label.overrides is not None:
            stage.note(decided=sum(column(entries, "decided")))
        uri = store.join(plan.folder, "histograms.json")
        if stage.made or not (run.dry or store.exists(uri)):
            store.write_json(uri, label.histograms(entries))
        stage.page(labels.page(run.recipe, run.root), beside=True)
        stage.page(false_negatives.page(run.recipe, run.root), beside=True)


COMMAND = Command(scopes.data, run, ("label",))

if __name__ == "__main__":
    main.main("label")
