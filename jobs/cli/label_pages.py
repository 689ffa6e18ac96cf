"""What `halftone label` leaves to look at: the label report, and the negatives to be decided."""

from jobs.cli.run import Run, Stage
from pipeline.reports import false_negatives
from pipeline.reports import labels as label_report
from pipeline.reports import render as _pages
from pipeline.storage import store as _store


def write(run: Run, stage: Stage, folder: str) -> None:
    """Write the pages and the table that are not there already, to MLflow too."""
    recipe, root = run.recipe, run.root
    uri = _store.join(folder, "labels.html")
    if not _pages.is_current(uri, label_report.version(recipe, root)):
        stage.start()
        report = label_report.Report(recipe, root)
        run.track.log("label", metrics=report.metrics())
        _keep(run, uri, report.page().encode())
    uri = _store.join(folder, "false-negatives.html")
    if not _pages.is_current(uri, false_negatives.version(recipe, root)):
        stage.start()
        found = false_negatives.suspects(recipe, root)
        table = _store.join(folder, false_negatives.TABLE)
        _keep(run, table, false_negatives.table(found, recipe, root))
        _keep(run, uri, false_negatives.page(found, recipe, root).encode())


def _keep(run: Run, uri: str, data: bytes) -> None:
    _store.write_bytes(uri, data)
    run.track.artifact("label", _store.name_of(uri), data)
