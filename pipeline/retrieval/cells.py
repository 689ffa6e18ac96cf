"""Approximate nearest neighbours by cells: vectors are cut up once, each searched near its own.

A coarse quantiser: centroids trained on a sample, each vector in the cell of the nearest one. Cells
that lie together form a group, which is what a task searches: it reads its own cells and as much
again of others at most. Scores are exact; who is not in a cell that was looked at is not found.

Legend of the shape suffixes: N vectors, D width, C cells, Q query rows, K neighbours.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.retrieval import nearest

PER_CELL = 4096  # vectors of a cell, about
PER_GROUP = 80_000  # and of a group of cells: the queries of a task
SAMPLE = 64  # vectors a cell that centroids are trained on
ROUNDS = 10  # of that training
REACH = 16  # cells that a query is compared with: its own and those nearest to it
AGAIN = 1.0  # what a group reads of others, at most, of its own size
MOST = 16_384  # cells: they are larger where there would be more
SAMPLED = 250_000  # vectors of the sample, at most
SCORES = 2**24  # of vectors with centroids at a time
SEED = 0


def count_of(vectors: int) -> tuple[int, int]:
    """How many cells so many vectors are cut into, and how many of them are the sample."""
    cells = max(1, min(round(vectors / PER_CELL), MOST))
    return cells, min(SAMPLE * cells, SAMPLED)


def centroids(sample_ND: torch.Tensor, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit centroids (C, D) of a sample of unit vectors, and how many of it are in each (C,)."""
    cells = max(1, min(cells, len(sample_ND)))
    generator = torch.Generator().manual_seed(SEED)
    found_CD = sample_ND[torch.randperm(len(sample_ND), generator=generator)[:cells]].clone()
    for _ in range(ROUNDS):
        cell_N = nearest_cell(sample_ND, found_CD)
        count_C = torch.bincount(cell_N, minlength=cells)
        sums_CD = torch.zeros_like(found_CD).index_add_(0, cell_N, sample_ND)
        empty = torch.nonzero(count_C == 0)[:, 0]  # these begin anew, somewhere else
        again = torch.randint(len(sample_ND), (len(empty),), generator=generator)
        sums_CD[empty] = sample_ND[again]
        found_CD = F.normalize(sums_CD, dim=1)
    return found_CD, torch.bincount(nearest_cell(sample_ND, found_CD), minlength=cells)


