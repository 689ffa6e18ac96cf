"""A run as the jobs see it: one model of one run folder, its stages shown, made and tracked."""

import contextlib
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jobs.cli.presence import Presence
from jobs.cli.show import Show
from jobs.cluster import tasks, training
from jobs.tracking.tracker import Tracker
from pipeline.errors import StageMissing
from pipeline.storage import store
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import RunFolder
from schemas.settings import SECTIONS, Recipe

if TYPE_CHECKING:
    from pipeline.evaluation.results import Result
    from pipeline.reports.render import Made, Page


class NotYet(Exception):
    """A dry run comes to work whose plan depends on what is still to be made."""


@dataclass
class Run:
    """What every job's `run` gets."""

    recipe: Recipe
    root: str
    name: str
    show: Show
    options: Namespace  # of the command line
    track: Tracker = field(init=False)
    present: Presence = field(init=False)
    results: dict[str, Any] = field(default_factory=dict)  # for --json and the final table
    begun: bool = False

    def __post_init__(self):
        self.track = Tracker(self.recipe.name, self.root, self.name)
        parts = (self.recipe.source, self.recipe.shard)
        data = store.fingerprint([part.model_dump(mode="json") for part in parts])
        self.present = Presence(self.root, data, self.show.line)

    @property
    def dry(self) -> bool:
        """Whether nothing is to be done, and what would be is to be said."""
        return self.options.dry_run

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator["Stage"]:
        """The stage's line on the screen, its MLflow run and its clock."""
        stage = Stage(self, name, time.perf_counter())
        try:
            yield stage
        except NotYet:
            return
        except StageMissing as missing:
            if not self.dry:
                self.show.failed(name)
                raise
            self.show.line(f"  {name}: waits, {missing}")
            return
        except BaseException as error:
            self.show.failed(name)
            if stopped := isinstance(error, KeyboardInterrupt | SystemExit):  # Ctrl-C, SIGTERM
                signal.alarm(0)  # Ray ends the process three seconds after a SIGTERM
            if stage.worked:
                self.track.log(name, tags={"halftone.error": f"{type(error).__name__}: {error}"})
            if self.begun:  # stages that came to their end stay as they ended
                self.track.finish("KILLED" if stopped else "FAILED")
            raise
        stage.end()

    def keep(self, stage: str, page: "Page", made: "Made") -> None:
        """A page that was made, and what was made with it, to the MLflow run of a stage."""
        if page.artifact:
            figures = {f"figures/{figure.name}.svg": figure.svg for figure in made.figures}
            for name, text in {page.artifact: made.html, **made.files, **figures}.items():
                self.track.artifact(stage, name, text.encode())
        if made.metrics:
            self.track.log(stage, metrics=made.metrics)

    def where_to_look(self) -> None:
        """The pages, the next question to ask, and MLflow."""
        places = {
            "report": store.join(self.root, "report.html"),
            "search": store.join(self.root, f"search-{self.name}.html"),
            "ask": f'{command("halftone")} search "…" --root {self.root}',
            "MLflow": self.track.url(),
        }
        if opens := self.track.ui_command():
            places |= {"MLflow": f"{command('mlflow')} {opens}", "then": self.track.url()}
        self.show.where(places)

    def begin(self, anew: bool = False) -> None:
        """There is work to do: the resolved settings go to the run folder and to MLflow.

        Where other MLflow runs begin (`anew`), what is known already is told to them too.
        """
        if anew or not self.begun:
            self.begun = True
            values = self.recipe.model_dump(mode="json")
            text = yaml.safe_dump(values, sort_keys=False).encode()
            store.write_bytes(RunFolder(self.root).settings_uri(self.name), text)
            params = {f"{s}.{key}": value for s in SECTIONS for key, value in values[s].items()}
            self.track.log("", params={"recipe": self.recipe.name, **params})
            self.track.artifact("", "settings.yaml", text)
            known = self.results.get("metrics", {}) if anew else {}
            for prefix, metrics in known.items():
                self.track.log("", metrics={f"{prefix}/{k}": v for k, v in metrics.items()})


