"""Continuous relevance of images and captions, from sentence embeddings of the captions.

Legend of the shape suffixes: M images, C captions of an image, N captions, D embedding width.
"""

import torch
from torch.nn import functional as F


def half(cosine):
    """(1 + cosine) / 2, the map of Listwise ITR (arXiv 2305.16566): [-1, 1] onto [0, 1].

    >>> half(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (1 + cosine) / 2


def clip(cosine):
    """The cosine where it is positive, else 0: unrelated captions have relevance 0.

    >>> clip(torch.tensor([-0.5, 0.25, 1.0]))
    tensor([0.0000, 0.2500, 1.0000])
    """
    return cosine.clamp(0, 1)


def logistic(cosine, *, centre, width):
    """sigmoid((cosine - centre) / width), both in units of cosine.

    >>> logistic(torch.tensor([0.5]), centre=0.5, width=0.1)
    tensor([0.5000])
    """
    return torch.sigmoid((cosine - centre) / width)


def isotonic(cosine, *, knots_K, values_K):
    """Values interpolated linearly between the knots of a fitted monotone map, and held flat outside them.

    >>> isotonic(torch.tensor([0.0, 0.3, 2.0]), knots_K=[0.2, 0.4], values_K=[0.0, 1.0])
    tensor([0.0000, 0.5000, 1.0000])
    """
    knots_K = torch.as_tensor(knots_K, dtype=cosine.dtype, device=cosine.device)
    values_K = torch.as_tensor(values_K, dtype=cosine.dtype, device=cosine.device)
    right = torch.searchsorted(knots_K, cosine.contiguous()).clamp(1, len(knots_K) - 1)
    left_x, right_x = knots_K[right - 1], knots_K[right]
    weight = ((cosine - left_x) / (right_x - left_x)).clamp(0, 1)
    return torch.lerp(values_K[right - 1], values_K[right], weight)


MAPS = {"half": half, "clip": clip, "logistic": logistic, "isotonic": isotonic}


def from_captions(
    image_captions_MCD, captions_ND, *, map="clip", reduce="max", mask_MC=None, same_image_MN=None, **map_settings
):
    """relevance_MN in [0, 1]: how well caption n describes image m, by the captions of image m.

    c_mn = max (or mean) over k of cos(e(caption k of image m), e(caption n)); relevance is `map` of c_mn, and 1 where
    `same_image_MN` says that caption n belongs to image m. `mask_MC` is False for captions that are padding.

    >>> image = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> from_captions(image, torch.tensor([[0.6, 0.8], [-1.0, 0.0]]))
    tensor([[0.8000, 0.0000]])
    """
    image_captions_MCD = F.normalize(image_captions_MCD, dim=-1)
    captions_ND = F.normalize(captions_ND, dim=-1)
    cosine_MCN = image_captions_MCD @ captions_ND.T
    if mask_MC is None:
        mask_MC = torch.ones_like(image_captions_MCD[..., 0], dtype=torch.bool)
    if reduce == "max":
        cosine_MN = cosine_MCN.masked_fill(~mask_MC[..., None], -torch.inf).amax(1)
    else:
        cosine_MN = torch.where(mask_MC[..., None], cosine_MCN, 0).sum(1) / mask_MC.sum(1)[:, None]
    relevance_MN = MAPS[map](cosine_MN, **map_settings)
    return relevance_MN if same_image_MN is None else relevance_MN.masked_fill(same_image_MN, 1.0)
