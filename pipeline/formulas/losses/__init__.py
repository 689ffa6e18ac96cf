"""All losses by name, both directions of a batch, and weighted sums with schedules.

A loss is `f(scores_QN, target_QN, *, mask_QN=None, **settings) -> loss_Q`: one value per query,
lower is better; the caller averages. The target is `relevance_QN` for the names in GRADED and
boolean `positive_QN` for the others. `mask_QN` is True for candidates in the list. Lists may be of
any shape Q x N: a batch, some rows of a global batch, or queries against a memory bank. Scores of
less than float32 are taken to float32; a score of -inf is outside the list.
To add one: a function that `of_lists` makes a loss, a row in `registry.py`, and its slow twin in
tests/reference.py.

Legend of the shape suffixes: Q queries, N candidates of a query.
"""

from pipeline.formulas.losses.both_directions import both_directions
from pipeline.formulas.losses.contrastive import (
    adaptive_info_nce,
    info_nce,
    masked_info_nce,
    siglip,
    triplet,
)
from pipeline.formulas.losses.kendall import kendall_rank, kendall_smooth
from pipeline.formulas.losses.learned import Learned, scale_and_bias
from pipeline.formulas.losses.listwise import list_mle, list_net, smooth_ndcg, soft_label_kl
from pipeline.formulas.losses.registry import GRADED, LOSSES
from pipeline.formulas.losses.weighted_sum import WeightedSum, scheduled

__all__ = [
    "GRADED",
    "LOSSES",
    "Learned",
    "WeightedSum",
    "adaptive_info_nce",
    "both_directions",
    "info_nce",
    "kendall_rank",
    "kendall_smooth",
    "list_mle",
    "list_net",
    "masked_info_nce",
    "scale_and_bias",
    "scheduled",
    "siglip",
    "smooth_ndcg",
    "soft_label_kl",
    "triplet",
]
