"""halftone calibrate: people's judgements become a map from cosine to relevance."""

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.run import Run


def run(run: Run) -> None:
    from pipeline.labels import calibrate, calibration_report
    from pipeline.reports import tables
    from pipeline.storage import store

    with run.stage("calibrate") as stage:
        plan = calibrate.plan(run.recipe, run.root)
        stage.make(plan, calibrate.write_cosines)
        found = calibrate.candidates(plan, run.recipe)
        kept = calibrate.write(found, run.recipe, run.root)
        judged = found[0].judged
        stage.note(pairs=len(judged.judgement_P), left_out=judged.left_out)
        stage.start()
        run.track.log("calibrate", metrics=calibration_report.metrics(found))
        for uri in kept.values():
            name = f"calibration/{store.name_of(uri)}"
            run.track.artifact("calibrate", name, store.read_bytes(uri))
    if run.dry:
        return
    run.show.table("", *tables.calibration(found), calibration_report.protocol(found, run.recipe))
    for line in calibration_report.verdicts(found):
        run.show.out.print(line, soft_wrap=True)
    run.show.where(calibration_report.commands(found, kept, run.root))
    run.results["calibrate"] |= {"agreement": calibration_report.numbers(found), "maps": kept}


COMMAND = Command(
    scopes.data,
    run,
    ("calibrate", "embed"),
    flags={"calibrate.judgements": "--judgements", "calibrate.captions": "--captions"},
)
