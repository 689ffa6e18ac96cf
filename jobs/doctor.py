"""halftone doctor: every node of the cluster, and whether a run can work there."""

import json
import os
from pathlib import Path

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.show import Show
from jobs.cluster import examine, health
from jobs.cluster.health import Line
from jobs.tracking import tracker
from pipeline.errors import InputError

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def run(root: str, options) -> None:
    """Prints a line a check; ends the process with 1 where one fails."""
    driver = {**health.facts(), "root": root, "mlflow_uri": tracker.default_uri(root)}
    try:
        lines = health.lines(driver, examine.examine(root, driver["mlflow_uri"]))
    except (InputError, OSError, RuntimeError, ValueError) as error:
        where, said = os.environ.get("RAY_ADDRESS", "this machine"), " ".join(str(error).split())
        do = "start the head, or correct RAY_ADDRESS, RAY_AUTH_MODE and the token"
        do = "" if isinstance(error, InputError) else do  # its sentence says that already
        lines = [Line("fail", "ray", where, said[:500], do)]
    if Path("jobs", "doctor.py").exists() and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        lines.append(health.upload(examine.upload(".")))
    if options.json:
        print(json.dumps([line._asdict() for line in lines]))
    else:
        out = Show().out
        for line in lines:
            colour, do = COLOURS[line.level], f"; {line.do}" if line.do else ""
            out.print(f"[{colour}]{line.level:<5}[/{colour}]", end="")
            text = f"{line.check:<11}{line.where}: {line.said}{do}"
            out.print(text, soft_wrap=True, markup=False)
    if any(line.level == "fail" for line in lines):
        raise SystemExit(1)


COMMAND = Command(scopes.unread_folder, run)

if __name__ == "__main__":
    main.main("doctor")
