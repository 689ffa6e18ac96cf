"""Any model's scores from its files: vectors or a matrix; runs are read by `evaluation.trec`."""

import hashlib
import logging
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.evaluation.external import tables
from pipeline.evaluation.external.arrays import array
from pipeline.retrieval.scores import Items, MatrixScores, System, VectorScores, matrix_scores
from pipeline.storage import ids, text_files

LOG = logging.getLogger(__name__)
SURE, FEW = 6, 12  # standard errors, and pairs that are too few to tell
NEAR = 1e-2  # of what two images differ by: one image, encoded in two batches


@dataclass(frozen=True)
class Named:
    """Ids from files of a line each, in the order of the rows; None: rows are numbers."""

    images: list[str] | None = None
    texts: list[str] | None = None
    owners: list[str] | None = None  # the image of each text

    @classmethod
    def read(cls, images: str | None, texts: str | None, owners: str | None) -> "Named":
        of_each = (
            uri and [line.strip() for _, line in text_files.lines(uri, "a list of ids")]
            for uri in (images, texts, owners)
        )
        return cls(*of_each)  # type: ignore[arg-type]

    def fit(self, images: int, texts: int) -> str:
        """Why these are not the ids of so many images and texts; '' where they may be."""
        for ids_, count, of in (
            (self.images, images, "image ids"),
            (self.texts, texts, "text ids"),
            (self.owners, texts, "images of texts"),
        ):
            if ids_ is not None and len(ids_) != count:
                return f"{len(ids_):,} {of} are listed, {count:,} are there"
        if self.owners is None and texts % images:
            return (
                f"{texts:,} texts do not share out equally over {images:,} images; name each "
                "text's image, --text-image-ids FILE"
            )
        return ""

    def items(self, images: int, texts: int, owner_N=None) -> Items:
        """Who is compared; without `owner_N`, the row of each text's image, they share out."""
        if why := self.fit(images, texts):
            raise InputError(why)
        image_ids = self.images or [*map(str, range(images))]
        text_ids = self.texts or [*map(str, range(texts))]
        for of, flag in ((image_ids, "--image-ids"), (text_ids, "--text-ids")):
            ids.unique(of, flag)
        if self.owners is None:
            rows = np.arange(texts) // (texts // images) if owner_N is None else owner_N
            return Items(image_ids, text_ids, [image_ids[row] for row in rows])
        if lost := set(self.owners) - set(image_ids):
            ids.known(self.owners, set(image_ids), "--text-image-ids")
            raise InputError(f"--text-image-ids: no image here is {min(lost)!r}; list only those")
        return Items(image_ids, text_ids, self.owners)


def of_table(uri: str) -> VectorScores:
    """Vectors in a Parquet file, or in a folder's: id, image_id, modality (image, text), vector."""
    *named, images, texts = tables.read(uri)
    return VectorScores(Items(*named), torch.from_numpy(images), torch.from_numpy(texts))


def of_arrays(images: str, texts: str, *named: str | None) -> VectorScores:
    """Vectors in two .npy files, compared by cosine; texts are in the order of their images.

    `named` are files of ids, a line each: of images, of texts, of each text's image.
    """
    a_MD, b_ND = (array(uri) for uri in (images, texts))
    if a_MD.shape[1] != b_ND.shape[1]:
        raise InputError(f"images are {a_MD.shape[1]} wide, texts {b_ND.shape[1]}; give one space")
    a_MD, items = _each_once(
        a_MD, len(b_ND), Named.read(*named, *[None] * (3 - len(named))), images
    )
    sides = (torch.from_numpy(side).float() for side in (a_MD, b_ND))
    found = VectorScores(items, *(torch.nn.functional.normalize(v, dim=1) for v in sides))
    _doubt(found, texts)
    return found


def of_matrix(uri: str, *named: str | None, rows: str | None = None) -> MatrixScores:
    """A similarity matrix in .npy; `rows` are images or texts, which mostly the shape says.

    `named` are files of ids, as of `of_arrays`. -inf stands where a pair has no score: the
    candidate is never found.
    """
    found = array(uri, unscored=True)
    given = Named.read(*named, *[None] * (3 - len(named)))
    if _texts_down(found, given, rows, uri):
        found = found.T
    matrix_MN, items = _each_once(found, found.shape[1], given, uri)
    scores = matrix_scores(items, torch.from_numpy(matrix_MN))
    _doubt(scores, uri)
    return scores


