"""Two commands on one run folder: who waits, who is refused, and that the dead hold nobody up."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jobs.cli import presence
from jobs.cli.presence import PREFIX, Presence
from pipeline.errors import InputError
from pipeline.storage import store
from tests.helpers.paths import ROOT

WORKS = """
import sys, time
from jobs.cli.presence import Presence
with Presence({root!r}, {data!r}, print).working({folder!r}, {of!r}):
    print("works", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(presence, "LOOK", 0.02)


@pytest.fixture
def other(tmp_path):
    """Another command at work in this folder, in a process of its own."""
    started = []

    def start(data="data", folder="2-shards", of="plan") -> subprocess.Popen:
        code = WORKS.format(root=str(tmp_path), data=data, folder=folder, of=of)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)
        started.append(process)
        assert process.stdout.readline() == "works\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def at_work(root) -> list[str]:
    return [name for name in store.list_files(str(root)) if name.startswith(PREFIX)]


def test_one_command_alone_waits_for_nobody_and_leaves_nothing(folder):
    with Presence(folder, "data", print).working("2-shards", "plan") as waited:
        assert not waited and len(at_work(folder)) == 1
    assert at_work(folder) == []


def test_the_same_waits_until_the_other_has_ended_and_says_for_whom(tmp_path, other):
    first, said = other(), []
    threading.Timer(0.5, first.stdin.close).start()
    with Presence(str(tmp_path), "data", said.append).working("2-shards", "plan") as waited:
        assert waited and len(at_work(tmp_path)) == 1
    (line,) = said
    assert f"process {first.pid} on " in line and "makes the same; this command waits" in line


@pytest.mark.parametrize(
    ("mine", "what"),
    [
        ({"data": "others", "folder": "5-model/b"}, "of other data or shards"),
        ({"data": "data", "folder": "2-shards"}, "otherwise"),
    ],
)
def test_other_settings_are_refused_with_who_is_at_work(tmp_path, other, mine, what):
    first = other()
    here = Presence(str(tmp_path), mine["data"], print)
    sentence = f"process {first.pid} on .* is at work in 2-shards, {what}; wait until"
    with pytest.raises(InputError, match=sentence), here.working(mine["folder"], "another"):
        pass
    assert len(at_work(tmp_path)) == 1  # the first one's


def test_another_folder_of_the_same_data_is_worked_on_beside(tmp_path, other):
    other(folder="5-model/a")
    with Presence(str(tmp_path), "data", print).working("5-model/b", "plan") as waited:
        assert not waited and len(at_work(tmp_path)) == 2


@pytest.mark.parametrize("data", ["data", "others"])
def test_a_command_that_was_killed_holds_nobody_up(tmp_path, other, data):
    first = other()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert len(at_work(tmp_path)) == 1  # it could not clear up
    with Presence(str(tmp_path), data, print).working("2-shards", "plan") as waited:
        assert not waited and len(at_work(tmp_path)) == 1


def test_a_process_number_that_was_given_again_is_not_the_command(tmp_path, other):
    first = other()
    (name,) = at_work(tmp_path)
    about = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(about | {"start": "1"}))
    with Presence(str(tmp_path), "others", print).working("2-shards", "plan") as waited:
        assert not waited
    assert first.poll() is None


def of_another_machine(folder: str, **more) -> str:
    """The file of a command of another machine, with no process here."""
    about = Presence(folder, "data", print).about
    about |= {"machine": "elsewhere", "pid": 1, "folder": "2-shards", "of": "plan"}
    uri = store.join(folder, f"{PREFIX}0.json")
    store.write_bytes(uri, json.dumps(about | {"state": "works", **more}).encode())
    return uri


def test_a_command_of_another_machine_is_dead_when_its_file_stays_as_it_is(folder, monkeypatch):
    monkeypatch.setattr(presence, "PATIENCE", 0.3)
    of_another_machine(folder)
    said = []
    with Presence(folder, "data", said.append).working("2-shards", "plan") as waited:
        assert waited and len(said) == 1 and len(at_work(folder)) == 1


def test_a_command_of_another_machine_with_other_settings_may_be_dead_too(folder, monkeypatch):
    """It is refused when the other gives a sign of life, and goes on when it gives none."""
    monkeypatch.setattr(presence, "PATIENCE", 0.3)
    of_another_machine(folder)
    said = []
    with Presence(folder, "others", said.append).working("2-shards", "plan"):
        assert len(said) == 1 and "may be dead" in said[0]
    monkeypatch.setattr(presence, "PATIENCE", 600.0)
    of_another_machine(folder)
    alive = threading.Timer(0.3, of_another_machine, [folder], {"beat": 1})
    alive.start()
    with (
        pytest.raises(InputError, match="is at work in 2-shards, of other data"),
        Presence(folder, "others", said.append).working("2-shards", "plan"),
    ):
        pass
    alive.join()


def test_time_in_which_nobody_could_look_does_not_count(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(presence.time, "monotonic", lambda: now[0])
    here = Presence(str(tmp_path), "data", print)
    other = {**here.about, "machine": "elsewhere", "beat": 3}
    for at, alive in ((0, True), (5, True), (100, True), (155, True), (160, True)):
        now[0] = float(at)
        assert here._is_alive("a", other) == alive
    for at in range(160, 221, 5):
        now[0] = float(at)
        alive = here._is_alive("a", other)
    assert not alive and not here.seen["a"].lives
    assert here._is_alive("a", {**other, "beat": 4}) and here.seen["a"].lives


def test_a_command_of_another_machine_that_gives_signs_of_life_is_waited_for(folder, monkeypatch):
    monkeypatch.setattr(presence, "PATIENCE", 30.0)
    over = threading.Event()

    def live() -> None:
        for beat in range(1, 16):
            uri = of_another_machine(folder, beat=beat)
            time.sleep(0.1)
        over.set()
        store.remove(uri)

    of_another_machine(folder)
    thread = threading.Thread(target=live)
    thread.start()
    with Presence(folder, "data", lambda line: None).working("2-shards", "plan") as waited:
        assert waited and over.is_set()
    thread.join()


def test_of_many_that_come_at_once_one_works_at_a_time(tmp_path):
    inside, most = [], []

    def work() -> None:
        with Presence(str(tmp_path), "data", lambda line: None).working("2-shards", "plan"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6 and at_work(tmp_path) == []
