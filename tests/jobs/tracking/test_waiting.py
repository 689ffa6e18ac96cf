"""What waits for MLflow: each thing once, not more than may be, and nobody's is lost."""

import json
import multiprocessing
from pathlib import Path

import pytest

from jobs.tracking import waiting
from jobs.tracking.waiting import Entry, Waiting, merged


def batch(stage="train", number=1, name="main", **metrics) -> Entry:
    values = {"metrics": [[k, v, 0, 5] for k, v in metrics.items()], "params": {}, "tags": {}}
    return Entry(name, number, stage, "batch", values)


def other(kind: str, number=1, name="main", stage="train", **values) -> Entry:
    return Entry(name, number, stage, kind, values)


def test_the_same_again_is_once():
    first = [batch(a=1.0), other("artifact", name_="x"), other("status", status="FAILED")]
    again = [batch(a=2.0, b=3.0), other("status", status="FINISHED"), batch("label", a=4.0)]
    found = merged([*first, *again, *again])
    kinds = [(entry.stage, entry.kind) for entry in found]
    assert kinds[:2] == [("train", "batch"), ("train", "artifact")]
    assert sorted(kinds[2:]) == [("label", "batch"), ("train", "status")]
    assert [m[:2] for m in found[0].values["metrics"]] == [["a", 2.0], ["b", 3.0]]
    assert {"status": "FINISHED"} in [entry.values for entry in found]


def test_a_status_stays_behind_what_it_is_the_end_of():
    late = other("artifact", name="late")
    found = merged([batch(a=1.0), other("status", status="FINISHED"), late])
    assert found[-1] == late
    found = merged([*found, other("status", status="FINISHED")])
    assert found[-1].kind == "status"


def test_the_file_is_bounded_and_gives_up_the_oldest_files_first(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "MOST", 3000)
    kept = Waiting(str(tmp_path))
    assert kept.add([batch(a=1.0)]) == 0
    pages = [Entry("main", 1, "", "artifact", {"name": f"{n}", "text": "x" * 900}) for n in "abcd"]
    assert kept.add(pages) == 2
    assert [e.values.get("name") for e in kept.of("main")] == [None, "c", "d"]
    assert Path(kept.uri).stat().st_size < 4000
    curves = [Entry("main", n, "train", "records", {"records": [0] * 500}) for n in range(1, 9)]
    assert kept.add(curves) > 0
    assert [e.number for e in kept.of("main") if e.kind == "records"][-1] == 8


def test_what_was_taken_is_replaced_and_what_came_meanwhile_stays(tmp_path):
    kept = Waiting(str(tmp_path))
    kept.add([batch(a=1.0), batch("label", b=1.0)])
    taken = kept.of("main")
    kept.add([batch(name="rival", a=9.0), batch("label", b=2.0)])
    kept.replace(taken, [])
    assert [e.values["metrics"][0][:2] for e in kept.of("main")] == [["b", 2.0]]
    kept.replace(kept.of("main"), [])
    kept.replace(kept.of("rival"), [])
    assert not Path(kept.uri).exists()


def test_files_of_a_model_that_was_made_anew_wait_no_longer(tmp_path):
    kept = Waiting(str(tmp_path))
    kept.add([batch(a=1.0), other("artifact", name="x"), other("model", folder="5-model/main")])
    kept.add([Entry("main", 2, "", "artifact", {"name": "x", "text": ""})])
    kept.drop_files("main", 2)
    assert [(e.number, e.kind) for e in kept.of("main")] == [(1, "batch"), (2, "artifact")]


def adds(root: str, who: str) -> None:
    for number in range(20):
        Waiting(root).add([batch(f"stage-{number}", name=who, a=float(number))])


def test_processes_do_not_lose_each_other_s_entries(tmp_path):
    context = multiprocessing.get_context("spawn")
    some = [context.Process(target=adds, args=(str(tmp_path), who)) for who in ("a", "b", "c")]
    for process in some:
        process.start()
    for process in some:
        process.join(600)
        assert process.exitcode == 0
    assert [len(Waiting(str(tmp_path)).of(who)) for who in "abc"] == [20, 20, 20]


@pytest.mark.parametrize("text", ["{", "[1, 2]", '[["main", "train", "batch", []]]', '{"a": 1}'])
def test_a_file_that_is_none_is_put_aside_and_told(tmp_path, capsys, text):
    kept = Waiting(str(tmp_path))
    Path(kept.uri).write_text(text)
    assert kept.of("main") == []
    assert Path(f"{kept.uri}.damaged").read_text() == text
    assert "tracking-pending.json.damaged" in capsys.readouterr().err
    kept.add([batch(a=float("nan"))])
    assert json.loads(Path(kept.uri).read_text())[0]["name"] == "main"
