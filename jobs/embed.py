"""halftone embed: captions become unit vectors of a frozen encoder."""

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.run import Run
from pipeline.storage.piece_table import column


def run(run: Run) -> None:
    from pipeline.labels import embed
    from pipeline.labels.encoders import encoder_label, guards

    settings, judge = run.recipe.embed, run.recipe.evaluate.encoder
    judging = [] if judge is None else [embed.settings_of(judge, run.recipe)]
    with run.stage("embed") as stage:
        for encoder in (*judging, settings):
            for step in embed.steps(encoder, run.root):
                index = stage.make(step.plan, step.make, gpu=step.gpu, check=step.check)
        stage.note(
            captions=sum(column(index["pieces"], "captions")),
            duplicates=round(guards.duplicates(index["pieces"]), 4),
            encoder=encoder_label(settings.encoder),
        )


COMMAND = Command(scopes.data, run, ("embed",))

if __name__ == "__main__":
    main.main("embed")
