"""Tables of results: column titles and rows, for a terminal and for the report."""

import re

import numpy as np

from pipeline.evaluation import compare
from pipeline.evaluation.results import Result, figure, interval
from pipeline.labels import calibration_report
from pipeline.labels.calibrate import Candidate
from pipeline.reports.pictures import Hit

Table = tuple[list[str], list[list[str]]]

RECALLS = ["i2t R@1   5    10", "t2i R@1   5    10"]  # a direction in one cell
COSTS = {"ms_per_query": "ms a query", "peak_mb": "MB"}
AGREEMENT = {"spearman": "Spearman", "pearson": "Pearson", "auc": "AUC", "error": "error"}
SHADES = "○◔◑◕●"  # of relevance, from 0 to 1
SEEDED = re.compile(r"(?P<model>.+)\.seed\d+(?P<rest>, re-ranked)?")  # `halftone run --seeds`


def _recalls(metrics: dict[str, float]) -> list[str]:
    """A cell for each direction: R@1, R@5 and R@10 in percent."""
    cells = []
    for direction in ("i2t", "t2i"):
        names = [f"{direction}_R_at_{k}" for k in (1, 5, 10)]
        cells.append(" ".join(f"{figure(name, metrics[name]):>4}" for name in names))
    return cells


# ---- one system --------------------------------------------------------------------------------


def figures(result: Result, title: str = "value") -> Table:
    """A row a figure: its name, value and interval."""
    found = result.metrics.items()
    rows = [[name, figure(name, value), interval(result, name) or "–"] for name, value in found]
    return ["", title, "95 %"], rows


# ---- several models ----------------------------------------------------------------------------


def _labels(results: list[Result]) -> list[str]:
    """The rows' labels, with the re-ranking's method where there are several in the table."""
    methods = [r.protocol.rerank for r in results]
    several = len(set(methods) - {"none"}) > 1
    return [
        f"{result.label}: {method}" if several and method != "none" else result.label
        for result, method in zip(results, methods, strict=True)
    ]


def models_in_short(results: list[Result]) -> Table:
    """The table for a terminal: recalls of a direction in one cell."""
    truth = any("i2t_ndcg_truth" in result.metrics for result in results)
    ndcg = [f"{direction}_ndcg_{'truth' if truth else 'label'}" for direction in ("i2t", "t2i")]
    title = f"{'true' if truth else 'label'} NDCG@{results[0].protocol.ndcg_at}"
    rows = [
        [label, *_recalls(r.metrics), *(figure(key, r.metrics[key]) for key in ("rsum", *ndcg))]
        for r, label in zip(results, _labels(results), strict=True)
    ]
    return ["", *RECALLS, "rSum", f"{title} i2t", "t2i"], rows


def seeds(results: list[Result]) -> Table:
    """Mean ± standard deviation over the training seeds of models named NAME.seedN."""
    groups: dict[str, list[dict[str, float]]] = {}
    for result in results:
        if named := SEEDED.fullmatch(result.label):
            label = named["model"] + (named["rest"] or "")
            groups.setdefault(label, []).append(result.metrics)
    groups = {label: found for label, found in groups.items() if len(found) > 1}
    titles = {"rsum": "rSum"}
    for graded, title in (("label", "label NDCG"), ("truth", "true NDCG")):
        titles |= {f"{d}_ndcg_{graded}": f"{title} {d}" for d in ("i2t", "t2i")}
    every = [metrics for found in groups.values() for metrics in found]
    shown = [key for key in titles if every and all(key in metrics for metrics in every)]
    rows = []
    for label, found in groups.items():
        values = {key: np.array([metrics[key] for metrics in found]) for key in shown}
        told = [f"{figure(k, v.mean())} ± {figure(k, v.std(ddof=1))}" for k, v in values.items()]
        rows.append([label, str(len(found)), *told])
    return ["", "seeds", *(titles[key] for key in shown)], rows


def methods(results: list[Result], pool: str, best: str, val: float) -> Table:
    """Re-ranking methods side by side; a star at the best, of so much (rSum) on val."""
    graded = all("i2t_ndcg_label" in result.metrics for result in results)
    rows = []
    for r in results:
        row = [r.label + (" *" if r.label == best else ""), *_recalls(r.metrics)]
        row.append(figure("rsum", r.metrics["rsum"]))
        if graded:
            row += [figure(k, r.metrics[k]) for k in ("i2t_ndcg_label", "t2i_ndcg_label")]
        else:
            row.append(interval(r, "rsum"))
        row += [figure(k, r.cost[k]) if k in r.cost else "-" for k in COSTS]
        rows.append(row)
    star = "best on val" if val >= 0 else "the first: none has a figure on val"
    more = ["label NDCG i2t", "t2i"] if graded else ["95 %"]
    return [f"{pool}; * {star}", *RECALLS, "rSum", *more, *COSTS.values()], rows


def compared(base: compare.Model, others: list[compare.Model]) -> Table:
    """A row a figure; the base with its interval, the others' differences and p."""
    columns = ["", base.label, *(part for r in others for part in (r.label, "difference", "p"))]
    tests = [compare.p_values(base, other) for other in others]
    rows = []
    for name, value in base.metrics.items():
        row = [name, _with_interval(base, name)]
        for other, p in zip(others, tests, strict=True):
            if name in other.metrics:
                difference = figure(name, other.metrics[name] - value, "+")
                row += [_with_interval(other, name), difference, _p(p.get(name))]
            else:
                row += ["–", "–", "–"]
        rows.append(row)
    return columns, rows


def _with_interval(result: Result, name: str) -> str:
    return f"{figure(name, result.metrics[name])} {interval(result, name)}".rstrip()


def _p(p: float | None) -> str:
    if p is None:
        return "–"
    return f"{p:.4f}" if p > 1.5 / compare.PERMUTATIONS else f"< {2 / compare.PERMUTATIONS:g}"


# ---- data, labels, search ----------------------------------------------------------------------


def duplicates(found: dict[tuple[str, str], tuple[int, str]]) -> Table:
    """Pairs by kind and by split, each with an example."""
    rows = [[*where, f"{count:,}", example] for where, (count, example) in found.items()]
    return ["kind", "in", "pairs", "such as"], rows


def calibration(found: list[Candidate]) -> Table:
    """An encoder's maps one below the other, what each agrees with people by, and what of it."""
    rows = []
    for candidate, maps in zip(found, calibration_report.numbers(found).values(), strict=True):
        for name, measures in maps.items():
            cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*measures[key]) for key in AGREEMENT]
            rows.append([candidate.name, name, *cells, calibration_report.note(candidate, name)])
    return ["encoder", "map", *AGREEMENT.values(), ""], rows


def hits(found: list[Hit]) -> Table:
    """Search results, the relevance as a shade where it is known."""
    rows = [[f"{hit.score:.3f}", hit.image_id, hit.text] for hit in found]
    columns = ["score", "image", "caption"]
    if not found or any(hit.relevance is None for hit in found):
        return columns, rows
    shades = [[SHADES[round(h.relevance * 4)], f"{h.relevance:.2f}"] for h in found]
    return ["", "relevance", *columns], [[*s, *row] for s, row in zip(shades, rows, strict=True)]
