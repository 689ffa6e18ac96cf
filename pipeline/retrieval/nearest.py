"""Exact nearest neighbours by inner product: one engine for labels, evaluation and search.

Blocks of the product are *scanned* in cheap arithmetic (int8, bf16, fp32), which only rules out:
whoever could still be among the top K, by a bound on the scan's error, is scored again in float64.
So the result is brute force's, whatever the scan. A score is the exact product, rounded once, to
float32: no order of summing changes it, so a CPU, compiled or not, and a GPU give the same lists,
byte for byte. Of equal scores the lowest row comes first.

A neighbour is one int64, its key: the score above, the row counted down below. The larger of two
keys is the better neighbour, and no two are equal.

Legend of the shape suffixes: Q query rows, N candidate rows, D width, G queries (groups of query
rows), K neighbours, R × C a block of the product, P pairs.
"""

import contextlib
import math
from typing import NamedTuple

import torch

from pipeline.formulas.floats import has_numba, turned

BLOCK = 2048  # rows and columns of a block of the product
WIDER = 16  # times as wide a block of few queries may be
FEW = 128  # rows at a time where a block's worth would take more memory than the block
PAIRS = 256  # scored again at once where nothing is compiled: larger ones leave the cache
LARGER = 4  # blocks on a GPU are so many times as high and as wide: launches cost more than work
NO_ROW = 2**31 - 1  # the row of a place that is not taken
ROUNDING = 2.0**-24  # of float32, relative
ROUNDING64 = 2.0**-53  # of float64


class Rows(NamedTuple):
    """Vectors as a scan needs them; every part is indexed by row."""

    vectors: torch.Tensor  # (N, D) float32
    codes: torch.Tensor  # (N, D) in the scan's arithmetic
    scale: torch.Tensor  # (N,) vectors ≈ codes × scale
    error: torch.Tensor  # (N,) a scanned product is off by at most the sum of its rows' errors
    group: torch.Tensor  # (N,) the query, or the candidate, that the row stands for
    owner: torch.Tensor  # (N,) a query does not meet candidates of its owner; negative: of nobody


