"""The report's figures: training curves, the spread of relevance, what of it is found."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.evaluation.graded_relevance import GradedRelevance
from pipeline.reports import render
from pipeline.reports.render import Figure

DEPTH = 10  # results of a query that count as found
QUERIES = 500  # a model and direction, evenly spaced, whose results are counted
BINS = 10  # of relevance
FEWEST = 30  # pairs in a bin that is drawn
BLOCK = 100  # queries counted at a time


def curves(histories: dict[str, list[dict]]) -> Iterator[Figure]:
    """Loss and validation by step, a line a model, from the records of their trainings."""

    def lines(key: str, label: str):
        def draw(axes) -> None:
            for name, records in histories.items():
                points = [(r["step"], r[key]) for r in records if key in r]
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel(label)
            axes.legend(frameon=False, fontsize=8)

        return draw

    yield Figure("loss", render.figure(lines("train/loss", "loss")), "Training loss")
    if all(any("val/rsum" in record for record in records) for records in histories.values()):
        svg = render.figure(lines("val/rsum", "rSum"))
        yield Figure("val", svg, "rSum on val after every epoch")


def spread(histograms: dict, caption: str, said: str = "share of pairs") -> Figure:
    """How label relevance is spread, over negatives and over held-out positives."""
    pairs = {
        "annotated negatives": histograms["histogram_negatives"],
        "positives (a caption against its siblings)": histograms["histogram_positives"],
    }
    return Figure("relevance", render.figure(shares(pairs, said)), caption)


def shares(counts_by_name: dict[str, list], label: str = "share"):
    """What draws histograms over [0, 1], each as shares of its sum."""

    def draw(axes) -> None:
        for name, given in counts_by_name.items():
            counts = np.array(given, float)
            if counts.sum():
                edges = np.linspace(0, 1, len(counts) + 1)
                axes.stairs(counts / counts.sum(), edges, label=name, fill=True, alpha=0.55)
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the legend
        axes.set_xlabel("relevance")
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=8)

    return draw


def recall(rankings: dict[str, pa.Table], relevance: GradedRelevance) -> Figure:
    """Recall by relevance: a model that knows shades finds the more, the more relevant they are."""
    curves = {label: recall_by_relevance(of_one, relevance) for label, of_one in rankings.items()}

    def draw(axes) -> None:
        middles = (np.arange(BINS) + 0.5) / BINS
        for label, recall_B in curves.items():
            style = "--" if label.endswith("re-ranked") else "-"
            known = np.isfinite(recall_B)
            points = middles[known], recall_B[known], style
            axes.plot(*points, marker=".", label=label, linewidth=1.4)
        chance = DEPTH / len(relevance.captions.image_ids)
        axes.axhline(chance, linewidth=0.8, linestyle=":", color="gray", label="chance")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("relevance of an image to the caption")
        axes.set_ylabel(f"share found among the first {DEPTH}")
        axes.legend(frameon=False, fontsize=8)

    kind = "true relevance" if relevance.facts is not None else f"relevance by {relevance.encoder}"
    caption = f"Recall by relevance: captions as queries, {kind}"
    return Figure("recall", render.figure(draw), caption)


def recall_by_relevance(ranked: pa.Table, relevance: GradedRelevance) -> np.ndarray:
    """Of the images of each bin of relevance, the share (BINS,) found early; nan where few are."""
    step = -(-len(ranked) // QUERIES)
    rows = ranked.take(list(range(0, len(ranked), step)))
    column = {image_id: i for i, image_id in enumerate(relevance.captions.image_ids)}
    there, found = np.zeros(BINS), np.zeros(BINS)
    for start in range(0, len(rows), BLOCK):
        part = rows.slice(start, BLOCK)
        r_QN = relevance.best_known("t2i", part["query_id"].to_pylist()).numpy()
        bins_QN = np.minimum((r_QN * BINS).astype(np.int64), BINS - 1)
        there += np.bincount(bins_QN.ravel(), minlength=BINS)
        for bins_N, candidates in zip(bins_QN, part["candidate_id"].to_pylist(), strict=True):
            first = [column[candidate] for candidate in candidates[:DEPTH]]
            found += np.bincount(bins_N[first], minlength=BINS)
    return np.where(there >= FEWEST, found / np.maximum(there, 1), np.nan)