def nearest_cell(vectors_ND: torch.Tensor, centroids_CD: torch.Tensor) -> torch.Tensor:
    """The cell (N,) of every vector."""
    rows = max(1, SCORES // len(centroids_CD))
    return torch.cat([(part @ centroids_CD.T).argmax(1) for part in vectors_ND.split(rows)])


def groups(centroids_CD: torch.Tensor, share_C: torch.Tensor, count: int) -> list[np.ndarray]:
    """The cells cut into at least so many groups of about one size, those together that are near.

    In halves again and again, each across the direction in which the cells differ most.
    """
    return _halved(np.arange(len(centroids_CD)), centroids_CD.double(), share_C.numpy() + 1, count)


def _halved(
    cells: np.ndarray, centroids_CD: torch.Tensor, weight_C, count: int
) -> list[np.ndarray]:
    if count <= 1 or len(cells) == 1:
        return [cells]
    off_CD = centroids_CD[cells] - centroids_CD[cells].mean(0)
    direction = torch.linalg.eigh(off_CD.T @ off_CD).eigenvectors[:, -1]
    cells = cells[np.argsort((off_CD @ direction).numpy(), kind="stable")]
    upto = weight_C[cells].cumsum()
    left = count // 2
    cut = int(np.clip(np.searchsorted(upto, upto[-1] * left / count), 1, len(cells) - 1))
    parts = (cells[:cut], left), (cells[cut:], count - left)
    return [g for part, n in parts for g in _halved(part, centroids_CD, weight_C, n)]


def read_by(
    own: np.ndarray, centroids_CD: torch.Tensor, size_C: np.ndarray
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The cells that a group reads, rising, and of each of its own those that it is compared with.

    Of other groups' cells the nearest come first, for every own cell in turn, until they are as
    large as `AGAIN` allows.
    """
    order_CC = (
        (centroids_CD[own] @ centroids_CD.T).argsort(dim=1, descending=True, stable=True).numpy()
    )
    order_CC = order_CC[:, :REACH]
    left, known = AGAIN * size_C[own].sum(), set(own.tolist())
    for cell in order_CC.T.reshape(-1).tolist():  # everybody's nearest, then the second ones
        if cell not in known and size_C[cell] <= left:
            known.add(cell)
            left -= size_C[cell]
    near = {
        int(cell): np.array(sorted({int(cell), *(c for c in row.tolist() if c in known)}))
        for cell, row in zip(own, order_CC, strict=True)
    }
    return np.array(sorted(known)), near


def top_k(
    queries_QD: torch.Tensor, candidates_ND: torch.Tensor, k: int, number_N, owners
) -> np.ndarray:
    """Keys (Q, K) of every query's nearest candidates, worse ones last, `nearest.EMPTY` for none.

    Candidates go by their numbers; several rows of one number count as their best. Pairs of one
    owner, of the queries' (Q,) and of the candidates' (N,), are left out.
    """
    number_N = np.array(number_N, np.int64)
    known, group = np.unique(number_N, return_inverse=True)
    if len(known) == len(number_N):
        known, group = number_N, None
    of_Q, of_N = (np.array(owner, np.int64) for owner in owners)
    how: dict[str, Any] = {"query_owner": of_Q, "candidate_owner": of_N, "candidate_group": group}
    score_QK, row_QK = nearest.top_k(queries_QD, candidates_ND, k, **how)
    row_QK = row_QK.long()
    keys_QK = nearest.key(score_QK.contiguous(), torch.from_numpy(known)[row_QK])
    out_QK = np.full((len(queries_QD), k), nearest.EMPTY)
    out_QK[:, : row_QK.shape[1]] = torch.where(row_QK < 0, nearest.EMPTY, keys_QK).numpy()
    return out_QK


def gathered(
    cells_R: np.ndarray,
    ends_PC: np.ndarray,
    kind: np.dtype,
    read: Callable[[int, int, int], np.ndarray],
) -> tuple[np.ndarray, dict[int, slice]]:
    """The records of some cells, which rise, out of P files sorted by cell; where each cell is.

    `ends_PC` says where in each file each cell ends; `read(file, start, end)` reads records, those
    of cells side by side at once.
    """
    starts_PC = np.concatenate([np.zeros((len(ends_PC), 1), int), ends_PC[:, :-1]], axis=1)
    size_PR = (ends_PC - starts_PC)[:, cells_R]
    edges = np.concatenate([[0], size_PR.sum(0).cumsum()])
    # A cell's records of the first file come first, and so on.
    place_PR = edges[:-1] + size_PR.cumsum(0) - size_PR
    records = np.empty(edges[-1], kind)
    runs = np.split(np.arange(len(cells_R)), np.flatnonzero(np.diff(cells_R) > 1) + 1)
    for file in range(len(ends_PC)):
        for run in runs:
            a, b = starts_PC[file, cells_R[run[0]]], ends_PC[file, cells_R[run[-1]]]
            if a == b:
                continue
            of_run, start = read(file, int(a), int(b)), 0
            for place, size in zip(place_PR[file, run], size_PR[file, run], strict=True):
                records[place : place + size] = of_run[start : start + size]
                start += size
    where = itertools.starmap(slice, itertools.pairwise(edges.tolist()))
    return records, dict(zip(cells_R.tolist(), where, strict=True))


def merged(keys_QK: np.ndarray, query_Q: np.ndarray, count: int) -> torch.Tensor:
    """Keys (count, K) of queries that several rows of keys are of."""
    k = keys_QK.shape[1]
    out_GK = torch.full((count, k), nearest.EMPTY)
    query_P = torch.from_numpy(np.repeat(query_Q, k))
    nearest.merge(out_GK, query_P, torch.from_numpy(keys_QK.reshape(-1)), grouped=True)
    return out_GK


def moved(keys_QK: np.ndarray, by: int) -> np.ndarray:
    """The keys with all candidates' numbers higher by so much."""
    return np.where(keys_QK == nearest.EMPTY, nearest.EMPTY, keys_QK - by)


def renumbered(keys_QK: np.ndarray, before_N: np.ndarray, after_N: np.ndarray) -> np.ndarray:
    """The keys with candidates' numbers changed, each to what stands in its place."""
    order = np.argsort(before_N)
    number_QK = nearest.NO_ROW - (keys_QK & 0xFFFFFFFF)
    known = keys_QK != nearest.EMPTY
    place_QK = np.searchsorted(before_N[order], np.where(known, number_QK, before_N.min()))
    new_QK = after_N[order][place_QK].astype(np.int64)
    return np.where(known, keys_QK + number_QK - new_QK, keys_QK)


def best(keys_QK: np.ndarray, more_QK: np.ndarray) -> np.ndarray:
    """The best K of two lots of keys (Q, K) of different candidates."""
    both = np.concatenate([keys_QK, more_QK], axis=1)
    return -np.sort(-both, axis=1)[:, : keys_QK.shape[1]]


def recall(found_QK: np.ndarray, exact_QK: np.ndarray) -> float:
    """Share of the exact neighbours that are among those found; 1 where there are none."""
    hits = total = 0
    for found, exact in zip(found_QK, exact_QK, strict=True):
        known = exact[exact != nearest.EMPTY] & 0xFFFFFFFF  # who it is, whatever the score
        hits += int(np.isin(known, found & 0xFFFFFFFF).sum())
        total += len(known)
    return hits / total if total else 1.0
