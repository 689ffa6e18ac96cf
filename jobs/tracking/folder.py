"""What a run folder knows of its MLflow runs: which they are, and what they are of.

tracking.json: by the server's URI, the ids of the experiment and of the runs. tracking-models.json:
where the folder lay when they were begun, and of each model the number of its runs, the
fingerprints of what they made, and the stages that have not come to an end.
"""

import os
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from jobs.tracking.waiting import LOCK, Waiting, read
from pipeline.storage import store

IDS, MODELS = "tracking.json", "tracking-models.json"


class Folder:
    """The tracking files of a run folder, which several processes may write."""

    def __init__(self, root: str):
        self.root = os.path.realpath(root) if store.is_local(root) else root
        self.ids_uri, self.models_uri = store.join(root, IDS), store.join(root, MODELS)
        self.lock = store.join(root, LOCK)
        self.waiting = Waiting(root)

    def ids(self, uri: str) -> dict[str, str]:
        """Of the experiment, and of runs by their keys (`key`), on a server."""
        return {} if self.copied_from() else read(self.ids_uri, {}).get(uri, {})

    def elsewhere(self, uri: str) -> str | None:
        """Another server that this folder was tracked on, where it is new to this one."""
        known = read(self.ids_uri, {})
        return None if uri in known or not known else next(reversed(known))

    def copied_from(self) -> str | None:
        """Where the folder lay when its runs were begun, if that is another place."""
        before = read(self.models_uri, {}).get("root", self.root)
        return before if before != self.root else None

    def id_of(self, uri: str, key: str, make: Callable[[dict, str], str]) -> tuple[str, bool]:
        """A run's id, and whether `make(ids, mark)` gave it: one process alone makes it.

        By the mark a run is found again of which a killed process did not write down the id.
        """
        with store.locked(self.lock):
            mark = self._mark()
            known = read(self.ids_uri, {})
            ids = known.get(uri, {})
            if key in ids:
                return ids[key], False
            ids[key] = make(ids, store.fingerprint(mark, key))  # may add the experiment to them
            store.write_json(self.ids_uri, {**known, uri: ids})
            return ids[key], True

    def _mark(self) -> str:
        """What tells this folder's runs from those of any other; a copy's is another."""
        known = read(self.models_uri, {})
        if known.get("root", self.root) != self.root:
            store.write_json(self.ids_uri, {})
        elif "mark" in known:
            return known["mark"]
        known |= {"root": self.root, "mark": uuid4().hex}
        store.write_json(self.models_uri, known)
        return known["mark"]

    def forget(self, uri: str, keys: set[str]) -> None:
        """Runs that are on the server no more."""
        with store.locked(self.lock):
            known = read(self.ids_uri, {})
            ids = {key: run for key, run in known.get(uri, {}).items() if key not in keys}
            store.write_json(self.ids_uri, {**known, uri: ids})

    def number(self, name: str) -> int:
        """Of the model's runs, counted from 1."""
        return self._model(name)["number"]

    def begin(self, name: str, stage: str, made: dict[str, str]) -> tuple[bool, list[str]]:
        """A stage has work of these fingerprints (by what is made).

        Whether other runs begin with it, as it was done with another fingerprint before; and the
        stages of the runs before that never came to an end.
        """
        with store.locked(self.lock):
            model, broken_off = self._model(name), []
            mine = {f"{stage}.{what}": fingerprint for what, fingerprint in made.items()}
            anew = any(model["made"].get(what, f) != f for what, f in mine.items())
            if anew:
                broken_off = [s for s, status in model["open"].items() if status == "RUNNING"]
                model = {"number": model["number"] + 1, "made": {}, "open": {}}
            model["made"] |= mine
            model["open"] |= {"": "RUNNING", stage: "RUNNING"}
            self._keep(name, model)
        if anew:
            self.waiting.drop_files(name, model["number"])
        return anew, broken_off

    def end(self, name: str, stage: str, status: str) -> None:
        """A stage came to an end; one that failed may be gone on with."""
        with store.locked(self.lock):
            model = self._model(name)
            if stage in model["open"]:
                model["open"][stage] = status
                if status == "FINISHED":
                    del model["open"][stage]
                self._keep(name, model)

    def unfinished(self, name: str, stage: str, made: dict[str, str]) -> bool:
        """Whether a stage was begun, with these fingerprints, and its end was never told."""
        model = self._model(name)
        same = all(model["made"].get(f"{stage}.{what}", f) == f for what, f in made.items())
        return stage in model["open"] and same

    def parent_left_open(self, name: str) -> bool:
        """Whether all stages came to their ends, and the command was killed before its own."""
        return self._model(name)["open"] == {"": "RUNNING"}

    def _model(self, name: str) -> dict[str, Any]:
        known = read(self.models_uri, {}).get("models", {})
        return known.get(name, {"number": 1, "made": {}, "open": {}})

    def _keep(self, name: str, model: dict) -> None:
        known = read(self.models_uri, {"root": self.root})
        known["models"] = {**known.get("models", {}), name: model}
        store.write_json(self.models_uri, known)


def key(name: str, number: int, stage: str = "") -> str:
    """Of a stage's run among the ids; without a stage that of the parent."""
    runs = name if number == 1 else f"{name}#{number}"
    return f"{runs}/{stage}" if stage else runs


def is_of(key: str, name: str) -> bool:
    """Whether a key is of one of a model's runs."""
    return key.split("/")[0].split("#")[0] == name
