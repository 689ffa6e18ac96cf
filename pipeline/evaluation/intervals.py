"""How sure a figure is: bootstrap intervals, and the paired permutation test of two rankings.

Images are what is drawn or swapped, and all queries of an image move with it, since the captions of
one image succeed and fail together.

Legend of the shape suffixes: B resamples, M images, Q queries of a direction.
"""

from typing import NamedTuple

import numpy as np

from pipeline.labels.agreement import draw_images

DEPTHS = (1, 5, 10)
SEED = 0
CELLS = 2**22  # of a block of weights
HELD = 2**24  # resamples × images whose draws are held at a time: 0.26 GB


class Queries(NamedTuple):
    """A direction's queries in a ranking."""

    query_ids: np.ndarray
    image_ids: np.ndarray
    values: dict[str, np.ndarray]  # of every metric, a value (Q,) or NaN; `rank` among them


def figures(ranking: dict[str, Queries]) -> dict[str, float]:
    """Means over all queries: recalls in percent, their sum, median ranks, other metrics in [0, 1].

    `ranking` holds a direction's queries under i2t and t2i.
    """
    out: dict[str, float] = {}
    for direction, queries in ranking.items():
        for name, value_Q in queries.values.items():
            if name == "rank":
                out[f"{direction}_MedR"] = float(np.nanmedian(value_Q))
            elif np.isfinite(value_Q).any():
                out[f"{direction}_{name}"] = _scale(name) * float(np.nanmean(value_Q))
    out["rsum"] = sum(value for name, value in out.items() if "_R_at_" in name)
    return out


def bootstrap(ranking: dict[str, Queries], resamples: int) -> dict[str, list[float]]:
    """[low, high] of every figure: the middle 95 % over so many draws of as many images.

    Of no queries there is no figure.
    """
    if not ranking:
        return {}
    images = np.unique(np.concatenate([queries.image_ids for queries in ranking.values()]))
    generator, parts = np.random.default_rng(SEED), []
    step = max(1, HELD // len(images))  # draws follow on from each other, however they are cut
    for start in range(0, resamples, step):
        drawn_BM = draw_images(len(images), min(step, resamples - start), generator)
        parts.append(_resampled(ranking, images, drawn_BM.astype(np.float64)))
    out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    # Values that were drawn, not between them: a resample of NaN alone says nothing.
    ends = (2.5, 97.5)
    return {
        name: [float(v) for v in np.nanpercentile(value_B, ends, method="nearest")]
        for name, value_B in out.items()
    }


def _resampled(ranking: dict[str, Queries], images: np.ndarray, weight_BM: np.ndarray) -> dict:
    """Every figure (B,) where each image counts as often as it was drawn."""
    rsum_B, out = np.zeros(len(weight_BM)), {}
    for direction, queries in ranking.items():
        row_Q = np.searchsorted(images, queries.image_ids)
        for name, value_Q in queries.values.items():
            known_Q = ~np.isnan(value_Q)
            if not known_Q.any():
                continue
            if name == "rank":
                value_B = _medians(weight_BM, row_Q[known_Q], value_Q[known_Q])
                out[f"{direction}_MedR"] = value_B
                continue
            # A mean is the drawn images' sums over their counts: two products for all resamples.
            sums_M, counts_M = (
                np.bincount(row_Q[known_Q], weights, minlength=len(images))
                for weights in (value_Q[known_Q], None)
            )
            with np.errstate(invalid="ignore"):
                value_B = _scale(name) * (weight_BM @ sums_M) / (weight_BM @ counts_M)
            out[f"{direction}_{name}"] = value_B
            rsum_B += value_B if name.startswith("R_at_") else 0.0
    return {**out, "rsum": rsum_B}


def _medians(weight_BM: np.ndarray, row_Q: np.ndarray, value_Q: np.ndarray) -> np.ndarray:
    """Median (B,) of the values, each as often as its image was drawn."""
    order = np.argsort(value_Q, kind="stable")
    row_Q, value_Q = row_Q[order], value_Q[order]
    parts = []
    for part_BM in np.array_split(weight_BM, -(-weight_BM.shape[0] * len(row_Q) // CELLS)):
        # A value's weight and that of all smaller ones; the median is where half of all is passed.
        upto_BQ = part_BM[:, row_Q].cumsum(1)
        total_B1 = upto_BQ[:, -1:]
        middle = [
            value_Q[(upto_BQ > place_B1).argmax(1)]
            for place_B1 in ((total_B1 - 1) // 2, total_B1 // 2)
        ]
        parts.append((middle[0] + middle[1]) / 2)
    return np.concatenate(parts)


def permutation(
    a: dict[str, Queries], b: dict[str, Queries], permutations: int
) -> dict[str, float]:
    """Two-sided p of every mean's difference: how often swapping images at random does as much.

    Both rankings are of the same queries, in the same order. Median ranks have no p.
    """
    images = np.unique(np.concatenate([queries.image_ids for queries in a.values()]))
    difference: dict[str, np.ndarray] = {}
    rsum_M = np.zeros(len(images))
    for direction, queries in a.items():
        row_Q = np.searchsorted(images, queries.image_ids)
        for name in (queries.values.keys() & b[direction].values.keys()) - {"rank"}:
            delta_Q = b[direction].values[name] - queries.values[name]
            known_Q = ~np.isnan(delta_Q)
            if not known_Q.any():
                continue
            delta_M = np.bincount(row_Q[known_Q], delta_Q[known_Q], minlength=len(images))
            difference[f"{direction}_{name}"] = delta_M = delta_M / known_Q.sum()
            rsum_M += delta_M if name.startswith("R_at_") else 0.0
    difference["rsum"] = rsum_M
    delta_MF = np.stack(list(difference.values()), axis=1)
    observed_F = np.abs(delta_MF.sum(0)) * (1 - 1e-12)  # swaps that give the same count
    generator, reached_F = np.random.default_rng(SEED), np.ones(len(difference))
    step = max(1, CELLS // len(images))
    for start in range(0, permutations, step):
        size = min(step, permutations - start), len(images)
        sign_BM = 2.0 * generator.integers(0, 2, size, dtype=np.int8) - 1.0
        reached_F += (np.abs(sign_BM @ delta_MF) >= observed_F).sum(0)
    return dict(zip(difference, (reached_F / (permutations + 1)).tolist(), strict=True))


def _scale(name: str) -> float:
    return 100.0 if name.startswith("R_at_") else 1.0
