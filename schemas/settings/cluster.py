"""The cluster that `halftone plan` plans for: nodes that are alike."""

from pydantic import Field

from schemas.settings.section import Section


class ClusterSettings(Section):
    """A cluster as `halftone plan` is told of it."""

    nodes: int = Field(1, ge=1, description="machines (count)")
    cpus: int = Field(8, ge=1, description="of a node (cores)")
    memory_gb: float = Field(32.0, gt=0, description="of a node (GB)")
    gpus: int = Field(0, ge=0, description="of a node (count)")
    gpu_memory_gb: float = Field(80.0, gt=0, description="of a GPU (GB)")
    gpu_tflops: float = Field(
        100.0, gt=0, description="what the towers reach on a GPU, not its peak (TFLOP/s)"
    )
    bandwidth_gbit: float = Field(
        10.0, gt=0, description="of a node to storage and to other nodes (Gbit/s)"
    )
    storage_gb: float = Field(0.0, ge=0, description="free for the run folder; 0: any (GB)")
    price_per_hour: float = Field(0.0, ge=0, description="of a node, in any currency (1/hour)")
