"""How far numbers agree with people's judgements, with intervals, and encoders with each other.

Legend of the shape suffixes: P judged pairs, U different values, R resamples, M images, N captions.
"""

import numpy as np
import torch

from pipeline.formulas.metrics import spearman

MEASURES = ("spearman", "pearson", "auc", "error")
AT_A_TIME = 2**22  # weights of resamples that are held


def resamples(image_P: np.ndarray, count: int, seed: int) -> np.ndarray:
    """How often each pair is drawn (1 + R, P) when images are drawn with replacement.

    All pairs of an image move together. The first row is the sample itself: ones.
    """
    images, row_P = np.unique(image_P, return_inverse=True)
    drawn_RM = draw_images(len(images), count, seed)
    times = np.vstack([np.ones((1, len(images)), np.int64), drawn_RM]).astype(np.float32)
    return times[:, row_P]


def draw_images(images: int, count: int, seed: int | np.random.Generator) -> np.ndarray:
    """How often each of M images is drawn (R, M), in so many draws of as many with replacement.

    A generator goes on where it stands: draws in several lots are those of one.
    """
    share = np.full(images, 1 / images)
    return np.random.default_rng(seed).multinomial(images, share, size=count)


def measured(
    relevance_P: np.ndarray, judgement_P: np.ndarray, weight_RP: np.ndarray, match: float
) -> dict[str, np.ndarray]:
    """Spearman, Pearson, AUC and root-mean-square error (R,) on every resample.

    AUC is of relevance against judgements of at least `match`; ties count half. NaN where a
    resample has one value alone, or no match, or nothing else.
    """
    size = max(1, AT_A_TIME // len(relevance_P))
    blocks = (weight_RP[start : start + size] for start in range(0, len(weight_RP), size))
    parts = [_measured(relevance_P, judgement_P, w.astype(np.float64), match) for w in blocks]
    return {name: np.concatenate([part[name] for part in parts]) for name in MEASURES}


def _measured(x_P, y_P, weight_RP, match) -> dict[str, np.ndarray]:
    rank_x, rank_y = _ranks(x_P, weight_RP), _ranks(y_P, weight_RP)
    matched_RP = weight_RP * (y_P >= match)
    matches_R = matched_RP.sum(1)
    others_R = weight_RP.sum(1) - matches_R
    below_R = (matched_RP * rank_x).sum(1) - matches_R**2 / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "spearman": _correlation(rank_x, rank_y, weight_RP),
            "pearson": _correlation(x_P[None], y_P[None], weight_RP),
            "auc": below_R / (matches_R * others_R),
            "error": np.sqrt(weight_RP @ (x_P - y_P) ** 2 / weight_RP.sum(1)),
        }


def _ranks(value_P: np.ndarray, weight_RP: np.ndarray) -> np.ndarray:
    """Weight (R, P) of the smaller values and half of the equal ones: ranks up to a constant."""
    _, row_P = np.unique(value_P, return_inverse=True)
    order = np.argsort(row_P, kind="stable")
    starts = np.flatnonzero(np.diff(row_P[order], prepend=-1))
    weight_RU = np.add.reduceat(weight_RP[:, order], starts, axis=1)
    return (weight_RU.cumsum(1) - weight_RU / 2)[:, row_P]


def _correlation(x_RP: np.ndarray, y_RP: np.ndarray, weight_RP: np.ndarray) -> np.ndarray:
    total_R1 = weight_RP.sum(1, keepdims=True)
    x_RP = x_RP - (weight_RP * x_RP).sum(1, keepdims=True) / total_R1
    y_RP = y_RP - (weight_RP * y_RP).sum(1, keepdims=True) / total_R1
    covariance_R = (weight_RP * x_RP * y_RP).sum(1)
    return covariance_R / np.sqrt((weight_RP * x_RP**2).sum(1) * (weight_RP * y_RP**2).sum(1))


def interval(value_R: np.ndarray) -> tuple[float, float, float]:
    """The sample's own value and the ends of the 95 % interval of its resamples."""
    known = value_R[1:][np.isfinite(value_R[1:])]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return float(value_R[0]), float(low), float(high)


def of_encoders(one_MN, other_MN, negative_MN, top: int) -> tuple[float, float]:
    """Means over images: Spearman of two encoders, and what their `top` negatives share."""
    spearman_M = spearman(one_MN, other_MN, mask_QN=negative_MN)
    k = min(top, int(negative_MN.sum(1).min()))
    tops = [c.masked_fill(~negative_MN, -torch.inf).topk(k).indices for c in (one_MN, other_MN)]
    same_M = (tops[0][:, :, None] == tops[1][:, None, :]).any(2).float().mean(1)
    return float(spearman_M.nanmean()), float(same_M.mean())
