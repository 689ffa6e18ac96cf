"""Choosing the settings of a chain of methods on val, and its scores for any queries."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from pipeline.evaluation.intervals import DEPTHS
from pipeline.formulas.metrics import recall_at
from pipeline.reranking import baselines
from pipeline.reranking.leaprr.model import LeaPRR, leaprr
from pipeline.reranking.problem import SIDES, Problem, View


def views(problem: Problem, direction: str, steps: list[dict], model=None) -> list[View]:
    """A direction's views after the steps of a chain, each {"method", direction: its settings}."""
    found = list(problem.views(direction))
    for step in steps:
        if step["method"] == "leaprr":
            found = [view.after(leaprr, model=model) for view in found]
        else:
            method = baselines.METHODS[step["method"]]
            found = [view.after(method, **step[direction]) for view in found]
    return found


def recalls(found: list[View]) -> float:
    """R@1 + R@5 + R@10 in percent (0-300) over the views' queries."""
    return tried(found, [lambda view: view])[0]


def sums(problem: Problem, steps: list[dict], model=None) -> list[float]:
    """The recalls (0-300) of image queries and of caption queries after the steps of a chain."""
    return [recalls(views(problem, direction, steps, model)) for direction in SIDES]


def tried(found: list[View], ways: Sequence[Callable[[View], View]]) -> list[float]:
    """The recalls (0-300) of several ways to go on from the same views, part by part together."""
    totals, count = [0.0] * len(ways), 0
    for view in found:
        after = [way(view) for way in ways]
        for rows_Q in view.parts(view.queries_Q):
            positive_QN = view.positives(rows_Q)
            for number, way in enumerate(after):
                scores_QN = way.scores(rows_Q)
                hits = (float(recall_at(scores_QN, positive_QN, k).nansum()) for k in DEPTHS)
                totals[number] += sum(hits)
            count += len(rows_Q)
    return [100 * total / max(1, count) for total in totals]


def choose(method: str, problem: Problem | None, before: list[dict], betas) -> tuple[dict, list]:
    """The step whose settings have the best recalls on val, and all trials.

    Without val the middle ones of the grid: nothing is chosen on test.
    """
    grid = baselines.grid(beta=betas) if method in baselines.SOFTMAXES else baselines.GRIDS[method]
    step: dict = {"method": method}
    trials: list[dict] = []
    for direction in SIDES:
        if problem is None:
            step[direction] = grid[len(grid) // 2]
            continue
        ways = [partial(View.after, method=baselines.METHODS[method], **s) for s in grid]
        found = tried(views(problem, direction, before), ways)
        step[direction] = grid[max(range(len(grid)), key=found.__getitem__)]
        for setting, value in zip(grid, found, strict=True):
            of = {"direction": direction, "method": method}
            trials.append({**of, "setting": setting, "val": value})
    return step, trials


def chain(methods: list[str], problem: Problem | None, betas) -> tuple[list[dict], list[dict]]:
    """The steps of a chain of methods, each chosen after those before it, and all trials."""
    steps, trials = [], []
    for method in methods:
        step, found = choose(method, problem, steps, betas)
        steps.append(step)
        trials += found
    return steps, trials


class Reranker:
    """A fitted chain applied to a problem: scores (Q, N) of any queries of its gallery."""

    def __init__(self, problem: Problem, steps: list[dict], model: LeaPRR | None = None):
        self.found = {d: views(problem, d, steps, model) for d in SIDES}

    @torch.inference_mode()
    def scores(self, direction: str, rows_Q: torch.Tensor) -> torch.Tensor:
        """Scores (Q, N) of rows of the asking side, in the order of the gallery."""
        gallery_N = self.found[direction][0].gallery_N
        out_QN = torch.empty(len(rows_Q), len(gallery_N), device=gallery_N.device)
        for view in self.found[direction]:
            mine_Q = torch.isin(rows_Q, view.queries_Q)
            if mine_Q.any():
                out_QN[mine_Q] = view.scores(rows_Q[mine_Q])
        return out_QN
