"""What is imported before there is work to do: help and a wrong word cost no seconds."""

import json
import subprocess
import sys

import pytest

from jobs.cli.command import COMMANDS, MODULES
from jobs.cli.external_options import PROTOCOLS
from pipeline.evaluation import protocols

HEAVY = {"torch", "ray", "mlflow", "transformers", "pandas", "scipy", "pyarrow", "matplotlib"}
OF_SETTINGS = {"pydantic", "fsspec", "rich", "yaml"}
STARTED = """
import json, resource, sys
from jobs.cli.main import main
try:
    main(None, sys.argv[1:])
except SystemExit:
    pass
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([sorted(sys.modules), used.ru_utime + used.ru_stime]))
"""


def started(*argv: str) -> tuple[set[str], float]:
    """The packages imported by a command line, and the CPU seconds it took."""
    command = [sys.executable, "-c", STARTED, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    packages, seconds = json.loads(done.stdout.splitlines()[-1])
    return set(packages), seconds


def test_the_overview_imports_nothing_and_takes_no_half_second():
    packages, seconds = started("--help")
    assert not packages & (HEAVY | OF_SETTINGS)
    assert seconds <= 0.5


@pytest.mark.parametrize(
    "argv",
    [
        *([command, "--help"] for command in COMMANDS),
        ["recipes"],
        ["info", "--root", "nowhere"],
        ["train", "--batchsize", "3"],
        ["run", "--recipe", "drwan"],
        ["lable"],
    ],
    ids=" ".join,
)
def test_help_and_what_looks_at_names_alone_import_nothing_heavy(argv):
    packages, _ = started(*argv)
    assert "jobs" in packages and not packages & HEAVY


@pytest.mark.parametrize("module", MODULES.values())
def test_a_stage_is_a_module_too(module):
    command = [sys.executable, "-m", module, "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("usage: halftone ")


def test_the_protocols_in_the_help_are_those_there_are():
    assert set(PROTOCOLS) == set(protocols.PROTOCOLS)
