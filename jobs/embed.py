"""halftone embed: captions become unit vectors of a frozen encoder."""

from jobs.cli import main
from jobs.cli.run import Run, Stage
from pipeline.labels import embed
from pipeline.labels.encoders import encoder_label, guards
from schemas.settings import EmbedSettings


def run(run: Run) -> None:
    settings, judge = run.recipe.embed, run.recipe.evaluate.encoder
    with run.stage("embed") as stage:
        if judge is not None:
            _make(stage, embed.settings_of(judge, run.recipe))
        index = _make(stage, settings)
        stage.note(
            captions=sum(entry["captions"] for entry in index["pieces"]),
            duplicates=round(guards.duplicates(index["pieces"]), 4),
            encoder=encoder_label(settings.encoder),
        )


def _make(stage: Stage, settings: EmbedSettings) -> dict:
    """The index of an encoder's vectors, after what they need was made, and they were."""
    for step in embed.steps(settings, stage.run.root):
        index = stage.make(step.plan, step.make, gpu=step.gpu, check=step.check)
    return index


if __name__ == "__main__":
    main.main("embed")
