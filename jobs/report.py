"""halftone report: one page about all the models of a run folder."""

from jobs import _cli
from jobs._run import Run
from pipeline import _pages, _store, report
from pipeline._errors import InputError


def run(run: Run) -> None:
    pass


def closing(runs: list[Run]) -> None:
    write(runs)
    table(runs)
    where_to_look(runs[-1])


def write(runs: list[Run]) -> None:
    """The page, unless it is there already; to every model's MLflow run too."""
    last, names = runs[-1], [run.name for run in runs]
    if not report.results(last.root, names):
        raise InputError(f"no metrics in {last.root}; run `halftone evaluate` first")
    uri = _store.join(last.root, "report.html")
    if _pages.is_current(uri, report.version(last.recipe, last.root, names)):
        return
    page = report.build(last.recipe, last.root, names).encode()
    _store.write_bytes(uri, page)
    for run in runs:
        run.track.artifact("", "report.html", page)
        run.track.finish()


def table(runs: list[Run]) -> None:
    columns, rows = report.table(runs[-1].root, [run.name for run in runs])
    protocol = report.results(runs[-1].root, [runs[-1].name])[-1][2]
    cells = [[f"[bold]{c['text']}[/]" if c["best"] else c["text"] for c in row] for row in rows]
    runs[-1].show.table("", columns, cells, report.protocol_line(protocol))


def where_to_look(run: Run) -> None:
    run.show.out.print(f"\nreport   {run.root}/report.html\nsearch   {run.root}/search-{run.name}.html")
    run.show.out.print(f'ask      halftone search "…" --recipe {run.recipe.name} --root {run.root}')
    if command := run.track.ui_command():
        run.show.out.print(f"MLflow   {command}\n         then {run.track.url()}")
    else:
        run.show.out.print(f"MLflow   {run.track.url()}")


if __name__ == "__main__":
    _cli.main("report")
