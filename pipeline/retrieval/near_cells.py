"""The cells of an approximate search: a query looks into those nearest to it, and no others.

Vectors lie sorted by the cell of the nearest centroid (`cells.py` trains them on a sample). What a
look into so many cells finds is measured when they are made, on sampled queries of the other side
(captions of images, images of captions): a search among the vectors' own kind would tell too much.

Legend of the shape suffixes: N vectors, D width, C cells, S sampled queries, K neighbours.
"""

from collections.abc import Iterable

import numpy as np
import torch

from pipeline.retrieval import cells

NEIGHBOURS = 10  # of a sampled query, whose recall is measured
SAMPLED = 512  # queries: half of them choose how many cells are looked at, half tell the recall


def count_of(vectors: int) -> int:
    """Into how many cells so many vectors are sorted."""
    return max(1, min(round(vectors**0.5), cells.MOST))


class Cells:
    """Where each cell ends (C,), and the recall (2, C) of a look into one cell, into two, …

    The recall of the first half of the sampled queries, and of the second.
    """

    def __init__(self, centroids_CD: torch.Tensor, end_C: np.ndarray, recall_2C: np.ndarray):
        self.centroids_CD, self.end_C, self.recall_2C = centroids_CD, end_C, recall_2C

    def __len__(self) -> int:
        return len(self.end_C)

    def probes(self, recall: float) -> int:
        """How many cells have to be looked into for the first half's recall."""
        return min(len(self), int(np.searchsorted(self.recall_2C[0], recall - 1e-6)) + 1)

    def recall(self, probes: int) -> float:
        """What a look into so many cells finds for the other half."""
        return float(self.recall_2C[1, probes - 1])

    def ranges(self, query_D: torch.Tensor, probes: int) -> list[tuple[int, int]]:
        """Where the vectors of the nearest cells lie, (start, end), cells side by side as one."""
        near = torch.topk(self.centroids_CD @ query_D, probes).indices.sort().values.tolist()
        out: list[tuple[int, int]] = []
        for cell in near:
            start = int(self.end_C[cell - 1]) if cell else 0
            end = int(self.end_C[cell])
            if out and out[-1][1] == start:
                out[-1] = out[-1][0], end
            else:
                out.append((start, end))
        return out


def trained(blocks: Iterable[np.ndarray], count: int, wanted: int) -> torch.Tensor:
    """Unit centroids (C, D) of an evenly spaced sample of vectors that come in blocks."""
    step, first, sample = max(1, count // min(cells.SAMPLE * wanted, cells.SAMPLED)), 0, []
    for block in blocks:
        sample.append(torch.from_numpy(block[-first % step :: step].copy()))
        first += len(block)
    return cells.centroids(torch.nn.functional.normalize(torch.cat(sample), dim=1), wanted)[0]


def assigned(blocks: Iterable[np.ndarray], centroids_CD: torch.Tensor) -> np.ndarray:
    """The cell (N,) of every vector."""
    near = (cells.nearest_cell(torch.from_numpy(block), centroids_CD) for block in blocks)
    return torch.cat([cell_N.int() for cell_N in near]).numpy()


def placed(cell_N: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each vector goes (N,) when they are sorted by cell, and where each cell ends (C,)."""
    place_N = np.empty(len(cell_N), np.int32)
    place_N[np.argsort(cell_N, kind="stable")] = np.arange(len(cell_N), dtype=np.int32)
    return place_N, np.bincount(cell_N, minlength=count).cumsum()


def curve(asked_SD: torch.Tensor, centroids_CD: torch.Tensor, cell_SK: np.ndarray) -> np.ndarray:
    """Recall (2, C) of the first half of queries, and of the second, by how many cells are seen.

    `cell_SK` are the cells of each query's exact neighbours.
    """
    order_SC = (asked_SD @ centroids_CD.T).argsort(dim=1, descending=True, stable=True)
    turn_SC = torch.empty_like(order_SC)
    turn_SC.scatter_(1, order_SC, torch.arange(order_SC.shape[1]).expand_as(order_SC))
    turn_SK = turn_SC.gather(1, torch.from_numpy(cell_SK.astype(np.int64))).numpy()
    halves = turn_SK[::2], turn_SK[1::2]  # images follow the order of their source: in turn
    counts = [np.bincount(half.reshape(-1), minlength=len(centroids_CD)) for half in halves]
    return np.stack([count.cumsum() / max(1, count.sum()) for count in counts])
