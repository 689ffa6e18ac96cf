"""Hubs: candidates that far too many queries find, and the gap between images and texts."""

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from pipeline.evaluation import tower_vectors
from pipeline.reports.sections.systems import System
from pipeline.storage import parquet
from pipeline.storage.vector_columns import vector_matrix

DEPTH = 10  # first candidates of a query that count
SHOWN = 6  # hubs of a system that are shown
WAYS = {"t2i": "images", "i2t": "captions"}  # what is found, by the direction that finds it


@dataclass(frozen=True)
class Hubness:
    """How unevenly the candidates of a direction are found."""

    skewness: float  # of how often a candidate is found: 0 where all are found alike
    never: float  # share of the candidates that no query finds
    top: list[tuple[str, int]]  # the most found, and by how many queries
    expected: float  # by how many queries a candidate is found on average


def hubness(system: System, direction: str) -> Hubness:
    """Of the candidates' k-occurrence: among how many queries' first ten each is."""
    counts = system.occurrences(direction, DEPTH)
    protocol = system.measured.protocol
    gallery = protocol.images if direction == "t2i" else protocol.captions
    found = np.zeros(max(gallery, len(counts)))
    found[: len(counts)] = list(counts.values())
    spread = found.std()
    skewness = float(((found - found.mean()) ** 3).mean() / spread**3) if spread else 0.0
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]
    return Hubness(skewness, 1 - len(counts) / len(found), top, float(found.mean()))


def table(systems: list[System], root: str, split: str) -> tuple[list[str], list[list[str]]]:
    """Hubness of both galleries, and of models the gap between their images and texts."""
    columns = ["", "modality gap"]
    columns += [f"{w}: {what}" for w in WAYS.values() for what in ("skewness", "never", "most")]
    rows = []
    for system in systems:
        gap = modality_gap(root, system.model, split) if system.stage == "evaluate" else None
        cells = [system.label, "–" if gap is None else f"{gap:.3f}"]
        for direction in WAYS:
            found = hubness(system, direction)
            most = found.top[0][1] / found.expected if found.top else 0.0
            cells += [f"{found.skewness:.2f}", f"{100 * found.never:.1f} %", f"{most:.1f} ×"]
        rows.append(cells)
    return columns, rows


def modality_gap(root: str, model: str, split: str) -> float:
    """How far the mean image vector lies from the mean caption vector; both are unit vectors."""
    sums: dict[str, np.ndarray] = {}
    counts = {"image": 0, "text": 0}
    for uri in tower_vectors.files(root, model, split).uris:
        table = parquet.read_table(uri).select(["modality", "vector"])
        for modality in counts:
            part = table.filter(pc.equal(table["modality"], modality))
            if len(part):
                counts[modality] += len(part)
                total = vector_matrix(part["vector"]).sum(0, dtype=np.float64)
                sums[modality] = sums.get(modality, 0) + total
    means = [sums[modality] / count for modality, count in counts.items() if count]
    return float(np.linalg.norm(means[0] - means[1])) if len(means) == 2 else float("nan")
