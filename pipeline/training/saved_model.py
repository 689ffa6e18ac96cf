"""A trained model of a run folder: texts and images become unit vectors of one space."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

from pipeline import models
from pipeline.models import TwoTower, Vocabulary
from pipeline.models.vocabulary import PretrainedTokens
from pipeline.sharding.decoding import decode
from pipeline.sharding.images import checked
from pipeline.storage import run_folder, store
from pipeline.storage.plan import Piece
from pipeline.storage.run_folder import RunFolder
from pipeline.training.distributed import ProcessGroup
from schemas.settings import Recipe


def summary(piece: Piece) -> dict:
    """What the finished training left in its folder."""
    history = store.read_json(piece.output)
    data = store.read_bytes(piece.output)
    own = {"history.json": {"bytes": len(data), "sha256": store.sha256(data)}}
    return {**history["summary"], "files": {**history["summary"]["files"], **own}}


Picture = bytes | str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class SavedModel:
    """Two towers in evaluation mode, with the words they know and their settings."""

    towers: TwoTower
    vocabulary: Vocabulary | PretrainedTokens
    recipe: Recipe

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Unit vectors (N, D), float32 on the CPU."""

        def encoded(part: Sequence[str]) -> torch.Tensor:
            words, lengths = self.vocabulary.encode(list(part), self.recipe.model.max_words)
            return self.towers.encode_text(words.to(self.device), lengths)

        return self._in_batches(texts, batch_size, encoded)

    def embed_images(self, images: Sequence[Picture], batch_size: int = 256) -> torch.Tensor:
        """Unit vectors (M, D), float32 on the CPU, of pictures as the shards treat theirs.

        A picture is a file's bytes, its path or URI, a PIL image, an array (H, W, 3) uint8, or,
        for a model of region features, an array of those. Raises `Rejected` with the reason where
        one is no picture.
        """
        how, size = self.recipe.shard, self.recipe.model.image_size
        payloads = [decode(checked(_bytes_of(i), how).data, size) for i in images]
        return self.embed_payloads(payloads, batch_size)

    @torch.inference_mode()
    def embed_payloads(self, payloads: Sequence[np.ndarray], batch_size: int) -> torch.Tensor:
        """Unit vectors (M, D) of decoded samples of shards: pixels or features."""

        def encoded(part: Sequence[np.ndarray]) -> torch.Tensor:
            return self.towers.encode_image(torch.from_numpy(np.stack(part)).to(self.device))

        return self._in_batches(payloads, batch_size, encoded)

    def _in_batches(self, some: Sequence, size: int, encoded: Callable) -> torch.Tensor:
        parts = [encoded(some[start : start + size]).cpu() for start in range(0, len(some), size)]
        return torch.cat(parts) if parts else torch.empty(0, self.recipe.model.dim)

    @property
    def device(self) -> torch.device:
        return next(self.towers.parameters()).device


def _bytes_of(picture: Picture) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        return store.read_bytes(store.absolute(str(picture)))
    if isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.dtype == np.uint8:
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    if isinstance(picture, np.ndarray):
        np.save(buffer, picture)
    else:
        picture.save(buffer, "PNG")
    return buffer.getvalue()


def load_model(folder: str) -> SavedModel:
    """The trained model of a folder of stage 5, in evaluation mode on the GPU if there is one."""
    index = run_folder.need_index(folder, "train")
    vocabulary = models.vocabulary_of(store.read_json(store.join(folder, "vocabulary.json")))
    about = index["pieces"][0]
    recipe = Recipe(**about["recipe"])
    known = {name: about[name] for name in ("features", "architecture")}
    model = models.build(recipe.model, vocabulary=vocabulary, **known)
    model.load_state_dict(load(store.read_bytes(store.join(folder, "model.safetensors"))))
    return SavedModel(model.eval().to(ProcessGroup().device), vocabulary, recipe)


def best_val(root: str, name: str) -> float:
    """The model's rSum on val; -1 where there is no such model or no val split."""
    index = RunFolder(root).known("train", name)
    return index["pieces"][0]["metrics"].get("val/rsum", -1.0) if index else -1.0
