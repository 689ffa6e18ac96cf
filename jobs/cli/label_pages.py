"""What `halftone label` leaves to look at: the label report, and the negatives to be decided."""

from jobs.cli.run import Run, Stage
from pipeline.reports import false_negatives, labels, render
from pipeline.storage import store


def write(run: Run, stage: Stage, folder: str) -> None:
    """Write the pages and the table that are not there already, to MLflow too."""
    recipe, root = run.recipe, run.root
    uri = store.join(folder, "labels.html")
    if not render.is_current(uri, labels.version(recipe, root)):
        stage.start()
        report = labels.Report(recipe, root)
        run.track.log("label", metrics=report.metrics())
        _keep(run, uri, report.page().encode())
    uri = store.join(folder, "false-negatives.html")
    if not render.is_current(uri, false_negatives.version(recipe, root)):
        stage.start()
        found = false_negatives.suspects(recipe, root)
        table = store.join(folder, false_negatives.TABLE)
        _keep(run, table, false_negatives.table(found, recipe, root))
        _keep(run, uri, false_negatives.page(found, recipe, root).encode())


def _keep(run: Run, uri: str, data: bytes) -> None:
    store.write_bytes(uri, data)
    run.track.artifact("label", store.name_of(uri), data)
