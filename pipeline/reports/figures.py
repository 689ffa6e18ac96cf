"""Figures that more than one page shows: how relevance is spread."""

import numpy as np

from pipeline.reports import render
from pipeline.reports.render import Figure


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
