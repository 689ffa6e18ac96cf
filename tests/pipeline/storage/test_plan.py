"""Plans: what is done, what a log keeps of a crash, and how much is asked of a store."""

import json
import os
import signal
import subprocess
import sys

import pytest

from pipeline.storage import parquet, plan, store
from pipeline.storage.plan import UNFINISHED, Log, Piece, Plan
from tests.helpers.paths import ROOT


def plan_of(folder: str, count: int, salt: str = "") -> Plan:
    pieces = [
        Piece(f"p-{n}", store.join(folder, f"p-{n}.bin"), f"{n}{salt}", {}) for n in range(count)
    ]
    return Plan.of("stage", folder, pieces, {})


def make(piece: Piece) -> dict:
    data = piece.name.encode()
    store.write_bytes(piece.output, data)
    file = {"bytes": len(data), "sha256": store.sha256(data)}
    return {"split": "train", "files": {store.name_of(piece.output): file}}


def logs(folder: str) -> list[str]:
    return [name for name in store.list_files(folder) if name.startswith(UNFINISHED)]


def test_what_a_log_has_noted_is_done_after_a_crash_and_the_index_is_the_same(folder, tmp_path):
    first = plan_of(folder, 5)
    with pytest.raises(KeyboardInterrupt), first.log() as log:
        for piece in first.pieces[:3]:
            log.add(piece, make(piece))
        raise KeyboardInterrupt
    assert len(logs(folder)) == 1
    again = plan_of(folder, 5)
    assert [piece.name for piece in again.pending] == ["p-3", "p-4"] and not again.complete
    index = again.finish({piece.name: make(piece) for piece in again.pending})
    assert logs(folder) == []  # the index holds it all
    other = f"{folder}-undisturbed"
    whole = plan_of(other, 5)
    whole.finish({piece.name: make(piece) for piece in whole.pieces})
    assert store.read_json(f"{other}/index.json") == index
    assert store.read_bytes(f"{other}/index.json") == store.read_bytes(f"{folder}/index.json")


def test_a_log_of_other_settings_or_of_files_that_are_gone_is_not_believed(folder):
    first = plan_of(folder, 3)
    with first.log() as log:
        for piece in first.pieces:
            log.add(piece, make(piece))
        log.keep()
    store.remove(first.pieces[1].output)
    store.write_bytes(first.pieces[2].output, b"another size")
    assert [piece.name for piece in plan_of(folder, 3).pending] == ["p-1", "p-2"]
    assert len(plan_of(folder, 3, salt="others").pending) == 3


def test_a_log_that_is_no_log_is_passed_over(tmp_path):
    store.write_bytes(f"{tmp_path}/{UNFINISHED}1.jsonl", b'{"name": "p-0", ')
    assert len(plan_of(str(tmp_path), 2).pending) == 2


def test_a_piece_with_samples_that_failed_is_looked_at_again(tmp_path):
    first = plan_of(str(tmp_path), 2)
    with first.log() as log:
        log.add(first.pieces[0], {**make(first.pieces[0]), "rejected": {"no answer": 2}})
        log.add(first.pieces[1], {**make(first.pieces[1]), "rejected": {}})
        log.keep()
    assert [piece.name for piece in plan_of(str(tmp_path), 2).pending] == ["p-0"]


def test_a_store_that_is_away_costs_the_log_nothing_but_time(tmp_path, monkeypatch):
    first = plan_of(str(tmp_path), 2)
    monkeypatch.setattr(Log, "EVERY", 0.0)
    write = store.write_bytes

    def away(uri, data):
        raise OSError("no room")

    with first.log() as log:
        made = make(first.pieces[0])
        monkeypatch.setattr(store, "write_bytes", away)
        log.add(first.pieces[0], made)
        monkeypatch.setattr(store, "write_bytes", write)
        log.add(first.pieces[1], make(first.pieces[1]))
    assert plan_of(str(tmp_path), 2).pending == []


KILLED = """
import os, signal, sys
from pipeline.storage.plan import Log
from tests.pipeline.storage.test_plan import make, plan_of
Log.EVERY = 0.0
plan = plan_of(sys.argv[1], 6)
with plan.log() as log:
    for piece in plan.pieces[:4]:
        log.add(piece, make(piece))
    make(plan.pieces[4])  # in flight
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_driver_costs_what_was_in_flight(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, env=os.environ).returncode == -signal.SIGKILL
    assert [piece.name for piece in plan_of(str(tmp_path), 6).pending] == ["p-4", "p-5"]


def test_an_index_is_json_with_a_piece_a_line(tmp_path):
    whole = plan_of(str(tmp_path), 3)
    index = whole.finish({piece.name: make(piece) for piece in whole.pieces}, totals={"a": 1})
    lines = (tmp_path / "index.json").read_text().splitlines()
    assert json.loads("\n".join(lines)) == index
    assert sum(line.startswith('{"files"') for line in lines) == 3


def test_a_large_finished_folder_is_not_listed(monkeypatch, tmp_path):
    """A sample of its pieces is asked for; where one is missing all is listed."""
    monkeypatch.setattr(plan, "LISTED", 40)
    folder = f"memory://{tmp_path.name}/large"
    whole = plan_of(folder, 50)
    whole.finish({piece.name: make(piece) for piece in whole.pieces})

    def listed(uri):
        raise AssertionError("all was listed")

    with monkeypatch.context() as patch:
        patch.setattr(store, "list_files", listed)
        assert plan_of(folder, 50).complete
        with pytest.raises(AssertionError, match="all was listed"):
            plan_of(folder, 50, salt="others").pending  # noqa: B018
    for piece in whole.pieces[:45]:  # of 16 at least 11 are among these
        store.remove(piece.output)
    assert len(plan_of(folder, 50).pending) == 45


def test_a_large_index_is_parsed_once_while_it_stays(monkeypatch, tmp_path):
    from pipeline.storage import run_folder

    monkeypatch.setattr(run_folder, "LARGE", 10)
    store.write_bytes(f"{tmp_path}/index.json", b'{"a": 1, "b": 2}')
    first = run_folder.read_index(str(tmp_path))
    assert run_folder.read_index(str(tmp_path)) is first
    store.write_bytes(f"{tmp_path}/index.json", b'{"a": 1, "b": 2, "c": 3}')
    assert run_folder.read_index(str(tmp_path))["c"] == 3
    assert run_folder.read_index(f"{tmp_path}/none") is None


def test_a_crash_before_the_index_reads_no_finished_piece_again(tmp_path, monkeypatch):
    """Neither the piece's file nor what lies beside it is opened by a task."""
    first = plan_of(str(tmp_path), 4)
    with first.log() as log:
        for piece in first.pieces:
            log.add(piece, make(piece))
        log.keep()

    def finished(uri, fingerprint):
        raise AssertionError(uri)

    monkeypatch.setattr(parquet, "finished", finished)
    again = plan_of(str(tmp_path), 4)
    assert again.pending == [] and len(again.finish({})["pieces"]) == 4
