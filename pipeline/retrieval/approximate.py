"""Approximate nearest neighbours by faiss, for splits in which exact ones take too long.

Who is found is faiss's choice, by an inverted file; the recall is measured. Scores are exact, but
for groups: the largest of a pair's rows may be among those that were not found.

Legend of the shape suffixes: Q query rows, N candidate rows, D width, G queries, K neighbours.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.errors import InputError
from pipeline.retrieval import nearest
from pipeline.retrieval.nearest import EMPTY, groups_of, owners_of

CELLS = 64  # of the inverted file's 4 √N that are looked at for a query
READ = 32  # candidates looked at for a neighbour, at least
SAMPLE = 256  # queries whose recall is measured
_indexes = WeakTensorKeyDictionary()  # of the candidates met in this process


def top_k(
    queries_QD,
    candidates_ND,
    k: int,
    *,
    query_group=None,
    candidate_group=None,
    query_owner=None,
    candidate_owner=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and rows (G, K) as of `nearest.top_k`, of the candidates that faiss finds."""
    query_group = groups_of(query_group, queries_QD)
    group = groups_of(candidate_group, candidates_ND)
    own_Q, own_N = owners_of(query_owner, queries_QD), owners_of(candidate_owner, candidates_ND)
    groups, others = (int(g.max()) + 1 if len(g) else 0 for g in (query_group, group))
    keys_GK = torch.full((groups, min(k, others)), EMPTY)
    if not keys_GK.numel():
        return nearest.unpacked(keys_GK)
    index = _index(candidates_ND)
    rows_each = int(torch.bincount(group).max())  # whoever may stand in the way of K candidates
    own_rows = int(torch.bincount(own_N[own_N >= 0], minlength=1).max())
    wanted = min(k * rows_each + own_rows, len(candidates_ND))
    index.nprobe = min(index.nlist, max(CELLS, index.nlist * READ * wanted // len(candidates_ND)))
    for start in range(0, len(queries_QD), nearest.BLOCK):
        part = slice(start, start + nearest.BLOCK)
        _, found_QK = index.search(queries_QD[part].float().numpy(), wanted)
        found_QK = torch.from_numpy(found_QK)
        query_P, place_P = torch.nonzero(found_QK >= 0, as_tuple=True)
        row_P, query_P = found_QK[query_P, place_P], query_P + start
        known = (own_Q[query_P] != own_N[row_P]) | (own_Q[query_P] < 0)
        row_P, query_P = row_P[known], query_P[known]
        score_P = nearest.products(queries_QD, candidates_ND, query_P, row_P)
        keys_P = nearest.key(score_P, group[row_P])
        nearest.merge(keys_GK, query_group[query_P], keys_P, grouped=True)
    return nearest.unpacked(keys_GK)


def recall(rows_GK, queries_QD, candidates_ND, k: int, *, query_group=None, **parts) -> float:
    """Share of the exact neighbours of a sample of the queries that are among those found."""
    query_group = groups_of(query_group, queries_QD)
    sample = torch.linspace(0, len(rows_GK) - 1, min(SAMPLE, len(rows_GK))).long()
    place = torch.full((len(rows_GK),), -1).index_copy(0, sample, torch.arange(len(sample)))
    kept = torch.nonzero(place[query_group] >= 0)[:, 0]
    if parts.get("query_owner") is not None:
        parts["query_owner"] = torch.as_tensor(parts["query_owner"])[kept]
    _, exact_GK = nearest.top_k(
        queries_QD[kept], candidates_ND, k, query_group=place[query_group][kept], **parts
    )
    found = (exact_GK[:, :, None] == rows_GK[sample][:, None, :]).any(2) & (exact_GK >= 0)
    return float(found.sum() / (exact_GK >= 0).sum().clamp(min=1))


def _index(candidates_ND):
    if candidates_ND not in _indexes:
        try:
            import faiss
        except ImportError as error:
            raise InputError(
                "label.approximate_above needs faiss, which is not installed; install "
                "halftone-itr[faiss] or leave the setting out"
            ) from error
        count, width = candidates_ND.shape
        cells = max(1, min(int(4 * count**0.5), count // 40))
        flat = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFFlat(flat, width, cells, faiss.METRIC_INNER_PRODUCT)
        vectors = candidates_ND.float().numpy()
        index.train(vectors)
        index.add(vectors)
        _indexes[candidates_ND] = index
    return _indexes[candidates_ND]
