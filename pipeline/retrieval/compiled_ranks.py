"""The counting of a block compiled by numba, for a CPU: optional.

What `_Side.absorb` does.

Legend of the shape suffixes: R × C a block, D width, P pairs of a query and a positive.
"""

import numpy as np
from numba import float32, int64

from pipeline.retrieval.compiled import compiled, dot

CHUNK = 64  # pairs tested at once
ZERO = np.float32(0)  # counts in a block are floats: as integers they would widen to 64 bits


@compiled
def count_rows(
    scores_RC, i, j, query_P, low_P, high_P, threshold_P, queries_QD, candidates_ND, above_P, tied_P
):
    """Add up who is above and beside each positive of the rows; no vectors: scores are exact."""
    columns = scores_RC.shape[1]
    for p in range(query_P.shape[0]):
        scores_C, low, high = scores_RC[query_P[p] - i], low_P[p], high_P[p]
        above, reaching = ZERO, ZERO
        for c in range(columns):
            above += float32(scores_C[c] > high)
            reaching += float32(scores_C[c] >= low)
        above_P[p] += int64(above)
        if reaching == above:
            continue
        if not len(queries_QD):
            tied_P[p] += int64(reaching - above)
            continue
        for c in range(columns):
            if low <= scores_C[c] <= high:
                score = dot(queries_QD[query_P[p]], candidates_ND[j + c])
                above_P[p] += score > threshold_P[p]
                tied_P[p] += score == threshold_P[p]


@compiled
def count_columns(
    scores_RC, i, j, query_P, low_P, high_P, threshold_P, queries_QD, candidates_ND, above_P, tied_P
):
    """The same for positives of columns, which begin at query i, and the rows at candidate j."""
    pairs = query_P.shape[0]
    column_P = query_P - i
    in_order = pairs == scores_RC.shape[1] and (column_P == np.arange(pairs)).all()
    count_P, gathered_P = np.zeros(pairs, np.float32), np.empty(pairs, np.float32)
    beside_P = np.zeros(pairs, np.float32)
    for r in range(scores_RC.shape[0]):
        scores_P = scores_RC[r] if in_order else gathered_P
        if not in_order:
            for p in range(pairs):
                gathered_P[p] = scores_RC[r, column_P[p]]
        if not len(queries_QD):
            for p in range(pairs):
                count_P[p] += float32(scores_P[p] > threshold_P[p])
                beside_P[p] += float32(scores_P[p] == threshold_P[p])
            continue
        for start in range(0, pairs, CHUNK):
            end = min(start + CHUNK, pairs)
            near = ZERO
            for p in range(start, end):
                score = scores_P[p]
                count_P[p] += float32(score > high_P[p])
                near += float32((score >= low_P[p]) & (score <= high_P[p]))
            if near == ZERO:
                continue
            for p in range(start, end):
                score = scores_P[p]
                if low_P[p] <= score <= high_P[p]:
                    score = dot(queries_QD[query_P[p]], candidates_ND[j + r])
                    above_P[p] += score > threshold_P[p]
                    tied_P[p] += score == threshold_P[p]
    for p in range(pairs):
        above_P[p] += int64(count_P[p])
        tied_P[p] += int64(beside_P[p])


@compiled
def products(queries_QD, candidates_ND, query_P, candidate_P):
    """float32 scores (P,) of pairs of rows, summed in float64."""
    scores_P = np.empty(len(query_P), np.float32)
    for p in range(len(query_P)):
        scores_P[p] = dot(queries_QD[query_P[p]], candidates_ND[candidate_P[p]])
    return scores_P
