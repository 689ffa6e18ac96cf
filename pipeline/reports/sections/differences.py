"""Query by query: how often another system places a query's positive higher, and lower."""

import numpy as np

from pipeline.evaluation.intervals import Queries
from pipeline.reports.sections.systems import System

WAYS = {"i2t": "images", "t2i": "captions"}


def table(base: System, systems: list[System]) -> tuple[list[str], list[list[str]]]:
    """A row a system: shares of the queries that it places higher, alike and lower than `base`."""
    columns = [f"against {base.label}"]
    columns += [f"{what} {how}" for what in WAYS.values() for how in ("higher", "alike", "lower")]
    rows = []
    for system in systems:
        if system is base:
            continue
        cells = [system.label]
        for way in WAYS:
            cells += _shares(base.measured.queries[way], system.measured.queries[way])
        rows.append(cells)
    return columns, rows


def _shares(a: Queries, b: Queries) -> list[str]:
    """Of the queries that both answered, in percent."""
    _, of_a, of_b = np.intersect1d(a.query_ids, b.query_ids, return_indices=True)
    before, after = a.values["rank"][of_a], b.values["rank"][of_b]
    if not len(before):
        return ["–"] * 3
    counts = [(after < before).mean(), (after == before).mean(), (after > before).mean()]
    return [f"{100 * share:.1f} %" for share in counts]
