"""The wheel, installed away from the checkout: its commands, its recipes, its pages."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.stages import TINY

pytestmark = pytest.mark.own_cluster  # all in one process: it is built and installed once
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('..')"
PACKAGES = ("pipeline", "jobs", "schemas", "recipes")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    source.mkdir()
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (built,) = source.parent.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """The programs of an environment that has the wheel, and of the checkout's its libraries."""
    folder = wheel.parent / "environment"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries) + "\n")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", "--ignore-installed", str(wheel)], check=True)
    return python.parent


def ran(installed: Path, folder: Path, *words: str) -> str:
    """What a program of the environment printed, run in a folder that is not the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RAY_JOB"))}
    done = subprocess.run(
        [installed / words[0], *words[1:]],
        cwd=folder,
        env={**environment, "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_holds_every_file_of_the_packages(wheel):
    there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    here = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert there == here and "pipeline/reports/templates/serve.js" in there


def test_its_recipes_are_found(installed, tmp_path):
    listed = ran(installed, tmp_path, "halftone", "recipes")
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert recipe.stem in listed


def test_a_run_of_it_goes_through_all_stages(installed, tmp_path):
    root = tmp_path / "run"
    command = ("run", *TINY, "--encoder", "tfidf", "--root", str(root), "--json")
    (model,) = json.loads(ran(installed, tmp_path, "halftone", *command))["models"].values()
    assert model["ingest"]["made"] and model["search"]["made"]
    assert "data:image/jpeg;base64," in (root / "report.html").read_text()
    where = ran(installed, tmp_path, "python", "-c", "import pipeline; print(pipeline.__file__)")
    assert Path(where).is_relative_to(installed.parent)
