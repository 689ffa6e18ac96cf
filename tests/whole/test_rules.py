"""The project's own rules where a tool does not check them, and that the documents are right."""

import ast
import graphlib
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import grimp
import pytest

from jobs.cli import recipes
from jobs.cli.command import COMMANDS, MODULES, command_of
from jobs.cli.options import parser_of
from schemas.settings import SECTIONS
from tests.helpers.paths import ROOT

PACKAGES = ("schemas", "pipeline", "jobs")
FILES = sorted(f for package in PACKAGES for f in (ROOT / package).rglob("*.py"))
AROUND = sorted(f for folder in ("tests", "bench") for f in (ROOT / folder).rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench/RESULTS.md"])
COMMAND_FILES = sorted([*ROOT.glob("jobs/[a-z]*.py"), *ROOT.glob("jobs/cli/commands/**/[a-z]*.py")])
FORMULAS = sorted((ROOT / "pipeline/formulas").rglob("*.py"))
ENTRIES = 14  # of a folder, at most
# People submit `python -m jobs.train` and the like: the stages stay where they are.
MORE_ENTRIES = {"jobs": 15, "pipeline": 15}  # … and models are handed on by a package of its own
CHAIN = 12  # arrows of the longest chain of imports inside pipeline, at most
ARROWS = 58  # between the packages of pipeline, at most


def test_nothing_below_looks_at_an_empty_list():
    assert len(FILES) > 150 and len(AROUND) > 90 and len(DOCUMENTS) > 12
    assert len(COMMAND_FILES) > 20 and len(FORMULAS) > 15


def imported(file: Path) -> set[str]:
    """The packages that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_and_functions_stay_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 50, f"{node.name} has {lines} lines"


def test_commands_are_short():
    for file in COMMAND_FILES:
        assert len(file.read_text().splitlines()) <= 60, file.name


def test_modules_say_what_they_are():
    for file in FILES:
        tree = ast.parse(file.read_text())
        if file.name != "__init__.py":
            assert ast.get_docstring(tree), file


def test_formulas_import_torch_alone():
    allowed = {"torch", "math", "functools", "inspect", "numba", "pipeline", "collections"}
    allowed |= {
        "contextlib",
        "itertools",
        "dataclasses",
        "types",
        "typing",
        "triton",
        "importlib",
        "os",
    }
    for file in FORMULAS:
        assert imported(file) <= allowed, file.name


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [v for name, v in project["optional-dependencies"].items() if name != "dev"]
    lines = sum(extras, project["dependencies"])
    declared = {re.match(r"[\w.-]+", line)[0].lower() for line in lines}
    declared |= {"datasets", "eccv-caption"}  # whoever needs them is asked to install them
    known = metadata.packages_distributions()
    for file in FILES:
        for package in imported(file) - sys.stdlib_module_names - {*PACKAGES, "recipes"}:
            names = {name.lower().replace("_", "-") for name in known[package]}
            assert names & declared, (file.name, package)


def modules_named(tree: ast.Module) -> set[str]:
    """The names under which a file has modules."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                path = ROOT.joinpath(*node.module.split("."), alias.name)
                if path.is_dir() or path.with_suffix(".py").exists():
                    names.add(alias.asname or alias.name)
    return names


def names_given(tree: ast.Module) -> set[str]:
    """The names of a file's variables, arguments, functions and classes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif hasattr(node, "name") and not isinstance(node, ast.alias):  # def, class, except … as
            names.add(node.name)
    return names


def test_no_name_of_a_file_hides_a_module_that_it_imports():
    found = {}
    for file in [*FILES, *AROUND]:
        tree = ast.parse(file.read_text())
        if hidden := modules_named(tree) & names_given(tree):
            found[str(file.relative_to(ROOT))] = hidden
    assert not found


def test_folders_hold_few_entries_and_no_underscores():
    folders = {f.parent for f in [*FILES, *ROOT.glob("tests/**/*.py")]}
    assert len(folders) > 35
    for folder in folders:
        name = str(folder.relative_to(ROOT))
        entries = [path.name for path in folder.iterdir() if path.name != "__pycache__"]
        assert len(entries) <= MORE_ENTRIES.get(name, ENTRIES), (name, sorted(entries))
        hidden = [entry for entry in entries if entry.startswith("_")]
        assert set(hidden) <= {"__init__.py", "__main__.py"}, (name, hidden)


def test_imports_inside_pipeline_stay_few_and_shallow():
    graph = grimp.build_graph("pipeline", cache_dir=None)
    imports = {m: graph.find_modules_directly_imported_by(m) for m in graph.modules}
    depth: dict[str, int] = {}
    for module in graphlib.TopologicalSorter(imports).static_order():  # a circle is refused
        depth[module] = max((depth[m] + 1 for m in imports[module]), default=0)
    assert len(depth) > 100 and max(depth.values()) <= CHAIN, max(depth, key=depth.get)
    package = {module: (*module.split("."), "")[1] for module in imports}
    arrows = {(package[m], package[other]) for m in imports for other in imports[m]}
    assert len([(one, other) for one, other in arrows if one != other]) <= ARROWS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda f: f.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_paths_in_backticks_exist():
    folders = "|".join([*PACKAGES, "tests", "bench", "docs", "deploy", "recipes"])
    found = [
        (file, path)
        for file in [*DOCUMENTS, *FILES, *AROUND]
        for path in re.findall(rf"`((?:{folders})/[\w./-]*|[\w/]+\.py)`", file.read_text())
    ]
    assert len(found) > 30
    for file, path in found:
        beside = "/" not in path and (file.parent / path).exists()
        assert beside or (ROOT / path).exists(), (file.name, path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda f: f.name)
def test_commands_in_documents_exist(document):
    text = document.read_text()
    for command in re.findall(r"^(?:\.venv/bin/)?halftone (\w+)", text, re.M):
        assert command in COMMANDS, command
    for recipe in re.findall(r"--recipe ([a-z]\w*)(?![\w.])", text):
        assert recipe in recipes.known() or recipe in ("mine",), recipe
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


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
