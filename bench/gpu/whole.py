"""`halftone run` on this machine: all stages under Ray, and what each of them took."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml

from bench.gpu import data

LINE = re.compile(r"^\d (\w+) +(?:made|nothing).* ([\d.]+) s$")


def run(device, quick: bool, folder: Path) -> dict:
    """One run of drawn scenes, a model of CLIP's shape, one epoch."""
    recipe = folder / "whole.yaml"
    recipe.write_text(yaml.safe_dump(settings(folder, quick)))
    command = [sys.executable, "-m", "jobs", "run", "--recipe", str(recipe)]
    command += ["--root", str(folder / "whole")]
    environment = {**os.environ, "COLUMNS": "200", "MLFLOW_TRACKING_URI": ""}
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with Watch() as watch:
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        whole = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    rows = [[m[1], float(m[2])] for line in done.stderr.splitlines() if (m := LINE.match(line))]
    rows += [["beside the stages", whole - sum(seconds for _, seconds in rows)], ["all", whole]]
    if watch.seen:
        rows.append(["seconds in which the device was busy", watch.busy])
    return {
        "title": f"halftone run, {'a few' if quick else '3,072'} drawn scenes, 1 epoch",
        "columns": ["stage", "s"],
        "rows": rows,
        "figures": {"run": whole},
    }


def settings(folder: Path, quick: bool) -> dict:
    size = 32 if quick else 224
    train, val, test = (64, 16, 16) if quick else (3072, 256, 512)
    drawn = {"train_images": train, "val_images": val, "test_images": test, "image_size": size}
    shared = data.recipe_of(folder, quick).model_dump(mode="json")
    return {
        "about": "all stages on one machine",
        "source": {"kind": "drawn", **drawn},
        "shard": shared["shard"],
        "embed": {"encoder": "tfidf"},
        "label": shared["label"],
        "model": shared["model"],
        "train": {**shared["train"], "epochs": 1},
    }


class Watch:
    """How often, once a second, the device was at work; nothing where NVML does not say."""

    def __init__(self):
        self.seen, self.busy, self.over = 0, 0, threading.Event()
        self.looker = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self.looker.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.looker.join()

    def _look(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            card = pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # no package, no driver, no card
            return
        while not self.over.wait(1.0):
            self.seen += 1
            self.busy += pynvml.nvmlDeviceGetUtilizationRates(card).gpu > 0
