"""The losses by name."""

from pipeline.formulas.losses.contrastive import (
    adaptive_info_nce,
    info_nce,
    masked_info_nce,
    siglip,
    triplet,
)
from pipeline.formulas.losses.kendall import kendall_rank, kendall_smooth
from pipeline.formulas.losses.listwise import list_mle, list_net, smooth_ndcg, soft_label_kl

LOSSES = {
    "smooth_ndcg": smooth_ndcg,
    "kendall_rank": kendall_rank,
    "kendall_smooth": kendall_smooth,
    "list_net": list_net,
    "list_mle": list_mle,
    "soft_label_kl": soft_label_kl,
    "masked_info_nce": masked_info_nce,
    "adaptive_info_nce": adaptive_info_nce,
    "triplet": triplet,
    "info_nce": info_nce,
    "siglip": siglip,
}

GRADED = {
    "smooth_ndcg",
    "kendall_rank",
    "kendall_smooth",
    "list_net",
    "list_mle",
    "soft_label_kl",
    "masked_info_nce",
    "adaptive_info_nce",
}
