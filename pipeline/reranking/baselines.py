"""Re-rankers without weights. Each is f(view, rows_Q, **setting) -> scores (Q, N).

They read what the view gives them: scores by the methods before them, the pool and the gallery.
GRIDS holds the settings tried on val.

Legend of the shape suffixes: Q queries, N gallery, P pool, K neighbours.
"""

import itertools
import math
from collections.abc import Callable

import torch

from pipeline.reranking.problem import View


def inverted_softmax(view: View, rows_Q, *, beta: float) -> torch.Tensor:
    """S − h: a candidate near to everything in the pool is worth less (Smith et al. 2017).

    h(c) = log mean_b exp(β s(b, c)) / β over the pool.
    """
    return view.scores(rows_Q) - hubness(view, beta)


def hubness(view: View, beta: float) -> torch.Tensor:
    """How near each candidate is to the pool (N,): log-mean-exp at temperature 1/β."""

    def make():
        parts = view.parts(view.pool_P)
        sums = [torch.logsumexp(beta * view.scores(part).double(), dim=0) for part in parts]
        total_N = torch.logsumexp(torch.stack(sums), dim=0)
        return ((total_N - math.log(len(view.pool_P))) / beta).float()

    return view.once(("hubness", beta), make)


def qb_norm(view: View, rows_Q, *, beta: float, active: int = 1) -> torch.Tensor:
    """Inverted softmax for queries whose first candidate is a hub, else s (QB-Norm, 2022).

    A hub, or member of the activation set, is among the first `active` candidates of a pool item.
    """
    return _of_hubs(view, rows_Q, active, inverted_softmax(view, rows_Q, beta=beta))


def dual_softmax(view: View, rows_Q, *, beta: float) -> torch.Tensor:
    """S × the query's share in all claims on a candidate (dual softmax, CAMoE 2021).

    The share is exp(β s(q, c)) / Σ_b exp(β s(b, c)) over the pool and the query.
    """
    scores_QN = view.scores(rows_Q)
    others_N = hubness(view, beta) * beta + math.log(len(view.pool_P))
    mine_QN = beta * scores_QN
    claims_QN = torch.logaddexp(mine_QN, others_N) if view.inductive else others_N
    return scores_QN * torch.exp(mine_QN - claims_QN)


def dynamic_dual_softmax(view: View, rows_Q, *, beta: float, active: int = 1) -> torch.Tensor:
    """Dual softmax for queries whose first candidate is a hub, else s."""
    return _of_hubs(view, rows_Q, active, dual_softmax(view, rows_Q, beta=beta))


def _of_hubs(view: View, rows_Q, active: int, normed_QN) -> torch.Tensor:
    """The normed scores of queries whose first candidate is a hub, the scores so far of others."""

    def make():
        hub_N = torch.zeros(len(view.gallery_N), dtype=torch.bool, device=view.gallery_N.device)
        for part in view.parts(view.pool_P):
            scores_PN = view.scores(part)
            hub_N[torch.topk(scores_PN, min(active, scores_PN.shape[1]), dim=1).indices] = True
        return hub_N

    scores_QN = view.scores(rows_Q)
    hub_Q = view.once(("hubs", active), make)[scores_QN.argmax(1)]
    return torch.where(hub_Q[:, None], normed_QN, scores_QN)


def krnn(view: View, rows_Q, *, weight: float, depth: int = 100) -> torch.Tensor:
    """S − weight × log(place of the query among the pool's claims on the candidate).

    K-reciprocal re-ranking with the places of both sides (after MTFN-RR 2019): a candidate that
    many others claim more strongly is worth less. Places beyond `depth` count alike. No place is
    given to a group of captions: that would tell which captions belong together.
    """
    scores_QN = view.scores(rows_Q)
    claims_NK = view.claims(min(depth, len(view.pool_P)))[0]
    rising_NK = claims_NK.flip(1).contiguous()
    below_NQ = torch.searchsorted(rising_NK, scores_QN.T.contiguous(), right=True)
    above_NQ = rising_NK.shape[1] - below_NQ
    return scores_QN - weight * torch.log1p(above_NQ.T.float())


def query_expansion(view: View, rows_Q, *, k: int, alpha: float, weight: float, of: str):
    """S + weight × that of the query's neighbours, each counted as s^α (αQE, 2018).

    The neighbours are of the gallery, as in image retrieval, or of the pool.
    """
    scores_QN = view.scores(rows_Q)
    if of == "gallery":
        best = torch.topk(scores_QN, min(k, scores_QN.shape[1]), dim=1)
        side, rows_QK = view.ranked, view.gallery_N[best.indices]
        near_QK = view.sims.near(view.asking, rows_Q[:, None], side, rows_QK)[:, 0]
    else:
        side = view.asking
        near_QK, rows_QK = view.nearest_in_pool(rows_Q, k)
    weights_QK = near_QK.clamp(min=1e-6) ** alpha
    weights_QK = weight * weights_QK / weights_QK.sum(1, keepdim=True)
    return scores_QN + view.sims.mixed(side, rows_QK, weights_QK, view.ranked, view.gallery_N)


