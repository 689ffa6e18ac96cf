"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.formulas.kernels import fused

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux",
    reason="Triton is not installed (pip install 'halftone-itr[triton]')",
)


def python(*arguments, **environment):
    """What a process of its own says, which has Triton as the environment asks for."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=1500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout


@needs_triton
def test_kernels_are_right_in_the_interpreter():
    file = str(HERE / "kernels_in_triton.py")
    python("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", file, TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_a_gpu(tmp_path):
    """As far as the machine's code: what an interpreter does not check, and what they take."""
    said = python(str(ROOT / "tests/pipeline/formulas/gpu_code.py"), TRITON_CACHE_DIR=str(tmp_path))
    assert "binned.smooth_ndcg" in said and "hinge_pairs.count" in said


def test_without_interpreter_or_gpu_torch_serves():
    scores = torch.rand(3, 4)
    assert fused.takes(scores, scores) is None
    assert fused.takes(scores.double(), scores) is None
