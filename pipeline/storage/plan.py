"""What a stage has to make, what of it is made already, and the index it leaves behind.

A stage is a plan of pieces. A piece is done when its files exist with its fingerprint, so running
again, resuming and retrying are one thing. The stage's `index.json` is written last; its `version`
is a hash of what the pieces hold, and what depends on the stage depends on that: a piece that was
made again with the same bytes leaves the later stages as they are.
"""

from dataclasses import dataclass, field
from typing import Any

from pipeline.storage import store
from pipeline.storage.run_folder import INDEX, read_index, version


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

    @classmethod
    def of(cls, stage: str, folder: str, pieces: list[Piece], settings: dict) -> "Plan":
        """The plan of a folder, with the index that the last time left there."""
        return cls(stage, folder, tuple(pieces), settings, read_index(folder) or {})

    @property
    def fingerprint(self) -> str:
        names = [(piece.name, piece.fingerprint) for piece in self.pieces]
        return store.fingerprint(self.stage, names, self.settings)

    @property
    def done(self) -> dict[str, dict]:
        """Summaries of the pieces that need no work, by name."""
        known = {entry["name"]: entry for entry in self.index.get("pieces", [])}
        files = store.list_files(self.folder)
        return {
            piece.name: known[piece.name]
            for piece in self.pieces
            if piece.name in known
            and known[piece.name]["fingerprint"] == piece.fingerprint
            and all(files.get(n) == f["bytes"] for n, f in known[piece.name]["files"].items())
        }

    @property
    def pending(self) -> list[Piece]:
        done = self.done
        return [piece for piece in self.pieces if piece.name not in done]

    @property
    def complete(self) -> bool:
        return self.index.get("fingerprint") == self.fingerprint and not self.pending

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
        index |= {"version": version(entries), "pieces": entries, **extra}
        named = {name for entry in entries for name in entry["files"]}
        for entry in self.index.get("pieces", []):
            for name in entry["files"].keys() - named:
                store.remove(store.join(self.folder, name))
        store.sweep(self.folder)
        store.write_json(store.join(self.folder, INDEX), index)
        return index
