"""How far a model's scores agree with people who judged images and captions.

Legend of the shape suffixes: P judged pairs, R resamples, Q queries, C judged candidates of one.
"""

from typing import NamedTuple

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.evaluation import intervals
from pipeline.evaluation.intervals import Queries
from pipeline.evaluation.results import GAIN, Protocol, Result
from pipeline.formulas import metrics
from pipeline.labels import agreement, judged_pairs
from pipeline.retrieval.scores import DIRECTIONS, System
from pipeline.storage import store

FIGURES = ("judged_spearman", "judged_kendall", "i2t_ndcg_judged", "t2i_ndcg_judged")


class Judgements(NamedTuple):
    """Pairs that people judged, each once: the mean of its lines."""

    name: str
    image_ids: list[str]
    caption_ids: list[str]
    relevance_P: np.ndarray  # in [0, 1]: the file's lowest score to its highest
    scale: tuple[float, float]


def read(uri: str) -> Judgements:
    """The pairs of a CSV with the columns image_id, caption_id and score."""
    lines = judged_pairs.read_pairs(uri)
    if lines[0][0] != "image":
        raise InputError(f"{uri} judges pairs of captions; expected image_id,caption_id,score")
    scores = [score for *_, score in lines]
    scale = min(scores), max(scores)
    if scale[0] == scale[1]:
        raise InputError(f"{uri} gives every pair {scale[0]:g}; judge pairs that differ")
    of_pair: dict[tuple[str, str], list[float]] = {}
    for _, image_id, caption_id, score in lines:
        of_pair.setdefault((image_id, caption_id), []).append(score)
    relevance_P = (np.array([np.mean(s) for s in of_pair.values()]) - scale[0]) / np.diff(scale)
    images, captions = zip(*of_pair, strict=True)
    return Judgements(store.name_of(uri), list(images), list(captions), relevance_P, scale)


def measure(system: System, people: Judgements, resamples: int = 1000) -> Result:
    """Agreement over all judged pairs of a gallery, and NDCG of each query's judged candidates."""
    items = system.items
    images, texts = items.rows("i2t")
    pairs = zip(people.image_ids, people.caption_ids, strict=True)
    known_P = np.array([image in images and text in texts for image, text in pairs])
    image_P = np.array(people.image_ids)[known_P]
    text_P = np.array(people.caption_ids)[known_P]
    relevance_P = people.relevance_P[known_P]
    rows = np.array([images[i] for i in image_P], int), np.array([texts[t] for t in text_P], int)
    score_P = system.of_pairs(*rows)
    if not (scored_P := (score_P > -torch.inf).numpy()).all():  # the others are on no list
        image_P, text_P, relevance_P = image_P[scored_P], text_P[scored_P], relevance_P[scored_P]
        score_P = score_P[scored_P]
    if len(np.unique(relevance_P)) < 2:
        raise InputError(
            f"of the {len(known_P):,} pairs of {people.name} {len(image_P):,} are of this gallery, "
            f"whose first image is {items.image_ids[:1]} and caption {items.text_ids[:1]}; "
            "give judgements that differ, of these"
        )
    weight_RP = agreement.resamples(image_P, resamples, intervals.SEED)
    rho_R = agreement.measured(score_P.numpy(), relevance_P, weight_RP, 1.0)["spearman"]
    tau = metrics.kendall_tau(score_P[None], torch.from_numpy(relevance_P)[None])
    ranking = {}
    for direction, query_P in zip(DIRECTIONS, (image_P, text_P), strict=True):
        owner_P = items.images_of(direction, query_P)
        queries = _graded(query_P, owner_P, score_P.numpy(), relevance_P)
        if len(queries.query_ids):
            ranking[direction] = queries
    rho, *ends = agreement.interval(rho_R)
    found = {"judged_spearman": rho, "judged_kendall": tau.item(), **intervals.figures(ranking)}
    between = {"judged_spearman": ends, **intervals.bootstrap(ranking, resamples)}
    about = Protocol(
        protocol="judgements",
        file=people.name,
        pairs=len(image_P),
        pairs_left_out=len(people.image_ids) - len(image_P),
        images=len(np.unique(image_P)),
        captions=len(np.unique(text_P)),
        scale=list(people.scale),
        queries={direction: len(queries.query_ids) for direction, queries in ranking.items()},
        gain=GAIN,
    )
    known = [name for name in FIGURES if np.isfinite(found.get(name, np.nan))]
    between = {name: between[name] for name in known if name in between}
    return Result("judgements", {name: found[name] for name in known}, between, about)


def _graded(query_P, image_P, score_P, relevance_P) -> Queries:
    """NDCG of every query whose candidates people judged differently."""
    queries, first_Q, of_P = np.unique(query_P, return_index=True, return_inverse=True)
    order = np.argsort(of_P, kind="stable")
    count_Q = np.bincount(of_P)
    cells = of_P[order], np.arange(len(order)) - np.repeat(count_Q.cumsum() - count_Q, count_Q)
    score_QC = np.zeros((len(queries), count_Q.max()))
    relevance_QC, mask_QC = np.zeros_like(score_QC), np.zeros_like(score_QC, bool)
    score_QC[cells], relevance_QC[cells], mask_QC[cells] = score_P[order], relevance_P[order], True
    parts = (torch.from_numpy(x) for x in (score_QC, relevance_QC))
    value_Q = metrics.ndcg(*parts, mask_QN=torch.from_numpy(mask_QC)).numpy()
    kept_Q = relevance_QC.max(1) > np.where(mask_QC, relevance_QC, 1).min(1)
    return Queries(queries[kept_Q], image_P[first_Q][kept_Q], {"ndcg_judged": value_Q[kept_Q]})
