"""The cluster that `halftone plan` plans for: nodes that are alike."""

from typing import Any

from pydantic import model_validator

from schemas.settings.section import Section, setting

GONE = {"gpu_tflops", "bandwidth_gbit", "price_per_hour"}  # run folders may still hold them


class ClusterSettings(Section):
    """A cluster as `halftone plan` is told of it."""

    nodes: int = setting(1, "machines (count)", ge=1)
    cpus: int = setting(8, "of a node (cores)", ge=1)
    memory_gb: float = setting(32.0, "of a node (GB)", gt=0)
    gpus: int = setting(0, "of a node (count)", ge=0)
    gpu_memory_gb: float = setting(80.0, "of a GPU (GB)", gt=0)
    storage_gb: float = setting(0.0, "free for the run folder; 0: any (GB)", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_gone(cls, values: Any) -> Any:
        known = isinstance(values, dict)
        return {k: v for k, v in values.items() if k not in GONE} if known else values
