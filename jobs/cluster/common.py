"""What tasks have in common: inputs, which travel once, and imports, which are made once."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pipeline.storage.plan import Piece


class Common:
    """What several pieces have in common, such as settings and names of files: sent once.

    It goes to Ray's store, from which each node fetches it, so a task's own arguments stay small
    however many shards there are.
    """

    SMALL = (str, int, float, bool, type(None))

    def __init__(self, pieces: Iterable[Piece]):
        self.times = Counter(id(value) for piece in pieces for value in self._values(piece))
        self.sent: dict[tuple, Any] = {}  # by what is in it

    def _values(self, piece: Piece) -> list:
        return [v for v in piece.inputs.values() if not isinstance(v, self.SMALL)]

    def parted(self, piece: Piece) -> tuple[Piece, Any]:
        """The piece with its own inputs alone, and where Ray holds the others."""
        import ray

        known = {id(value) for value in self._values(piece) if self.times[id(value)] > 1}
        inputs = piece.inputs.items()
        common = {name: value for name, value in inputs if id(value) in known}
        key = tuple((name, id(value)) for name, value in common.items())
        if key not in self.sent:
            self.sent[key] = ray.put(common)
        own = {name: value for name, value in inputs if name not in common}
        return replace(piece, inputs=own), self.sent[key]


def warm() -> None:
    """Makes a process ready for the stages that use a GPU: it imports, and finds its device."""
    import torch

    from pipeline.training import train

    train.ready()
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
