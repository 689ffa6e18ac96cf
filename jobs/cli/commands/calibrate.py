"""halftone calibrate: people's judgements become a map from cosine to relevance."""

from jobs.cli import main as _cli
from jobs.cli.run import Run
from pipeline.labels import calibrate
from pipeline.labels import calibration_report as report


def run(run: Run) -> None:
    with run.stage("calibrate") as stage:
        plan = calibrate.plan(run.recipe, run.root)
        stage.make(plan, calibrate.write_cosines)
        found = calibrate.candidates(plan, run.recipe)
        kept = calibrate.write(found, run.recipe, run.root)
        judged = found[0].judged
        stage.note(pairs=len(judged.judgement_P), left_out=judged.left_out)
        stage.start()
        run.track.log("calibrate", metrics=report.metrics(found))
        for uri in kept.values():
            run.track.artifact("calibrate", *report.artifact(uri))
    if run.dry:
        return
    run.show.table("", report.COLUMNS, report.rows(found), report.protocol(found, run.recipe))
    for line in report.verdicts(found):
        run.show.out.print(line, soft_wrap=True)
    run.show.where(report.commands(found, kept, run.root))
    run.results["calibrate"] |= {"agreement": report.numbers(found), "maps": kept}


if __name__ == "__main__":
    _cli.main("calibrate")