def _texts_down(found: np.ndarray, given: Named, rows: str | None, uri: str) -> bool:
    """Whether rows are texts, by what is given, the shape, or who is there several times."""
    if rows not in (None, "images", "texts"):
        raise InputError(f"--rows {rows!r}: the rows of {uri} are images or texts")
    down, across = found.shape
    if rows or down != across:
        why = given.fit(down, across), given.fit(across, down)
        turned = rows == "texts" if rows else bool(why[0]) and not why[1]
        if turned and not rows:
            LOG.warning(
                "%s: %s rows are texts, %s columns images, by their numbers", uri, *found.shape
            )
        return turned
    repeated = [_owners(side, uri) is not None for side in (found, found.T)]
    if repeated[0] == repeated[1] and given == Named():
        raise InputError(
            f"{uri} is {down:,} × {across:,}, which does not say what its rows are; add --rows "
            "images or --rows texts"
        )
    return repeated[1] and not repeated[0]


def _each_once(found: np.ndarray, texts: int, given: Named, uri: str) -> tuple[np.ndarray, Items]:
    """The rows of images, each once where they are there once for every text; who is compared."""
    owner_N = _owners(found, uri) if len(found) == texts else None
    if owner_N is None:
        return found, given.items(len(found), texts)
    first = np.unique(owner_N, return_index=True)[1]
    LOG.warning(
        "%s: %s rows are %s images, each there once for every text of its; one of each is taken",
        *(uri, f"{texts:,}", f"{len(first):,}"),
    )
    if given.images is not None and len(given.images) == texts:
        given = Named([given.images[row] for row in first], given.texts, given.owners)
    return found[first], given.items(len(first), texts, owner_N)


def _doubt(system: System, uri: str) -> None:
    """Tells where pairs match worse than others do, or would match better in another order."""
    owner_N, images = system.items.image_of_N, len(system.items.image_ids)
    place_N = np.arange(len(owner_N))
    own_N, other_N, round_N = (
        system.of_pairs(rows_N, place_N).double()
        for rows_N in (owner_N, (owner_N + 1) % images, place_N % images)
    )
    in_order = (owner_N == place_N * images // len(owner_N)).all() and images < len(owner_N)
    if _above(other_N, own_N):
        LOG.warning("%s: pairs that match score less than others; larger must be nearer", uri)
    elif in_order and _above(round_N, own_N) and _above(round_N, other_N):
        LOG.warning(
            "%s: texts would match far better in rounds (the first of each image, then the "
            "second) than image by image, as they are read; --text-image-ids says whose they are",
            uri,
        )


def _above(one_N: torch.Tensor, other_N: torch.Tensor) -> bool:
    """Whether scores are surely higher than others, by their means."""
    one_N, other_N = (part_N[part_N.isfinite()] for part_N in (one_N, other_N))
    if min(len(one_N), len(other_N)) < FEW:
        return False
    error = (one_N.var() / len(one_N) + other_N.var() / len(other_N)).sqrt()
    return bool(one_N.mean() - other_N.mean() > SURE * error)


def _owners(found: np.ndarray, uri: str) -> np.ndarray | None:
    """The image (N,) of each row, where rows are equal because images stand there several times."""
    count, step_N = len(found), _steps(found)
    for times in (n for n in range(count // 2, 1, -1) if count % n == 0):
        ends = np.arange(1, count) % times == 0  # steps from an image to the next
        if step_N[~ends].max() < NEAR * np.median(step_N[ends]):
            return np.arange(count) // times
    seen: dict[bytes, int] = {}
    rows = (np.ascontiguousarray(row).data for row in found)
    keys = (hashlib.blake2b(row, digest_size=16).digest() for row in rows)
    owner_N = np.array([seen.setdefault(key, len(seen)) for key in keys])
    times_M = np.bincount(owner_N)
    if 1 < len(seen) < count and times_M.min() == times_M.max():
        return owner_N
    if 1 < len(seen) <= count / 2:
        raise InputError(
            f"{uri}: of {count:,} rows {len(seen):,} are different, some {times_M.max()} times "
            "there; give each image once, and --text-image-ids FILE"
        )
    return None


def _steps(found: np.ndarray) -> np.ndarray:
    """How far each row (N - 1,) is from the one before; infinitely, where others have no score."""
    size, out = max(2, 2**22 // found.shape[1]), []
    for start in range(0, len(found) - 1, size - 1):
        part = found[start : start + size].astype(np.float64)
        none = part == -np.inf
        part[none] = 0
        other = (none[1:] != none[:-1]).any(1)
        out.append(np.where(other, np.inf, np.linalg.norm(np.diff(part, axis=0), axis=1)))
    return np.concatenate([*out, np.zeros(0)])
