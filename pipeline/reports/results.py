"""The results of a run folder's models, as tables."""

import contextlib
import re
from typing import NamedTuple

import numpy as np

from pipeline.errors import StageMissing
from pipeline.evaluation import evaluate
from pipeline.evaluation.results import RECALLS, recalls
from pipeline.storage import run_folder, store
from schemas.settings import Recipe

COLUMNS = {
    "i2t_R_at_1": "i2t R@1",
    "i2t_R_at_5": "R@5",
    "i2t_R_at_10": "R@10",
    "t2i_R_at_1": "t2i R@1",
    "t2i_R_at_5": "R@5",
    "t2i_R_at_10": "R@10",
    "rsum": "rSum",
    "i2t_MedR": "MedR i2t",
    "t2i_MedR": "t2i",
    "i2t_ndcg_truth": "true NDCG i2t",
    "t2i_ndcg_truth": "t2i",
    "i2t_ndcg_label": "label NDCG i2t",
    "t2i_ndcg_label": "t2i",
}

LOWER_IS_BETTER = {"i2t_MedR", "t2i_MedR"}

SEEDED = re.compile(r"(?P<model>.+)\.seed\d+(?P<rest>, re-ranked)?")  # `halftone run --seeds`


class Result(NamedTuple):
    """The metrics of a model, or of a model re-ranked."""

    label: str
    metrics: dict[str, float]
    protocol: dict
    intervals: dict[str, list[float]] = {}  # [lowest, highest] of those metrics that have one


def results(root: str, names: list[str]) -> list[Result]:
    """Every ranking there is: each model, then re-ranked."""
    out = []
    for name in names:
        for stage, label in (("evaluate", name), ("reranked", f"{name}, re-ranked")):
            uri = run_folder.folder(root, stage, name, "metrics.json")
            if store.exists(uri):
                found = store.read_json(uri)
                intervals = found.get("intervals", {})
                out.append(Result(label, found["metrics"], found["protocol"], intervals))
    return out


def beside(root: str, models: list[tuple[str, Recipe]], names: list[str]) -> list[str]:
    """Of a run folder's models (name, settings), those that stand in one table with `names`.

    They were measured by the same protocol, and nothing they depend on has changed since.
    """
    protocol, found = _protocol(root, names[-1]), []
    for name, recipe in models:
        if name not in names and _protocol(root, name) == protocol:
            with contextlib.suppress(StageMissing):
                if evaluate.plan(recipe, root, name).complete:
                    found.append(name)
    return found


def _protocol(root: str, name: str) -> dict:
    """By what a model was measured, without what is the model's own."""
    uri = run_folder.folder(root, "evaluate", name, "metrics.json")
    protocol = store.read_json(uri)["protocol"] if store.exists(uri) else {}
    return {key: value for key, value in protocol.items() if key != "labels_trained_on"}


def protocol_line(protocol: dict) -> str:
    """The protocol in words: every table carries it."""
    p = protocol
    without = " without {images:,} images, {captions:,} captions excluded;"
    excluded = without.format(**p["excluded"]) if "excluded" in p else ""
    beside = f", {p['pool']}" if "pool" in p else ""
    if "bank_images" in p:
        beside += f" (bank of {p['bank_images']:,} train images)"
    used = " (training used it too)" if p.get("labels_trained_on") else ""
    return (
        f"{p['data']} {p['split']}:{excluded} {p['images']:,} images, {p['captions']:,} captions "
        f"({p['captions_per_image']:g} an image). R@K in percent; ties: {p['ties']}. "
        f"NDCG@{p['ndcg_at']}, gain {p['gain']}; label relevance by {p['label_encoder']}{used}, "
        f"map {p['label_map']}. Re-ranking: {p.get('rerank', 'none')}{beside}."
    )


def table(root: str, names: list[str]) -> tuple[list[str], list[list[dict]]]:
    """Column titles and rows of {text, interval, best}; the best as trained, and re-ranked."""
    found = results(root, names)
    shown = [key for key in COLUMNS if any(key in result.metrics for result in found)]
    rows = []
    for result in found:
        rivals = [r.metrics for r in found if r.protocol["rerank"] == result.protocol["rerank"]]
        row = [{"text": _label(result, found), "interval": "", "best": False}]
        for key in shown:
            pick = min if key in LOWER_IS_BETTER else max
            values = [metrics[key] for metrics in rivals if key in metrics]
            best = len(values) > 1 and result.metrics.get(key) == pick(values)
            row.append({**_cell(result, key), "best": best})
        rows.append(row)
    return [""] + [COLUMNS[key] for key in shown], rows


def _label(result: Result, found: list[Result]) -> str:
    """A row's label, with the re-ranking's method where there are several in the table."""
    method = result.protocol["rerank"]
    several = len({r.protocol["rerank"] for r in found} - {"none"}) > 1
    return f"{result.label}: {method}" if several and method != "none" else result.label


def _cell(result: Result, key: str) -> dict:
    if key not in result.metrics:
        return {"text": "–", "interval": ""}
    digits = 3 if "ndcg" in key else 1
    low_high = result.intervals.get(key, ())
    interval = "–".join(f"{value:.{digits}f}" for value in low_high)
    return {"text": f"{result.metrics[key]:.{digits}f}", "interval": interval}


def short_table(root: str, names: list[str]) -> tuple[list[str], list[list[str]]]:
    """The table for a terminal: recalls of a direction in one cell."""
    found = results(root, names)
    truth = any("i2t_ndcg_truth" in result.metrics for result in found)
    graded = "truth" if truth else "label"
    title = f"{'true' if truth else 'label'} NDCG@{found[0].protocol['ndcg_at']}"
    columns = ["", *RECALLS, "rSum", f"{title} i2t", "t2i"]
    rows = []
    for result in found:
        label, m = _label(result, found), result.metrics
        ndcg = [f"{m[f'{direction}_ndcg_{graded}']:.3f}" for direction in ("i2t", "t2i")]
        rows.append([label, *recalls(m), f"{m['rsum']:.1f}", *ndcg])
    return columns, rows


def seeds_table(root: str, names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Mean ± standard deviation over the training seeds of models named NAME.seedN."""
    groups: dict[str, list[Result]] = {}
    for result in results(root, names):
        if found := SEEDED.fullmatch(result.label):
            groups.setdefault(found["model"] + (found["rest"] or ""), []).append(result)
    groups = {label: found for label, found in groups.items() if len(found) > 1}
    measures = [("rSum", "rsum", 1)]
    for graded, title in (("label", "label NDCG"), ("truth", "true NDCG")):
        measures += [(f"{title} {d}", f"{d}_ndcg_{graded}", 3) for d in ("i2t", "t2i")]
    measures = [
        (title, key, digits)
        for title, key, digits in measures
        if groups and all(key in r.metrics for found in groups.values() for r in found)
    ]
    rows = []
    for label, found in groups.items():
        cells = [np.array([r.metrics[key] for r in found]) for _, key, _ in measures]
        told = [
            f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"
            for values, (*_, digits) in zip(cells, measures, strict=True)
        ]
        rows.append([label, str(len(found)), *told])
    return ["", "seeds", *(title for title, *_ in measures)], rows
