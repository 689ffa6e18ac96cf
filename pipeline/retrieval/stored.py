"""Vectors that lie in a file of this machine, mapped, with all that a search among them needs.

The file holds the vectors as they are, and of each what `nearest.coded` makes of it: 8-bit codes,
their scale, what they lost; of an approximate search their cells too (`near_cells.py`). It is made
once, block by block, and kept where `storage.cache` keeps files: a process holds none of it, and
all processes of a machine share the kernel's one copy.

Legend of the shape suffixes: N vectors, D width, C cells, Q queries, K neighbours, S sampled
queries.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from pipeline.formulas.floats import has_numba
from pipeline.retrieval import near_cells, nearest
from pipeline.storage import cache, store

KIND = "vectors-1"  # of the file; another number, another layout
ROWS = 16_384  # that are made at a time
COMPILED = "pipeline.retrieval.compiled"
LARGE = 2**17  # vectors above which a single query is worth loading what is compiled
FEW = 32  # queries whose floors rise soon by themselves


class Source(NamedTuple):
    """Where stored vectors come from."""

    version: str  # stands for what they hold
    shape: tuple[int, int]  # (N, D)
    parts: Callable[[], Iterable[np.ndarray]]  # the vectors in order, float32
    asked: Callable[[], np.ndarray]  # some of what they are asked with (S, D), to measure recall


class StoredVectors:
    """N vectors (N, D) as they are searched; where they lie by cells, `row` says which each is.

    What is held of them in memory is 20 bytes a vector.
    """

    def __init__(self, parts: dict[str, np.ndarray]):
        tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
        self.vectors, self.codes = tensors["vectors"], tensors["codes"]
        self.scale, self.lost = tensors["scale"], tensors["lost"]
        self.cells = near_cells.Cells(tensors["centroids"], parts["ends"], parts["curve"])
        self.row = tensors["row"] if len(self.cells) else None
        self.longest = float(parts["longest"][0])
        self._rows: tuple[float, nearest.Rows] | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    @functools.cached_property
    def scan(self) -> str:
        """In what arithmetic they are scanned."""
        vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
        return "int8" if self.vectors.shape[1] > 1 and vnni() else "fp32"

    def as_candidates(self, longest: float) -> nearest.Rows:
        """The vectors as candidates of queries up to so long; kept for the next queries."""
        if self._rows is None or longest > self._rows[0]:
            longest = max(longest, self.longest) * 1.001  # unit vectors are not all alike
            codes, scale, lost = self.codes, self.scale, self.lost
            if self.scan != "int8":
                codes, scale, lost = self.vectors, torch.ones_like(scale), torch.zeros_like(lost)
            error = nearest.error_of(lost, longest, self.vectors.shape[1], self.scan)
            group = nearest.groups_of(self.row, self.vectors)
            owner = nearest.owners_of(None, self.vectors)
            rows = nearest.Rows(self.vectors, codes, scale, error, group, owner)
            self._rows = longest, rows
        return self._rows[1]

    def prepare(self) -> None:
        """Load what a search may use, so that the first query does not wait for it."""
        if has_numba():
            importlib.import_module(COMPILED)
        self.top_k(torch.zeros(1, self.vectors.shape[1]), 1)

    def top_k(
        self, queries_QD: torch.Tensor, k: int, kept_N: np.ndarray | None = None, probes: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (Q, K), falling, and rows (Q, K) int32 of each query's best, as `nearest.top_k`.

        `kept_N` says by row who may be found. With `probes` only that many cells are looked at,
        those nearest to a query, each query by itself. A place that is not taken has row -1.
        """
        queries_QD = queries_QD.float().contiguous()
        if not probes:
            return self._search(queries_QD, k, kept_N, None)
        found = [
            self._search(query_QD, k, kept_N, self.cells.ranges(query_QD[0], probes))
            for query_QD in queries_QD.split(1)
        ]
        scores, rows = (torch.full((len(found), k), blank) for blank in (-torch.inf, -1))
        for n, (score_1K, row_1K) in enumerate(found):
            scores[n, : score_1K.shape[1]], rows[n, : row_1K.shape[1]] = score_1K[0], row_1K[0]
        return scores, rows.int()

    def _search(self, queries_QD, k: int, kept_N, ranges):
        candidates = self.as_candidates(max([0.0, *queries_QD.norm(dim=1).tolist()]))
        owner = None
        if kept_N is not None:  # who may not be found is the queries' own
            kept = torch.from_numpy(kept_N)
            kept = kept if self.row is None else kept[self.row.long()]
            candidates, owner = candidates._replace(owner=kept.long()), torch.zeros(len(queries_QD))
        longest = self._rows[0]  # type: ignore[index]
        queries = nearest._rows(queries_QD, longest, self.scan, None, owner)
        work = len(queries_QD) * len(self) >= nearest.BLOCK**2
        there = work or len(self) >= LARGE or COMPILED in sys.modules
        fast = there and has_numba()
        search = nearest._Search(queries, candidates, k, False, False, fast, ranges)
        few = fast and len(queries_QD) <= FEW
        search.run(guess=not few and kept_N is None and ranges is None)
        return nearest.unpacked(search.keys_GK)


