"""What is remembered of a run: all that the jobs know of MLflow.

One parent run a model, a child run a stage. What a stage makes anew from other settings or data is
of other runs; a crashed or repeated one goes on in the same. Only the driver's side writes. What
cannot be written now waits in the run folder; what can never be is told and left out.
"""

import functools
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from jobs.tracking import logged_model, registration, runs, server, watchers, writing
from jobs.tracking.errors import Kind, Verdict, reason, told_apart
from jobs.tracking.folder import Folder, is_of, key
from jobs.tracking.server import current, default_uri
from jobs.tracking.undisturbed import undisturbed
from jobs.tracking.waiting import FILES, Entry, merged
from pipeline.storage import run_folder

PAUSE = 30  # seconds until a server that did not answer is asked again
_said: set[tuple] = set()  # what this process has said, of which run folder


def harmless(method: Callable) -> Callable:
    """Tracking must never end the work that it tracks: what goes wrong here is said, once."""

    @functools.wraps(method)
    def tried(self, *args, **named):
        try:
            return method(self, *args, **named)
        except Exception as error:
            self.say(f"cannot be told of this run ({reason(error)}); going on", "fault")
            return None

    return tried


class Tracker:
    """The MLflow runs of one model of one run folder."""

    def __init__(self, experiment: str, root: str, name: str):
        self.experiment, self.root, self.name = experiment, root, name
        self.uri = default_uri(root)
        self.folder = Folder(root)
        self.away, self.again = False, math.inf  # when (monotonic) it is asked again
        self.files_away = False
        self.doubtful: set[tuple] = set()  # slots that a server answered to with an error
        self.open: set[str] = set()  # stages that were written to and have not come to an end
        self.journal: list[Entry] = []  # of this session: a run that is lost is written again
        self._spelled = ""  # the URI as it was opened
        self._known: dict[str, str] = {}  # ids of the runs that were looked at, by key
        self._running: set[str] = set()

    # ---- what the jobs say ---------------------------------------------------------------------

    @harmless
    def begin(self, stage: str, made: dict[str, str]) -> bool:
        """A stage has work of these fingerprints; whether other runs begin with it."""
        before = self.number
        anew, broken_off = self.folder.begin(self.name, stage, made)
        if anew:
            self.__dict__.pop("number", None)
            now = _now()
            for (
                one
            ) in broken_off:  # by this session, which goes on, or by the end of an earlier one
                how = {"status": "FINISHED" if one in self.open else "KILLED", "time": now}
                self._take([Entry(self.name, before, one, "status", how)])
            self.open -= set(broken_off)
        return anew

    @harmless
    def unfinished(self, stage: str, made: dict[str, str]) -> bool:
        """Whether a stage, with these fingerprints, was begun and its end was never told."""
        return self.folder.unfinished(self.name, stage, made)

    @harmless
    def log(self, stage: str, *, metrics=None, params=None, tags=None, step: int = 0) -> None:
        """Metrics at a step, parameters and tags of a stage; '' is the parent run."""
        given = metrics or {}, params or {}, tags or {}
        self._write(stage, "batch", writing.cleaned(*given, step, self._left_out))

    @harmless
    def records(self, stage: str, records: list[dict]) -> None:
        """Metrics by step, those left out that are there already."""
        self._write(stage, "records", {"records": writing.plain(records)})

    @harmless
    def artifact(self, stage: str, name: str, data: bytes) -> None:
        """A file of a stage."""
        text = data.decode("utf-8", "surrogateescape")
        self._write(stage, "artifact", {"name": name, "text": text})

    @harmless
    def model(self, stage: str, folder: str, score: float) -> None:
        """Log a folder's trained model so that `mlflow.pyfunc.load_model` loads it.

        It becomes a version of the model registered under the recipe's name, with this model's
        name as alias, and `best` where no other version's score is higher.
        """
        about = {"model": self.name, "version": _version(folder), "score": float(score)}
        self._write(stage, "model", {"folder": folder, "about": {**about, "trained": _now()}})

    def recorder(self, stage: str) -> Callable[[list[dict]], None]:
        """A function for the training's controller that logs records as they come."""
        run_id = self._reached(stage)
        return watchers.Recorder(self.uri, run_id) if run_id else lambda records: None

    def monitor(self, stage: str) -> Callable[[str], AbstractContextManager]:
        """For the training's workers: while it is entered, their node's load is logged."""
        return partial(watchers.monitor, self.uri, self._reached(stage))

    @harmless
    def end(self, stage: str, status: str = "FINISHED") -> None:
        """A stage came to its end."""
        self._write(stage, "status", {"status": status, "time": _now()})
        self.folder.end(self.name, stage, status)

    @harmless
    def finish(self, status: str = "FINISHED") -> None:
        """End the runs that have no end yet; write what waits, or say where it waits."""
        left_open = {""} if self.folder.parent_left_open(self.name) else set()
        for stage in sorted(self.open | left_open, reverse=True):
            self.end(stage, status)
        if self.again < math.inf:  # perhaps it does better now
            self._ask_again()
        if left := self.folder.waiting.of(self.name):
            self._take([])
            left = self.folder.waiting.of(self.name)
        where = f"waits in {self.folder.waiting.uri} and is written by the next run"
        if left and all(entry.kind in FILES for entry in left):
            self.say(f"could not take all files; what it lacks {where}", "end")
        elif left and self.again < math.inf:
            self.say(f"could not be written; what it lacks {where}", "end")
        self.journal = []

    def url(self) -> str:
        """Where the runs are to be seen, once `mlflow ui` runs."""
        experiment = self.folder.ids(self.uri).get("experiment", "")
        base = self.uri if self.uri.startswith("http") else "http://127.0.0.1:5000"
        return f"{base}/#/experiments/{experiment}/runs?workflowType=machine_learning"

    def ui_command(self) -> str | None:
        """The words after `mlflow` that open the UI, where no server runs."""
        if self.uri.startswith("http"):
            return None
        return f"ui --backend-store-uri {self.uri} --port 5000 --workers 1"

    def say(self, text: str, about: str = "") -> None:
        """A sentence about MLflow, once in a process; of those about one thing the first."""
        what = (self.root, self.uri, about or text)
        if what not in _said:
            _said.add(what)
            print(f"halftone: MLflow at {self.uri} {text}", file=sys.stderr)

    # ---- entries -------------------------------------------------------------------------------

    @functools.cached_property
    def number(self) -> int:
        """Of the model's runs, counted from 1."""
        return self.folder.number(self.name)

    @harmless
    def _write(self, stage: str, kind: str, values: dict) -> None:
        entry = Entry(self.name, self.number, stage, kind, values)
        self.open |= {"", stage}
        if kind == "status":
            self.open.discard(stage)
        self.journal = merged([*self.journal, entry])
        self._take([entry])

    def _take(self, new: list[Entry]) -> None:
        """Write entries, after those that wait; keep those that cannot be written now."""
        if self.away and time.monotonic() >= self.again:
            self._ask_again()
        if self.away:
            return self._kept(self.folder.waiting.add(new)) if new else None
        waiting = self.folder.waiting.of(self.name)
        left = all_of_it = merged([*waiting, *new])
        with undisturbed():
            try:
                left = self._put_all(all_of_it)
            finally:  # stopped in the middle: all is written again, which changes nothing
                if waiting or left:
                    self._kept(self.folder.waiting.replace(waiting, left))
        return None

    def _ask_again(self) -> None:
        self.away = self.files_away = False
        self.doubtful.clear()

    def _put_all(self, entries: list[Entry]) -> list[Entry]:
        """Write entries in their order; those that wait for a better moment."""
        todo, left, renewed = list(entries), [], 0
        while todo:
            entry = todo.pop(0)
            verdict = self._put(entry)
            if verdict is not None and verdict.kind is Kind.GONE:
                lost, renewed = self._lost(), renewed + 1
                if lost is not None and renewed < 4:
                    todo = merged([*lost, entry, *todo])
                    continue
                verdict = Verdict(Kind.UNWRITABLE, verdict.why)
            if verdict is not None and self._judged(entry, verdict):
                left.append(entry)
        return left

    def _put(self, entry: Entry) -> Verdict | None:
        """Write an entry; what kept it from being written."""
        files = entry.kind in FILES
        if self.away or (files and self.files_away) or entry.slot in self.doubtful:
            return Verdict(Kind.PASSING, "")
        opened = False
        try:
            client = self._client()
            run_id = self._run_id(client, entry.number, entry.stage)
            opened = True
            self._apply(client, run_id, entry)
        except Exception as error:  # MLflow's, its stores' and its databases': of no common base
            verdict = told_apart(error, self.uri, files=files and opened)
            if verdict.kind is Kind.UNWRITABLE and not opened:
                return Verdict(Kind.REFUSED, verdict.why, "mend that")
            if verdict.kind is Kind.UNWRITABLE and entry.kind == "status":
                return Verdict(Kind.GONE, verdict.why)  # nothing else is wrong with a status
            return verdict
        return None

    def _judged(self, entry: Entry, verdict: Verdict) -> bool:
        """Say what a verdict means, and whether the entry waits."""
        why, waits = verdict.why, f"what it lacks waits in {self.folder.waiting.uri}"
        where = key(entry.name, entry.number, entry.stage)
        if verdict.kind is Kind.UNWRITABLE and entry.kind == "artifact":
            text = f"has a store of artifacts that cannot be written from here ({why}): pages and "
            text += f"settings stay in {self.root} alone. Metrics, parameters and statuses are "
            text += "written; a server started with --artifacts-destination takes files itself"
            self.say(text, "artifacts")
        elif verdict.kind is Kind.UNWRITABLE and entry.kind == "model":
            folder = entry.values["folder"]
            self.say(f"cannot take the model ({why}): it is not registered and stays in {folder}")
        elif verdict.kind is Kind.UNWRITABLE:
            self._left_out(f"{entry.kind} of {where}", why)
        elif verdict.kind is Kind.REFUSED:
            self.away, self.again = True, math.inf
            self.say(f"cannot be written: {why}; {verdict.do}. Going on; {waits} until then")
        elif verdict.why:  # else it was not tried
            self.again = time.monotonic() + PAUSE
            if verdict.answered and not self.doubtful:  # of this alone, perhaps
                self.doubtful.add(entry.slot)
                self.say(f"does not take the {entry.kind} of {where} now ({why}); going on", "now")
            elif entry.kind in FILES:
                self.files_away = True
                self.say(f"cannot take files ({why}); going on", "files")
            else:
                self.away = True
                self.say(f"cannot be written ({why}); going on", "away")
        return verdict.kind is not Kind.UNWRITABLE

    def _left_out(self, what: str, why: str) -> None:
        self.say(f"does not take the {what} ({why}); it is left out")

    def _kept(self, given_up: int) -> None:
        if given_up:
            self.say(f"lacks {given_up:,} entries: too much waited, the oldest was given up")

    def _lost(self) -> list[Entry] | None:
        """What this session wrote to runs that are there no more, and are now begun anew.

        None where all are there.
        """
        mine = {k: i for k, i in self.folder.ids(self.uri).items() if is_of(k, self.name)}
        lost = runs.gone(self._client(), mine)
        if not lost:
            return None
        self.folder.forget(self.uri, lost)
        for one in lost:
            self._known.pop(one, None)
        named = ", ".join(sorted(lost))
        said = f"has no run {named} any more (deleted, or another database): a new one is begun"
        self.say(f"{said}, and lacks what earlier commands wrote")
        return [e for e in self.journal if key(e.name, e.number, e.stage) in lost]

    # ---- the server ----------------------------------------------------------------------------

    def _client(self):
        client = server.client(self.uri)
        if client.tracking_uri != self._spelled:  # another database than before
            self._spelled = client.tracking_uri
            self._known.clear()
            self._running.clear()
        return client

    def _reached(self, stage: str) -> str | None:
        """The id of a stage's run; None where it cannot be written now."""
        self._write(stage, "batch", writing.cleaned({}, {}, {}, 0, self._left_out))
        return self._known.get(key(self.name, self.number, stage))

    def _run_id(self, client, number: int, stage: str) -> str:
        """The stage's run, the one of the last time if there was one."""
        mine = key(self.name, number, stage)
        parent = self._run_id(client, number, "") if stage else None
        if mine not in self._known:
            self._say_where()
            create = partial(self._create, client, number, stage, parent)
            run_id, new = self.folder.id_of(self.uri, mine, create)
            if new:
                self._running.add(mine)
            else:
                writing.alive(client, run_id)
            self._known[mine] = run_id
        current = number == self.number and stage in self.open
        if current and mine not in self._running:
            client.update_run(self._known[mine], status="RUNNING")
            self._running.add(mine)
        return self._known[mine]

    def _say_where(self) -> None:
        if before := self.folder.copied_from():
            self.say(f"knows {self.root} as {before}; copied or moved, it gets runs of its own")
        elif before := self.folder.elsewhere(self.uri):
            self.say(f"does not know {self.root}, which was tracked at {before}: new runs begin")

    def _create(
        self, client, number: int, stage: str, parent: str | None, ids: dict, mark: str
    ) -> str:
        """A new run; a parent's takes the stages' runs that there are below it."""
        known = ids.get("experiment")
        ids["experiment"] = runs.experiment(client, known, self.experiment, self.uri, self.say)
        tags = {"halftone.root": self.root, "halftone.stage": stage or "run"}
        tags |= {"mlflow.parentRunId": parent} if parent else {}
        run_id = runs.begin(client, ids["experiment"], stage or self.name, tags, mark)
        below = f"{key(self.name, number)}/"
        for child in [] if stage else [i for k, i in ids.items() if k.startswith(below)]:
            client.set_tag(child, "mlflow.parentRunId", run_id)
        return run_id

    def _apply(self, client, run_id: str, entry: Entry) -> None:
        values = entry.values
        if entry.kind == "batch":
            writing.batch(client, run_id, values, self._left_out)
        elif entry.kind == "records":
            writing.records(client, run_id, values["records"], self._left_out)
        elif entry.kind == "artifact":
            writing.artifact(client, run_id, values["name"], values["text"])
        elif entry.kind == "status":
            self._running.discard(key(self.name, entry.number, entry.stage))
            client.set_terminated(run_id, values["status"], values["time"])
        elif _version(values["folder"]) != values["about"]["version"]:
            self._left_out("model", f"another one lies in {values['folder']} now")
        else:
            log = partial(_log_model, client.tracking_uri, run_id, values["folder"])
            with writing.same_status(client, run_id):  # logging a model ends its run
                registration.register(client, run_id, self.experiment, values["about"], log)


def _now() -> int:
    return int(time.time() * 1000)


def _version(folder: str) -> str:
    """What stands for a trained model's files; '' where there is none."""
    return (run_folder.read_index(folder) or {}).get("version", "")


def _log_model(uri: str, run_id: str, folder: str):
    import mlflow

    with current(uri), mlflow.start_run(run_id=run_id):
        return logged_model.log_model(folder)
