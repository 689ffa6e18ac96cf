"""The run folder: where each stage lies in it, and what a finished stage left there."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline.errors import InputError, StageMissing
from pipeline.storage import piece_table, store
from pipeline.storage.piece_table import PieceTable, as_json, column, split_names
from schemas.settings import of_before

INDEX = "index.json"
TABLE = "table"  # in the index of many pieces, what is said of the file that holds them
LARGE = 10_000_000  # bytes of an index as they were written before there were tables
FOLDERS = {
    "ingest": "1-manifest",
    "shard": "2-shards",
    "embed": "3-embeddings",
    "label": "4-relevance",
    "train": "5-model",
    "evaluate": "6-rankings",
    "rerank": "7-reranker",
    "reranked": "8-reranked",
}
COMMANDS = {"reranked": "rerank"}  # what fills a folder, where that is not the stage's own name
SETTINGS = "settings-{}.yaml"  # of a model, as they were resolved


@dataclass(frozen=True)
class Files:
    """The Parquet files of a stage's pieces, of one split or of all, in order."""

    folder: str
    names: tuple[str, ...]  # of the pieces
    version: str  # hash of what they hold
    entries: Sequence[dict] = field(default=(), compare=False, repr=False)  # in the index

    @classmethod
    def of(cls, folder: str, entries: Sequence[dict]) -> "Files":
        """The files of some pieces of a folder."""
        return cls(folder, tuple(column(entries, "name")), version(entries), entries)

    @property
    def uris(self) -> list[str]:
        return [store.join(self.folder, f"{name}.parquet") for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self):
        return Files, (self.folder, self.names, self.version)  # tasks need no entries

    def of_split(self, split: str) -> "Files":
        entries = _of_split(self.entries, split)
        return self if len(entries) == len(self) else Files.of(self.folder, entries)

    def need(self, split: str, setting: str) -> "Files":
        """The files of the split that a setting names, or a sentence with those there are."""
        if not (found := self.of_split(split)):
            known = ", ".join(sorted(split_names(self.entries))) or "none"
            raise InputError(f"{setting} {split!r} is not in {self.folder}; known: {known}")
        return found

    def only(self, names: Iterable[str]) -> "Files":
        wanted = set(names)
        return Files.of(self.folder, [e for e in self.entries if e["name"] in wanted])

    def one(self, name: str) -> "Files":
        """The file of one piece, also where no entries are known."""
        return Files(self.folder, (name,), store.fingerprint(self.version, name))


@dataclass(frozen=True)
class RunFolder:
    """A run folder by its URI."""

    root: str

    def folder(self, stage: str, *names: str) -> str:
        """URI of a stage's folder, or of what lies in it."""
        return store.join(self.root, FOLDERS[stage], *names)

    def known(self, stage: str, *names: str) -> dict | None:
        """The index of a stage, if it was finished."""
        return read_index(self.folder(stage, *names))

    def index(self, stage: str, *names: str) -> dict:
        """The index of a finished stage, or the sentence that names the command to run first."""
        return need_index(self.folder(stage, *names), COMMANDS.get(stage, stage))

    def files(self, stage: str, *names: str) -> Files:
        """What a finished stage left."""
        return Files.of(self.folder(stage, *names), self.index(stage, *names)["pieces"])

    def models(self) -> list[str]:
        """Names of the models whose settings lie here, in order."""
        before, after = SETTINGS.split("{}")
        return [
            name.removeprefix(before).removesuffix(after)
            for name in sorted(store.list_files(self.root))
            if name.startswith(before) and name.endswith(after)
        ]

    def settings_uri(self, name: str) -> str:
        return store.join(self.root, SETTINGS.format(name))

    def settings(self, name: str) -> dict[str, Any]:
        """A model's settings as they were resolved."""
        return of_before(yaml.safe_load(store.read_bytes(self.settings_uri(name))))


def contents(entry: dict) -> Any:
    """What a piece holds, for the fingerprints of what depends on it (JSON-able).

    The hashes of its files; or what its summary says in their place, where files may differ that
    hold the same.
    """
    return entry.get("contents") or entry["files"]


def contents_of(entries: Sequence[dict]) -> list:
    """What each of some pieces holds."""
    if not isinstance(entries, PieceTable):
        return [contents(entry) for entry in entries]
    both = zip(column(entries, "contents"), column(entries, "files"), strict=True)
    return [of_piece or files for of_piece, files in both]


def version(entries: Sequence[dict]) -> str:
    """Hash of what the pieces hold."""
    if isinstance(entries, PieceTable) and entries.version:
        return entries.version
    return store.fingerprint(contents_of(entries))


def read_index(folder: str) -> dict | None:
    """The index in a folder, None where there is none. It is everybody's: nobody changes it.

    Its `pieces` are a list of entries; of many pieces a `PieceTable`, read by column.
    """
    uri = store.join(folder, INDEX)
    try:
        size, changes = store.stamp(uri)
        index = _large_index(uri, size, changes) if size > LARGE else store.read_json(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if about := index.get(TABLE):
        return {**index, "pieces": piece_table.opened(folder, about)}
    return index


def write_index(folder: str, index: dict) -> None:
    """Write a stage's index: a piece a line, or of many pieces a table beside it, written first."""
    entries, about = index["pieces"], {k: v for k, v in index.items() if k != "pieces"}
    if len(entries) > piece_table.ABOVE:
        names = split_names(entries)
        versions = {name: version(_of_split(entries, name)) for name in names}
        versions[""] = index["version"]
        about[TABLE] = piece_table.write(folder, entries, versions)
    values = {name: as_json(value) for name, value in about.items()}
    if TABLE not in about:
        values["pieces"] = "[\n" + ",\n".join(map(as_json, entries)) + "\n]"
    lines = ",\n".join(f"{as_json(name)}: {values[name]}" for name in sorted(values))
    store.write_bytes(store.join(folder, INDEX), ("{" + lines + "}\n").encode())


def table_of(index: dict) -> str:
    """The name of the table beside an index; "" where the pieces stand in it."""
    return index.get(TABLE, {}).get("name", "")


@functools.lru_cache(maxsize=2)
def _large_index(uri: str, size: int, changes: str) -> dict:
    """Read once while it stays as it is: of 100,000 shards that takes a second."""
    return store.read_json(uri)


def need_index(folder: str, command: str) -> dict:
    """The index of a stage's folder, or the sentence that names the command to run first."""
    index = read_index(folder)
    if index is None:
        raise StageMissing(f"nothing in {folder}; run `halftone {command}` first")
    return index


def of_split(index: dict, split: str) -> Sequence[dict]:
    """The entries of one split's pieces, in order."""
    return _of_split(index["pieces"], split)


def _of_split(entries: Sequence[dict], split: str) -> Sequence[dict]:
    if isinstance(entries, PieceTable):
        return entries.of_split(split)
    return [entry for entry in entries if entry.get("split") == split]
