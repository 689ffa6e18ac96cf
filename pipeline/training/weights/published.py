"""What a finished model is: the files of stage 5 that all later stages read."""

import json
from typing import Any

import torch
from safetensors.torch import save

from pipeline.models.preprocessing import Preprocessing
from pipeline.storage import store
from pipeline.storage.plan import Piece
from pipeline.storage.run_folder import RunFolder


def write(
    piece: Piece,
    weights: dict[str, torch.Tensor],
    vocabulary: list | dict | None,
    summary: dict[str, Any],
    records: list[dict],
) -> None:
    """Write weights, words and, last, the history into the folder of the piece.

    `summary` is what the stage's index says of the model, but for the files.
    """
    folder = piece.output.rsplit("/", 1)[0]
    outputs = {"model.safetensors": save({k: v.contiguous() for k, v in weights.items()})}
    if vocabulary is not None:
        outputs["vocabulary.json"] = (json.dumps(vocabulary) + "\n").encode()
    files = {}
    for name, data in outputs.items():
        store.write_bytes(store.join(folder, name), data)
        files[name] = {"bytes": len(data), "sha256": store.sha256(data)}
    history = {"summary": {**summary, "files": files}, "records": records}
    store.write_json(piece.output, {"fingerprint": piece.fingerprint, **history})


def described(
    root: str,
    towers: torch.nn.Module,
    features: int | None,
    architecture: dict | None,
    preprocessing: Preprocessing,
    recipe: dict[str, Any],
) -> dict[str, Any]:
    """What an index says of a model: all that loading it takes, beside its files.

    `recipe` is its settings, JSON-able.
    """
    return {
        "parameters": sum(p.numel() for p in towers.parameters()),
        "features": features,
        "shard": RunFolder(root).index("shard")["settings"],
        "architecture": architecture,
        "preprocessing": None if features else preprocessing.state,
        "recipe": recipe,
    }
