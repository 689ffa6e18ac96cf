"""MLflow goes away, loses runs and files or is ruined at random moments of a run.

    python -m tests.chaos.tracking --rounds 20 --seed 0

First, as often, two commands at once are the first ones of a new folder: one makes the database,
both are tracked. Then the rounds: commands of five stages that say all that real ones say, to a
real server or to a database beside the run folder. At random moments the server is killed and
started again, files cannot be stored, runs or their experiment are deleted, the database is locked,
ruined or removed, the command is killed (-9); some begin again with other settings. Every command
that is not killed has to end well. When all is in order again and a command has found nothing left
to do, MLflow holds every metric of the models that are there, each step once, with parameters,
report and registered model, or a sentence has told what it lacks.
"""

import argparse
import random
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from jobs.tracking import server as mlflow_server
from pipeline.storage import store
from tests.chaos.tracked import Command, lacking, trained_model
from tests.helpers.mlflow_server import Server, client_of

MOMENTS = 28  # that a whole command has, about


# ---- two first commands at once ----------------------------------------------------------------


def first_commands(folder: Path, model: Path, chance: random.Random) -> str:
    """Two commands at once are the first ones beside a database; raises unless both are tracked."""
    folder.mkdir()
    folders = chance.choice([("one", "two"), ("one", "one")])
    names = ("main", "main") if folders[0] != folders[1] else ("main", "rival")
    go = folder / "go"
    some = [
        Command(folder / where, 1, model, "", folder / f"{n}.log", "--name", name, "--go", str(go))
        for n, (where, name) in enumerate(zip(folders, names, strict=True))
    ]
    while len(list(folder.glob("go.*"))) < len(some):
        assert not any(command.process.exitcode for command in some), folder
        time.sleep(0.02)
    go.touch()
    assert all(command.run({}) for command in some)
    said = "".join(command.log.read_text() for command in some)
    assert not said, said
    uri = f"sqlite:///{folder}/mlflow.db"
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for where, name in set(zip(folders, names, strict=True)):
        missing = lacking(folder / where, name, 1, uri, said, shared=folders[0] == folders[1])
        assert not missing, f"{folder}: {missing}"
    return f"{len(set(folders))} run folders, {len(set(names))} models"


# ---- rounds ------------------------------------------------------------------------------------


