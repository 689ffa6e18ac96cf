"""The house's own rules, where a tool does not check them, and that the documents are right."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from jobs.cli import recipes
from jobs.cli.command import COMMANDS, MODULES, command_of
from jobs.cli.options import parser_of
from schemas.settings import SECTIONS
from tests.helpers.paths import ROOT

HOUSE = ROOT
ROOMS = ("schemas", "pipeline", "jobs")
FILES = sorted(f for room in ROOMS for f in (HOUSE / room).rglob("*.py"))
DOCUMENTS = sorted([*HOUSE.glob("*.md"), *HOUSE.glob("docs/*.md"), HOUSE / "bench/RESULTS.md"])


def imported(file: Path) -> set[str]:
    """The packages that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(HOUSE)))
def test_files_and_functions_stay_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 50, f"{node.name} has {lines} lines"


def test_jobs_are_short():
    files = [*(HOUSE / "jobs").glob("*.py"), *(HOUSE / "jobs/cli/commands").glob("*.py")]
    assert len(files) > len(COMMANDS)
    for file in files:
        assert len(file.read_text().splitlines()) <= 60, file.name


def test_modules_say_what_they_are():
    for file in FILES:
        tree = ast.parse(file.read_text())
        if file.name != "__init__.py":
            assert ast.get_docstring(tree), file


def test_formulas_import_torch_alone():
    allowed = {"torch", "math", "functools", "inspect", "numba", "pipeline", "collections"}
    allowed |= {"contextlib", "itertools", "dataclasses", "typing", "triton", "importlib"}
    for file in (HOUSE / "pipeline/formulas").rglob("*.py"):
        assert imported(file) <= allowed, file.name


def test_what_is_imported_is_declared():
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    extras = [v for name, v in project["optional-dependencies"].items() if name != "dev"]
    lines = sum(extras, project["dependencies"])
    declared = {re.match(r"[\w.-]+", line)[0].lower() for line in lines}
    declared |= {"datasets", "eccv-caption"}  # whoever needs them is asked to install them
    known = metadata.packages_distributions()
    for file in FILES:
        for package in imported(file) - sys.stdlib_module_names - {*ROOMS, "recipes"}:
            names = {name.lower().replace("_", "-") for name in known[package]}
            assert names & declared, (file.name, package)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda f: f.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda f: f.name)
def test_commands_in_documents_exist(document):
    text = document.read_text()
    for command in re.findall(r"^(?:\.venv/bin/)?halftone (\w+)", text, re.M):
        assert command in COMMANDS, command
    for recipe in re.findall(r"--recipe ([a-z]\w*)(?![\w.])", text):
        assert recipe in recipes.known() or recipe in ("mine",), recipe
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", (HOUSE / "Makefile").read_text(), re.M), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda f: f.name)
def test_options_in_documents_exist(document):
    text = document.read_text()
    stages = {module.removeprefix("jobs."): command for command, module in MODULES.items()}
    for module, given in re.findall(r"(?:halftone |-m jobs\.)(\w+)((?:\\\n|[^`\n|;#&])*)", text):
        command = stages.get(module, module)
        options = parser_of(command, command_of(command))._option_string_actions
        for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*", given):
            inside = ".".join(flag.split(".")[:2])  # --train.losses.triplet.weight is inside one
            assert flag in options or (inside in options and inside != flag), (command, flag)
    for section, name in re.findall(r"`(?:--)?([a-z]+)\.([a-z_0-9]+)[` =]", text):
        if section in SECTIONS and name not in ("html", "py"):  # a page, a module
            assert name in {known for known, *_ in recipes.settings_of(section)}, (section, name)
