"""Guards: vectors that no longer tell captions apart stop the stage with a sentence."""

from collections.abc import Sequence

import numpy as np

from pipeline.errors import InputError
from pipeline.storage.piece_table import column
from schemas.settings import EmbedSettings

ENOUGH = 8  # different captions, to judge how alike their vectors are


def check_vectors(vectors: np.ndarray, texts: list[str], settings: EmbedSettings) -> None:
    """Stop where a vector (N, D) is no direction, or all of them are nearly the same."""
    name = settings.encoder
    norms = np.linalg.norm(vectors, axis=1)
    if len(bad := np.flatnonzero(~np.isfinite(norms))):
        raise InputError(
            f"encoder {name} gave numbers that are not finite for {len(bad)} of {len(texts)} "
            f"captions, the first {texts[bad[0]]!r}; try embed.precision fp32"
        )
    if len(bad := np.flatnonzero(norms < 0.5)):
        raise InputError(
            f"encoder {name} gave a vector of zeros for {len(bad)} of {len(texts)} captions, the "
            f"first {texts[bad[0]]!r}; choose an encoder that reads them, or mend the captions"
        )
    rows = list({text: row for row, text in enumerate(texts)}.values())
    count = len(rows)
    if count < ENOUGH:
        return
    mean = float((np.linalg.norm(vectors[rows].sum(0)) ** 2 - count) / (count * (count - 1)))
    if mean > settings.max_mean_cosine:
        raise InputError(
            f"encoder {name} gives {count} different captions nearly the same vector (mean cosine "
            f"{mean:.4f}, at most {settings.max_mean_cosine} expected); choose another encoder"
        )


def check_stage(entries: dict[str, dict], settings: EmbedSettings) -> None:
    """Stop where pieces, by name, differ in width, or too many captions say the same."""
    widths = {entry["dim"]: name for name, entry in entries.items()}
    if len(widths) > 1:
        found = ", ".join(f"{dim} in {name}" for dim, name in sorted(widths.items()))
        raise InputError(
            f"encoder {settings.encoder} gave vectors of different widths ({found}); have the same "
            "model on every machine, remove the wrong pieces and run `halftone embed` again"
        )
    if (share := duplicates(list(entries.values()))) > settings.max_duplicates:
        raise InputError(
            f"{share:.0%} of the captions repeat another of their shard, at most "
            f"{settings.max_duplicates:.0%} expected; mend the captions or raise "
            "embed.max_duplicates"
        )


def duplicates(entries: Sequence[dict]) -> float:
    """Share of captions whose text another caption of their shard has already."""
    captions, different = (sum(column(entries, of)) for of in ("captions", "different"))
    return (captions - different) / max(1, captions)