def train_pairs(view: View, rows_Q, *, k: int, temperature: float, weight: float):
    """S + weight × how near a candidate is to the partners of the query's nearest train items.

    A caption is like train captions, whose images are like the image it asks for; an image is like
    train images, whose captions are like its own. Each of k train items counts as
    softmax(similarity / temperature), its partners alike. What tells texts apart is best not the
    model itself: with a sentence encoder (`rerank.texts`) the pairs bring in what that one knows.
    """
    bank_P, partner_PR, share_PR = view.once("partners", lambda: _partners(view))

    def near() -> tuple[torch.Tensor, torch.Tensor]:
        near_QP = view.sims.between(view.asking, rows_Q, view.asking, bank_P)
        return torch.topk(near_QP, min(k, len(bank_P)), dim=1)

    def partners() -> torch.Tensor:
        best_QK, place_QK = view.lately(rows_Q, ("near", k), near)
        weights_QK = torch.softmax(best_QK / temperature, dim=1)
        rows_QR = partner_PR[place_QK].flatten(1)
        weights_QR = (weights_QK[:, :, None] * share_PR[place_QK]).flatten(1)
        return view.sims.mixed(view.ranked, rows_QR, weights_QR, view.ranked, view.gallery_N)

    mixed_QN = view.lately(rows_Q, ("partners", k, temperature), partners)
    return view.scores(rows_Q) + weight * mixed_QN


def _partners(view: View) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bank's asking items (P,), and each one's partners and their shares (P, R), padded."""
    bank, owner = view.problem.bank, view.problem.owner
    bank_P, others = bank[view.asking], bank[view.ranked]
    owners, order = owner[view.ranked][others].sort(stable=True)
    mine_P = owner[view.asking][bank_P]
    first_P, last_P = (torch.searchsorted(owners, mine_P, right=right) for right in (False, True))
    count_P1 = (last_P - first_P)[:, None]
    place_R = torch.arange(int(count_P1.max()), device=bank_P.device)
    place_PR = (first_P[:, None] + place_R).clamp(max=len(others) - 1)
    return bank_P, others[order[place_PR]], (place_R < count_P1) / count_P1.clamp(min=1)


def database_augmentation(view: View, rows_Q, *, k: int, alpha: float, weight: float):
    """S averaged with the scores of each candidate's nearest in the gallery (DBA).

    (1 − weight) s(q, c) + weight Σ_n w(c, n) s(q, n), w ∝ similarity^α over k neighbours.
    """
    scores_QN = view.scores(rows_Q)
    near_NK, place_NK = gallery_neighbours(view, k)
    weights_NK = near_NK.clamp(min=1e-6) ** alpha
    weights_NK = weights_NK / weights_NK.sum(1, keepdim=True)
    out_QN = (1 - weight) * scores_QN
    for place_N, weight_N in zip(place_NK.T, weights_NK.T, strict=True):
        out_QN += scores_QN[:, place_N] * (weight * weight_N)
    return out_QN


def gallery_neighbours(view: View, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities and places in the gallery (N, K) of each candidate's nearest, not itself."""

    return view.once(("neighbours", k), lambda: view.sims.nearest(view.ranked, view.gallery_N, k))


def grid(**choices) -> list[dict]:
    rows = itertools.product(*choices.values())
    return [dict(zip(choices, row, strict=True)) for row in rows]


METHODS: dict[str, Callable[..., torch.Tensor]] = {
    "inverted_softmax": inverted_softmax,
    "qb_norm": qb_norm,
    "dual_softmax": dual_softmax,
    "dynamic_dual_softmax": dynamic_dual_softmax,
    "krnn": krnn,
    "query_expansion": query_expansion,
    "database_augmentation": database_augmentation,
    "train_pairs": train_pairs,
}
SOFTMAXES = ("inverted_softmax", "qb_norm", "dual_softmax", "dynamic_dual_softmax")
GRIDS = {  # of the softmaxes, `rerank.betas` are tried
    "krnn": grid(weight=(0.005, 0.01, 0.02, 0.04, 0.08, 0.16)),
    "query_expansion": grid(
        k=(4, 16), alpha=(1.0, 3.0), weight=(0.05, 0.1, 0.25, 0.5), of=("gallery", "pool")
    ),
    "train_pairs": grid(k=(20, 100), temperature=(0.02, 0.05), weight=(0.1, 0.2, 0.4, 0.8, 1.6)),
    "database_augmentation": grid(k=(2, 5), alpha=(1.0, 3.0), weight=(0.05, 0.1, 0.25)),
}
