"""What a stage has to make, what of it is made already, and the index it leaves behind.

A stage is a plan of pieces. A piece is done when its files exist with its fingerprint, so running
again, resuming and retrying are one thing. The stage's `index.json` is written last; its `version`
is a hash of what the pieces hold, and what depends on the stage depends on that: a piece that was
made again with the same bytes leaves the later stages as they are.

While a stage runs, summaries of what it has made are kept beside the index every few seconds
(`Log`): after a crash nothing that was finished is read again.
"""

import contextlib
import functools
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import InputError
from pipeline.storage import store
from pipeline.storage.run_folder import INDEX, read_index, version

UNFINISHED = "unfinished-"  # how the names of a log's files begin
LISTED = 20_000  # pieces of a finished remote folder above which a sample's files are looked at
LOOKED_AT = 16  # pieces of that sample: a listing tells 1,000 files a request
as_json = json.JSONEncoder(sort_keys=True).encode


@dataclass(frozen=True)
class Piece:
    """One unit of a stage's work."""

    name: str  # such as train-000003, the same from stage 2 to the end
    output: str  # URI of the Parquet file that is written last
    fingerprint: str  # of all that the output depends on
    inputs: dict[str, Any]  # what the stage's function needs to make it
    memory: int = 0  # bytes that making it takes; 0 where that is little, or not known


@dataclass(frozen=True)
class Plan:
    """All the pieces of a stage."""

    stage: str
    folder: str
    pieces: tuple[Piece, ...]
    settings: dict[str, Any]
    index: dict = field(default_factory=dict)  # of the last time, {} if there was none
    follows: str = ""  # fingerprint of all that the pieces follow from, where that is kept

    @classmethod
    def of(
        cls, stage: str, folder: str, pieces: list[Piece], settings: dict, follows: str = ""
    ) -> "Plan":
        """The plan of a folder, with the index that the last time left there."""
        return cls(stage, folder, tuple(pieces), settings, read_index(folder) or {}, follows)

    def look_again(self) -> None:
        """See what lies in the folder now: another command may have worked there."""
        object.__setattr__(self, "index", read_index(self.folder) or {})
        self.__dict__.pop("done", None)

    @functools.cached_property
    def fingerprint(self) -> str:
        names = [(piece.name, piece.fingerprint) for piece in self.pieces]
        return store.fingerprint(self.stage, names, self.settings)

    @functools.cached_property
    def done(self) -> dict[str, dict]:
        """Summaries of the pieces that need no work, by name, as it was when it was first asked."""
        entries = self.index.get("pieces", [])
        finished = self.index.get("fingerprint") == self.fingerprint
        large = len(entries) > LISTED and not store.is_local(self.folder)
        if finished and large and all(map(self._is_there, random.sample(entries, LOOKED_AT))):
            return {entry["name"]: entry for entry in entries}
        files = store.list_files(self.folder)
        known = {entry["name"]: entry for entry in entries}
        if not finished:
            logged = (entry for name in sorted(files) for entry in _logged(self.folder, name))
            known |= {entry["name"]: entry for entry in logged}
        return {
            piece.name: known[piece.name]
            for piece in self.pieces
            if piece.name in known
            and known[piece.name]["fingerprint"] == piece.fingerprint
            and all(files.get(n) == f["bytes"] for n, f in known[piece.name]["files"].items())
        }

    def _is_there(self, entry: dict) -> bool:
        """Whether the files of one piece are there, each asked for by itself."""
        try:
            uris = {store.join(self.folder, name): f for name, f in entry["files"].items()}
            return all(store.stamp(uri)[0] == file["bytes"] for uri, file in uris.items())
        except FileNotFoundError:
            return False

    @property
    def pending(self) -> list[Piece]:
        done = self.done
        return [piece for piece in self.pieces if piece.name not in done]

    @property
    def complete(self) -> bool:
        return self.index.get("fingerprint") == self.fingerprint and not self.pending

    @contextlib.contextmanager
    def log(self) -> Iterator["Log"]:
        """Where pieces are noted as they are made; what was noted is kept where this breaks off."""
        log = Log(self.folder)
        try:
            yield log
        except BaseException:
            log.keep()
            raise

    def finish(self, made: dict[str, dict], **extra) -> dict:
        """Write the index from the summaries of the pieces; remove files nobody names any more."""
        done = self.done
        entries = []
        for piece in self.pieces:
            summary = made.get(piece.name) or done[piece.name]
            entries.append({**summary, "name": piece.name, "fingerprint": piece.fingerprint})
        index: dict = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
        }
        index |= {"follows": self.follows} if self.follows else {}
        index |= {"version": version(entries), "pieces": entries, **extra}
        named = {name for entry in entries for name in entry["files"]}
        for entry in self.index.get("pieces", []):
            for name in entry["files"].keys() - named:
                store.remove(store.join(self.folder, name))
        store.sweep(self.folder)
        store.write_bytes(store.join(self.folder, INDEX), _lines(index).encode())
        for name in store.list_files(self.folder):
            if name.startswith(UNFINISHED):
                store.remove(store.join(self.folder, name))
        return index


class Log:
    """Summaries of the pieces made so far, in files beside the index that is not yet written.

    Each file is whole or not there. The longer the stage runs the rarer they are written, so that
    there are a few hundred at most: what a crash may lose is 5 s of work, or 2 % of it.
    """

    EVERY, SHARE = 5.0, 0.02  # seconds between two files, at least; and of the time so far

    def __init__(self, folder: str):
        self.folder = folder
        self.lines: list[str] = []
        self.begun = self.kept = time.monotonic()

    def add(self, piece: Piece, summary: dict) -> None:
        """Note a piece. One with samples that failed is not: they may be had another time."""
        if summary.get("rejected"):
            return
        entry = {**summary, "name": piece.name, "fingerprint": piece.fingerprint}
        self.lines.append(as_json(entry) + "\n")
        now = time.monotonic()
        if now - self.kept >= max(self.EVERY, self.SHARE * (now - self.begun)):
            self.keep()

    def keep(self) -> None:
        """Write what was noted since the last time."""
        self.kept = time.monotonic()
        if not self.lines:
            return
        uri = store.join(self.folder, f"{UNFINISHED}{time.time_ns():020d}-{os.getpid()}.jsonl")
        with contextlib.suppress(OSError, InputError):  # tried again with the next: it is no work
            store.write_bytes(uri, "".join(self.lines).encode())
            self.lines = []


def _logged(folder: str, name: str) -> list[dict]:
    """The summaries in a file of a log; none of another file, or of one that is gone meanwhile."""
    if not name.startswith(UNFINISHED):
        return []
    try:
        return [json.loads(line) for line in store.read_text(store.join(folder, name)).splitlines()]
    except (FileNotFoundError, ValueError):  # finished by another command; none of ours
        return []


def _lines(index: dict) -> str:
    """The index as JSON, a piece a line: indented, it would take eight times as long."""
    values = {name: as_json(value) for name, value in index.items() if name != "pieces"}
    values["pieces"] = "[\n" + ",\n".join(map(as_json, index["pieces"])) + "\n]"
    return "{" + ",\n".join(f"{as_json(name)}: {values[name]}" for name in sorted(values)) + "}\n"
