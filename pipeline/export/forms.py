"""The forms there are, and a model written in one, read back and held against itself."""

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.errors import InputError, did_you_mean
from pipeline.export.graphs import Onnx, Torch
from pipeline.export.hugging_face import HuggingFace
from pipeline.export.openclip import OpenClip
from pipeline.export.sentences import Sentences
from pipeline.export.writing import BOTH, Form, Pictures, Sides, payloads, quiet
from pipeline.models import Vocabulary
from pipeline.training.saved_model import SavedModel

FORMS: dict[str, Form] = {
    "hf": HuggingFace(),
    "open_clip": OpenClip(),
    "sentence-transformers": Sentences(),
    "onnx": Onnx(),
    "torch": Torch(),
}
ALLOWED = {"onnx": 1e-4}  # largest difference of a coordinate of unit vectors
EXACT = 1e-5  # of all others
EXTRAS = {"onnx": "onnx", "open_clip": "open-clip"}  # that install what a form needs
TEXT = "a man in a red jacket and two brown dogs run over the snow while a child looks on"


@dataclass(frozen=True)
class Exported:
    """What was written, and how near its vectors are to the model's own."""

    to: str
    folder: Path
    differences: dict[str, float] = field(default_factory=dict)  # by tower: the largest
    unchecked: str | None = None  # why none was measured


def export(
    model: SavedModel, to: str, folder: Path, sides: Sides = BOTH, pairs: int = 16
) -> Exported:
    """The model, or one tower, written into a folder that is new or empty, and read back.

    Raises InputError where the form cannot hold it, a package is missing, or what was read back
    gives other vectors than the model does on so many drawn pairs.
    """
    if to not in FORMS:
        raise InputError(f"--to {to!r} is no form to export{did_you_mean(to, FORMS)}")
    form = FORMS[to]
    if why := form.refusal(model, sides):
        raise InputError(f"--to {to}: {why}")
    missing = [name for name in form.needs if importlib.util.find_spec(name) is None]
    # open_clip's own files are written without it.
    if missing and to != "open_clip":
        extra = f'; run: pip install "halftone-itr[{EXTRAS[to]}]"' if to in EXTRAS else ""
        raise InputError(f"--to {to} needs {', '.join(missing)}, which is not installed{extra}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output {folder} is there already and not empty; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as part:
        made = Path(part, folder.name)  # moved when it is whole and has proved right
        made.mkdir()
        with quiet():
            form.write(model, made, sides)
        found: dict[str, float] = {}
        if not missing:
            found = differences(model, to, made, sides, *drawn(model, pairs))
            _near(found, to)
        made.rename(folder)
    why = f"{', '.join(missing)} is not installed here" if missing else None
    return Exported(to, folder, found, why)


def _near(found: dict[str, float], to: str) -> None:
    """Refuses vectors that are not the model's; also those that are no numbers."""
    limit = ALLOWED.get(to, EXACT)
    if wrong := [side for side, far in found.items() if not far <= limit]:
        raise InputError(
            f"--to {to}: the vectors of the exported {wrong[0]} tower differ by up to "
            f"{found[wrong[0]]:.1e} from the model's, more than {limit:g}, so nothing was "
            "written; please report it with the model's settings"
        )


def differences(
    model: SavedModel,
    to: str,
    folder: Path,
    sides: Sides,
    texts: Sequence[str],
    pictures: Pictures,
) -> dict[str, float]:
    """By tower, the largest difference of a coordinate between an export's vectors and the model's.

    Both are given the same texts and pictures, of which each makes its inputs itself.
    """
    found = {}
    with quiet():
        loaded = FORMS[to].read(folder, model, sides)
    if loaded.images is not None:
        own = model.embed_payloads(payloads(model, pictures), 32)
        found["image"] = _largest(loaded.images(pictures) - own)
    if loaded.texts is not None:
        found["text"] = _largest(loaded.texts(texts) - model.embed_texts(texts))
    return found


def _largest(difference_ND: torch.Tensor) -> float:
    """Not a number where one is."""
    return difference_ND.abs().amax().item()


def drawn(model: SavedModel, pairs: int) -> tuple[list[str], Pictures]:
    """Texts of 1 to 17 words, one beyond any model's length, and pictures of many shapes."""
    generator = np.random.default_rng(0)
    words = TEXT.split()
    if isinstance(model.vocabulary, Vocabulary):
        words = list(generator.permutation(model.vocabulary.words[1:]))[:17] or words
    lengths = generator.integers(1, len(words) + 1, pairs)
    texts = [" ".join(generator.permutation(words)[:length]) for length in lengths]
    texts[-1] = " ".join(words * 40)
    if model.features is not None:
        shape = pairs, 12, model.features
        return texts, list(generator.standard_normal(shape, dtype=np.float32))
    sides = generator.integers(24, 400, (pairs, 2))
    pixels = [generator.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]
    return texts, [Image.fromarray(picture) for picture in pixels]
