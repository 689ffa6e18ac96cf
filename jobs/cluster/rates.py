"""How fast each kind of work goes, and whether that was measured or is assumed.

Measured: on one core of an AMD EPYC with AVX-512, without a GPU; see bench/RESULTS.md.
"""

from typing import NamedTuple


class Rate(NamedTuple):
    """A figure, its unit, and where it comes from."""

    value: float
    unit: str
    measured: str  # the command; empty: assumed


RATES = {
    "shard": Rate(135e-6, "CPU s a sample: packing", "bench.shard"),
    "check": Rate(201e-6 / 14_500, "CPU s a byte of JPEG: decode check", "bench.shard"),
    "ingest": Rate(40e-6, "CPU s a row", ""),
    "embed": Rate(1 / 379, "CPU s a caption, MiniLM in bf16", "bench.encode"),
    "fitted": Rate(1 / 40_000, "CPU s a caption, tfidf, trigrams, lsa", "bench.encode"),
    "embed_gpu": Rate(1 / 5000, "GPU s a caption, MiniLM", ""),
    "label_query": Rate(0.11e-3, "CPU s a caption's queries, both directions", "docs/scale.md"),
    "label_pair": Rate(
        7.6e-9 / 384, "CPU s a pair and dimension, both directions", "docs/scale.md"
    ),
    "towers": Rate(1 / 50e9, "CPU s a FLOP of the towers", "halftone plan's own towers"),
    "loss": Rate(1.24 / 4096**2, "CPU s a pair of S-NDCG, binned", "bench.losses"),
    "loss_gpu": Rate(2e-11, "GPU s a pair of any loss", ""),
    "decode": Rate(1 / 950, "CPU s a picture to 224 pixels", "PIL with draft, 256 pixels"),
    "rank": Rate(3.2 / (5000 * 25_000 * 1024), "CPU s a pair and dimension", "bench.evaluate"),
    "task": Rate(0.7e-3, "s of the driver a task", "1,000 tasks that do nothing"),
    "start": Rate(5.0, "s until a stage's workers have started", ""),
    "start_train": Rate(15.0, "s until a training's workers have started", "12 to 17 s"),
}
SAMPLE_BYTES = 2_000  # of a sample beside its picture: headers, captions, JSON, sidecar
MANIFEST_BYTES = 570  # a row of five captions
EMBEDDING_BYTES = 2.1  # a dimension: float16 and ids
LIST_BYTES = 3.6  # a candidate
TASK_GB = 0.86  # Python, torch and a model of a few layers

SHARED = 3  # of a loss's score matrices: what another loss of a sum finds there already


def of(name: str) -> float:
    return RATES[name].value
