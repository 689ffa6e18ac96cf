"""Shades: how relevance is spread, how true it is, and what of it each system finds.

Legend of the shape suffixes: Q queries, B bins of relevance, M images, N captions, R resamples.
"""

import numpy as np
import torch

from pipeline.evaluation.graded_relevance import GradedRelevance
from pipeline.labels.agreement import draw_images
from pipeline.reports import render
from pipeline.reports.pictures import spaced
from pipeline.reports.render import Figure
from pipeline.reports.sections.systems import System

DEPTH = 10  # results of a query that count as found
QUERIES = 500  # of a system, evenly spaced, whose results are counted
BINS = 10  # of relevance
FEWEST = 30  # pairs in a bin that is drawn
BLOCK = 100  # queries counted at a time
PAIRS = 250_000  # whose labels are held against the truth
RESAMPLES = 400
MIDDLES = (np.arange(BINS) + 0.5) / BINS


def _bins(relevance: torch.Tensor) -> np.ndarray:
    return np.minimum((relevance.numpy() * BINS).astype(np.int64), BINS - 1)


def _name(bin_: int) -> str:
    return f"{bin_ / BINS:.1f}–{(bin_ + 1) / BINS:.1f}"


# ---- what is found -----------------------------------------------------------------------------


def recall(systems: list[System], relevance: GradedRelevance) -> Figure:
    """Recall by relevance: a model that knows shades finds the more, the more relevant they are."""
    found = found_by_relevance(systems, relevance)
    there_B = next(iter(found.values()))[0].sum(0)

    def draw(axes) -> None:
        curve, count = axes
        for system in systems:
            mean_B, low_B, high_B = shares(*found[system.label])
            known = np.isfinite(mean_B)
            x = MIDDLES[known]
            curve.plot(
                x, mean_B[known], marker=".", label=system.label, linewidth=1.4, **system.line
            )
            band = {
                "color": system.colour,
                "alpha": 0.13,
                "linewidth": 0,
                "gid": system.line["gid"],
            }
            curve.fill_between(x, low_B[known], high_B[known], **band)
        chance = DEPTH / relevance.items.counts[0]
        curve.axhline(chance, linewidth=0.8, linestyle=":", color="gray", label="chance")
        curve.set_ylim(bottom=0)
        curve.set_ylabel(f"share found among the first {DEPTH}")
        curve.legend(frameon=False, fontsize=8)
        count.bar(MIDDLES, np.maximum(there_B, 0.5), width=0.09, color="gray", alpha=0.5)
        count.set_yscale("log")
        count.set_ylabel("pairs")
        count.set_xlim(0, 1)
        count.set_xlabel("relevance of an image to the caption")

    kind = "true relevance" if relevance.facts is not None else f"relevance by {relevance.encoder}"
    caption = (
        f"Recall by relevance: captions as queries, {kind}. Bands: the middle 95 % of a bootstrap "
        f"over images; below, how many pairs there are. Bins of fewer than {FEWEST} are left out"
    )
    rows = []
    for system in systems:
        for b, (mean, low, high) in enumerate(zip(*shares(*found[system.label]), strict=True)):
            if np.isfinite(mean):
                told = f"{mean:.4f}", f"{low:.4f}–{high:.4f}", f"{there_B[b]:,.0f}"
                rows.append([system.label, _name(b), *told])
    numbers = ["system", "relevance", "share found", "95 %", "pairs"], rows
    return Figure("recall", render.figure(draw, panels=2, heights=(4, 1)), caption, numbers)


