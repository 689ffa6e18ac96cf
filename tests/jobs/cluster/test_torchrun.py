"""`halftone train` under torchrun: its workers train what Ray Train's do, and Ray is not asked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.cli.main import main
from jobs.cluster import torchrun
from pipeline.errors import InputError
from pipeline.storage import store
from pipeline.training import train
from tests.helpers.paths import ROOT
from tests.helpers.stages import TINY
from tests.pipeline.training.test_train import (
    data,  # noqa: F401  (a fixture, and its recipe)
)

FLAGS = [*TINY, "--train.workers", "2", "--train.pairs", "image", "--train.log_every", "1"]


def started(workers: int, command: str, *flags: str) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node WORKERS -m jobs COMMAND`, without a Ray that it could start."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run += ["--nproc-per-node", str(workers), "-m", "jobs", command, *flags]
    return subprocess.run(
        run,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "127.0.0.1:1"},
    )


def losses(root) -> list[tuple[int, float]]:
    records = store.read_json(f"{root}/5-model/main/history.json")["records"]
    return [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]


@pytest.fixture(scope="module")
def roots(data, tmp_path_factory) -> dict[str, str]:  # noqa: F811
    """Run folders with the same shards, by what trains there."""
    folder = tmp_path_factory.mktemp("torchrun")
    return {how: shutil.copytree(data[1], folder / how) for how in ("ray", "torchrun")}


def test_it_trains_what_ray_train_trains(roots, ray_here, tiny_encoder):
    flags = [*FLAGS, "--encoder", tiny_encoder]
    main("train", [*flags, "--root", str(roots["ray"])])
    done = started(2, "train", *flags, "--root", str(roots["torchrun"]))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(f"{roots[how]}/5-model/main/model.safetensors") for how in roots)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert losses(roots["ray"]) == losses(roots["torchrun"])
    assert done.stderr.count("halftone train ") == 1  # worker 0 alone speaks
    assert not Path(roots["torchrun"], "5-model/main/ray").exists()
    before = Path(roots["torchrun"], "5-model/main/history.json").stat().st_mtime_ns
    again = started(2, "train", *flags, "--root", str(roots["torchrun"]))  # nothing is left to do
    assert again.returncode == 0, again.stderr[-3000:]
    after = Path(roots["torchrun"], "5-model/main/history.json").stat().st_mtime_ns
    assert before == after


def test_other_commands_are_one_process(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert torchrun.rank() == 1
    torchrun.check("train", dry=False)
    for command, dry in (("run", False), ("evaluate", False), ("train", True)):
        with pytest.raises(InputError, match="is one process; run it without torchrun"):
            torchrun.check(command, dry)


def test_workers_that_do_not_divide_the_lanes_are_refused(data, monkeypatch):  # noqa: F811
    from pipeline.training.distributed import ProcessGroup
    from pipeline.training.trainer import TowerTrainer

    recipe, root = data
    world = ProcessGroup()
    world.size = 3
    with pytest.raises(InputError, match="train.lanes 8 do not share out among 3 workers"):
        TowerTrainer(train.plan(recipe, root, "three").pieces[0], world)
