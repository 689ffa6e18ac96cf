"""halftone report: one page about all the models of a run folder."""

from jobs.cli import recipes, scopes
from jobs.cli.command import Command, nothing
from jobs.cli.run import Run
from pipeline.errors import InputError
from pipeline.storage import store


def closing(runs: list[Run]) -> None:
    write(runs)
    table(runs)
    spread(runs)
    runs[-1].where_to_look()


def write(runs: list[Run]) -> None:
    """The page of these and the folder's other models, unless it is there; to MLflow too."""
    from pipeline.reports import render, report, results

    last, names = runs[-1], [run.name for run in runs]
    if not results.results(last.root, names):
        raise InputError(f"no metrics in {last.root}; run `halftone evaluate` first")
    names = results.beside(last.root, recipes.saved(last.root, {}, None), names) + names
    uri = store.join(last.root, "report.html")
    if render.is_current(uri, report.version(last.recipe, last.root, names)):
        return
    page = report.build(last.recipe, last.root, names).encode()
    store.write_bytes(uri, page)
    figures = report.figures(last.recipe, last.root, names)
    for run in runs:
        run.track.artifact("", "report.html", page)
        for figure in figures:
            run.track.artifact("", f"figures/{figure.name}.svg", figure.svg.encode())
        run.track.finish()


def table(runs: list[Run]) -> None:
    from pipeline.reports import results

    root, show = runs[-1].root, runs[-1].show
    columns, rows = results.short_table(root, [run.name for run in runs])
    protocol = results.results(root, [runs[-1].name])[-1][2]
    show.table("", columns, rows, results.protocol_line(protocol))


def spread(runs: list[Run]) -> None:
    """Means over the training seeds, of models that were trained with several."""
    from pipeline.reports import results

    columns, rows = results.seeds_table(runs[-1].root, [run.name for run in runs])
    if rows:
        runs[-1].show.table("over training seeds: mean ± standard deviation", columns, rows, "")


COMMAND = Command(scopes.each_model, nothing, ("report",), closing=closing)
