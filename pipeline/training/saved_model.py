"""A trained model of a run folder: texts and images become unit vectors of one space."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load
from torch.nn.functional import normalize

from pipeline import models
from pipeline.models import TwoTower, Vocabulary
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.vocabulary import PretrainedTokens
from pipeline.sharding.decoding import decode
from pipeline.sharding.given import Picture, bytes_of
from pipeline.sharding.images import Rejected, checked
from pipeline.storage import run_folder, store
from pipeline.storage.plan import Piece
from pipeline.storage.run_folder import RunFolder
from pipeline.training.distributed import ProcessGroup
from schemas.settings import Recipe, ShardSettings, of_before

LEARNED = "learned."  # how the names of what the losses learned begin


def summary(piece: Piece) -> dict:
    """What the finished training left in its folder."""
    history = store.read_json(piece.output)
    data = store.read_bytes(piece.output)
    own = {"history.json": {"bytes": len(data), "sha256": store.sha256(data)}}
    return {**history["summary"], "files": {**history["summary"]["files"], **own}}


class WrongKind(Rejected):
    """A picture for a model of region features, or the other way round."""


@dataclass(frozen=True)
class SavedModel:
    """Two towers in evaluation mode, with the words they know and how their pictures were made."""

    towers: TwoTower
    vocabulary: Vocabulary | PretrainedTokens
    recipe: Recipe
    shard: ShardSettings  # of the shards that it was trained on
    features: int | None  # width of a region vector; None: it takes pictures
    preprocessing: Preprocessing  # of its pictures
    architecture: dict | None = None  # of the model that pretrained towers are of
    prompts: tuple[str, ...] = ()  # by which texts are read, `a photo of {}`; none: as they are

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Unit vectors (N, D), float32 on the CPU.

        With several prompts the mean of a text's unit vectors by each, of unit length again.
        """

        def encoded(part: Sequence[str]) -> torch.Tensor:
            words, lengths = self.vocabulary.encode(list(part), self.recipe.model.max_words)
            return self.towers.encode_text(words.to(self.device), lengths)

        vectors = [
            self._in_batches([prompt.replace("{}", text) for text in texts], batch_size, encoded)
            for prompt in self.prompts or ("{}",)
        ]
        return vectors[0] if len(vectors) == 1 else normalize(torch.stack(vectors).mean(0), dim=1)

    def cut_texts(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model reads."""
        return self.vocabulary.cut(list(texts), self.recipe.model.max_words)

    def embed_images(self, images: Sequence[Picture], batch_size: int = 256) -> torch.Tensor:
        """Unit vectors (M, D), float32 on the CPU, of pictures as the shards treat theirs.

        A picture is a file's bytes, its path or URI, a data URI, a PIL image, an array (H, W, 3)
        uint8, or, for a model of region features, an array of those. Raises `Rejected`, with its
        place and the reason, where one is none.
        """
        parts = []
        for start in range(0, len(images), batch_size):  # no more of them are decoded at a time
            payloads = []
            for place, image in enumerate(images[start : start + batch_size], start + 1):
                try:
                    payloads.append(self.payload(image))
                except Rejected as reason:
                    raise Rejected(f"picture {place} of {len(images)}: {reason}") from reason
            parts.append(self.embed_payloads(payloads, batch_size))
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

    def payload(self, picture: Picture) -> np.ndarray:
        """The picture, decoded as those of the shards are; `Rejected` where it is none."""
        data, ending, holds, *_ = checked(bytes_of(picture), self.shard)
        payload, wanted = decode(data, self.preprocessing), self.features
        if ending != "npy" and wanted is None:
            return payload
        if ending == "npy" and wanted == payload.shape[-1]:
            return payload
        takes = "images" if wanted is None else f"region features (.npy) {wanted} wide"
        raise WrongKind(f"{holds}, and the model takes {takes}")

    @torch.inference_mode()
    def embed_payloads(self, payloads: Sequence[np.ndarray], batch_size: int) -> torch.Tensor:
        """Unit vectors (M, D) of decoded samples of shards: pixels or features."""

        def encoded(part: Sequence[np.ndarray]) -> torch.Tensor:
            return self.towers.encode_image(torch.from_numpy(np.stack(part)).to(self.device))

        alike = len({(payload.shape, payload.dtype) for payload in payloads}) <= 1
        return self._in_batches(payloads, batch_size if alike else 1, encoded)

    def _in_batches(self, some: Sequence, size: int, encoded: Callable) -> torch.Tensor:
        parts = [encoded(some[start : start + size]).cpu() for start in range(0, len(some), size)]
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

    @functools.cached_property
    def dim(self) -> int:
        """Dimensions of a vector: a pretrained pair's own, whatever `model.dim` says."""
        return self.embed_texts(["a"]).shape[1]

    @property
    def device(self) -> torch.device:
        return next(self.towers.parameters()).device


def load_model(folder: str, prompts: tuple[str, ...] | None = None) -> SavedModel:
    """The trained model of a folder of stage 5, in evaluation mode on the GPU if there is one.

    It reads texts by `prompts`, or by those of the settings it was trained with.
    """
    index = run_folder.need_index(folder, "train")
    vocabulary = models.vocabulary_of(store.read_json(store.join(folder, "vocabulary.json")))
    about = index["pieces"][0]
    recipe = Recipe(**of_before(about["recipe"]))
    # Of a model trained before it was kept, the settings it was trained with.
    shard = ShardSettings(**about["shard"]) if "shard" in about else recipe.shard
    # Of a model trained before it was kept, the square that all pictures were then.
    kept = about.get("preprocessing")
    how = (
        Preprocessing.of(kept)
        if kept
        else Preprocessing.squash(about["recipe"]["model"]["image_size"])
    )
    known = {name: about[name] for name in ("features", "architecture")}
    model = models.build(
        recipe.model, vocabulary=vocabulary, preprocessing=how, untrained=True, **known
    )
    weights = load(store.read_bytes(store.join(folder, "model.safetensors")))
    learned = {n.removeprefix(LEARNED): v for n, v in weights.items() if n.startswith(LEARNED)}
    model.learned.update({name: torch.nn.Parameter(value) for name, value in learned.items()})
    model.load_state_dict(weights)
    model = model.eval().to(ProcessGroup().device)
    read_by = recipe.evaluate.prompts if prompts is None else prompts
    return SavedModel(model, vocabulary, recipe, shard, preprocessing=how, prompts=read_by, **known)


def best_val(root: str, name: str) -> float:
    """The model's rSum on val; -1 where there is no such model or no val split."""
    index = RunFolder(root).known("train", name)
    return index["pieces"][0]["metrics"].get("val/rsum", -1.0) if index else -1.0
