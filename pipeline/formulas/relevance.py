"""Continuous relevance of images and captions, from sentence embeddings of the captions.

Legend of the shape suffixes: M images, C captions of an image, N captions, D embedding width, K
knots.
"""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.formulas.kernels import Function, Mask
from pipeline.formulas.kernels.rows import in_full_precision


def half(cosine: Tensor) -> Tensor:
    """(1 + cosine) / 2, the map of Listwise ITR (arXiv 2305.16566): [-1, 1] onto [0, 1].

    >>> half(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (1 + cosine) / 2


def clip(cosine: Tensor) -> Tensor:
    """The cosine where it is positive, else 0: unrelated captions have relevance 0.

    >>> clip(torch.tensor([-0.5, 0.25, 1.0]))
    tensor([0.0000, 0.2500, 1.0000])
    """
    return cosine.clamp(0, 1)


def logistic(cosine: Tensor, *, centre: float, width: float) -> Tensor:
    """sigmoid((cosine - centre) / width), both in units of cosine.

    >>> logistic(torch.tensor([0.5]), centre=0.5, width=0.1)
    tensor([0.5000])
    """
    return torch.sigmoid((cosine - centre) / width)


def isotonic(
    cosine: Tensor, *, knots_K: Sequence[float] | Tensor, values_K: Sequence[float] | Tensor
) -> Tensor:
    """A fitted monotone map: linear between its knots, flat outside them.

    >>> isotonic(torch.tensor([0.0, 0.3, 2.0]), knots_K=[0.2, 0.4], values_K=[0.0, 1.0])
    tensor([0.0000, 0.5000, 1.0000])
    """
    knots_K = torch.as_tensor(knots_K, dtype=cosine.dtype, device=cosine.device)
    values_K = torch.as_tensor(values_K, dtype=cosine.dtype, device=cosine.device)
    right = torch.searchsorted(knots_K, cosine.contiguous()).clamp(max=len(knots_K) - 1)
    left = (right - 1).clamp(min=0)
    width = (knots_K[right] - knots_K[left]).where(left < right, 1)
    weight = ((cosine - knots_K[left]) / width).clamp(0, 1)
    return torch.lerp(values_K[left], values_K[right], weight)


def fit_isotonic(cosine_P: Iterable[float], judgement_P: Iterable[float]) -> dict[str, list[float]]:
    """{"knots_K", "values_K"} for `isotonic`: the monotone map nearest to people's judgements.

    Least squares over P judged pairs, by pooling neighbours that are out of order; judgements are
    on any scale that the caller wants back, [0, 1] for relevance.

    >>> fit_isotonic([0.1, 0.2, 0.3, 0.4], [0.0, 0.8, 0.6, 1.0])
    {'knots_K': [0.1, 0.2, 0.3, 0.4], 'values_K': [0.0, 0.7, 0.7, 1.0]}
    """
    judged = collections.defaultdict(list)
    for cosine, judgement in zip(map(float, cosine_P), map(float, judgement_P), strict=True):
        judged[cosine].append(judgement)
    if not judged:
        raise ValueError("no judged pairs to fit a map to")
    pools: list[tuple] = []  # of each: sum and number of judgements, lowest and highest cosine
    for cosine in sorted(judged):
        pool = (sum(judged[cosine]), len(judged[cosine]), cosine, cosine)
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            total, count, lowest, _ = pools.pop()
            pool = (total + pool[0], count + pool[1], lowest, pool[3])
        pools.append(pool)
    knots = [(edge, total / count) for total, count, *edges in pools for edge in sorted(set(edges))]
    return {"knots_K": [knot for knot, _ in knots], "values_K": [value for _, value in knots]}


MAPS: dict[str, Function] = {
    function.__name__: function for function in (half, clip, logistic, isotonic)
}


@in_full_precision
def from_captions(
    image_captions_MCD: Tensor,
    captions_ND: Tensor,
    *,
    map: str | Function = "clip",
    reduce: str = "max",
    mask_MC: Mask = None,
    same_image_MN: Tensor | None = None,
    unit: bool = False,
    **map_settings: Any,
) -> Tensor:
    """relevance_MN in [0, 1]: how well caption n describes image m, by the captions of image m.

    No gradient passes. c_mn = max (or mean, by `reduce`) over k of cos(e(caption k of image m),
    e(caption n)); relevance is `map` of c_mn, and 1 where `same_image_MN` says that caption n
    belongs to image m. `mask_MC` is False for captions that are padding: images may have any number
    of captions. An image with none has relevance NaN. `unit` says that all vectors have length 1:
    they are then taken as they are, and not copied. `map` is one of MAPS, or a function of
    cosines; `map_settings` go to it. The relevance of texts to images is the transpose, not this
    again. Relevance score calculation of Listwise ITR (arXiv 2305.16566), which has `half` and
    `max`, as in the authors' code.

    >>> image = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> from_captions(image, torch.tensor([[0.6, 0.8], [-1.0, 0.0]]))
    tensor([[0.8000, 0.0000]])
    """
    if reduce not in ("max", "mean") or not (callable(map) or map in MAPS):
        raise ValueError(
            f"reduce is max or mean and map one of {', '.join(MAPS)}, got {reduce!r} and {map!r}"
        )
    with torch.no_grad():
        image_captions_MCD, captions_ND = (
            _at_least_float32(x) if unit else F.normalize(_at_least_float32(x), dim=-1)
            for x in (image_captions_MCD, captions_ND)
        )
        relevance_MN = _reduced(image_captions_MCD, captions_ND, mask_MC, largest=reduce == "max")
        relevance_MN = relevance_MN.clamp_(-1, 1)  # rounding takes the cosine of twins past 1
        relevance_MN = (map if callable(map) else MAPS[map])(relevance_MN, **map_settings)
        if same_image_MN is not None:
            relevance_MN = relevance_MN.masked_fill(same_image_MN, 1.0)
        return relevance_MN


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _reduced(
    image_captions_MCD: Tensor, captions_ND: Tensor, mask_MC: Mask, *, largest: bool
) -> Tensor:
    """cosine_MN, one caption of every image at a time: all at once could be too large."""
    images, captions, _ = image_captions_MCD.shape
    total_MN = None
    for k in range(captions):
        cosine_MN = image_captions_MCD[:, k] @ captions_ND.T
        if mask_MC is not None:
            cosine_MN.masked_fill_(~mask_MC[:, k, None], -torch.inf if largest else 0)
        if total_MN is None:
            total_MN = cosine_MN
        elif largest:
            torch.maximum(total_MN, cosine_MN, out=total_MN)
        else:
            total_MN += cosine_MN
        del cosine_MN  # before the next one is there
    if total_MN is None:
        return captions_ND.new_full((images, len(captions_ND)), torch.nan)
    if mask_MC is None:
        return total_MN if largest else total_MN.div_(captions)
    count_M1 = mask_MC.sum(1, keepdim=True)
    if not largest:
        total_MN /= count_M1
    return total_MN.masked_fill_(count_M1 == 0, torch.nan)
