"""The cluster that `halftone plan` plans for: nodes that are alike."""

from pydantic import Field, model_validator

from schemas.settings.section import Section

GONE = {"gpu_tflops", "bandwidth_gbit", "price_per_hour"}  # run folders may still hold them


class ClusterSettings(Section):
    """A cluster as `halftone plan` is told of it."""

    nodes: int = Field(1, ge=1, description="machines (count)")
    cpus: int = Field(8, ge=1, description="of a node (cores)")
    memory_gb: float = Field(32.0, gt=0, description="of a node (GB)")
    gpus: int = Field(0, ge=0, description="of a node (count)")
    gpu_memory_gb: float = Field(80.0, gt=0, description="of a GPU (GB)")
    storage_gb: float = Field(0.0, ge=0, description="free for the run folder; 0: any (GB)")

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_gone(cls, values):
        return (
            {k: v for k, v in values.items() if k not in GONE}
            if isinstance(values, dict)
            else values
        )
