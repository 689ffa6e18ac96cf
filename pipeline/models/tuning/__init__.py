"""What of a tower is trained: all, nothing, its last blocks, or low-rank updates.

Open `modes` first. `adapters` puts low-rank updates in and merges them into the weights, `patches`
leaves patches out of a training step.
"""

from pipeline.models.tuning.adapters import merged
from pipeline.models.tuning.modes import Tuned, tune

__all__ = ["Tuned", "merged", "tune"]
