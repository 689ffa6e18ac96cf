"""halftone embed: captions become unit vectors of a frozen encoder."""

from jobs import _cli
from jobs._run import Run
from pipeline import embed
from pipeline.encoders import guards


def run(run: Run) -> None:
    settings = run.recipe.embed
    with run.stage("embed") as stage:
        for step in embed.steps(settings, run.root):
            index = stage.make(step.plan, step.make, gpu=step.gpu, check=step.check)
        stage.note(
            captions=sum(entry["captions"] for entry in index["pieces"]),
            duplicates=round(guards.duplicates(index["pieces"]), 4),
            encoder=embed.encoder_label(settings.encoder),
        )


if __name__ == "__main__":
    _cli.main("embed")
