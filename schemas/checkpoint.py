"""Checkpoint: a folder of files named in `checkpoint.json`, which is written last and means done.

model.safetensors  optimizer.safetensors  vocabulary.json  checkpoint.json
With averaged weights model.safetensors holds those, and raw.safetensors the ones that are trained.
Weights that are not trained (frozen layers, what LoRA adds to) are in neither.
"""

from pydantic import BaseModel, ConfigDict


class Checkpoint(BaseModel):
    """What `checkpoint.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    fingerprint: str  # of settings, shards and labels: another one is another training
    epoch: int  # finished epochs
    step: int  # finished optimizer steps
    metrics: dict[str, float]  # of the last validation
    best: dict[str, float]  # step, epoch and val/rsum of the best one so far
    optimizer: dict  # parameter groups and loss scale: its state without the tensors
    settings: dict  # the resolved recipe
    data_version: str  # of 2-shards
    label_version: str | None  # of 3-embeddings, where a loss needed relevance
    order: int = 1  # of the samples: another one is other batches
    records: list[dict] = []  # of the steps so far
    base: str | None = None  # identity of the weights that are not trained; None: all are
    files: dict[str, str]  # name -> sha256
