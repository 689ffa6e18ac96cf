"""The manifest's files, in spans: so many of them together that a task is worth its while."""

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import parquet, store
from pipeline.storage.piece_table import column
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import need_index
from schemas.manifest import MANIFEST

ROWS = 2**18  # of a span, about; a collection of one span is planned by the command itself
BLOCK = 2**17  # rows that a task reads at a time
VERSION = 1  # of all steps: counts up when their files are other ones
ROW = 2500  # bytes of memory that a row takes while it is dealt out, with five captions


@dataclass(frozen=True)
class Part:
    """A file of the manifest."""

    uri: str
    of: str  # what of the source it is
    splits: dict[str, int]  # rows by split
    contents: Any  # what stands for its bytes

    @property
    def rows(self) -> int:
        return sum(self.splits.values())


@dataclass(frozen=True)
class Span:
    """Files that follow one another, and the number of their first row in the whole manifest."""

    uris: tuple[str, ...]
    first: int
    rows: int

    def blocks(self, columns: list[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """(number of its first row, rows) of every block, all files in order."""
        number = self.first
        for uri in self.uris:
            with parquet.opened(uri) as file:
                for batch in pq.ParquetFile(file).iter_batches(BLOCK, columns=columns):
                    yield number, pa.Table.from_batches([batch]).replace_schema_metadata()
                    number += len(batch)


@dataclass(frozen=True)
class Manifest:
    """What `ingest` has written: names and counts, no rows."""

    folder: str
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, folder: str, entries: list[dict]) -> "Manifest":
        """From the entries of ingest's index, or the summaries of what it has made."""
        parts = (
            Part(
                store.join(folder, f"{e['name']}.parquet"),
                e.get("part", ""),
                e.get("splits", {}),
                e["files"],
            )
            for e in entries
        )
        return cls(folder, tuple(parts))

    @functools.cached_property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def is_large(self) -> bool:
        """Whether it is more than the command itself takes on."""
        return self.rows > ROWS

    @functools.cached_property
    def starts(self) -> list[int]:
        """The number of every part's first row."""
        return list(itertools.accumulate((part.rows for part in self.parts), initial=0))

    @functools.cached_property
    def groups(self) -> list[tuple[int, int]]:
        """From which part to which every span goes."""
        edges = [0]
        for number in range(len(self.parts)):
            full = self.starts[number + 1] - self.starts[edges[-1]] >= ROWS
            if full or number == len(self.parts) - 1:
                edges.append(number + 1)
        return list(itertools.pairwise(edges))

    @functools.cached_property
    def spans(self) -> list[Span]:
        uris = [part.uri for part in self.parts]
        return [
            Span(tuple(uris[a:b]), self.starts[a], self.starts[b] - self.starts[a])
            for a, b in self.groups
        ]

    def given(self) -> list[Counter[str]]:
        """Rows by split of every span."""
        zero: Counter[str] = Counter()
        parts = [Counter(part.splits) for part in self.parts]
        return [sum(parts[a:b], zero) for a, b in self.groups]

    def contents(self) -> list[list]:
        """What stands for the bytes of every span."""
        return [[part.contents for part in self.parts[a:b]] for a, b in self.groups]

    def part_of(self, row: int) -> Part:
        """The part that a row of the manifest is of."""
        return self.parts[int(np.searchsorted(self.starts, row, side="right")) - 1]


def memory(rows: int) -> int:
    """Bytes that a task takes which holds so many rows, beside Python and its libraries."""
    return int(ROW * rows)


def step(stage: str, folder: str, pieces: list[tuple[str, Any, dict, int]], *matters: Any) -> Plan:
    """A preparatory plan in a folder: of each piece name, what it depends on, inputs, memory."""
    settings = {"version": VERSION, "rows": ROWS, "block": BLOCK, "matters": list(matters)}
    name = store.name_of(folder)
    made = [
        Piece(
            piece,
            store.join(folder, f"{piece}.parquet"),
            store.fingerprint(stage, name, settings, piece, depends),
            inputs,
            needed,
        )
        for piece, depends, inputs, needed in pieces
    ]
    return Plan.of(stage, folder, made, settings)


def finished(stage: str, folder: str, follows: str, settings: dict) -> Plan | None:
    """The plan that a folder's index is of, if it follows from the same and all is there."""

    def draw() -> list[Piece]:
        names, prints = (column(plan.entries, of) for of in ("name", "fingerprint"))
        uris = [store.join(folder, f"{name}.parquet") for name in names]
        return [Piece(*one, {}) for one in zip(names, uris, prints, strict=True)]

    plan = Plan.of(stage, folder, draw, settings, follows)
    return plan if plan.unchanged else None


def outputs(folder: str, stage: str) -> tuple[str, list[str], Sequence[dict]]:
    """Version, Parquet files and entries of a finished step."""
    index = need_index(folder, stage)
    entries = index["pieces"]
    uris = [store.join(folder, f"{name}.parquet") for name in column(entries, "name")]
    return index["version"], uris, entries


def numbered(count: int, name: str) -> list[str]:
    return [f"{name}-{number:05d}" for number in range(count)]


PLACED = pa.schema([*MANIFEST, ("place", pa.int64())])
