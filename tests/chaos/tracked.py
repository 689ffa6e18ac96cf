"""A command of five stages that says to MLflow all that real ones say, without their computing."""

import argparse
import itertools
import multiprocessing
import os
import re
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from jobs.tracking.folder import key
from pipeline.storage import store
from pipeline.storage.plan import Piece, Plan
from schemas.settings import Recipe
from tests.helpers import forked, stages
from tests.helpers.mlflow_server import client_of, curve

STAGES = ("ingest", "shard", "train", "evaluate", "rerank")
DATA = STAGES[:2]  # of all models and settings
EPOCHS, STEPS = 3, 5  # of a training; steps an epoch


def metrics_of(stage: str, version: int) -> dict[str, float]:
    """What a stage of these settings tells."""
    of = 0 if stage in DATA else version
    return {f"{stage}_rsum": 100.0 * of + STAGES.index(stage), f"{stage}_pairs": 7.0}


def records_of(version: int) -> list[dict]:
    """Of the whole training."""
    steps = range(1, EPOCHS * STEPS + 1)
    ends = [{"step": e * STEPS, "epoch": e, "val/rsum": 10.0 * e} for e in range(1, EPOCHS + 1)]
    losses = [{"step": step, "train/loss": version + 1.0 / step} for step in steps]
    return sorted([*losses, *ends], key=lambda record: record["step"])


def plan_of(root: str, name: str, stage: str, version: int) -> Plan:
    """One piece; data are of all models and settings."""
    data = stage in DATA
    folder = f"{root}/{stage}" if data else f"{root}/{stage}/{name}"
    fingerprint = f"{stage} {0 if data else version}"
    piece = Piece(stage, f"{folder}/history.json", fingerprint, {"version": version})
    return Plan.of(stage, folder, [piece], {})


def make(piece: Piece, model: Path) -> dict:
    """What a piece leaves in its folder; of the training a real model's files."""
    folder, summary = Path(piece.output).parent, {}
    files = {"history.json": piece.fingerprint.encode()}
    if piece.name == "train":
        index = store.read_json(f"{model}/index.json")
        history = {"fingerprint": piece.fingerprint, "records": records_of(piece.inputs["version"])}
        files["history.json"] = repr(history).replace("'", '"').encode()
        for file in ("vocabulary.json", "model.safetensors"):
            files[file] = (model / file).read_bytes()
        summary = index["pieces"][0]
    for file, data in files.items():
        store.write_bytes(str(folder / file), data)
    said = {n: {"bytes": len(data), "sha256": store.sha256(data)} for n, data in files.items()}
    return {**summary, "files": said}


def drive(options: argparse.Namespace) -> None:
    """`halftone run` without the computing: stages as they are planned, made and tracked."""
    from jobs.cli import run as cli
    from jobs.cli.show import Show
    from jobs.cluster import tasks, training
    from jobs.tracking import tracker, watchers

    root, name, version, model = options.drive, options.name, options.version, Path(options.model)
    watchers.PAUSE = tracker.PAUSE = 1
    if not options.go:
        _at_every_moment(tracker.Tracker)

    def trained(fit, piece, settings, record, monitor, say) -> None:
        with monitor("node-0"):
            for _, some in itertools.groupby(
                records_of(version), lambda r: (r["step"] - 1) // STEPS
            ):
                record(list(some))
        make(piece, model)

    tasks.fan_out = lambda one, pieces, **how: {p.name: make(p, model) for p in pieces}
    training.train = trained
    recipe = Recipe(name="chaos", train={"seed": version})
    run = cli.Run(recipe, root, name, Show(quiet=True), Namespace(dry_run=False, json=False))
    _at_once(options.go, name)
    for stage_name in STAGES:
        with run.stage(stage_name) as stage:
            plan = plan_of(root, name, stage_name, version)
            if stage_name == "train":
                stage.train(plan, None, lambda piece: make(piece, model))
                if stage.untold:
                    run.track.model("train", plan.folder, 100.0 * version)
            else:
                stage.make(plan, None)
            stage.metrics(stage_name, metrics_of(stage_name, version))
            if stage_name == "rerank" and stage.untold:
                run.track.artifact("", "report.html", b"<p>" * 1000)
    run.track.finish()
    print("done", flush=True)


def _at_every_moment(kind: type) -> None:
    """Before anything is written, whoever started this process has his say."""
    take = kind._take

    def asked(self, new):
        print("moment", flush=True)
        sys.stdin.readline()
        return take(self, new)

    kind._take = asked


def _at_once(go: str, name: str) -> None:
    if go:
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  (seconds)

        Path(f"{go}.{name}.{os.getpid()}").touch()
        while not Path(go).exists():
            time.sleep(0.001)


