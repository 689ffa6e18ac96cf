"""halftone serve: search in the browser, on the trained model, until Ctrl-C."""

import sys

from jobs.cli import main as _cli
from jobs.cli.run import Run
from jobs.cluster import serving as _cluster_serve
from pipeline.evaluation import evaluate
from pipeline.search import service as serve


def run(run: Run) -> None:
    settings = run.recipe.serve
    evaluate.evaluated(run.recipe, run.root, run.name)  # a sentence now, not from a replica
    if run.dry:
        return run.show.line(f"  would serve model {run.name} at {settings.host}:{settings.port}")
    if serve.allowed_hosts(settings) == ["*"]:
        run.show.line(f"  no password: all who reach {settings.host}:{settings.port} can search")
    url = _cluster_serve.start(run.recipe, run.root, run.name)
    places = {"search": url, "JSON": f"{url}/search?q=a+dog+in+the+snow"}
    run.show.where({**places, "health": f"{url}/healthz", "metrics": f"{url}/metrics"})
    sys.stdout.flush()  # into a file, too, before the wait
    try:
        _cluster_serve.wait()
    finally:
        _cluster_serve.stop()
    return None


if __name__ == "__main__":
    _cli.main("serve")