def stored(source: Source, limit: float, *, cells: int = 0) -> StoredVectors:
    """The vectors of a source, made into a file of this machine the first time; by so many cells.

    `limit` is what all files kept may take (bytes). Where there is no room they are held in memory.
    """
    size = _layout(source.shape, cells)[1]
    file = {"bytes": size, "sha256": store.sha256(source.version.encode())}
    kind = f"{KIND}-{cells}" if cells else KIND

    def write(path: str) -> None:
        with open(path, "r+b") as out:
            os.posix_fallocate(out.fileno(), 0, size)  # a full disk is told now, not by a signal
        _fill(np.memmap(path, np.uint8, "r+"), source, cells)

    for anew in (False, True):
        path = cache.made(file, limit, kind, write, anew=anew)
        if path is None:
            break
        try:
            buffer = np.memmap(path, np.uint8, "c")  # as torch asks for; nobody writes into it
        except (OSError, ValueError):  # dropped by another process meanwhile; torn
            continue
        if len(buffer) == size:
            return StoredVectors(_views(buffer, source.shape, cells))
    held = np.empty(size, np.uint8)
    _fill(held, source, cells)
    return StoredVectors(_views(held, source.shape, cells))


def _layout(shape: tuple[int, int], cells: int) -> tuple[list[tuple], int]:
    """(name, kind of number, shape, first byte) of every part, and the bytes of all."""
    count, dim = shape
    parts = [
        *(("longest", "<f8", (1,)), ("ends", "<i8", (cells,)), ("curve", "<f4", (2, cells))),
        *(("centroids", "<f4", (cells, dim)), ("vectors", "<f4", (count, dim))),
        *(("scale", "<f4", (count,)), ("lost", "<f4", (count,))),
        *(("row", "<i4", (count if cells else 0,)), ("codes", "|i1", (count, dim))),
    ]
    out, start = [], 0
    for name, kind, size in parts:
        out.append((name, kind, size, start))
        start += int(np.prod(size)) * np.dtype(kind).itemsize
    return out, start


def _views(buffer: np.ndarray, shape: tuple[int, int], cells: int) -> dict[str, np.ndarray]:
    out = {}
    for name, kind, size, start in _layout(shape, cells)[0]:
        end = start + int(np.prod(size)) * np.dtype(kind).itemsize
        out[name] = np.asarray(buffer)[start:end].view(kind).reshape(size)
    return out


def _fill(buffer: np.ndarray, source: Source, cells: int) -> None:
    into, place_N = _views(buffer, source.shape, cells), None
    if cells:
        centroids_CD = near_cells.trained(_blocks(source.parts()), source.shape[0], cells)
        cell_N = near_cells.assigned(_blocks(source.parts()), centroids_CD)
        place_N, into["ends"][:] = near_cells.placed(cell_N, cells)
        into["centroids"][:] = centroids_CD.numpy()
    first, longest = 0, 0.0
    for vectors in _blocks(source.parts()):
        codes, scale, lost = nearest.coded(torch.from_numpy(vectors), "int8")
        rows = slice(first, first + len(vectors))
        where = rows if place_N is None else place_N[rows]
        made = {"vectors": vectors, "codes": codes, "scale": scale, "lost": lost}
        made |= {} if place_N is None else {"row": np.arange(rows.start, rows.stop)}
        for name, values in made.items():
            into[name][where] = np.asarray(values)
        longest = max(longest, float(np.linalg.norm(vectors, axis=1).max(initial=0)))
        first = rows.stop
    into["longest"][0] = longest
    if cells:
        asked_SD = torch.from_numpy(source.asked())
        _, row_SK = StoredVectors(into).top_k(asked_SD, near_cells.NEIGHBOURS)
        into["curve"][:] = near_cells.curve(asked_SD, centroids_CD, cell_N[row_SK.numpy()])


def _blocks(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        for start in range(0, len(part), ROWS):
            yield np.ascontiguousarray(part[start : start + ROWS], np.float32)
