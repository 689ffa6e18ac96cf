"""The report's figures: training curves, the spread of relevance, what of it is found."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline.evaluation.graded_relevance import GradedRelevance, judge_of
from pipeline.labels.encoders import encoder_label
from pipeline.reports import render
from pipeline.storage import parquet, run_folder, store
from schemas.settings import Recipe

DEPTH = 10  # results of a query that count as found
QUERIES = 500  # a model and direction, evenly spaced, whose results are counted
BINS = 10  # of relevance
FEWEST = 30  # pairs in a bin that is drawn
BLOCK = 100  # queries counted at a time


@dataclass(frozen=True)
class Figure:
    """A drawing, and what it shows."""

    name: str
    svg: str
    caption: str


def figures(recipe: Recipe, root: str, names: list[str]) -> list[Figure]:
    """Training curves of all models, the spread of relevance, and recall by it."""
    return [*_curves(root, names), _histogram(recipe, root), _found(recipe, root, names)]


def rankings(folder: str, direction: str) -> pa.Table:
    """The rankings of a direction, of all shards, in order; empty where there are none."""
    index = run_folder.read_index(folder)
    tables = []
    for entry in index["pieces"] if index else []:
        table = parquet.read_table(store.join(folder, f"{entry['name']}.parquet"))
        table = table.replace_schema_metadata()
        mine = np.array(table["direction"].to_pylist()) == direction
        tables.append(table.filter(pa.array(mine)))
    return pa.concat_tables(tables) if tables else pa.table({})


def graded_of(recipe: Recipe, root: str, name: str) -> GradedRelevance:
    """Relevance of the evaluated split's queries to its candidates."""
    return GradedRelevance(judge_of(recipe, root))


def best_known(graded: GradedRelevance, direction: str, query_ids: list[str]) -> torch.Tensor:
    """Relevance (Q, N) to all candidates: the true one where it is known."""
    found = graded(direction, query_ids)
    return found.get("ndcg_truth", found["ndcg_label"])


def _curves(root: str, names: list[str]) -> Iterator[Figure]:
    """Loss and validation by step, a line a model."""
    history = {
        name: store.read_json(run_folder.folder(root, "train", name, "history.json"))["records"]
        for name in names
    }

    def lines(key: str, label: str):
        def draw(axes) -> None:
            for name, records in history.items():
                points = [(r["step"], r[key]) for r in records if key in r]
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel(label)
            axes.legend(frameon=False, fontsize=8)

        return draw

    yield Figure("loss", render.figure(lines("train/loss", "loss")), "Training loss")
    if all(any("val/rsum" in record for record in records) for records in history.values()):
        svg = render.figure(lines("val/rsum", "rSum"))
        yield Figure("val", svg, "rSum on val after every epoch")


def _histogram(recipe: Recipe, root: str) -> Figure:
    """How label relevance is spread, over negatives and over held-out positives."""
    folder = run_folder.folder(root, "label", encoder_label(recipe.embed.encoder))
    found = store.read_json(store.join(folder, "histograms.json"))
    split = found["splits"].get("train") or found["splits"][recipe.evaluate.split]

    def draw(axes) -> None:
        edges = np.array(found["edges"])
        for key, label in (
            ("histogram_negatives", "annotated negatives"),
            ("histogram_positives", "positives (a caption against its siblings)"),
        ):
            counts = np.array(split[key], float)
            if counts.sum():
                axes.stairs(counts / counts.sum(), edges, label=label, fill=True, alpha=0.55)
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the legend
        axes.set_xlabel("relevance")
        axes.set_ylabel("share of pairs")
        axes.legend(frameon=False, fontsize=8)

    caption = f"Relevance by {recipe.embed.encoder}, map {recipe.label.map}"
    return Figure("relevance", render.figure(draw), caption)


def _found(recipe: Recipe, root: str, names: list[str]) -> Figure:
    """Recall by relevance: a model that knows shades finds the more, the more relevant they are."""
    curves, images = {}, 0
    for name in names:
        graded = graded_of(recipe, root, name)
        images = len(graded.captions.image_ids)
        for stage, label in (("evaluate", name), ("reranked", f"{name}, re-ranked")):
            ranked = rankings(run_folder.folder(root, stage, name), "t2i")
            if len(ranked):
                curves[label] = recall_by_relevance(ranked, graded)

    def draw(axes) -> None:
        middles = (np.arange(BINS) + 0.5) / BINS
        for label, recall_B in curves.items():
            style = "--" if label.endswith("re-ranked") else "-"
            known = np.isfinite(recall_B)
            axes.plot(
                middles[known], recall_B[known], style, marker=".", label=label, linewidth=1.4
            )
        axes.axhline(DEPTH / images, linewidth=0.8, linestyle=":", color="gray", label="chance")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("relevance of an image to the caption")
        axes.set_ylabel(f"share found among the first {DEPTH}")
        axes.legend(frameon=False, fontsize=8)

    kind = "true relevance" if graded.facts is not None else f"relevance by {graded.encoder}"
    svg = render.figure(draw)
    return Figure("recall", svg, f"Recall by relevance: captions as queries, {kind}")


def recall_by_relevance(ranked: pa.Table, graded: GradedRelevance) -> np.ndarray:
    """Of the images of each bin of relevance, the share (BINS,) found early; nan where few are."""
    step = -(-len(ranked) // QUERIES)
    rows = ranked.take(list(range(0, len(ranked), step)))
    column = {image_id: i for i, image_id in enumerate(graded.captions.image_ids)}
    there, found = np.zeros(BINS), np.zeros(BINS)
    for start in range(0, len(rows), BLOCK):
        part = rows.slice(start, BLOCK)
        r_QN = best_known(graded, "t2i", part["query_id"].to_pylist()).numpy()
        bins_QN = np.minimum((r_QN * BINS).astype(np.int64), BINS - 1)
        there += np.bincount(bins_QN.ravel(), minlength=BINS)
        for bins_N, candidates in zip(bins_QN, part["candidate_id"].to_pylist(), strict=True):
            first = [column[candidate] for candidate in candidates[:DEPTH]]
            found += np.bincount(bins_N[first], minlength=BINS)
    return np.where(there >= FEWEST, found / np.maximum(there, 1), np.nan)
