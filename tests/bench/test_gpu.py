"""The benchmark of a GPU, at tiny sizes on the CPU: every table is made, and what fails is told."""

import importlib
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import data, formulas, training
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("gpu")
    data.make(made, quick=True)
    return made


def well_formed(table: dict) -> list:
    assert table["rows"] and {len(row) for row in table["rows"]} == {len(table["columns"])}
    assert gpu.text("it", json.loads(json.dumps(table)))
    return table["rows"]


@pytest.mark.parametrize("make", [formulas.speed, formulas.others, formulas.neighbours])
def test_tables_that_need_torch_alone(make):
    well_formed(make(CPU, quick=True))


def test_losses_on_the_device_are_right_and_the_same_twice():
    for _, name, loss, gradient, same in well_formed(formulas.correct(CPU, quick=True)):
        assert loss < 1e-4 and gradient < 1e-3 and same, name


@pytest.mark.parametrize("make", [training.steps, training.tuning, training.loader, training.loop])
def test_tables_on_pictures(make, folder):
    table = make(CPU, True, folder)
    for row in well_formed(table):
        assert all(value > 0 for value in row[:3] if isinstance(value, float)), row
    assert table["figures"]


def test_every_table_is_there_and_what_is_asked_names_figures():
    for name, (module, function, _, limit) in gpu.TABLES.items():
        if importlib.util.find_spec(module) is not None:
            assert callable(getattr(importlib.import_module(module), function)), name
        assert limit <= gpu.BUDGET
    rows = gpu.asked({"loop_512": 0.97, "run": 61.0})["rows"]
    met = {row[0]: row[-1] for row in rows}
    assert met["loop / learner alone, B = 512"] is True and met["one run of the whole, s"] is False
    assert met["loader, pictures/s on 16 cores"] == "not measured"


def test_one_table_that_fails_costs_no_other(tmp_path):
    out = tmp_path / "found.json"
    words = ["formulas", "neighbours", "--quick", "--out", str(out), "--device", "cpu"]
    code = (
        "import sys; from bench.gpu import __main__ as gpu;"
        "gpu.TABLES['formulas'] = ('bench.gpu.formulas', 'correct', False, 0.01);"
        f"sys.exit(gpu.main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(out.read_text())
    assert done.returncode == 1 and "formulas: FAILED, no end within 0 s" in done.stdout
    assert found["tables"]["neighbours"]["rows"] and "torch" in found["versions"]
    assert found["command"] == "python -m bench.gpu formulas neighbours --device cpu --quick"
