"""Names and values as MLflow takes them: it refuses what holds a character that it does not like.

A name that is legal already stays as it is.
"""

import posixpath
import re
from collections.abc import Mapping

VALUE, TAG = 6000, 8000  # characters of a parameter's value and of a tag's
EARLIER = (500, 250)  # characters of a parameter's value on older servers, the newest first
KEY, MODEL, ALIAS, EXPERIMENT = 250, 250, 255, 500


def experiment(name: str) -> str:
    return name.strip()[:EXPERIMENT] or "halftone"


def registered(name: str) -> str:
    """Of a registered model: without `/` and `:`, and without quotes, which end a filter."""
    plain = re.sub(r"[/:\\'\"`%\x00-\x1f]", "-", name).strip().lstrip(".")
    return plain[:MODEL] or "model"


def alias(name: str) -> str:
    """Of a version: `latest`, `best` and `v1` are words of MLflow's or of ours."""
    plain = re.sub(r"[^\w-]", "-", name, flags=re.ASCII)[: ALIAS - len("model-")]
    taken = re.fullmatch(r"latest|best|v\d+|", plain, flags=re.IGNORECASE)
    return f"model-{plain}" if taken else plain


def key(name: str) -> str:
    """Of a metric, a parameter or a tag."""
    plain = posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("/")
    return re.sub(r"^\.+", "_", plain)[:KEY] or "_"


def keys(values: Mapping) -> dict:
    """The values under legal names; of two that become one name the second is numbered."""
    legal: dict = {}
    for name, value in values.items():
        plain, number = key(name), 1
        while plain in legal:
            number += 1
            plain = f"{key(name)[: KEY - 4]}_{number}"
        legal[plain] = value
    return legal


def cut(text: str, limit: int) -> str:
    """A text of at most so many characters, which says where it was longer."""
    if len(text) <= limit:
        return text
    told = f"… ({len(text):,} characters)"
    return text[: limit - len(told)] + told
