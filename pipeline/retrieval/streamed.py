"""Exact nearest neighbours of candidates that come block by block: memory of one block.

What comes of it is `nearest.top_k` of all candidates at once, bit for bit: a key says who is
better, and no two are equal, so the order in which candidates come plays no part.

Legend of the shape suffixes: Q query rows, N candidate rows of a block, D width, G queries (groups
of query rows), K neighbours.
"""

import torch

from pipeline.formulas.floats import has_numba
from pipeline.retrieval import nearest
from pipeline.retrieval.nearest import BLOCK, EMPTY, _rows, _Search

ROWS = 8 * BLOCK  # candidates that are searched together: small blocks are put together
SLACK = 1.001  # how much longer than the longest so far a vector may be


class Streamed:
    """The best K candidates of every query among those that have come so far."""

    def __init__(self, queries_QD, k: int, *, query_group=None, query_owner=None, grouped=False):
        """`grouped`: several rows are one query or one candidate, whose score is their largest."""
        # On the GPU where there is one: the lists are the same.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.queries_QD, self.k, self.grouped = queries_QD.to(self.device).float(), k, grouped
        self.queries_QD = self.queries_QD.contiguous()
        self.group = nearest.groups_of(query_group, self.queries_QD)
        self.owner = nearest.owners_of(query_owner, self.queries_QD)
        groups = int(self.group.max()) + 1 if len(self.group) else 0
        self.keys_GK = torch.full((groups, k), EMPTY, device=self.device)
        self.candidates = 0  # the highest group so far, and one
        self.waiting: list[tuple] = []
        self.longest, self.scan = 0.0, ""
        self.rows: nearest.Rows | None = None  # the queries as they are scanned

    def add(self, candidates_ND, candidate_group, candidate_owner) -> None:
        """Take a block of candidates. Groups count on from one block to the next, from 0."""
        if not len(candidates_ND):
            return
        block = candidates_ND.float(), torch.as_tensor(candidate_group)
        self.waiting.append((*block, torch.as_tensor(candidate_owner)))
        if sum(len(part[0]) for part in self.waiting) >= ROWS:
            self._search()

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and rows (G, K) as of `nearest.top_k`; K is the candidates' number at most."""
        if self.waiting:
            self._search()
        kept_GK = self.keys_GK[:, : min(self.k, self.candidates)].cpu().contiguous()
        self.keys_GK = torch.empty(0)
        if not kept_GK.numel():
            return torch.empty(kept_GK.shape), torch.empty(kept_GK.shape, dtype=torch.int32)
        return nearest.unpacked(kept_GK)

    def _search(self) -> None:
        parts = zip(*self.waiting, strict=True)
        vectors_ND, group, owner = (torch.cat(part).to(self.device) for part in parts)
        self.waiting, first = [], self.candidates == 0
        self.candidates = max(self.candidates, int(group.max()) + 1)
        if not self.keys_GK.numel():
            return
        work = len(self.queries_QD) * len(vectors_ND)
        fast = work >= BLOCK**2 and has_numba() and self.device.type == "cpu"
        vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
        wide = vectors_ND.shape[1] > 1  # of a single column, torch._int_mm is wrong
        scan = "int8" if fast and len(self.queries_QD) >= 256 and wide and vnni() else "fp32"
        queries = self._queries(vectors_ND, scan)
        candidates = _rows(vectors_ND, self.longest, scan, group, owner)
        search = _Search(queries, candidates, self.k, False, self.grouped, fast)
        if first:  # a good guess spares scoring nearly all of the first block
            search.run()
            self.keys_GK[:, : search.keys_GK.shape[1]] = search.keys_GK
        else:
            search.keys_GK = self.keys_GK
            search._scan(queries, symmetric=False)

    def _queries(self, candidates_ND, scan: str) -> nearest.Rows:
        """The queries as they are scanned, made anew where a vector is longer than all before."""
        both = (v for v in (self.queries_QD, candidates_ND) if len(v))
        longest = max((float(v.norm(dim=1).max()) for v in both), default=0.0)
        if self.rows is None or longest > self.longest or scan != self.scan:
            self.longest, self.scan = max(self.longest, SLACK * longest), scan
            parts = (self.queries_QD, self.longest, scan, self.group, self.owner)
            self.rows = _rows(*parts)
        return self.rows