class Command:
    """A command as a process."""

    def __init__(self, root: Path, version: int, model: Path, uri: str, log: Path, *more: str):
        words = ["--drive", str(root), "--version", str(version), "--model", str(model), *more]
        environment = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_TRACKING_URI": uri}
        self.log = log
        log.touch()
        here, there = multiprocessing.Pipe()
        self.process = forked.start(str(log), _command, there, words, environment)
        there.close()
        self.said, self.told = (os.fdopen(os.dup(here.fileno()), how) for how in "rw")
        here.close()

    def run(self, happens: dict[int, Callable]) -> bool:
        """Go through it, and what happens at its moments, by number; whether it came to its end."""
        done, moment = False, 0
        for line in self.said:
            done = done or line == "done\n"
            if line == "moment\n":
                moment += 1
                for event in happens.pop(moment, []):
                    event(self)
                self._go_on()
        self.process.join()
        code = self.process.exitcode
        assert code == -signal.SIGKILL or (done and code == 0), self.log.read_text()[-3000:]
        return done

    def _go_on(self) -> None:
        try:
            self.told.write("\n")
            self.told.flush()
        except OSError:  # it was killed
            return


def _command(there, words: list[str], environment: dict[str, str]) -> None:
    """The command's process: what it says and is told goes through one pipe, and not to the log."""
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value:
            os.environ[name] = value
    sys.stdin, sys.stdout = (os.fdopen(os.dup(there.fileno()), how) for how in "rw")
    there.close()
    main(words)


def trained_model(folder: Path) -> Path:
    """A small model, really trained."""
    from pipeline.training import saved_model
    from pipeline.training import train as fitting

    recipe = Recipe(
        name="chaos",
        source=stages.SCENES,
        shard={"samples": 6},
        model={"width": 8, "dim": 8, "word_dim": 8, "image_size": 16},
        train={"epochs": 1, "batch_size": 8, "losses": {"info_nce": {"weight": 1.0}}},
    )
    stages.sharded(recipe, folder)
    plan = fitting.plan(recipe, str(folder), "main")
    fitting.fit(plan.pieces[0], lambda records: None)
    plan.finish({"model": saved_model.summary(plan.pieces[0])})
    return Path(plan.folder)


# ---- what MLflow holds -------------------------------------------------------------------------


def lacking(
    root: Path, name: str, version: int, uri: str, said: str, shared: bool = False
) -> list[str]:
    """What MLflow lacks of a model, and no sentence told; raises where a metric is there twice.

    Where several models share a folder, data are told of by the one whose command made them.
    """
    ids = store.read_json(f"{root}/tracking.json").get(uri, {})
    number = store.read_json(f"{root}/tracking-models.json")["models"][name]["number"]
    lost = set(re.findall(r"[\w#]+(?:/\w+)?", " ".join(re.findall(r"has no run (.*?) any", said))))
    client, missing = client_of(uri), []
    own = STAGES[len(DATA) :] if shared else STAGES
    for stage in ("", *own):
        wanted = {f"{s}/{n}" for s in own for n in metrics_of(s, version)}
        wanted = set(metrics_of(stage, version)) if stage else wanted
        wanted |= {"train/loss", "val/rsum"} if stage == "train" else set()
        keys = [key(name, n, stage) for n in range(number, 0, -1)]
        mine = next((k for k in keys if k in ids), keys[0])
        run = client.get_run(ids[mine]) if mine in ids else None
        there = run.data.metrics if run else {}
        for metric in there:
            steps = [step for step, _ in curve(uri, run, metric)]
            assert len(steps) == len(set(steps)), f"{root}: {mine} has {metric} twice: {steps}"
        if run:
            assert run.info.status == "FINISHED", f"{root}: {mine} is {run.info.status}"
        gaps = [metric for metric in sorted(wanted - set(there)) if stage or number == 1]
        if stage == "train" and run:
            seed = run.data.params.get("train.seed")
            assert seed in (None, str(version)), f"{root}: {mine} has the settings {seed}"
            steps = [step for step, _ in curve(uri, run, "train/loss")]
            if sorted(steps) != list(range(1, EPOCHS * STEPS + 1)):
                gaps.append(f"steps beside {steps}")
            gaps += [] if seed else ["train.seed"]
        if gaps and not lost & {*keys, key(name, number)}:
            missing.append(f"{mine or stage}: {', '.join(gaps)}")
    return [*missing, *_files_lacking(root, name, client, ids, number, lost, said)]


def _files_lacking(root, name, client, ids, number, lost, said) -> list[str]:
    parent, missing = key(name, number), []
    files = {f.path for f in client.list_artifacts(ids[parent])} if parent in ids else set()
    told = "artifacts that cannot be written" in said or parent in lost
    if "report.html" not in files and not told:
        missing.append("report.html")
    try:
        version = client.get_model_version_by_alias("chaos", name).tags["halftone.version"]
    except Exception:
        version = ""
    made = store.read_json(f"{root}/train/{name}/index.json")["version"]
    if version != made and not ("cannot take the model" in said or f"{parent}/train" in lost):
        missing.append(f"the model is registered as {version!r}, not {made!r}")
    return missing


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drive", required=True, help="the run folder")
    parser.add_argument("--name", default="main")
    parser.add_argument("--version", type=int, default=1, help="of the settings")
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--go", default="", help="a file to wait for, and not at every moment")
    drive(parser.parse_args(words))
