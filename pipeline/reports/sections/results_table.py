"""The table of results: which figures differ beyond chance, and which do not."""

from dataclasses import dataclass

from pipeline.evaluation import compare
from pipeline.evaluation.results import figure, interval
from pipeline.reports.sections.systems import STAGES, System

# Groups of columns: name in metrics to title.
GROUPS = {
    "": {"rsum": "rSum"},
    **{
        title: {
            f"{way}_R_at_1": "R@1",
            f"{way}_R_at_5": "R@5",
            f"{way}_R_at_10": "R@10",
            f"{way}_MedR": "MedR",
            f"{way}_ndcg_truth": "NDCG, true",
            f"{way}_ndcg_label": "NDCG, labels",
        }
        for way, title in (("i2t", "image to text"), ("t2i", "text to image"))
    },
}
LOWER_IS_BETTER = {"i2t_MedR", "t2i_MedR"}
PERMUTATIONS = 2_000
LEVEL = 0.05  # p below which two rows count as different


@dataclass(frozen=True)
class Cell:
    """A figure, its interval, and how it stands among its block."""

    text: str
    interval: str = ""
    mark: str = ""  # best: told apart from all others; tied: not told apart from the best


@dataclass(frozen=True)
class Row:
    """A system's figures."""

    system: System
    cells: list[Cell]
    used: bool  # its training used the labels that it is measured against


@dataclass(frozen=True)
class Block:
    """Rows that compete: rankings of one kind."""

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class Table:
    """What the page shows of all systems."""

    groups: list[tuple[str, int]]  # title and number of columns
    columns: list[tuple[str, str]]  # name in metrics and title
    blocks: list[Block]

    @property
    def any_marks(self) -> bool:
        cells = (c for block in self.blocks for row in block.rows for c in row.cells)
        return any(cell.mark for cell in cells)

    @property
    def any_used(self) -> bool:
        return any(row.used for block in self.blocks for row in block.rows)


def table(systems: list[System]) -> Table:
    """The figures of all systems, those as trained and each re-ranking in blocks of their own."""
    shown = {
        group: {key: title for key, title in titles.items() if _known(key, systems)}
        for group, titles in GROUPS.items()
    }
    columns = [(key, title) for titles in shown.values() for key, title in titles.items()]
    rivals: dict[str, list[System]] = {}
    for system in systems:
        rivals.setdefault(_title(system), []).append(system)
    blocks = [Block(title, _rows(some, columns)) for title, some in rivals.items()]
    groups = [(group, len(titles)) for group, titles in shown.items() if titles]
    return Table(groups, columns, sorted(blocks, key=lambda b: b.title != STAGES["evaluate"]))


def _known(key: str, systems: list[System]) -> bool:
    return any(key in system.measured.metrics for system in systems)


def _title(system: System) -> str:
    protocol = system.measured.protocol
    if system.stage == "evaluate":
        return STAGES["evaluate"]
    return f"re-ranked: {protocol.rerank}, {protocol.pool}"


def _rows(rivals: list[System], columns: list[tuple[str, str]]) -> list[Row]:
    tests: dict[tuple[str, str], dict[str, float]] = {}

    def p_of(key: str, best: System, other: System) -> float | None:
        """Of the difference in one figure; the test of two systems is made once."""
        pair = best.label, other.label
        if pair not in tests:
            found = compare.p_values(best.measured, other.measured, PERMUTATIONS)
            tests[pair] = tests[pair[::-1]] = found
        return tests[pair].get(key)

    cells: dict[str, list[Cell]] = {system.label: [] for system in rivals}
    for key, _ in columns:
        marks = _marks(key, rivals, p_of)
        for system in rivals:
            measured = system.measured
            if key not in measured.metrics:
                cells[system.label].append(Cell("–"))
                continue
            text, ends = figure(key, measured.metrics[key]), interval(measured, key, "{}–{}")
            cells[system.label].append(Cell(text, ends, marks.get(system.label, "")))
    used = [bool(system.measured.protocol.labels_trained_on) for system in rivals]
    return [Row(s, cells[s.label], u) for s, u in zip(rivals, used, strict=True)]


def _marks(key: str, rivals: list[System], p_of) -> dict[str, str]:
    """The mark of each system in a column; none where there is no test of the difference."""
    known = [system for system in rivals if key in system.measured.metrics]
    pick = min if key in LOWER_IS_BETTER else max
    if len(known) < 2:
        return {}
    best = pick(known, key=lambda system: system.measured.metrics[key])
    p = {other.label: p_of(key, best, other) for other in known if other is not best}
    if any(value is None for value in p.values()):
        return {}
    tied = [label for label, value in p.items() if value >= LEVEL]
    return {best.label: "tied", **dict.fromkeys(tied, "tied")} if tied else {best.label: "best"}
