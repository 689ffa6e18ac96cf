"""The simulation: against arithmetic where there is one, and against runs that were measured."""

import math
import re

import pytest

from bench import simulate
from bench.simulate import Machines, Work
from jobs.cluster.rates import of as rate
from tests.helpers.paths import ROOT

SCALE = ROOT / "docs" / "scale.md"


def makespan(work: Work, machines: Machines, seed: int = 0) -> float:
    return simulate.stage(work, machines, seed).seconds - simulate.START


def test_without_failures_a_stage_takes_its_waves():
    for pieces, nodes, slots in ((10, 1, 1), (10, 1, 4), (100, 3, 4), (7, 10, 2)):
        waves = math.ceil(pieces / (nodes * slots))
        took = makespan(Work(pieces, 60.0, 0.0), Machines(nodes, slots))
        assert took == pytest.approx(60 * waves, rel=0.01)


def test_many_tiny_pieces_take_as_long_as_they_take_to_hand_out():
    took = makespan(Work(20_000, 0.01), Machines(1000, 32))
    assert took == pytest.approx(20_000 * rate("task"), rel=0.05)


def test_the_same_seed_gives_the_same_and_another_another():
    machines = Machines(20, 4, hours_between_failures=1.0)
    first, again, other = (simulate.stage(Work(2000, 30.0), machines, s) for s in (0, 0, 1))
    assert first == again != other


def test_a_lost_node_costs_its_pieces_and_nothing_else():
    work = Work(4000, 30.0)
    calm, stormy = (simulate.stage(work, Machines(20, 4, h)) for h in (math.inf, 0.5))
    assert calm.failures == calm.redone == 0
    expected = 20 * stormy.seconds / 3600 / 0.5
    assert stormy.failures == pytest.approx(expected, rel=0.5)
    assert 0 < stormy.redone <= 4 * stormy.failures
    assert calm.seconds < stormy.seconds < 2 * calm.seconds
    assert stormy.busy < calm.busy <= 1


def test_one_node_that_is_lost_is_waited_for():
    machines = Machines(1, 2, hours_between_failures=0.2, replaced=1000.0)
    found = simulate.stage(Work(50, 60.0, 0.0), machines)
    assert found.failures >= 1
    assert found.seconds >= 25 * 60 + found.failures * 1000


def test_a_training_takes_its_steps_and_what_failures_cost():
    calm = simulate.training(10_000, 0.5, 100, Machines(8, 1))
    assert calm.seconds == pytest.approx(simulate.START_TRAIN + 5000)
    machines = Machines(8, 1, hours_between_failures=2.0)
    runs = [simulate.training(10_000, 0.5, 100, machines, 60.0, seed) for seed in range(200)]
    failures = sum(run.failures for run in runs) / len(runs)
    lost = failures * (60 + 100 * 0.5 / 2)  # half a checkpoint's interval, by Young
    mean = sum(run.seconds for run in runs) / len(runs)
    assert mean == pytest.approx(calm.seconds + lost, rel=0.02) and failures > 3


def test_checkpoints_farther_apart_lose_more():
    machines = Machines(64, 1, hours_between_failures=20.0)
    redone = [simulate.training(20_000, 1.0, every, machines).redone for every in (50, 500, 5000)]
    assert redone == sorted(redone) and redone[0] < redone[-1]


# ---- against docs/scale.md -----------------------------------------------------------------------


def rows(first: str) -> list[list[str]]:
    """Cells of the rows of the last table that begin with a word."""
    measured = SCALE.read_text().split("bench.simulate measure")[1]
    lines = re.findall(rf"^\| ({first}) \|(.*)\|$", measured, re.M)
    return [[name, *(cell.strip() for cell in rest.split("|"))] for name, rest in lines]


def test_the_simulation_agrees_with_what_was_measured():
    """Makespans of real Ray tasks here, from the mean and spread of their pieces alone."""
    measured = rows("shard|embed")
    assert {row[0] for row in measured} == {"shard", "embed"}
    assert {row[1] for row in measured} == {"1", "2"}
    settled = [row for row in measured if float(row[4]) < 1]  # no worker was still starting
    assert len(settled) >= 7
    for _, workers, pieces, mean, spread, seconds, *_ in settled:
        work = Work(int(pieces), float(mean), float(spread))
        took = makespan(work, Machines(1, int(workers)))
        assert took == pytest.approx(float(seconds), rel=0.25), (workers, pieces)


def test_the_documents_table_is_what_the_simulation_prints(capsys):
    simulate.table()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1")]
    assert len(printed) == 12
    assert all(line in SCALE.read_text() for line in printed)
