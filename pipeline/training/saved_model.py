"""A trained model of a run folder."""

from safetensors.torch import load

from pipeline import models
from pipeline.models import TwoTower, Vocabulary
from pipeline.models.vocabulary import PretrainedTokens
from pipeline.storage import run_folder, store
from pipeline.storage.plan import Piece
from pipeline.training.distributed import ProcessGroup
from schemas.settings import Recipe


def summary(piece: Piece) -> dict:
    """What the finished training left in its folder."""
    history = store.read_json(piece.output)
    data = store.read_bytes(piece.output)
    own = {"history.json": {"bytes": len(data), "sha256": store.sha256(data)}}
    return {**history["summary"], "files": {**history["summary"]["files"], **own}}


def load_model(folder: str) -> tuple[TwoTower, Vocabulary | PretrainedTokens, Recipe]:
    """The trained model of a folder of stage 5, in evaluation mode on the GPU if there is one."""
    index = run_folder.need_index(folder, "train")
    vocabulary = models.vocabulary_of(store.read_json(store.join(folder, "vocabulary.json")))
    about = index["pieces"][0]
    recipe = Recipe(**about["recipe"])
    model = models.build(
        recipe.model,
        vocabulary=vocabulary,
        features=about["features"],
        architecture=about["architecture"],
    )
    model.load_state_dict(load(store.read_bytes(store.join(folder, "model.safetensors"))))
    return model.eval().to(ProcessGroup().device), vocabulary, recipe


def best_val(root: str, name: str) -> float:
    """The model's rSum on val; -1 where there is no such model or no val split."""
    index = run_folder.read_index(run_folder.folder(root, "train", name))
    return index["pieces"][0]["metrics"].get("val/rsum", -1.0) if index else -1.0
