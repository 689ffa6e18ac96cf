"""What is meant for one's own code is there, works as its page shows, and is cheap to import."""

import re
import subprocess
import sys

import pipeline
from tests.helpers.paths import ROOT


def test_importing_pipeline_imports_nothing():
    code = (
        "import sys; before = set(sys.modules); import pipeline;"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['pipeline']", done.stderr


def test_what_the_docstring_lists_can_be_imported():
    lines = re.findall(r"^    (from .+)$", pipeline.__doc__, re.M)
    assert len(lines) >= 8
    for line in lines:
        exec(line, {})


def test_the_page_runs_as_it_stands(finished_run, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/library.md").read_text()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(finished_run)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) >= 6
    for block in blocks:
        exec(block, names)
    said = capsys.readouterr().out
    assert "losses" in said and len(said.splitlines()) >= 8
    assert names["texts"].shape == (2, 64)
