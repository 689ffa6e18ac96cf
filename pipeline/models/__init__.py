"""Two-tower models, and texts as they read them.

An image tower maps (B, …) payloads and a text tower maps (B, L) word ids with (B,) lengths to
(B, dim); `TwoTower` gives both unit norm. A recipe may also name a tower of one's own as
`package.module:Class`. A tower has `from_settings(settings, given)`; see `TowerInputs`.

What this package has by name is imported when it is asked for: `pipeline.models.words` and
`pipeline.models.vocabulary` are used where no torch is.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.models.towers import (
        IMAGE_TOWERS,
        TEXT_TOWERS,
        architecture,
        build,
        preprocessing_of,
        vocabulary_for,
    )
    from pipeline.models.two_tower import TowerInputs, TwoTower
    from pipeline.models.vocabulary import Vocabulary, vocabulary_of

MODULES = {
    "towers": (
        "IMAGE_TOWERS",
        "TEXT_TOWERS",
        "architecture",
        "build",
        "preprocessing_of",
        "vocabulary_for",
    ),
    "two_tower": ("TowerInputs", "TwoTower"),
    "vocabulary": ("Vocabulary", "vocabulary_of"),
}
__all__ = [
    "IMAGE_TOWERS",
    "TEXT_TOWERS",
    "TowerInputs",
    "TwoTower",
    "Vocabulary",
    "architecture",
    "build",
    "preprocessing_of",
    "vocabulary_for",
    "vocabulary_of",
]


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
