"""What MLflow still lacks of a run folder: entries in a file there, until they are written."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.storage import store

FILE, LOCK = "tracking-pending.json", "tracking.lock"
MOST = 16 * 2**20  # bytes that wait, at most
FILES = ("artifact", "model")  # what goes to the store of artifacts, which may be another place


@dataclass(frozen=True)
class Entry:
    """Something to be written to the MLflow run of a stage ('' is a model's parent run)."""

    name: str  # of the model
    number: int  # of its runs: counts up when something is made anew from other settings or data
    stage: str
    kind: str  # batch, records, artifact, model or status
    values: dict[str, Any]

    @property
    def slot(self) -> tuple:
        """What it is of: of two entries of one slot the later one says all."""
        return self.name, self.number, self.stage, self.kind, self.values.get("name")


def merged(entries: Iterable[Entry]) -> list[Entry]:
    """One entry a slot, the newest; parameters, tags and metrics are gathered, each once."""
    found: dict[tuple, Entry] = {}
    for entry in entries:
        before = found.pop(entry.slot, None) if entry.kind == "status" else found.get(entry.slot)
        if entry.kind == "batch" and before is not None:
            entry = _gathered(before, entry)
        found[entry.slot] = entry  # a status comes last, after all that it is the end of
    return list(found.values())


def _gathered(before: Entry, entry: Entry) -> Entry:
    old, new = before.values, entry.values
    metrics = {(m[0], m[2]): m for m in [*old["metrics"], *new["metrics"]]}
    values = {
        "metrics": list(metrics.values()),
        "params": {**old["params"], **new["params"]},
        "tags": {**old["tags"], **new["tags"]},
    }
    return Entry(entry.name, entry.number, entry.stage, "batch", values)


class Waiting:
    """The file of a run folder, which several processes may write."""

    def __init__(self, root: str):
        self.uri = store.join(root, FILE)
        self.lock = store.join(root, LOCK)

    def of(self, name: str) -> list[Entry]:
        """A model's entries, in the order in which they are to be written."""
        return [entry for entry in self._read() if entry.name == name]

    def add(self, entries: list[Entry]) -> int:
        """Keep entries too; the count of those that were given up because the file is too long."""
        with store.locked(self.lock):
            kept, given_up = _bounded(merged([*self._read(), *entries]))
            self._write(kept)
        return given_up

    def replace(self, taken: list[Entry], left: list[Entry]) -> int:
        """In place of entries that were taken those that are left of them; as `add`."""
        with store.locked(self.lock):
            others = [entry for entry in self._read() if entry not in taken]
            kept, given_up = _bounded(merged([*left, *others]))
            self._write(kept)
        return given_up

    def drop_files(self, name: str, before: int) -> None:
        """A model that was made anew: the files of its earlier runs are there no more."""
        with store.locked(self.lock):
            there = self._read()
            old = [e for e in there if e.name == name and e.number < before and e.kind in FILES]
            if old:
                self._write([entry for entry in there if entry not in old])

    def _read(self) -> list[Entry]:
        return [Entry(**entry) for entry in read(self.uri, [])]

    def _write(self, entries: list[Entry]) -> None:
        if entries:
            store.write_json(self.uri, [asdict(entry) for entry in entries])
        else:
            store.remove(self.uri)


def _bounded(entries: list[Entry]) -> tuple[list[Entry], int]:
    """As many as may wait: the oldest files are given up first, then the oldest of the rest."""
    sizes = {id(entry): len(json.dumps(asdict(entry))) for entry in entries}
    total, given_up = sum(sizes.values()), set()
    for entry in sorted(entries, key=lambda entry: entry.kind not in FILES):
        if total <= MOST:
            break
        total -= sizes[id(entry)]
        given_up.add(id(entry))
    return [entry for entry in entries if id(entry) not in given_up], len(given_up)


def read(uri: str, default: Any) -> Any:
    """The JSON of a file; `default` where there is none, or where it is none: that is put aside."""
    if not store.exists(uri):
        return default
    data = store.read_bytes(uri)
    try:
        found = json.loads(data)
        if isinstance(default, list):
            [Entry(**entry) for entry in found]
        return found if isinstance(found, type(default)) else default
    except (ValueError, TypeError):
        store.write_bytes(f"{uri}.damaged", data)
        store.remove(uri)
        said = f"halftone: {uri} could not be read and is kept as {store.name_of(uri)}.damaged"
        print(said, file=sys.stderr)
        return default
