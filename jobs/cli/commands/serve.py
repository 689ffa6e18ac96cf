"""halftone serve: search in the browser, on the trained model, until Ctrl-C."""

import sys

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.run import Run
from jobs.cluster import serving


def run(run: Run) -> None:
    from pipeline.evaluation import tower_vectors
    from pipeline.search import service

    settings = run.recipe.serve
    tower_vectors.evaluated(run.recipe, run.root, run.name)  # a sentence now, not from a replica
    if run.dry:
        return run.show.line(f"  would serve model {run.name} at {settings.host}:{settings.port}")
    if service.allowed_hosts(settings) == ["*"]:
        run.show.line(f"  no password: all who reach {settings.host}:{settings.port} can search")
    url = serving.start(run.recipe, run.root, run.name)
    places = {"search": url, "JSON": f"{url}/search?q=a+dog+in+the+snow"}
    run.show.where({**places, "health": f"{url}/healthz", "metrics": f"{url}/metrics"})
    sys.stdout.flush()  # into a file, too, before the wait
    try:
        serving.wait()
    finally:
        serving.stop()
    return None


COMMAND = Command(scopes.best_model, run, ("serve", "search", "evaluate"))