class Round:
    """Commands on one run folder, and what happens to them."""

    def __init__(self, folder: Path, model: Path, template: Path, chance: random.Random):
        folder.mkdir()
        self.folder, self.model, self.template, self.chance = folder, model, template, chance
        self.root, self.log = folder / "run", folder / "log.txt"
        self.kind = chance.choice(["server", "server, files past it", "database"])
        self.server, self.database = None, folder / "mlflow.db"
        self.artifacts = folder / "mlflow-artifacts"
        self.happened: Counter[str] = Counter()
        self.uri = f"sqlite:///{self.database}"
        if self.kind != "database":
            past = ("--no-serve-artifacts", "--default-artifact-root", str(self.artifacts))
            through = ("--artifacts-destination", str(self.artifacts))
            self.server = Server(folder, *(through if self.kind == "server" else past))
            shutil.copy(template, self.database)
            self.uri = self.server.start().uri

    def play(self) -> str:
        """All of it; a line about it."""
        versions = sorted(self.chance.choices([1, 2, 3], k=self.chance.choice([1, 2, 2, 3])))
        try:
            for version in versions:
                self.command(version, self.events())
            self.mend()
            tries = 0
            while not self.command(versions[-1], {}) or self.waits:
                tries += 1
                assert tries < 3, f"{self.folder}: what MLflow lacks still waits"
            said = self.log.read_text()
            missing = lacking(self.root, "main", versions[-1], self.uri, said)
            assert not missing, f"{self.folder}: {missing}"
        finally:
            if self.server:
                self.server.kill()
        told = sum(line.startswith("halftone: MLflow") for line in said.splitlines())
        events = ", ".join(f"{what} {n}" for what, n in sorted(self.happened.items()))
        return f"{self.kind:21} {len(versions)} settings, {told:2} sentences: {events or 'nothing'}"

    @property
    def waits(self) -> bool:
        return (self.root / "tracking-pending.json").exists()

    def command(self, version: int, happens: dict) -> bool:
        return Command(self.root, version, self.model, self.uri, self.log).run(happens)

    def events(self) -> dict[int, list[Callable]]:
        """What happens in a command, by its moments."""
        out: dict[int, list[Callable]] = {}
        for _ in range(self.chance.randint(1, 3)):
            moment = self.chance.randint(1, MOMENTS)
            name = self.chance.choice(self.possible)
            out.setdefault(moment, []).append(lambda command, name=name: self.happen(name, command))
            if name == "away":
                back = moment + self.chance.randint(1, MOMENTS)
                out.setdefault(back, []).append(lambda command: self.back())
            if name == "no files" and self.chance.random() < 0.5:
                later = moment + self.chance.randint(1, MOMENTS)
                out.setdefault(later, []).append(lambda command: self.files_again())
        return out

    @property
    def possible(self) -> list[str]:
        both = ["no files", "run deleted", "experiment deleted", "ruined", "killed"]
        return [*both, *(["away", "away"] if self.server else ["removed", "locked"])]

    def happen(self, name: str, command: Command) -> None:
        self.happened[name] += 1
        getattr(self, name.replace(" ", "_"))(command)

    # What can happen.

    def away(self, command: Command) -> None:
        self.server.kill()

    def back(self) -> None:
        if not self.server.process and not self._is_ruined():
            self.server.start()

    def no_files(self, command: Command) -> None:
        if self.artifacts.is_dir():
            self.artifacts.rename(self.folder / f"artifacts-{time.monotonic_ns()}")
        self.artifacts.write_text("a file where the folder should be")

    def files_again(self) -> None:
        if self.artifacts.is_file():
            self.artifacts.unlink()
            for kept in self.folder.glob("artifacts-*"):
                shutil.copytree(kept, self.artifacts, dirs_exist_ok=True)

    def run_deleted(self, command: Command) -> None:
        if run_ids := self._runs():
            client_of(self.uri).delete_run(self.chance.choice(run_ids))

    def experiment_deleted(self, command: Command) -> None:
        if self._runs():
            client = client_of(self.uri)
            client.delete_experiment(client.get_run(self._runs()[0]).info.experiment_id)

    def ruined(self, command: Command) -> None:
        if self.server:
            self.server.kill()
        if self.database.exists():
            size = self.database.stat().st_size
            with self.database.open("r+b") as file:
                file.write(self.chance.randbytes(max(size, 100)))

    def removed(self, command: Command) -> None:
        self.database.unlink(missing_ok=True)

    def locked(self, command: Command) -> None:
        """Another program writes to the database for a second."""
        if self._is_ruined() or not self.database.exists():
            return
        begun = threading.Event()

        def hold() -> None:
            with sqlite3.connect(self.database, isolation_level=None) as other:
                other.execute("BEGIN EXCLUSIVE")
                begun.set()
                time.sleep(1)
                other.execute("ROLLBACK")

        threading.Thread(target=hold).start()
        begun.wait(60)

    def killed(self, command: Command) -> None:
        wait = self.chance.random() / 3
        threading.Timer(wait, command.process.kill).start()

    def mend(self) -> None:
        """What a person does in the end, as the sentences say."""
        self.files_again()
        if self._is_ruined():
            self.database.rename(self.folder / "mlflow.db.damaged")
            if self.server:
                shutil.copy(self.template, self.database)
        if self.server and not self.server.process:
            self.server.start()

    def _is_ruined(self) -> bool:
        there = self.database.exists() and self.database.stat().st_size
        return bool(there) and self.database.read_bytes()[:15] != b"SQLite format 3"

    def _runs(self) -> list[str]:
        """Ids of the runs that are known and there, where MLflow can be asked."""
        if self._is_ruined() or (self.server and not self.server.process):
            return []
        path = self.root / "tracking.json"
        ids = store.read_json(str(path)).get(self.uri, {}) if path.exists() else {}
        if not ids or not self.database.exists():
            return []
        client, out = client_of(self.uri), []
        for name, run_id in ids.items():
            if name != "experiment":
                try:
                    if client.get_run(run_id).info.lifecycle_stage == "active":
                        out.append(run_id)
                except Exception:  # of a database that was removed
                    continue
        return out


def run(folder: Path, starts: int, rounds: int, seed: int) -> str:
    """A line a pair of first commands and a line a round, after all ended as they have to."""
    chance = random.Random(seed)
    model, template = trained_model(folder / "model"), folder / "template.db"
    mlflow_server.client(f"sqlite:///{template}")
    lines, began = [], time.monotonic()
    for number in range(1, starts + 1):
        about = first_commands(folder / f"first-{number}", model, chance)
        lines.append(f"first {number:2}  {about}: one database, both tracked")
        print(lines[-1], flush=True)
    happened: Counter[str] = Counter()
    for number in range(1, rounds + 1):
        one = Round(folder / f"round-{number}", model, template, chance)
        lines.append(f"round {number:2}  {one.play()}")
        print(lines[-1], flush=True)
        happened += one.happened
    seconds = time.monotonic() - began
    lines.append(f"{starts} first pairs and {rounds} rounds in {seconds:.0f} s; {dict(happened)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=20, help="rounds, and pairs of first commands"
    )
    parser.add_argument("--starts", type=int, help="pairs of first commands (default: as rounds)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    starts = options.rounds if options.starts is None else options.starts
    folder = Path(tempfile.mkdtemp(prefix="halftone-chaos-"))  # stays where a round fails
    print(run(folder, starts, options.rounds, options.seed).splitlines()[-1])
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
