"""What a re-ranker sees of a collection: similarities of images and texts, by row numbers.

From the vectors of two towers (`Towers`) or from the matrices of any system (`Matrices`). A side
is "image" or "text".

Legend of the shape suffixes: M images, N texts, D and E widths, X and Y rows of two sides, B lists
of rows, K rows mixed into one.
"""

from typing import Protocol

import torch

from pipeline.errors import InputError
from pipeline.retrieval.nearest import anywhere

BLOCK = 256  # rows compared at a time
FEW = 32  # lists of rows whose profiles are held at a time


class Similarities(Protocol):
    """Larger is nearer, in one unit across sides."""

    sizes: dict[str, int]  # rows of each side

    def to(self, device) -> "Similarities":
        """The same on a device."""

    def between(self, side: str, rows_X, other: str, rows_Y) -> torch.Tensor:
        """Of every row with every other row (X, Y)."""

    def near(self, side: str, rows_BX, other: str, rows_BY) -> torch.Tensor:
        """Of the rows of each list with those of the list beside it (B, X, Y)."""

    def mixed(self, side: str, rows_XK, weights_XK, other: str, rows_Y) -> torch.Tensor:
        """Weighted sums over K rows: Σ_k weights[x, k] × between[rows[x, k], y] (X, Y)."""

    def nearest(self, side: str, rows_X, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarities, falling, and places in `rows_X` (X, K) of each row's nearest others."""


class Towers:
    """Cosines of unit vectors; products of whole rows are summed in float64, so ties stay ties.

    With `sentences`, vectors of a sentence encoder, those say how near two texts are.
    """

    def __init__(self, images_MD, texts_ND, sentences_NE=None):
        self.vectors = {"image": images_MD.float(), "text": texts_ND.float()}
        self.sentences = None if sentences_NE is None else sentences_NE.float()
        self.sizes = {side: len(vectors) for side, vectors in self.vectors.items()}

    def to(self, device):
        parts = (*self.vectors.values(), self.sentences)
        return Towers(*(part if part is None else part.to(device) for part in parts))

    def _of(self, side: str, other: str) -> torch.Tensor:
        """The side's vectors that are compared with the other's."""
        between_texts = side == other == "text" and self.sentences is not None
        return self.sentences if between_texts else self.vectors[side]

    def between(self, side, rows_X, other, rows_Y):
        x, y = self._of(side, other)[rows_X], self._of(other, side)[rows_Y]
        return (x.double() @ y.double().T).float()

    def near(self, side, rows_BX, other, rows_BY):
        return self._of(side, other)[rows_BX] @ self._of(other, side)[rows_BY].transpose(1, 2)

    def mixed(self, side, rows_XK, weights_XK, other, rows_Y):
        vectors = self._of(side, other)
        mixture_XD = vectors.new_zeros(len(rows_XK), vectors.shape[1])
        for rows, weights in zip(rows_XK.split(64, 1), weights_XK.split(64, 1), strict=True):
            mixture_XD = mixture_XD + (weights.unsqueeze(1) @ vectors[rows]).squeeze(1)
        return (mixture_XD.double() @ self._of(other, side)[rows_Y].double().T).float()

    def nearest(self, side, rows_X, k):
        vectors, own = self._of(side, side)[rows_X], torch.arange(len(rows_X))
        k = min(k, len(rows_X) - 1)
        values, places = anywhere(vectors, None, k, query_owner=own, candidate_owner=own)
        return values, places.long()


class Matrices:
    """Matrices of any system: image against text (M, N) and, where there are any, M × M and N × N.

    Without an intra-modal matrix two images are as near as their rows of scores are correlated,
    and two texts as their columns are; `known` holds the texts and the images that those scores are
    with, by side (all, if not given). Arrays may be memory-mapped: what is asked for is read.
    """

    def __init__(self, i2t_MN, i2i_MM=None, t2t_NN=None, known=None):
        i2t_MN = torch.as_tensor(i2t_MN)
        shape = tuple(i2t_MN.shape)
        if len(shape) != 2:
            raise InputError(f"the scores have shape {shape}; expected images × texts, two axes")
        self.matrices = {("image", "text"): i2t_MN, ("text", "image"): i2t_MN.T}
        self.sizes = dict(zip(("image", "text"), i2t_MN.shape, strict=True))
        given, self.known, self.profiles = {"image": i2i_MM, "text": t2t_NN}, known, {}
        for side, matrix in given.items():
            size = self.sizes[side]
            if matrix is None:
                scores = (i2t_MN if side == "image" else i2t_MN.T).float()
                if known is not None:
                    scores = scores[:, known["text" if side == "image" else "image"]]
                centred = scores - scores.mean(1, keepdim=True)
                self.profiles[side] = torch.nn.functional.normalize(centred, dim=1)
            elif tuple(matrix.shape) != (size, size):
                raise InputError(
                    f"the similarities of {side}s have shape {tuple(matrix.shape)}; expected "
                    f"{size} × {size}, as many as the scores have {side}s"
                )
            else:
                self.matrices[side, side] = torch.as_tensor(matrix)

    def to(self, device):
        kinds = (("image", "text"), ("image", "image"), ("text", "text"))
        parts = (self.matrices.get(kind) for kind in kinds)
        i2t, i2i, t2t = (part if part is None else part.to(device) for part in parts)
        known = self.known and {side: rows.to(device) for side, rows in self.known.items()}
        return Matrices(i2t, i2i, t2t, known)

    def between(self, side, rows_X, other, rows_Y):
        if (side, other) not in self.matrices:
            return self.profiles[side][rows_X] @ self.profiles[side][rows_Y].T
        return self.matrices[side, other][rows_X][:, rows_Y].float()

    def near(self, side, rows_BX, other, rows_BY):
        if (side, other) not in self.matrices:
            profiles = self.profiles[side]
            parts = zip(rows_BX.split(FEW), rows_BY.split(FEW), strict=True)
            return torch.cat([profiles[x] @ profiles[y].transpose(1, 2) for x, y in parts])
        return self.matrices[side, other][rows_BX[:, :, None], rows_BY[:, None, :]].float()

    def mixed(self, side, rows_XK, weights_XK, other, rows_Y):
        rows, place = rows_XK.unique(return_inverse=True)
        weights = weights_XK.new_zeros(len(rows_XK), len(rows))
        weights.scatter_add_(1, place, weights_XK)
        return weights @ self.between(side, rows, other, rows_Y)

    def nearest(self, side, rows_X, k):
        found = []
        for start, part in enumerate(rows_X.split(BLOCK)):
            near = self.between(side, part, side, rows_X)
            own = torch.arange(len(part), device=near.device)
            near[own, own + start * BLOCK] = -torch.inf
            found.append(torch.topk(near, min(k, len(rows_X) - 1), dim=1))
        return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