@dataclass
class Stage:
    """One stage of a run, while it runs."""

    run: Run
    name: str
    started: float
    made: int = 0
    kept: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    worked: bool = False
    seen: list[str] = field(default_factory=list)  # fingerprints of what it makes, in order

    def make(
        self,
        plan: Plan,
        make: Callable[[Piece], dict],
        *,
        gpu: bool = False,
        check: Callable[[dict[str, dict]], Any] = lambda made: None,
        **extra,
    ) -> dict:
        """The plan's index, after its pending pieces were made; `check` sees them before it is."""
        pending = self._pending(plan)
        if self.run.dry:
            return self._would(plan, pending)
        if plan.complete:
            return plan.index
        with self._at_work(plan):
            if plan.complete:  # by another command, which was waited for
                return plan.index
            if pending := plan.pending:
                self.start()
            return self._make(plan, make, pending, gpu, check, extra)

    @contextlib.contextmanager
    def _at_work(self, plan: Plan) -> Iterator[None]:
        """While it is entered no other command makes what the plan is of."""
        with self.run.present.working(plan.folder, plan.fingerprint) as waited:
            if waited:
                before = len(plan.pending)
                plan.look_again()
                self.kept += before - len(plan.pending)
            yield

    def _make(self, plan: Plan, make: Callable, pending: list[Piece], gpu, check, extra) -> dict:
        """The index of a plan whose pending pieces are made."""
        with self.run.show.progress(self.name, len(pending)) as advance, plan.log() as log:

            def done(piece: Piece, summary: dict) -> None:
                log.add(piece, summary)
                advance()

            made = tasks.fan_out(make, pending, gpu=gpu, done=done, say=self.run.show.line)
            self.made += len(made)
            check(made)
            return plan.finish(made, **extra)

    def train(
        self, plan: Plan, fit: Callable, summary: Callable[[Piece], dict], epochs: int = 0
    ) -> dict:
        """The plan's index, after its one piece was trained on Ray's workers."""
        pending, piece = self._pending(plan), plan.pieces[0]
        if self.run.dry:
            return self._would(plan, pending)
        if not pending:
            if self.untold:
                self.run.track.records(self.name, store.read_json(piece.output)["records"])
            return plan.index if plan.complete else plan.finish({})
        with self._at_work(plan):
            if not plan.pending:  # another command, which was waited for, has made it
                return plan.index if plan.complete else plan.finish({})
            self.start()
            self._train(fit, piece, epochs or self.run.recipe.train.epochs)
            self.made += 1
            self.run.track.records(self.name, store.read_json(piece.output)["records"])
            return plan.finish({piece.name: summary(piece)})

    def _train(self, fit: Callable, piece: Piece, epochs: int) -> None:
        with self.run.show.training(epochs, piece):
            track = self.run.track
            watchers = track.recorder(self.name), track.monitor(self.name)
            training.train(fit, piece, self.run.recipe.train, *watchers, self.run.show.line)

    def _pending(self, plan: Plan) -> list[Piece]:
        """The pieces that are still to be made; the rest are counted as kept."""
        pending = plan.pending
        self.kept += len(plan) - len(pending)
        self.seen.append(store.fingerprint(plan.names))
        return pending

    def _would(self, plan: Plan, pending: list[Piece]) -> dict:
        """A dry run's line; the index of the last time, if there was one."""
        self.run.show.would(self.name, plan, pending)
        if not plan.index:
            raise NotYet
        return plan.index

    def page(self, page: "Page", *, beside: bool = False, aside: bool = False) -> None:
        """Make a page that is not there, or was made from something else; to MLflow too.

        One that lies beside a stage's pieces is not counted among what the stage made. One that is
        made `aside` needs models: a process that has them makes it, if there is one.
        """
        if beside and self.run.dry:
            return
        current = page.is_current
        if not beside:
            self.made, self.kept = self.made + (not current), self.kept + current
        if self.run.dry:
            self.run.show.line(f"  {store.name_of(page.uri)}: {'done' if current else 'to make'}")
            raise NotYet
        if not current:
            self.start()
            made = tasks.aside(page.make) if aside else page.make()
            self.run.keep(self.name, page, made)

    def result(self, plan: Plan, label: str, version: str, measure: Callable, *about) -> "Result":
        """What a ranking's metrics.json holds; `measure(plan, *about, label)` where it is old."""
        from pipeline.evaluation.results import FILE, read, write

        uri = store.join(plan.folder, FILE)
        self.seen.append(version)
        if (found := read(uri, label, version)) is None:
            self.start()
            write(uri, found := measure(plan, *about, label), version)
        return found

    @property
    def _of(self) -> dict[str, str]:
        """The fingerprints of what it makes, by their turn."""
        return {str(turn): fingerprint for turn, fingerprint in enumerate(self.seen)}

    def start(self) -> None:
        """The stage has work to do: its MLflow run begins, its settings the parameters.

        What was made before from other settings or data is of other runs: these are new ones then.
        """
        anew = bool(self.run.track.begin(self.name, self._of))
        if anew or not self.worked:
            self.worked = True
            section = self.run.recipe.model_dump(mode="json").get(self.name, {})
            params = {f"{self.name}.{key}": value for key, value in section.items()}
            self.run.begin(anew)
            self.run.track.log(self.name, params=params)

    @property
    def untold(self) -> bool:
        """Whether MLflow is to hear of what the stage made: now, or before it was killed."""
        return self.worked or bool(self.run.track.unfinished(self.name, self._of))

    def note(self, **notes) -> None:
        """Figures for the stage's line, and numbers for its MLflow run."""
        self.notes |= notes

    def metrics(self, prefix: str, metrics: dict[str, float]) -> None:
        """Results: to the model's MLflow run if they are new, and the main ones to the line."""
        self.run.results.setdefault("metrics", {})[prefix] = metrics
        shown = ("rsum", "i2t_R_at_1", "t2i_R_at_1", "i2t_ndcg_truth", "t2i_ndcg_truth")
        self.note(**{name: metrics[name] for name in shown if name in metrics})
        if self.untold and not self.run.dry:
            self.run.track.log("", metrics={f"{prefix}/{k}": v for k, v in metrics.items()})
            self.run.track.log(self.name, metrics=metrics)

    def end(self) -> None:
        seconds = time.perf_counter() - self.started
        self.run.results[self.name] = {"made": self.made, "kept": self.kept, **self.notes}
        if self.run.dry:
            return
        self.run.show.stage(self.name, self.made, self.kept, self.notes, seconds)
        if self.untold:
            numbers = {k: v for k, v in self.notes.items() if isinstance(v, int | float)}
            spent = {"seconds": seconds} if self.worked else {}
            self.run.track.log(self.name, metrics={**numbers, **spent})
            self.run.track.end(self.name)


def command(name: str) -> str:
    """A command as this person has to type it: it may lie in an environment not on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not beside.exists() else os.path.relpath(beside)
