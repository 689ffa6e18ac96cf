"""halftone embed: captions become unit vectors of a frozen sentence encoder."""

from jobs import _cli
from jobs._run import Run
from pipeline import embed


def run(run: Run) -> None:
    with run.stage("embed") as stage:
        plan = embed.plan(run.recipe, run.root)
        index = stage.make(plan, embed.write_embeddings, gpu=True)
        captions = sum(entry["captions"] for entry in index["pieces"])
        stage.note(captions=captions, encoder=embed.encoder_label(run.recipe.embed.encoder))


if __name__ == "__main__":
    _cli.main("embed")
