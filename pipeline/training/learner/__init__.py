"""What learns: the towers and their optimizer, a step at a time. Open `step` first.

`arithmetic` says in which numbers the towers compute, `optimizer` what moves the weights and how
fast, `compiling` whether the towers are compiled, `sharding` how their weights are spread out.
"""

from pipeline.training.learner.optimizer import lr_factor
from pipeline.training.learner.step import Learner, NotFinite

__all__ = ["Learner", "NotFinite", "lr_factor"]
