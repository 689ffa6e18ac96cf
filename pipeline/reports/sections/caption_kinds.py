"""Results by kind of caption: long and short ones, with numbers, colours, relations.

Length is of any language; the other kinds are of English words, and are left out where no caption
has one.
"""

from collections.abc import Callable, Iterable

import numpy as np

from pipeline.evaluation.intervals import Queries, bootstrap, figures
from pipeline.evaluation.results import figure
from pipeline.models.words import words
from pipeline.reports.sections.systems import System

NUMBERS = "two three four five six seven eight nine ten eleven twelve dozen several"
COLOURS = (
    "red orange yellow green blue purple violet pink brown black white gray grey golden gold "
    "silver beige tan turquoise teal crimson maroon navy"
)
RELATIONS = (
    "left right above below under underneath over behind beside between near inside outside "
    "around against atop across beneath alongside"
)
KINDS = {"with a number": NUMBERS, "with a colour": COLOURS, "with a relation": RELATIONS}
WORDS = {kind: frozenset(some.split()) for kind, some in KINDS.items()}
METRIC = "t2i_R_at_10"
FEWEST = 20  # captions of a kind that is told
RESAMPLES = 500
Texts = Callable[[Iterable[str]], Iterable[str]]


def kinds_of(texts: Iterable[str]) -> dict[str, np.ndarray]:
    """Which of the texts (Q,) are of each kind."""
    lengths, has_digit, of_words = [], [], {kind: [] for kind in WORDS}  # type: ignore[var-annotated]
    for text in texts:  # which may be many: none of them is kept
        said = words(text)
        lengths.append(len(said))
        has_digit.append(any(word.isdigit() for word in said))
        for kind, of_kind in WORDS.items():
            of_words[kind].append(not of_kind.isdisjoint(said))
    length, digits = np.array(lengths, np.int32), np.array(has_digit, bool)
    low, high = np.quantile(length, (1 / 3, 2 / 3)) if len(length) else (0, 0)
    found = {
        f"up to {low:g} words": length <= low,
        f"{low:g} to {high:g} words": (length > low) & (length <= high),
        f"over {high:g} words": length > high,
    }
    for kind, met in of_words.items():
        has = np.array(met, bool)
        found[kind] = has | digits if kind == "with a number" else has
    if any(found[kind].any() for kind in KINDS):
        found["with none of these"] = ~np.any([found[kind] for kind in KINDS], axis=0)
    return found


def table(systems: list[System], texts: Texts) -> tuple[list[str], list[list]]:
    """R@10 of captions as queries by kind, a column a system: (figure, interval).

    `texts` gives those of captions by their ids, one after the other.
    """
    rows = []
    asked = systems[0].measured.queries["t2i"]
    kinds = kinds_of(texts(asked.query_ids))
    for kind, chosen_Q in kinds.items():
        if chosen_Q.sum() < FEWEST:
            continue
        ids = set(asked.query_ids[chosen_Q].tolist())
        cells = [_cell(system, ids) for system in systems]
        rows.append([kind, f"{len(ids):,}", *cells])
    return ["captions", "of them", *(system.label for system in systems)], rows


def _cell(system: System, ids: set[str]) -> tuple[str, str]:
    queries = system.measured.queries["t2i"]
    of_kind = np.array([query_id in ids for query_id in queries.query_ids], bool)
    recall = {"R_at_10": queries.values["R_at_10"][of_kind]}
    part = {"t2i": Queries(queries.query_ids[of_kind], queries.image_ids[of_kind], recall)}
    if not of_kind.any():
        return "–", ""
    low, high = bootstrap(part, RESAMPLES)[METRIC]
    return figure(METRIC, figures(part)[METRIC]), f"{figure(METRIC, low)}–{figure(METRIC, high)}"
