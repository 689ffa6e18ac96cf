"""How fast each kind of work goes, where that was measured, and what is stored and held.

Measured on one core of an AMD EPYC with AVX-512, without a GPU; see bench/RESULTS.md.
"""

from typing import NamedTuple


class Rate(NamedTuple):
    """A figure, its unit, and the command or page that it comes from."""

    value: float
    unit: str
    measured: str


RATES = {
    "shard": Rate(135e-6, "CPU s a sample: packing", "bench.shard"),
    "check": Rate(201e-6 / 14_500, "CPU s a byte of JPEG: decode check", "bench.shard"),
    "embed": Rate(1 / 379, "CPU s a caption, MiniLM in bf16", "bench.encode"),
    "fitted": Rate(1 / 40_000, "CPU s a caption, tfidf, trigrams, lsa", "bench.encode"),
    "label_query": Rate(0.11e-3, "CPU s a caption's queries, both directions", "docs/scale.md"),
    "label_pair": Rate(
        7.6e-9 / 384, "CPU s a pair and dimension, both directions", "docs/scale.md"
    ),
    "task": Rate(0.7e-3, "s of the driver a task", "1,000 tasks that do nothing"),
}
SAMPLE_BYTES = 2_000  # of a sample beside its picture: headers, captions, JSON, sidecar
MANIFEST_BYTES = 570  # a row of five captions
EMBEDDING_BYTES = 2.1  # a dimension: float16 and ids
LIST_BYTES = 3.6  # a candidate
# Of the driver's memory at its peak, each time a stage is planned (python -m bench.plans, .shard).
ROW, CAPTION = 320, 205  # B a row of the manifest, and a caption of it: `shard`
SIDE = 224  # pixels: of most pretrained models
SHARD = 3_000  # B a shard: plans and indexes
GB = 1e9
TASK = 0.86 * GB  # of a task: Python, torch and a model of a few layers


def of(name: str) -> float:
    return RATES[name].value


# Of a training worker's memory on its node, beside the model and the loss (docs/scale.md).
DRAWN = 0.2 * GB  # rows, words and vectors that it draws from, however many there are
SHARD_KNOWN = 250  # B a shard: its start, and where it lies
NEAR = 17  # B an image: groups of neighbours
DECODER = 0.1 * GB  # a decoding process: 43 MB when it has started, and pictures
CACHED = 900  # B a caption of 384 numbers in files that the node's page cache best holds
PRETRAINED = 0.61 * GB  # weights of CLIP ViT-B/32; of a model that is not on this machine
SEARCHED = 8_900  # B an image of the searched split at the peak, 256 dimensions
# Of the loader (pipeline/training/loading/loader.py), which is training's own.
AHEAD, AHEAD_BYTES, READY = 4, 2**30, 2  # batches made ahead, and on their way to the device
KEPT_BYTES, MOST_WORKERS = 2**30, 32  # decoded images of a small split; decoding processes
