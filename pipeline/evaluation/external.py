"""Any model's scores, as a gallery that protocols can measure: vectors, a matrix, or TREC runs."""

import csv
import io
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.errors import InputError
from pipeline.evaluation.protocols import Matches
from pipeline.evaluation.ranking import Vectors
from pipeline.formulas.metrics_from_ranks import NOWHERE
from pipeline.retrieval import nearest as _neighbours
from pipeline.retrieval import ranks as _counting
from pipeline.retrieval.ranks import Pairs, Places
from pipeline.storage import store as _store


@dataclass(frozen=True)
class Gallery:
    """Images, captions and what a model scores their pairs with."""

    image_ids: list[str]
    text_ids: list[str]
    text_image_ids: list[str]
    vectors: tuple[torch.Tensor, torch.Tensor] | None = None  # (M, D), (N, D)
    matrix: torch.Tensor | None = None  # (M, N), where there are no vectors

    def places(self, i2t, t2i) -> tuple[Places, Places]:
        """Where positives stand, given rows (2, P) of queries and of their positives."""
        pairs = Pairs(*i2t), Pairs(*t2i)
        if self.vectors is None:
            return _counting.of_matrix(self.matrix, *pairs)
        return _counting.of_vectors(*self.vectors, *pairs)

    def scores(self, image_P: list[int], text_P: list[int]) -> torch.Tensor:
        """Scores (P,) of pairs of rows."""
        rows = torch.tensor(image_P), torch.tensor(text_P)
        if self.vectors is None:
            return self.matrix[rows]
        return _neighbours.products(*self.vectors, *rows)

    def rows(self, way: str) -> tuple[dict[str, int], dict[str, int]]:
        """Row of every query and of every candidate, by id."""
        sides = [{id_: n for n, id_ in enumerate(ids)} for ids in (self.image_ids, self.text_ids)]
        return (sides[0], sides[1]) if way == "i2t" else (sides[1], sides[0])

    def images_of(self, way: str, ids) -> np.ndarray:
        """The image that a query belongs to."""
        owner = dict(zip(self.text_ids, self.text_image_ids, strict=True))
        return np.array([owner[id_] for id_ in ids]) if way == "t2i" else np.array(ids)

    def own(self) -> Matches:
        """A caption's image, and an image's captions."""
        of_image: dict[str, list[str]] = {image_id: [] for image_id in self.image_ids}
        for text_id, image_id in zip(self.text_ids, self.text_image_ids, strict=True):
            of_image[image_id].append(text_id)
        of_text = {text: [image] for image, texts in of_image.items() for text in texts}
        return {"i2t": {image: texts for image, texts in of_image.items() if texts}, "t2i": of_text}

    def with_captions(self, count: int | None) -> tuple["Gallery", int]:
        """Only the first captions of every image, and how many were dropped."""
        if count is None:
            return self, 0
        seen: dict[str, int] = {}
        kept = []
        for row, image_id in enumerate(self.text_image_ids):
            seen[image_id] = seen.get(image_id, 0) + 1
            if seen[image_id] <= count:
                kept.append(row)
        dropped = len(self.text_ids) - len(kept)
        return (self.part(range(len(self.image_ids)), kept) if dropped else self), dropped

    def folds(self, count: int) -> list["Gallery"]:
        """The gallery cut by images in their order."""
        if count == 1:
            return [self]
        out = []
        for rows in np.array_split(np.arange(len(self.image_ids)), count):
            inside = {self.image_ids[row] for row in rows}
            texts = [n for n, image_id in enumerate(self.text_image_ids) if image_id in inside]
            out.append(self.part(rows, texts))
        return out

    def part(self, images, texts) -> "Gallery":
        images, texts = list(images), list(texts)
        ids = (
            [i[n] for n in rows] for i, rows in ((self.image_ids, images), (self.text_ids, texts))
        )
        owners = [self.text_image_ids[n] for n in texts]
        if self.vectors is None:
            return Gallery(*ids, owners, matrix=self.matrix[images][:, texts])
        return Gallery(*ids, owners, (self.vectors[0][images], self.vectors[1][texts]))

    def top(self, way: str, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (Q, K), falling, and rows (Q, K) of every query's best candidates."""
        if self.vectors is None:
            return _neighbours.largest(self.matrix if way == "i2t" else self.matrix.T, k)
        queries, candidates = self.vectors if way == "i2t" else self.vectors[::-1]
        return _neighbours.top_k(queries, candidates, k)


@dataclass(frozen=True)
class Runs:
    """TREC runs: {query: {candidate: score}} of i2t and t2i; who is on no list is not found."""

    lists: dict[str, dict[str, dict[str, float]]]

    @property
    def image_ids(self) -> list[str]:
        return list(self.lists["i2t"])

    @property
    def text_ids(self) -> list[str]:
        return list(self.lists["t2i"])

    def rows(self, way: str) -> tuple[dict[str, int], dict[str, int]]:
        candidates = dict.fromkeys(c for of in self.lists[way].values() for c in of)
        sides = (self.lists[way], candidates)
        return tuple({id_: n for n, id_ in enumerate(ids)} for ids in sides)

    def places(self, i2t, t2i) -> tuple[Places, Places]:
        return self._places("i2t", i2t), self._places("t2i", t2i)

    def _places(self, way: str, pairs) -> Places:
        queries, candidates = (list(side) for side in self.rows(way))
        above_P, tied_P = np.full(pairs.shape[1], NOWHERE), np.ones(pairs.shape[1], np.int64)
        for p, (query, candidate) in enumerate(pairs.T):
            scored = self.lists[way][queries[query]]
            if (score := scored.get(candidates[candidate])) is not None:
                scores = np.fromiter(scored.values(), float)
                above_P[p], tied_P[p] = (scores > score).sum(), (scores == score).sum()
        return Places(above_P, tied_P)

    def images_of(self, way: str, ids) -> np.ndarray:
        """The queries themselves: a run does not say whose caption one is."""
        return np.array(ids)

    def scores(self, image_P: list[int], text_P: list[int]) -> torch.Tensor:
        raise InputError("a TREC run does not score every judged pair; give vectors or a matrix")

    def own(self) -> Matches:
        raise InputError("a TREC run does not say which pairs match; give --positives")

    def with_captions(self, count: int | None) -> tuple["Runs", int]:
        return self, 0

    def folds(self, count: int) -> list["Runs"]:
        if count > 1:
            raise InputError("a TREC run cannot be cut into folds; give vectors or a matrix")
        return [self]


def of_table(uri: str) -> Gallery:
    """Vectors in a Parquet file, or in a folder's: id, image_id, modality (image, text), vector."""
    files = sorted(name for name in _store.list_files(uri) if name.endswith(".parquet"))
    tables = [
        _store.read_table(one).replace_schema_metadata()
        for one in [_store.join(uri, name) for name in files] or [uri]
    ]
    return of_vectors(Vectors.of(pa.concat_tables(tables)))


def of_vectors(found: Vectors) -> Gallery:
    ids = found.image_ids, found.text_ids, found.text_image_ids
    return Gallery(*ids, (found.images, found.texts))


def of_arrays(images: str, texts: str, image_ids: str | None, text_ids: str | None) -> Gallery:
    """Vectors in two .npy files, compared by cosine; texts are in the order of their images."""
    a_MD, b_ND = (torch.from_numpy(array(uri)).float() for uri in (images, texts))
    if a_MD.shape[1] != b_ND.shape[1]:
        raise InputError(f"images are {a_MD.shape[1]} wide, texts {b_ND.shape[1]}; give one space")
    a_MD, b_ND = (torch.nn.functional.normalize(v, dim=1) for v in (a_MD, b_ND))
    return replace(_empty(len(a_MD), len(b_ND), image_ids, text_ids), vectors=(a_MD, b_ND))


def of_matrix(uri: str, image_ids: str | None, text_ids: str | None) -> Gallery:
    """A similarity matrix in .npy, images down and texts across, in the order of their images."""
    matrix = torch.from_numpy(array(uri))
    return replace(_empty(*matrix.shape, image_ids, text_ids), matrix=matrix)


def array(uri: str) -> np.ndarray:
    here = _store.is_local(uri)
    try:
        found = np.load(uri.removeprefix("file://") if here else io.BytesIO(_store.read_bytes(uri)))
    except (OSError, ValueError) as error:
        raise InputError(f"{uri} is no array ({error}); give a .npy file of two axes") from error
    if found.ndim != 2 or found.dtype.kind not in "fiu":
        raise InputError(f"{uri} is {found.dtype} {found.shape}; give numbers on two axes")
    return found.astype(np.float32, copy=False)


def _empty(images: int, texts: int, image_ids: str | None, text_ids: str | None) -> Gallery:
    """Ids from files of a line each, else numbers; every image has as many texts."""
    ids = []
    for uri, count in ((image_ids, images), (text_ids, texts)):
        lines = _store.read_text(_store.absolute(uri)).split() if uri else map(str, range(count))
        ids.append(list(lines))
        if len(ids[-1]) != count or len(set(ids[-1])) != count:
            raise InputError(f"{uri} must hold {count:,} different ids, one a line")
    if not images or texts % images:
        raise InputError(
            f"{texts:,} texts do not share out equally over {images:,} images; write Parquet with "
            "id, image_id, modality and vector instead"
        )
    return Gallery(*ids, [ids[0][n // (texts // images)] for n in range(texts)])


def of_trec(i2t: str | None, t2i: str | None) -> Runs:
    """TREC runs, a line a pair: query Q0 candidate rank score tag. Scores order, not ranks."""
    lists: dict[str, Any] = {"i2t": {}, "t2i": {}}
    for way, uri in (("i2t", i2t), ("t2i", t2i)):
        for number, words in _lines(uri):
            try:
                query, _, candidate, _, score, _ = words
                lists[way].setdefault(query, {})[candidate] = float(score)
            except ValueError as error:
                raise InputError(
                    f"{uri} line {number} is {' '.join(words)!r}; write query Q0 candidate rank "
                    "score tag"
                ) from error
    return Runs(lists)


def matches(uri: str) -> Matches:
    """Positives from CSV (image_id, caption_id) or JSON ({i2t: {image: [caption]}, t2i: …})."""
    text = _store.read_text(_store.absolute(uri))
    out: Matches = {"i2t": {}, "t2i": {}}
    if uri.endswith(".json"):
        found = json.loads(text)
        if not isinstance(found, dict) or not found.keys() <= out.keys():
            raise InputError(f"{uri} must be a JSON object of i2t and t2i")
        return out | {
            way: {str(q): [*map(str, ids)] for q, ids in of.items()} for way, of in found.items()
        }
    reader = csv.DictReader(text.lstrip("\ufeff").splitlines())
    if not {"image_id", "caption_id"} <= set(reader.fieldnames or ()):
        raise InputError(f"{uri} must begin with a line that names image_id and caption_id")
    for row in reader:
        out["i2t"].setdefault(row["image_id"], []).append(row["caption_id"])
        out["t2i"].setdefault(row["caption_id"], []).append(row["image_id"])
    return out


def write_trec(folder: str, gallery: Gallery, depth: int = 100, tag: str = "halftone") -> list[str]:
    """Writes runs, `depth` candidates a query, and qrels of both directions; their URIs."""
    if not isinstance(gallery, Gallery):
        raise InputError("TREC runs are written from vectors or a matrix; this is one already")
    written = []
    for way, of_query in gallery.own().items():
        queries, candidates = (list(side) for side in gallery.rows(way))
        lines = []
        for query, scores, rows in zip(
            queries, *(p.tolist() for p in gallery.top(way, depth)), strict=True
        ):
            for rank, (score, row) in enumerate(zip(scores, rows, strict=True), 1):
                lines.append(f"{query} Q0 {candidates[row]} {rank} {score:.9g} {tag}\n")
        qrels = [f"{query} 0 {match} 1\n" for query, of in of_query.items() for match in of]
        for name, content in ((f"{way}.run", lines), (f"{way}.qrels", qrels)):
            written.append(_store.join(folder, name))
            _store.write_bytes(written[-1], "".join(content).encode())
    return written


def _lines(uri: str | None):
    text = _store.read_text(_store.absolute(uri)) if uri else ""
    return ((n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip())
