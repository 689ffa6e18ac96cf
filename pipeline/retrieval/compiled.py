"""The pass over a scanned block compiled by numba, for a CPU: optional.

What `_Search._absorb` does, but a query's floor rises with every neighbour that is found.

Legend of the shape suffixes: R × C a block, G queries, K neighbours, D width.
"""

from typing import Any

import numpy as np
from numba import float32, float64, int32, int64, njit

from pipeline.formulas import floats

NO_ROW = 2**31 - 1  # as in nearest.py
ROUNDING64 = 2.0**-53
CHUNK = 32  # columns tested at once

compiled = njit(cache=True, nogil=True, fastmath={"nsz", "contract", "reassoc"})
turned: Any = compiled(floats.turned)  # of numbers here


@compiled
def absorb(scan_RC, i, j, queries, candidates, keys_GK, both, grouped):
    """Take into the keys whom the block at row i, column j does not rule out.

    `both`: the block's transpose too, which a symmetric product has on its other side.
    """
    vectors_Q, scale_Q, error_Q, group_Q, owner_Q = queries
    vectors_N, scale_N, error_N, group_N, owner_N = candidates
    rows, columns = scan_RC.shape
    last = keys_GK.shape[1] - 1
    scale_C, error_C = scale_N[j : j + columns], error_N[j : j + columns]
    floor_C = np.full(columns, np.inf, np.float32)
    if both:
        for c in range(columns):
            floor_C[c] = _score(keys_GK[group_Q[j + c], last])
    for r in range(rows):
        scan_C, scale, error = scan_RC[r], scale_Q[i + r], error_Q[i + r]
        keys_K = keys_GK[group_Q[i + r]]
        floor = _score(keys_K[last])
        for start in range(0, columns, CHUNK):
            end = min(start + CHUNK, columns)
            part = slice(start, end)
            if not _any_near(
                scan_C[part], scale_C[part], error_C[part], floor_C[part], scale, error, floor
            ):
                continue
            for c in range(start, end):
                bound = float32(scan_C[c]) * (scale_C[c] * scale) + (error_C[c] + error)
                if not (bound >= floor or bound >= floor_C[c]):
                    continue
                a, b = i + r, j + c
                apart = owner_Q[a] != owner_N[b] or owner_Q[a] < 0
                if not (apart or both):
                    continue
                score = dot(vectors_Q[a], vectors_N[b])
                if apart and score >= floor:
                    _insert(keys_K, _key(score, group_N[b]), grouped)
                    floor = _score(keys_K[last])
                if both and score >= floor_C[c] and (owner_Q[b] != owner_N[a] or owner_Q[b] < 0):
                    keys = keys_GK[group_Q[b]]
                    _insert(keys, _key(score, group_N[a]), grouped)
                    floor_C[c] = _score(keys[last])


@compiled
def _any_near(scan_C, scale_C, error_C, floor_C, scale, error, floor):
    near = False
    for c in range(scan_C.shape[0]):
        bound = float32(scan_C[c]) * (scale_C[c] * scale) + (error_C[c] + error)
        near |= bound >= min(floor, floor_C[c])
    return near


@compiled
def dot(a_D, b_D):
    """The exact product of two rows, rounded to float32: as nearest.py's `products`."""
    total, size = float64(0), float64(0)
    for d in range(a_D.shape[0]):
        term = float64(a_D[d]) * float64(b_D[d])
        total += term
        size += abs(term)
    error = size * ((a_D.shape[0] + 2) * ROUNDING64)
    score = float32(total - error)
    if score == float32(total + error):
        return score
    return exact_dot(a_D, b_D)


# In this order and no other, what is lost being the point; fastmath left out is the caller's.
@njit(cache=True, nogil=True, fastmath=False)
def exact_dot(a_D, b_D):
    """With twice the digits: what each addition lost is added in the end."""
    total, lost = float64(0), float64(0)
    for d in range(a_D.shape[0]):
        term = float64(a_D[d]) * float64(b_D[d])
        grown = total + term
        mine = grown - total
        lost += (total - (grown - mine)) + (term - mine)
        total = grown
    return float32(total + lost)


@compiled
def _key(score, row):
    bits = np.float32(score + float32(0)).view(np.int32)
    return (int64(turned(bits)) << 32) | (int64(NO_ROW) - row)


@compiled
def _score(key):
    return np.int32(turned(int32(key >> 32))).view(np.float32)


@compiled
def _insert(keys_K, key, grouped):
    """Put a key in its place among falling ones; of one candidate the best alone stays."""
    end = keys_K.shape[0] - 1
    if key <= keys_K[end]:
        return
    if grouped:
        for p in range(keys_K.shape[0]):
            if (keys_K[p] ^ key) & 0xFFFFFFFF == 0:
                if keys_K[p] >= key:
                    return
                end = p
                break
    while end > 0 and keys_K[end - 1] < key:
        keys_K[end] = keys_K[end - 1]
        end -= 1
    keys_K[end] = key


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
        above_P[p] += int(above)
        if reaching == above:
            continue
        if not len(queries_QD):
            tied_P[p] += int(reaching - above)
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
    count_P, gathered_P = np.zeros(pairs, np.float32), np.empty(pairs, scores_RC.dtype)
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
