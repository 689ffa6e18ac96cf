"""What a stage has to make, what of it is made already, and the index it leaves behind.

A stage is a plan of pieces. A piece is done when its files exist with its fingerprint, so running
again, resuming and retrying are one thing. The stage's `index.json` is written last; its `version`
is a hash of what the pieces hold, and what depends on the stage depends on that: a piece that was
made again with the same bytes leaves the later stages as they are.

A plan may also know a fingerprint of all that its pieces follow from, versions and settings. Where
the index was made of the same, and its files are there, no piece is drawn up.

While a stage runs, summaries of what it has made are kept beside the index every few seconds
(`Log`): after a crash nothing that was finished is read again.
"""

import contextlib
import functools
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import InputError
from pipeline.storage import piece_table, store
from pipeline.storage.piece_table import as_json, at, column
from pipeline.storage.run_folder import read_index, table_of, version, write_index

UNFINISHED = "unfinished-"  # how the names of a log's files begin
LISTED = 20_000  # pieces of a finished remote folder above which a sample's files are looked at
LOOKED_AT = 16  # files of that sample: a listing tells 1,000 files a request
Drawn = Callable[[], Sequence["Piece"]]


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
    draw: Drawn  # the pieces, when they are first asked for
    settings: dict[str, Any]
    index: dict = field(default_factory=dict)  # of the last time, {} if there was none
    follows: str = ""  # fingerprint of all that the pieces follow from, where that is kept

    @classmethod
    def of(
        cls,
        stage: str,
        folder: str,
        pieces: Sequence[Piece] | Drawn,
        settings: dict,
        follows: str = "",
    ) -> "Plan":
        """The plan of a folder, with the index that the last time left there.

        With `follows` the pieces may be what draws them up, not called where all is as it was.
        """
        draw = pieces if callable(pieces) else lambda: pieces
        return cls(stage, folder, draw, settings, read_index(folder) or {}, follows)

    def look_again(self) -> None:
        """See what lies in the folder now: another command may have worked there."""
        object.__setattr__(self, "index", read_index(self.folder) or {})
        for known in ("entries", "sampled", "done", "unchanged", "names", "fingerprint"):
            self.__dict__.pop(known, None)

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(self.draw())

    @functools.cached_property
    def entries(self) -> Sequence[dict]:
        """What the index of the last time says of its pieces, where that can still be read."""
        entries = self.index.get("pieces", [])
        try:
            column(entries, "name")
        except InputError:  # its table is gone: each piece's own file says whether it is done
            return []
        return entries

    @functools.cached_property
    def unchanged(self) -> bool:
        """Whether the index was made of the same, and its files are there: nothing is to be done.

        Where it says no, the pieces say what is.
        """
        if not self.follows or self.index.get("follows") != self.follows or not self.entries:
            return False
        if self.sampled is not None:
            return self.sampled
        files = store.list_files(self.folder)
        return all(files.get(n) == size for n, size in piece_table.sizes(self.entries))

    @functools.cached_property
    def names(self) -> list[tuple[str, str]]:
        """(name, fingerprint) of every piece."""
        if self.unchanged:
            both = (column(self.entries, of) for of in ("name", "fingerprint"))
            return list(zip(*both, strict=True))
        return [(piece.name, piece.fingerprint) for piece in self.pieces]

    @functools.cached_property
    def fingerprint(self) -> str:
        if self.unchanged:
            return self.index["fingerprint"]
        return store.fingerprint(self.stage, self.names, self.settings)

    def __len__(self) -> int:
        return len(self.entries if self.unchanged else self.pieces)

    @functools.cached_property
    def done(self) -> dict[str, dict]:
        """Summaries of the pieces that need no work, by name, as it was when it was first asked."""
        finished = self.index.get("fingerprint") == self.fingerprint
        if self.unchanged or (finished and self.sampled):
            return {entry["name"]: entry for entry in self.entries}
        files = store.list_files(self.folder)
        known = {entry["name"]: entry for entry in self.entries}
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

    @functools.cached_property
    def sampled(self) -> bool | None:
        """Whether a file each of some of many pieces is there; None where all are listed."""
        if len(self.entries) <= LISTED or store.is_local(self.folder):
            return None
        some = at(self.entries, sorted(random.sample(range(len(self.entries)), LOOKED_AT)))
        return all(map(self._is_there, column(some, "files")))

    def _is_there(self, files: dict[str, dict]) -> bool:
        """Whether one of a piece's files is there: of those written together any."""
        name, file = random.choice(list(files.items()))
        try:
            return store.stamp(store.join(self.folder, name))[0] == file["bytes"]
        except FileNotFoundError:
            return False

    @property
    def pending(self) -> list[Piece]:
        if self.unchanged:
            return []
        done = self.done
        return [piece for piece in self.pieces if piece.name not in done]

    @property
    def complete(self) -> bool:
        if self.unchanged:
            return True
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
        kept = {name for entry in entries for name in entry["files"]}
        files = store.list_files(self.folder)
        for name in {name for name, _ in piece_table.sizes(self.entries)} - kept:
            store.remove(store.join(self.folder, name))
        store.sweep(self.folder)
        write_index(self.folder, index)
        self._tidy(files)
        return index

    def _tidy(self, files: dict[str, int]) -> None:
        """Remove the logs, and the tables of indexes before."""
        table = table_of(read_index(self.folder) or {})
        for name in files:
            if name.startswith(UNFINISHED) or (piece_table.is_table(name) and name != table):
                store.remove(store.join(self.folder, name))


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
