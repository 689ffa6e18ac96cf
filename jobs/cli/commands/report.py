"""halftone report: one page about all the models of a run folder."""

from jobs.cli import recipes, scopes
from jobs.cli.command import Command, nothing
from jobs.cli.run import Run


def closing(runs: list[Run]) -> None:
    """The page of these and the folder's other models, to MLflow too; the tables of these."""
    from pipeline.evaluation.results import sentence
    from pipeline.reports import report, tables

    last, names = runs[-1], [run.name for run in runs]
    found = report.read(last.recipe, last.root, recipes.saved(last.root, {}, None), names)
    if not found.page.is_current:
        made = found.page.make()
        for run in runs:
            run.keep("", found.page, made)
            run.track.finish()
    results = found.results(names)
    last.show.table("", *tables.models_in_short(results), sentence(results[-1].protocol))
    columns, rows = tables.seeds(results)
    if rows:
        last.show.table("over training seeds: mean ± standard deviation", columns, rows, "")
    last.where_to_look()


COMMAND = Command(scopes.each_model, nothing, ("report",), closing=closing)
