"""Sentences per second of the encoders, against a plain `model.encode(captions)`, in one run.

    python -m bench.encode CAPTIONS [COUNT]        # COUNT captions, 1,000 unless told

CAPTIONS is a .jsonl or .jsonl.gz file of lines {"captions": [...]}. CPU seconds on one thread,
the best of three rounds in which every way takes its turn. The mixed texts are the captions, every
tenth of them a paragraph of ten.
"""

import gzip
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.labels.encoders import fitted, sentences
from schemas.settings import EmbedSettings

ROUNDS = 3


def captions_of(path: Path, count: int) -> list[str]:
    """`count` captions of the file, spread over all of it."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        captions = [caption for line in lines for caption in json.loads(line)["captions"]]
    chosen = np.random.default_rng(0).permutation(len(captions))[:count]
    return [captions[row] for row in chosen]


def with_paragraphs(captions: list[str]) -> list[str]:
    """The captions, every tenth of them followed by the nine after it."""
    return [
        " ".join(captions[row : row + 10]) if row % 10 == 0 else caption
        for row, caption in enumerate(captions)
    ]


def fastest(ways: dict, texts: list[str]) -> dict[str, tuple[float, np.ndarray]]:
    """CPU seconds of the best round and vectors (N, D), by the way's name."""
    best = {}
    for _ in range(ROUNDS):
        for name, encode in ways.items():
            start = time.process_time()
            vectors = encode(texts)
            seconds = time.process_time() - start
            if name not in best or seconds < best[name][0]:
                best[name] = seconds, vectors
    return best


def main() -> None:
    torch.set_num_threads(1)
    captions = captions_of(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
    how = EmbedSettings()
    model = sentences.load(how.encoder)
    print(f"{how.encoder}, {len(captions)} captions, auto is {sentences.precision(how)} here")
    ways = {
        "model.encode(captions)": model.encode,
        "ours, fp32": lambda texts: sentences.encode(texts, EmbedSettings(precision="fp32")),
        "ours, auto": lambda texts: sentences.encode(texts, how),
    }
    for about, texts in (("captions", captions), ("mixed", with_paragraphs(captions))):
        found = fastest(ways, texts)
        plain_seconds, plain = found["model.encode(captions)"]
        for name, (seconds, vectors) in found.items():
            cosine = (vectors * plain).sum(1) / np.linalg.norm(plain, axis=1)
            print(
                f"{about:9} {name:23} {len(texts) / seconds:8,.0f} /s  "
                f"{plain_seconds / seconds:5.2f} ×  least cosine {cosine.min():.6f}"
            )
    for encoder in ("tfidf", "trigrams", "lsa"):
        start = time.process_time()
        terms = fitted.fit(encoder, captions)
        fit = time.process_time() - start
        start = time.process_time()
        fitted.encode(captions, encoder, terms)
        rate = len(captions) / (time.process_time() - start)
        print(f"captions  {encoder:23} {rate:8,.0f} /s  fitted in {fit:.1f} s")


if __name__ == "__main__":
    main()
