"""halftone ingest: annotations of any known kind become a manifest, one row an image."""

from jobs import _cli
from jobs._run import Run
from pipeline import ingest


def run(run: Run) -> None:
    with run.stage("ingest") as stage:
        plan = ingest.plan(run.recipe, run.root)
        index = stage.make(plan, ingest.write_part)
        if not run.dry:
            stage.note(**{f"{k}_images": n for k, n in ingest.check(plan).items()})
            stage.note(version=index["version"])


if __name__ == "__main__":
    _cli.main("ingest")
