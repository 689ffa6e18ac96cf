"""Every positive's place in its ranking, by counting larger scores: exact, and nothing is sorted.

Of a block of scores it is counted how many candidates are above each positive, for the rows' own
positives and, turned, for the columns': one product serves both directions, and counts add up over
blocks. A product in float32 decides but for candidates within its rounding of the positive; those
pairs alone are summed in float64, so equal vectors have equal scores wherever they stand.

Legend of the shape suffixes: M images, N texts, D width, Q queries, P pairs of a query and one of
its positives, R × C a block of the product.
"""

from typing import NamedTuple

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.formulas.metrics_from_ranks import NOWHERE
from pipeline.retrieval import nearest

BLOCK = 2048  # rows and columns of a block of the product
FEW = 256  # pairs at a time where nothing is compiled


class Pairs(NamedTuple):
    """Queries and their positives, by row, in any order."""

    query_P: np.ndarray
    candidate_P: np.ndarray


class Ranks(NamedTuple):
    """Where positives stand: how many candidates score more, how many as much (with them)."""

    above_P: np.ndarray
    tied_P: np.ndarray


Both = tuple[Ranks, Ranks]  # of images' positives and of texts'


def of_vectors(images_MD, texts_ND, i2t: Pairs, t2i: Pairs, *, fast: bool | None = None) -> Both:
    """(Ranks, Ranks) of the positives of images and of texts, scored by their inner products.

    `fast` says whether to run compiled; it does not change the result.
    """
    images_MD, texts_ND = images_MD.float().contiguous(), texts_ND.float().contiguous()
    lengths = [v.norm(dim=1).double() for v in (images_MD, texts_ND)]
    if not all(bool(length.isfinite().all()) for length in lengths):
        raise InputError("vectors hold NaN or infinity; write them again from a model without")
    longest = [float(length.max()) if len(length) else 0.0 for length in lengths]
    # |fl(x·y) − x·y| ≤ D u |x| |y|; the rest is for the roundings of the bounds themselves.
    highest = torch.get_float32_matmul_precision() == "highest"
    rounding = (images_MD.shape[1] + 16) * nearest.ROUNDING if highest else 2.0**-7
    compiled = _compiled(images_MD.device) if fast is None else fast
    sides = [
        _Side(images_MD, texts_ND, i2t, rounding * longest[1] * lengths[0], compiled),
        _Side(texts_ND, images_MD, t2i, rounding * longest[0] * lengths[1], compiled),
    ]
    product = torch.empty(BLOCK * BLOCK, device=images_MD.device)
    for i in range(0, len(images_MD), BLOCK):
        for j in range(0, len(texts_ND), BLOCK):
            a_RD, b_CD = images_MD[i : i + BLOCK], texts_ND[j : j + BLOCK]
            scores_RC = torch.mm(a_RD, b_CD.T, out=_view(product, (len(a_RD), len(b_CD))))
            sides[0].absorb(scores_RC, i, j, turned=False)
            sides[1].absorb(scores_RC, j, i, turned=True)
    return sides[0].ranks(), sides[1].ranks()


def of_matrix(scores_MN, i2t: Pairs, t2i: Pairs, *, fast: bool | None = None) -> Both:
    """(Ranks, Ranks) of the positives of rows and of columns of a matrix of scores.

    Compared in float64 where they are that, else in float32. A score of -inf says that the pair is
    outside the list: the candidate is never found.
    """
    scores_MN = torch.as_tensor(scores_MN)
    dtype = torch.float64 if scores_MN.dtype == torch.float64 else torch.float32
    compiled = _compiled(scores_MN.device) if fast is None else fast
    threshold = [scores_MN[i2t], scores_MN[t2i.candidate_P, t2i.query_P]]
    sides = [
        _Side(None, None, pairs, None, compiled, known.to(dtype))
        for pairs, known in zip((i2t, t2i), threshold, strict=True)
    ]
    block = torch.empty(BLOCK * BLOCK, dtype=dtype, device=scores_MN.device)
    for i in range(0, scores_MN.shape[0], BLOCK):
        for j in range(0, scores_MN.shape[1], BLOCK):
            part_RC = scores_MN[i : i + BLOCK, j : j + BLOCK]
            scores_RC = _view(block, part_RC.shape).copy_(part_RC)
            if not scores_RC.max() < torch.inf:
                _refuse(scores_RC, i, j)
            sides[0].absorb(scores_RC, i, j, turned=False)
            sides[1].absorb(scores_RC, j, i, turned=True)
    return sides[0].ranks(), sides[1].ranks()


