"""What the models were made of: the settings that differ first, then those they share."""

import json
from collections import Counter
from typing import Any

from pipeline.reports.sections.systems import System
from pipeline.storage.run_folder import RunFolder

LEFT_OUT = ("name", "about", "place", "variants", "report", "search", "serve", "cluster", "audit")


def settings(systems: list[System]) -> tuple[list[str], list[list[str]], list[tuple[str, str]]]:
    """Columns and rows of the settings that differ between models, and (name, value) of the rest.

    Versions of data, labels and models are among them.
    """
    about = {s.model: s.measured.about for s in systems if s.stage == "evaluate"}
    names = dict.fromkeys(name for one in about.values() for name in one)
    different, alike = [], []
    for name in names:
        if name.partition(".")[0] in LEFT_OUT:
            continue
        told = [_text(one[name]) if name in one else "–" for one in about.values()]
        if len(set(told)) > 1:
            different.append([name, *told])
        else:
            alike.append((name, told[0]))
    return ["", *about], different, alike


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def data(root: str) -> list[tuple[str, str]]:
    """The data's version and how many images each split has."""
    shards = RunFolder(root).index("shard")
    counts: Counter[str] = Counter()
    for entry in shards["pieces"]:
        counts[entry["split"]] += entry["samples"]
    images = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    return [("data version", shards["version"]), ("images", images)]
