"""halftone serve: search in the browser, on the trained model, until Ctrl-C."""

import sys

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.run import Run
from jobs.cluster import serving


def arguments(parser) -> None:
    about = "put this in the place of the application of its name, which the cluster serves"
    parser.add_argument("--replace", action="store_true", default=False, help=about)


def run(run: Run) -> None:
    from pipeline.evaluation import tower_vectors
    from pipeline.search import service

    settings = run.recipe.serve
    tower_vectors.evaluated(run.recipe, run.root, run.name)  # a sentence now, not from a replica
    if run.dry:
        return run.show.line(f"  would serve model {run.name} at {settings.host}:{settings.port}")
    served = serving.start(run.recipe, run.root, run.name, replace=run.options.replace)
    try:
        if served.told:
            run.show.line(f"  {served.told}")
        if service.allowed_hosts(served.settings) == ["*"]:
            where = f"{served.settings.host}:{served.settings.port}"
            run.show.line(f"  no password: all who reach {where} can search")
        url = served.url
        places = {"search": f"{url}/", "JSON": f"{url}/search?q=a+dog+in+the+snow"}
        run.show.where({**places, "health": f"{url}/healthz", "metrics": f"{url}/metrics"})
        sys.stdout.flush()  # into a file, too, before the wait
        serving.wait(settings.application)
    finally:
        serving.stop(settings.application)
    return None


COMMAND = Command(scopes.best_model, run, ("serve", "search", "evaluate"), arguments=arguments)
