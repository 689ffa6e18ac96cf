"""What the forms share: which towers, what is read back, and the files beside the weights."""

import base64
import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.models import Vocabulary, preprocessing
from pipeline.training.saved_model import SavedModel

BOTH = ("image", "text")
Sides = tuple[str, ...]  # of BOTH: the whole model, or one tower
BATCH = 32
NAMES = ["input_ids", "attention_mask"]  # what a text model of transformers is given
Pictures = Sequence[Any]  # PIL images in RGB; or region features (R, F), as arrays


@dataclass(frozen=True)
class Loaded:
    """An exported model as its own library loads it: unit vectors (N, dim) of texts, of pictures.

    None where it has no such tower.
    """

    texts: Callable[[Sequence[str]], torch.Tensor] | None
    images: Callable[[Pictures], torch.Tensor] | None


class Form(Protocol):
    """A form that models are handed on in."""

    needs: tuple[str, ...]  # what is imported to write and read it, beyond Halftone's own

    def refusal(self, model: SavedModel, sides: Sides) -> str | None:
        """Why this form cannot hold these towers, and what can; None where it can."""

    def write(self, model: SavedModel, folder: Path, sides: Sides) -> None:
        """Write them into an empty folder."""

    def read(self, folder: Path, model: SavedModel, sides: Sides) -> Loaded:
        """What was written, by the library that it is for; `model` says how its inputs are made."""


def batched(encoded: Callable, some: Sequence) -> torch.Tensor:
    """The vectors of all, of so many at a time."""
    with torch.inference_mode():
        parts = [encoded(some[at : at + BATCH]) for at in range(0, len(some), BATCH)]
    return torch.nn.functional.normalize(torch.cat(parts).float(), dim=1)


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """What a library raises becomes a sentence."""
    try:
        yield
    except Exception as error:  # of tracing anything may be raised
        said = str(error).strip().splitlines() or [repr(error)]
        raise InputError(f"{what}: {type(error).__name__}: {said[0]:.300}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars of transformers' and no advice of torch's exporter meanwhile."""
    from transformers.utils import logging as theirs

    exporter, bars = logging.getLogger("torch.onnx"), theirs.is_progress_bar_enabled()
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        exporter.setLevel(level)
        if bars:
            theirs.enable_progress_bar()


def payloads(model: SavedModel, pictures: Pictures) -> list[np.ndarray]:
    """The inputs of the image tower that these pictures, or features, become."""
    if model.features is not None:
        return list(pictures)
    return [model.preprocessing.pixels(picture) for picture in pictures]


def write_preprocessor(model: SavedModel, folder: Path) -> None:
    """preprocessor_config.json, which transformers and others read."""
    told = preprocessing.config(model.preprocessing)
    write_json(folder / "preprocessor_config.json", told)


def write_words(model: SavedModel, folder: Path) -> None:
    """The tokenizer's files as transformers reads them; of words of its own vocabulary.json."""
    if isinstance(model.vocabulary, Vocabulary):
        write_json(folder / "vocabulary.json", model.vocabulary.state)
        return
    state = model.vocabulary.state
    if "files" in state:
        for name, data in state["files"].items():
            (folder / name).write_bytes(base64.b64decode(data))
        told = folder / "tokenizer_config.json"
        if state["padded"] and told.exists():
            write_json(told, json.loads(told.read_text("utf-8")) | {"model_input_names": NAMES[:1]})
        return
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(state["tokenizer"])
    inner.no_truncation()
    inner.no_padding()
    told = json.loads(state["tokenizer"])
    named = {"pad_token": inner.id_to_token(state["pad"])}
    if unknown := told["model"].get("unk_token"):
        named["unk_token"] = unknown
    first, last = _marks(inner)
    named |= {"bos_token": first} if first else {}
    named |= {"eos_token": last} if last else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=state["length"],
        # A model that was trained on texts of full length attends to what pads them.
        model_input_names=NAMES[:1] if state["padded"] else NAMES,
        **named,
    )
    tokenizer.save_pretrained(folder)


def _marks(tokenizer) -> tuple[str | None, str | None]:
    """The marks that are put before and after a text."""
    marked, plain = (tokenizer.encode("a", add_special_tokens=yes).tokens for yes in (True, False))
    if len(marked) <= len(plain):
        return None, None
    first = marked[0] if marked[: len(plain)] != plain else None
    return first, marked[-1] if marked[-len(plain) :] != plain else None


def write_json(path: Path, value) -> None:
    """A JSON file that people can read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