def found_by_relevance(
    systems: list[System], relevance: GradedRelevance
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images of each bin of relevance (Q, BINS), those found early, and the queries' images (Q,).

    By system's label, of captions as queries, evenly spaced among those that all answer.
    """
    asked = systems[0].measured.queries["t2i"]
    common = [set(system.measured.queries["t2i"].query_ids) for system in systems[1:]]
    known = np.array([all(i in ids for ids in common) for i in asked.query_ids], bool)
    rows = np.flatnonzero(known)[spaced(int(known.sum()), QUERIES)]
    ids, owners = asked.query_ids[rows].tolist(), asked.image_ids[rows]
    lists = {system.label: system.lists("t2i", ids) for system in systems}
    items, first = relevance.items, {label: _first(of, ids) for label, of in lists.items()}
    texts, images = (
        items.find("text", ids),
        items.find("image", {i for f in first.values() for of in f for i in of}),
    )
    row_Q = np.array([texts[query_id] for query_id in ids], np.int64)
    there_QB = np.zeros((len(ids), BINS))
    found_QB = {system.label: np.zeros((len(ids), BINS)) for system in systems}
    for start in range(0, len(ids), BLOCK):
        part = slice(start, start + BLOCK)
        for span in relevance.spans("t2i"):
            bins_QN = _bins(relevance.best_known("t2i", row_Q[part], span))  # once for all systems
            for row, bins_N in enumerate(bins_QN, start):
                there_QB[row] += np.bincount(bins_N, minlength=BINS)
                for label, of_system in first.items():
                    rows = np.array([images[image_id] for image_id in of_system[row]], np.int64)
                    here = rows[(rows >= span.start) & (rows < span.stop)] - span.start
                    found_QB[label][row] += np.bincount(bins_N[here], minlength=BINS)
    return {label: (there_QB, of_system, owners) for label, of_system in found_QB.items()}


def _first(lists: dict[str, dict], ids: list[str]) -> list[list[str]]:
    """The first candidates of each query."""
    return [lists[query_id]["candidate_id"][:DEPTH] for query_id in ids]


def shares(there_QB, found_QB, owner_Q) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share found (BINS,) and the ends of its interval; NaN where pairs are few."""
    images, row_Q = np.unique(owner_Q, return_inverse=True)
    there_MB, found_MB = np.zeros((2, len(images), BINS))
    np.add.at(there_MB, row_Q, there_QB)
    np.add.at(found_MB, row_Q, found_QB)
    weight_RM = draw_images(len(images), RESAMPLES, 0).astype(float)
    few = there_MB.sum(0) < FEWEST
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_B = found_MB.sum(0) / there_MB.sum(0)
        drawn_RB = (weight_RM @ found_MB) / (weight_RM @ there_MB)
    drawn_RB[:, few] = np.nan
    ends = np.full((2, BINS), np.nan)
    ends[:, ~few] = np.nanpercentile(drawn_RB[:, ~few], (2.5, 97.5), axis=0)
    return np.where(few, np.nan, mean_B), *ends


# ---- how true labels are -----------------------------------------------------------------------


def against_truth(relevance: GradedRelevance) -> Figure | None:
    """The true relevance of pairs by what the labels say; None where nobody knows it."""
    if relevance.facts is None:
        return None
    count, captions = relevance.items.counts
    images = spaced(count, max(2, PAIRS // captions))
    count_MB, sum_MB = np.zeros((2, len(images), BINS))
    for start in range(0, len(images), BLOCK):
        part = images[start : start + BLOCK]
        for span in relevance.spans("i2t"):
            owners = relevance.captions.images_of(np.arange(span.start, span.stop))
            graded, others_MN = relevance("i2t", part, span), part[:, None] != owners
            bins_MN, truth_MN = _bins(graded["ndcg_label"]), graded["ndcg_truth"].numpy()
            for row, others_N in enumerate(others_MN):
                bins_N, truth_N = bins_MN[row][others_N], truth_MN[row][others_N]
                count_MB[start + row] += np.bincount(bins_N, minlength=BINS)
                sum_MB[start + row] += np.bincount(bins_N, truth_N, minlength=BINS)
    owner = np.arange(len(images))
    mean_B, low_B, high_B = shares(count_MB, sum_MB, owner)
    known = np.isfinite(mean_B)
    count_B = count_MB.sum(0)

    def draw(axes) -> None:
        curve, count = axes
        ends = np.abs(np.stack([low_B, high_B]) - mean_B)[:, known]
        style = {"marker": ".", "color": "#0072b2", "linewidth": 1.4, "capsize": 3}
        curve.errorbar(MIDDLES[known], mean_B[known], ends, **style)
        curve.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=0.8)
        curve.set_ylim(0, 1)
        curve.set_ylabel("mean true relevance")
        count.bar(MIDDLES, np.maximum(count_B, 0.5), width=0.09, color="gray", alpha=0.5)
        count.set_yscale("log")
        count.set_ylabel("pairs")
        count.set_xlim(0, 1)
        count.set_xlabel(f"relevance by {relevance.encoder}")

    caption = (
        f"Labels against the truth: images and captions of others, {len(images):,} images evenly "
        "spaced. Bars: the middle 95 % of a bootstrap over images; dotted: labels that are true"
    )
    rows = [
        [_name(b), f"{mean_B[b]:.3f}", f"{low_B[b]:.3f}–{high_B[b]:.3f}", f"{count_B[b]:,.0f}"]
        for b in np.flatnonzero(known).tolist()
    ]
    numbers = ["label", "mean true relevance", "95 %", "pairs"], rows
    return Figure("truth", render.figure(draw, panels=2, heights=(4, 1)), caption, numbers)
