"""LeaPRR: learnable pillar-based re-ranking (arXiv 2304.12570), its inputs, model and losses.

A query and its candidates are each a row of similarities to the query's nearest items, its
*pillars*; layers of attention, half of it the neighbour-affinity graph, refine the rows; a
candidate's new score is the cosine of its row with the query's. All it knows are similarities.
That is the paper's, and preset `paper`. With `residual`, the default, ours differs: refinements
are added to the scores that come in; rows keep their level (the paper's layer norm takes it away)
and end with the scores of the node's nearest on the other side, both of which tell a hub; and a
candidate's own row counts beside its cosine with the query's.

Legend of the shape suffixes: B queries of a batch, N gallery, P pool, K candidates, L pillars of a
kind, V = 1 + K nodes (the query first), C neighbours in a list, H hidden width.
"""

from dataclasses import dataclass

import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F

from pipeline.reranking.baselines import gallery_neighbours
from pipeline.reranking.leaprr.graph import affinity
from pipeline.reranking.problem import SIDES, View
from pipeline.storage import run_folder, store
from schemas.settings import LeaPRRSettings

START = 0.03  # of the cosine's share: an untrained model leaves the order nearly as it was


@dataclass(frozen=True)
class CandidateLists:
    """What LeaPRR sees of B queries."""

    rows_B: torch.Tensor  # of the queries
    place_BK: torch.Tensor  # of the candidates in the gallery, best first
    score_BK: torch.Tensor  # by the methods before
    features: tuple[torch.Tensor, torch.Tensor]  # (B, V, L) similarities to the pillars:
    # of the gallery, and of the pool
    claims_BVL: torch.Tensor  # the highest scores of each node with the other side's items
    affinity_BVV: torch.Tensor


def candidate_lists(
    view: View, rows_B, settings: LeaPRRSettings, scores_BN=None, place_BK=None
) -> CandidateLists:
    """The lists of queries: candidates by the scores so far (or as given), pillars, affinity."""
    sims, asking, ranked = view.sims, view.asking, view.ranked
    scores_BN = view.scores(rows_B) if scores_BN is None else scores_BN
    candidates = {"i2t": settings.candidates_i2t, "t2i": settings.candidates_t2i}[view.direction]
    pillars, depth = settings.pillars, max(settings.pillars, settings.neighbours)
    deepest = min(max(candidates, depth), scores_BN.shape[1])
    best_BK = torch.topk(scores_BN, deepest, dim=1).indices
    place_BK = best_BK[:, :candidates] if place_BK is None else place_BK
    _, near_BL = view.nearest_in_pool(rows_B, depth)
    claims = view.claims(depth)
    nodes = ((asking, rows_B[:, None]), (ranked, view.gallery_N[place_BK]))

    def near(other: str, rows_BL) -> torch.Tensor:
        rows_BL = rows_BL[:, :pillars]
        return torch.cat([sims.near(side, rows, other, rows_BL) for side, rows in nodes], 1)

    features = near(ranked, view.gallery_N[best_BK]), near(asking, near_BL)
    score_BK = scores_BN.gather(1, place_BK)
    # The query's best scores in the gallery, and each candidate's best in the pool.
    claim_NL = _filled(claims[0], pillars, 0)
    mine_BL = _filled(scores_BN.gather(1, best_BK), pillars, 0)
    claims_BVL = torch.cat([mine_BL[:, None], claim_NL[place_BK]], 1)
    graph_BVV = _graph(view, rows_B, best_BK, near_BL, claims, place_BK, score_BK, settings)
    return CandidateLists(rows_B, place_BK, score_BK, features, claims_BVL, graph_BVV)


def _graph(view, rows_B, best_BK, near_BL, claims, place_BK, score_BK, settings) -> torch.Tensor:
    """Affinity of the query and its candidates; the query is a pool item among the others."""
    c = settings.neighbours
    claim_NC, claimant_NC = (found[:, :c] for found in claims)
    own_NC = torch.arange(len(view.gallery_N), device=rows_B.device)[:, None]
    near_NC = _filled(torch.cat([own_NC, gallery_neighbours(view, c - 1)[1]], 1), c)
    of_ranked = torch.cat([_filled(best_BK, c)[:, None], near_NC[place_BK]], 1)
    claimants_BKC = _filled(claimant_NC, c)[place_BK]
    if view.inductive:  # not in the pool: it takes the last claimant's place where it claims more
        claims_BK = score_BK > claim_NC[:, -1][place_BK]
        last_BK = torch.where(claims_BK, rows_B[:, None], claimants_BKC[:, :, -1])
        claimants_BKC = torch.cat([claimants_BKC[:, :, :-1], last_BK[:, :, None]], 2)
    mine_BC = _filled(torch.cat([rows_B[:, None], near_BL[:, : c - 1]], 1), c)
    of_asking = torch.cat([mine_BC[:, None], claimants_BKC], 1)
    return affinity(of_asking, of_ranked, threshold=settings.threshold / (1 + place_BK.shape[1]))


def _filled(rows_XL, length: int, nobody=-1) -> torch.Tensor:
    """The first (X, length) of each list, `nobody` where a collection has no more."""
    rows_XL = rows_XL[:, :length]
    return F.pad(rows_XL, (0, length - rows_XL.shape[1]), value=nobody)