class _Side:
    """The counts of one direction: what its queries' positives have above and beside them."""

    def __init__(self, queries, candidates, pairs: Pairs, error_Q, compiled, threshold_P=None):
        # By query, so that the positives of a block's queries are one slice.
        query_P, candidate_P = (np.asarray(rows, np.int64) for rows in pairs)
        self.order = np.argsort(query_P, kind="stable")
        self.query_P, self.compiled = query_P[self.order], compiled
        self.queries, self.candidates, self.error_Q = queries, candidates, error_Q
        if queries is not None:
            self.threshold_P = self._products(self.query_P, candidate_P[self.order])
        else:
            self.threshold_P = threshold_P[torch.from_numpy(self.order)]
        # A scanned score outside [low, high] cannot be on the other side of the positive's own.
        error_P = error_Q[torch.from_numpy(self.query_P)] if error_Q is not None else 0.0
        middle_P = self.threshold_P.double()
        ends = middle_P - error_P, middle_P + error_P
        self.low_P, self.high_P = (end_P.to(self.threshold_P.dtype) for end_P in ends)
        self.above_P, self.tied_P = (np.zeros(len(self.order), np.int64) for _ in range(2))

    def _products(self, query_P, candidate_P) -> torch.Tensor:
        if self.compiled:
            from pipeline.retrieval.compiled import products

            vectors = self.queries.numpy(), self.candidates.numpy()
            return torch.from_numpy(products(*vectors, query_P, candidate_P))
        rows = (torch.as_tensor(r, device=self.queries.device) for r in (query_P, candidate_P))
        return nearest.products(self.queries, self.candidates, *rows)

    def absorb(self, scores_RC, i: int, j: int, *, turned: bool) -> None:
        """Count in a block whose rows begin at query i, its columns at candidate j; or `turned`."""
        scores_QC = scores_RC.T if turned else scores_RC
        part = slice(*np.searchsorted(self.query_P, (i, i + len(scores_QC))))
        if self.compiled:
            self._absorb_compiled(scores_RC, i, j, part, turned)
            return
        for first in range(part.start, part.stop, FEW):
            self._absorb_few(scores_QC, i, j, slice(first, min(first + FEW, part.stop)))

    def _absorb_few(self, scores_QC, i: int, j: int, part: slice) -> None:
        query_P = torch.from_numpy(self.query_P[part]).to(scores_QC.device)
        low_P, high_P, known_P = (t[part] for t in (self.low_P, self.high_P, self.threshold_P))
        # Surely above, whatever the product's rounding; those within it are looked at again.
        scores_PC = scores_QC[query_P - i]
        above_PC = scores_PC > high_P[:, None]
        p, c = torch.nonzero((scores_PC >= low_P[:, None]) & ~above_PC, as_tuple=True)
        # The doubtful ones against their positive: in float64, or as the matrix gave them.
        exact = scores_PC[p, c]
        if self.queries is not None:
            exact = nearest.products(self.queries, self.candidates, query_P[p], c + j)
        above_P = above_PC.sum(1).index_add_(0, p, (exact > known_P[p]).long())
        tied_P = torch.zeros_like(above_P).index_add_(0, p, (exact == known_P[p]).long())
        self.above_P[part] += above_P.cpu().numpy()
        self.tied_P[part] += tied_P.cpu().numpy()

    def _absorb_compiled(self, scores_RC, i: int, j: int, part: slice, turned: bool) -> None:
        from pipeline.retrieval.compiled import count_columns, count_rows

        count = count_columns if turned else count_rows
        bounds = (t[part].numpy() for t in (self.low_P, self.high_P, self.threshold_P))
        none = np.empty((0, 0), np.float32)
        vectors = [none if v is None else v.numpy() for v in (self.queries, self.candidates)]
        counts = (self.above_P[part], self.tied_P[part])
        count(*(scores_RC.numpy(), i, j, self.query_P[part], *bounds, *vectors, *counts))

    def ranks(self) -> Ranks:
        above_P, tied_P = np.empty_like(self.above_P), np.empty_like(self.tied_P)
        outside_P = (self.threshold_P == -torch.inf).cpu().numpy()
        self.above_P[outside_P], self.tied_P[outside_P] = NOWHERE, 1
        # Back to the order in which the pairs were given.
        above_P[self.order], tied_P[self.order] = self.above_P, self.tied_P
        return Ranks(above_P, tied_P)


def _refuse(scores_RC, i: int, j: int) -> None:
    """Names a score that orders nothing, in a block that begins at row i and column j."""
    r, c = torch.nonzero(~(scores_RC < torch.inf))[0].tolist()
    raise InputError(
        f"the score in row {i + r}, column {j + c} (from 0) is {scores_RC[r, c].item()}; give "
        "every pair a number, or -inf to leave it out of the list"
    )


def _compiled(device: torch.device) -> bool:
    return device.type == "cpu" and nearest.has_numba()


def _view(buffer, shape) -> torch.Tensor:
    return buffer[: shape[0] * shape[1]].view(*shape)