def anywhere(
    queries_QD: torch.Tensor, candidates_ND: torch.Tensor | None, k: int, **how
) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_k` of vectors on the CPU, found on the GPU where there is one that they fit into.

    Nobody can tell where: the lists are the same.
    """
    if torch.cuda.is_available():
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            there_ND = None if candidates_ND is None else candidates_ND.cuda()
            scores_GK, rows_GK = top_k(queries_QD.cuda(), there_ND, k, **how)
            return scores_GK.cpu(), rows_GK.cpu()
        torch.cuda.empty_cache()
    return top_k(queries_QD, candidates_ND, k, **how)


def top_k(
    queries_QD: torch.Tensor,
    candidates_ND: torch.Tensor | None,
    k: int,
    *,
    query_group=None,
    candidate_group=None,
    query_owner=None,
    candidate_owner=None,
    scan: str = "auto",
    fast: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (G, K) float32, falling, and rows (G, K) int32 of each query's best candidates.

    Without candidates the queries are their own, and a block of the symmetric product serves its
    rows and its columns. Rows of one group (numbers from 0) are one query, or one candidate: its
    score is the largest of its rows'. Pairs of one owner are left out. A place for which there is
    no candidate has score -inf and row -1. `scan` is int8, bf16, fp32 or auto; `fast` says whether
    to run compiled (None: where numba is installed and it is worth it). Neither changes a result.
    """
    symmetric = candidates_ND is None
    queries_QD = queries_QD.float().contiguous()
    candidates_ND = queries_QD if symmetric else candidates_ND.float().contiguous()
    if fast is None:
        enough = len(queries_QD) * len(candidates_ND) >= BLOCK**2  # compiling takes seconds
        fast = enough and has_numba() and queries_QD.device.type == "cpu"
    if scan == "auto":
        # Codes are made of all candidates, which few queries do not pay back; with VNNI int8
        # products are exact and fast.
        vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
        scan = "int8" if fast and len(queries_QD) >= 256 and vnni() else "fp32"
    if queries_QD.shape[1] == 1:
        scan = "fp32"  # of a single column, torch._int_mm is wrong
    both = [v for v in (queries_QD, candidates_ND) if len(v)]
    longest = max((float(v.norm(dim=1).max()) for v in both), default=0.0)
    queries = _rows(queries_QD, longest, scan, query_group, query_owner)
    if symmetric:
        owner = owners_of(candidate_owner, queries_QD)
        candidates = queries._replace(group=groups_of(candidate_group, queries_QD), owner=owner)
    else:
        candidates = _rows(candidates_ND, longest, scan, candidate_group, candidate_owner)
    grouped = query_group is not None or candidate_group is not None
    return _Search(queries, candidates, k, symmetric, grouped, fast).result()


def largest(scores_QN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (Q, K), falling, and rows (Q, K) of the largest of each row; lowest row first in ties.

    As `torch.topk`, whose choice among equal scores is nobody's to tell.
    """
    k = min(k, scores_QN.shape[1])
    keys_QK = torch.full((len(scores_QN), k), EMPTY, device=scores_QN.device)
    if k:
        # All that reach the K-th score, ties too; the keys then say which of them stay.
        least_Q1 = torch.topk(scores_QN, k, dim=1, sorted=False).values.amin(1, keepdim=True)
        query_P, row_P = torch.nonzero(scores_QN >= least_Q1, as_tuple=True)
        merge(keys_QK, query_P, key(scores_QN[query_P, row_P].float(), row_P), grouped=False)
    return unpacked(keys_QK)


class _Search:
    """The best K keys of every query so far, and the scan that makes them so."""

    def __init__(self, queries: Rows, candidates: Rows, k, symmetric, grouped, fast, ranges=None):
        """`ranges` are those of the candidates that are looked at, (start, end); None: all."""
        self.queries, self.candidates = queries, candidates
        self.symmetric, self.grouped, self.fast = symmetric, grouped, fast
        self.ranges = [(0, len(candidates.group))] if ranges is None else ranges
        groups = int(queries.group.max()) + 1 if len(queries.group) else 0
        others = sum(end - start for start, end in self.ranges)
        if ranges is None and grouped and others:
            others = int(candidates.group.max()) + 1
        device = queries.vectors.device
        self.larger = 1 if device.type == "cpu" else LARGER
        self.keys_GK = torch.full((groups, min(k, others)), EMPTY, device=device)
        self.block = torch.empty((self.larger * BLOCK) ** 2, device=device)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.run()
        return unpacked(self.keys_GK)

    def run(self, guess: bool = True) -> None:
        """Find the keys of the best K."""
        if self.keys_GK.numel():
            if guess:
                self._guess()
            self._scan(self.queries, self.symmetric)
            short_G = (self.keys_GK[:, -1] & 0xFFFFFFFF == 0) & (self.keys_GK[:, -1] > EMPTY)
            if short_G.any():  # fewer than K were above the guess
                self.keys_GK[short_G] = EMPTY
                again = torch.nonzero(short_G[self.queries.group])[:, 0]
                self._scan(Rows(*(part[again] for part in self.queries)), symmetric=False)

    def _guess(self) -> None:
        """Fill the places with nobodies, at a score that rather more than K candidates reach.

        It is read off a sample of the candidates; whether K did reach it is seen in the end.
        """
        queries, candidates = self.queries, self.candidates
        n, k = len(candidates.group), self.keys_GK.shape[1]
        size = min(max(n // 16, 1024), 8192)
        # Of the best K so many rows are in the sample, and three deviations more to be safe.
        expected = k * n / (int(candidates.group.max()) + 1) * size / n
        rank = int(expected + 3 * expected**0.5 + 3)
        if n < 4 * size or rank > size // 2:
            return
        sample = torch.linspace(0, n - 1, size, device=candidates.codes.device).long()
        codes, scale = candidates.codes[sample], candidates.scale[sample]
        guess_G = torch.full((len(self.keys_GK),), -torch.inf, device=scale.device)
        product, scores = self.block.chunk(2)
        for part in _blocks(len(queries.group), self.larger**2 * FEW):
            product_RC = _product(queries.codes[part], codes, product)
            scores_RC = scores[: product_RC.numel()].view_as(product_RC)
            scores_RC.copy_(product_RC).mul_(scale)
            # Scores times the query's own scale, which is positive: the order stays.
            guess_R = torch.topk(scores_RC, rank, dim=1).values[:, -1] * queries.scale[part]
            guess_G.scatter_reduce_(0, queries.group[part], guess_R, "amax")
        self.keys_GK[:] = key(guess_G, torch.full_like(queries.group[:1], NO_ROW))[:, None]

    def _scan(self, queries: Rows, symmetric: bool) -> None:
        candidates, size = self.candidates, self.larger * BLOCK
        # Few queries meet many candidates at a time: a block is no smaller for them.
        wide = size if symmetric else size * min(WIDER, max(1, size // max(1, len(queries.group))))
        firsts = [(j, end) for start, end in self.ranges for j in range(start, end, wide)]
        for i in range(0, len(queries.group), size):
            for j, end in firsts:
                if symmetric and j < i:
                    continue
                rows, columns = slice(i, i + size), slice(j, min(j + wide, end))
                scan_RC = _product(queries.codes[rows], candidates.codes[columns], self.block)
                both = symmetric and j > i
                if self.fast:
                    self._absorb_compiled(scan_RC, i, j, queries, both)
                else:
                    self._absorb(scan_RC, _part(queries, rows), _part(candidates, columns))
                    if both:
                        self._absorb(scan_RC.T, _part(queries, columns), _part(candidates, rows))

    def _absorb(self, scan_RC, queries: Rows, candidates: Rows) -> None:
        """Take into the keys whom a block of the scan does not rule out."""
        # Who could reach the worst of the K there are, by the highest score the scan allows.
        floor_R = _score(self.keys_GK[queries.group, -1])
        bound_RC = scan_RC * candidates.scale * queries.scale[:, None] + candidates.error
        r, c = torch.nonzero(bound_RC >= (floor_R - queries.error)[:, None], as_tuple=True)
        # Nobody meets those of his own.
        known = (queries.owner[r] != candidates.owner[c]) | (queries.owner[r] < 0)
        r, c = r[known], c[known]
        # Their scores proper, and the best K of old and new.
        scores_P = products(queries.vectors, candidates.vectors, r, c)
        merge(self.keys_GK, queries.group[r], key(scores_P, candidates.group[c]), self.grouped)

    def _absorb_compiled(self, scan_RC, i: int, j: int, queries: Rows, both: bool) -> None:
        from pipeline.retrieval import compiled

        asking, asked = (
            tuple(part.numpy() for part in (r.vectors, r.scale, r.error, r.group, r.owner))
            for r in (queries, self.candidates)
        )
        keys_GK = self.keys_GK.numpy()
        compiled.absorb(scan_RC.numpy(), i, j, asking, asked, keys_GK, both, self.grouped)


def _rows(vectors_ND, longest: float, scan: str, group, owner) -> Rows:
    """Rows ready to be scanned; no product with a vector up to `longest` exceeds its bound."""
    codes, scale, lost = coded(vectors_ND, scan)
    error = error_of(lost, longest, vectors_ND.shape[1], scan)
    group, owner = groups_of(group, vectors_ND), owners_of(owner, vectors_ND)
    return Rows(vectors_ND, codes, scale, error, group, owner)


def coded(vectors_ND, scan: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (N, D) of vectors, scale (N,), and how long (N,) what they lost is."""
    n, width = vectors_ND.shape
    device = vectors_ND.device
    scale, lost = torch.ones(n, device=device), torch.zeros(n, device=device)
    codes = vectors_ND
    if scan == "bf16":
        codes = vectors_ND.bfloat16()
    elif scan == "int8":
        codes = torch.empty(n, width, dtype=torch.int8, device=device)
    elif scan != "fp32":
        raise ValueError(f"scan is auto, int8, bf16 or fp32, got {scan!r}")
    for part in _blocks(n, FEW) if scan != "fp32" else ():
        if scan == "int8":
            scale[part] = (vectors_ND[part].abs().amax(1) / 127).clamp_(min=1e-30)
            codes[part] = (vectors_ND[part] / scale[part, None]).round_().to(torch.int8)
        lost[part] = (vectors_ND[part] - codes[part] * scale[part, None]).norm(dim=1)
    return codes, scale, lost


def error_of(lost, longest: float, width: int, scan: str) -> torch.Tensor:
    """By how much (N,) a scanned product with a vector up to `longest` may be off, by one row.

    |x·y − x̂·ŷ| ≤ |x − x̂| |y| + |x̂| |y − ŷ|, and the arithmetic's own roundings.
    """
    exact = torch.get_float32_matmul_precision() == "highest"
    rounding = (width + 16) * ROUNDING if exact else 2.0**-7  # else TF32 or bf16 may multiply
    rounding += 2.0**-8 if scan == "bf16" else 0.0  # the product comes as bf16
    longest *= 1 + width**0.5 / 254  # x̂ may be that much longer: a part moves by half a step
    return lost * (longest * 1.001) + rounding * longest**2 / 2


def groups_of(group, vectors_ND) -> torch.Tensor:
    if group is None:
        return torch.arange(len(vectors_ND), device=vectors_ND.device)
    return torch.as_tensor(group, dtype=torch.int64, device=vectors_ND.device)


def owners_of(owner, vectors_ND) -> torch.Tensor:
    if owner is None:
        return torch.full((len(vectors_ND),), -1, device=vectors_ND.device)
    return torch.as_tensor(owner, dtype=torch.int64, device=vectors_ND.device)


def _blocks(n: int, size: int):
    return (slice(start, start + size) for start in range(0, n, size))


def _part(rows: Rows, part: slice) -> Rows:
    return Rows(*(values[part] for values in rows))


def _product(codes_RD, codes_CD, buffer):
    """The product (R, C) of codes: int32 of int8, else float32; in the buffer's memory."""
    out_RC = buffer[: len(codes_RD) * len(codes_CD)].view(len(codes_RD), len(codes_CD))
    if codes_RD.dtype == torch.int8:
        return torch._int_mm(codes_RD, codes_CD.T, out=out_RC.view(torch.int32))
    if codes_RD.dtype == torch.bfloat16:
        return out_RC.copy_(codes_RD @ codes_CD.T)
    return torch.mm(codes_RD, codes_CD.T, out=out_RC)


def products(queries_QD, candidates_ND, query_P, candidate_P) -> torch.Tensor:
    """float32 scores (P,) of pairs of rows: their exact products, rounded.

    Summed in float64, in whatever order the device likes; where that leaves open which float32 is
    the nearest, in one of some hundred thousand, summed again on the CPU, exactly.
    """
    scores_P = torch.empty(len(query_P), device=queries_QD.device)
    pairs = PAIRS if queries_QD.device.type == "cpu" else PAIRS * LARGER**4
    for start in range(0, len(query_P), pairs):
        part = slice(start, start + pairs)
        a_PD, b_PD = queries_QD[query_P[part]], candidates_ND[candidate_P[part]]
        terms_PD = a_PD.double() * b_PD.double()  # exact: twice 24 bits are fewer than 53
        sum_P = terms_PD.sum(1)
        error_P = terms_PD.abs_().sum(1) * ((terms_PD.shape[1] + 2) * ROUNDING64)
        scores_P[part] = sum_P
        ends = (sum_P - error_P).float(), (sum_P + error_P).float()
        open_P = torch.nonzero((ends[0] != ends[1]) & sum_P.isfinite())[:, 0]
        if len(open_P):
            exact = exact_sums(a_PD[open_P].cpu().double() * b_PD[open_P].cpu().double())
            scores_P[start + open_P] = exact.to(scores_P.device)
    return scores_P


def exact_sums(terms_PD: torch.Tensor) -> torch.Tensor:
    """float32 sums (P,) of rows of float64, as if summed without any rounding but the last."""
    return torch.tensor([math.fsum(row) for row in terms_PD.tolist()], dtype=torch.float64).float()


def key(score_P, row_P) -> torch.Tensor:
    """int64 keys (P,) of float32 scores and rows below NO_ROW."""
    bits_P = (score_P + 0.0).view(torch.int32)  # -0 becomes 0
    return (turned(bits_P).long() << 32) | (NO_ROW - row_P.long())


EMPTY = int(key(torch.tensor([-torch.inf]), torch.tensor([NO_ROW])))


def _score(keys) -> torch.Tensor:
    return turned((keys >> 32).int()).view(torch.float32)


def unpacked(keys_GK) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and rows in the memory of the keys, which are no more."""
    halves = keys_GK.view(torch.int32).unflatten(1, (-1, 2))
    for row_RK, rising_RK in (part.unbind(-1) for part in halves.split(BLOCK)):
        row_RK.neg_().add_(NO_ROW)
        row_RK[row_RK == NO_ROW] = -1
        rising_RK.copy_(turned(rising_RK))
    return halves.view(torch.float32)[..., 1], halves[..., 0]


def merge(keys_GK, query_P, keys_P, grouped: bool) -> None:
    """Keep the best K of each query's keys and of P new ones; of one candidate the best alone."""
    if not len(query_P):
        return
    k = keys_GK.shape[1]
    # New keys by query; of each query its row in `both`, of each key its place in that row.
    order = torch.argsort(query_P, stable=True)
    touched, count = torch.unique_consecutive(query_P[order], return_counts=True)
    row_P = torch.repeat_interleave(torch.arange(len(touched), device=count.device), count)
    place_P = torch.arange(len(order), device=count.device) - (count.cumsum(0) - count)[row_P]
    # A row a query: the keys there are, then the new ones, then empty places.
    both = torch.full((len(touched), k + int(count.max())), EMPTY, device=count.device)
    both[:, :k] = keys_GK[touched]
    both[row_P, k + place_P] = keys_P[order]
    if grouped:
        both = _once(both)
    keys_GK[touched] = both.sort(dim=1, descending=True).values[:, :k]


def _once(keys_GW) -> torch.Tensor:
    """The keys with all but the best of each candidate emptied."""
    # The halves change places, so that sorting puts keys of one candidate side by side, the best
    # last; the score above is moved by 2^31 to be no negative number below.
    by_row = ((keys_GW << 32) | ((keys_GW >> 32) + 2**31)).sort(dim=1).values
    # Empty whatever is followed by a key of its own candidate, but for places that nobody took.
    again = by_row[:, :-1] >> 32 == by_row[:, 1:] >> 32
    keys = ((by_row & 0xFFFFFFFF) - 2**31 << 32) | (by_row >> 32)
    keys[:, :-1][again & (keys[:, :-1] & 0xFFFFFFFF > 0)] = EMPTY
    return keys