class LeaPRR(nn.Module):
    """The two sub-models, one a direction."""

    def __init__(self, settings: LeaPRRSettings):
        super().__init__()
        self.settings = settings
        self.of = nn.ModuleDict({direction: DirectionModel(settings) for direction in SIDES})

    def forward(self, lists: list[tuple[str, CandidateLists]]) -> list[torch.Tensor]:
        """Refined scores (B, K) of each of some lists with their directions."""
        return [self.of[direction](some) for direction, some in lists]


class DirectionModel(nn.Module):
    """Refined scores (B, K) of lists of one direction."""

    def __init__(self, settings: LeaPRRSettings):
        super().__init__()
        pillars, hidden = settings.pillars, settings.hidden
        self.pillars, self.residual = pillars, settings.residual
        if not settings.residual:
            self.before = nn.ModuleList([nn.LayerNorm(pillars) for _ in range(2)])
        self.project = nn.Linear((3 if settings.residual else 2) * pillars, hidden)
        layers = [Reasoning(hidden, settings.heads) for _ in range(settings.layers)]
        self.layers = nn.ModuleList(layers)
        self.after = nn.LayerNorm(hidden)
        if settings.residual:  # untrained, the cosine is that of the rows themselves
            nn.init.orthogonal_(self.project.weight)
            for layer in layers:
                for last in ("out.weight", "mlp.2.weight"):
                    nn.init.zeros_(layer.get_parameter(last))
            self.head = nn.Linear(hidden, 1, bias=False)
            nn.init.zeros_(self.head.weight)
            self.scale = nn.Parameter(torch.tensor([1.0, START]))  # of scores, of cosines

    def forward(self, some: CandidateLists) -> torch.Tensor:
        # A collection smaller than the pillars has zeros for those that are missing.
        blocks = [F.pad(part, (0, self.pillars - part.shape[2])) for part in some.features]
        if self.residual:
            blocks = [_standard(block) for block in (*blocks, some.claims_BVL)]
        else:
            blocks = [norm(block) for norm, block in zip(self.before, blocks, strict=True)]
        x_BVH = self.project(torch.cat(blocks, 2))
        for layer in self.layers:
            x_BVH = layer(x_BVH, some.affinity_BVV)
        x_BVH = self.after(x_BVH)
        unit_BVH = F.normalize(x_BVH, dim=2)
        cosine_BK = (unit_BVH[:, 1:] @ unit_BVH[:, :1].transpose(1, 2)).squeeze(2)
        if not self.residual:
            return cosine_BK
        more_BK = self.scale[1] * cosine_BK + 0.1 * self.head(x_BVH[:, 1:]).squeeze(2)
        return self.scale[0] * some.score_BK + more_BK


def _standard(block_BVL):
    """Over a query's whole list: rows keep their level, which tells a candidate near to all."""
    mean_B11 = block_BVL[:, 1:].mean((1, 2), keepdim=True)
    return (block_BVL - mean_B11) / (block_BVL[:, 1:].std((1, 2), keepdim=True) + 1e-4)


class Reasoning(nn.Module):
    """A transformer layer whose attention is half the affinity graph's: (Ã + softmax(QKᵀ)) / 2."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before = nn.ModuleList([nn.LayerNorm(hidden) for _ in range(2)])
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        wide = 4 * hidden
        self.mlp = nn.Sequential(nn.Linear(hidden, wide), nn.GELU(), nn.Linear(wide, hidden))

    def forward(self, x_BVH, affinity_BVV):
        parts = self.qkv(self.before[0](x_BVH)).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        attention = torch.softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, dim=3)
        attention = (attention + affinity_BVV.unsqueeze(1)) / 2
        x_BVH = x_BVH + self.out((attention @ v).transpose(1, 2).flatten(2))
        return x_BVH + self.mlp(self.before[1](x_BVH))


def spliced(scores_BN, place_BK, refined_BK) -> torch.Tensor:
    """Scores (B, N) in which the candidates keep their set of scores and take the refined order.

    So all other candidates stay where they were, and scores stay in their unit. Candidates that
    scored alike before and after score alike.
    """
    rank_BK = torch.sort(refined_BK, dim=1, descending=True, stable=True).indices
    old_BK = scores_BN.gather(1, place_BK).sort(1, descending=True).values
    return scores_BN.scatter(1, place_BK.gather(1, rank_BK), old_BK)


def leaprr(view: View, rows_Q: torch.Tensor, *, model: LeaPRR) -> torch.Tensor:
    """Scores (Q, N) with each query's first candidates in refined order, in `spliced`'s way."""
    scores_QN = view.scores(rows_Q)
    some = candidate_lists(view, rows_Q, model.settings, scores_QN)
    (refined_QK,) = model([(view.direction, some)])
    return spliced(scores_QN, some.place_BK, refined_QK)


def load_leaprr(folder: str) -> LeaPRR:
    """The trained model of a folder of stage 7, in evaluation mode."""
    index = run_folder.need_index(folder, "rerank")
    model = LeaPRR(LeaPRRSettings(**index["pieces"][0]["leaprr"]))
    model.load_state_dict(load(store.read_bytes(store.join(folder, "model.safetensors"))))
    return model.eval()
