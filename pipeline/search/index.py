"""Stage 8: a text finds images, a picture finds captions; in a terminal, as a page, as a service.

Legend of the shape suffixes: Q queries, D width, M images, N captions, C captions of an image.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.evaluation import tower_vectors
from pipeline.labels import embed
from pipeline.labels.caption_vectors import StoredCaptions, relevance_of
from pipeline.reports.pictures import Hit, Pictures, thumbnail
from pipeline.retrieval import near_cells, tower_files
from pipeline.retrieval.stored import StoredVectors
from pipeline.retrieval.stored_scores import StoredItems
from pipeline.search.words import Words
from pipeline.sharding.given import bytes_of
from pipeline.sharding.images import Rejected, checked
from pipeline.storage.run_folder import RunFolder
from pipeline.training.saved_model import SavedModel, WrongKind, load_model
from schemas.settings import Recipe


@dataclass(frozen=True)
class Query:
    """A text, or a picture's bytes, and what the results must be like."""

    text: str = ""
    picture: bytes | None = None  # an image file, or features (.npy)
    top: int = 8
    words: str = ""  # all of these, with blanks between, in one caption of a result
    without: str = ""  # none of these in any caption of it
    least: float = -1.0  # score
    shades: bool = False  # whether the relevance of results to the text is wanted


class SearchIndex:
    """The ranked split of a run, ready to be searched with its model.

    Vectors, captions and words are files of this machine, mapped: made once, by whoever comes
    first. Nothing of them is held but some 20 bytes a vector.
    """

    def __init__(self, recipe: Recipe, root: str, name: str):
        self.recipe, self.root, self.name = recipe, root, name
        self.limit = recipe.train.cache_gb * 1e9
        self.files = tower_vectors.evaluated(recipe, root, name)
        self.pictures = Pictures(root, recipe.evaluate.split, self.limit)
        self.words = Words(self.pictures)
        self.items = StoredItems(*tower_files.items(self.files, tower_vectors.NOBODY, self.limit))
        counts = len(self.pictures.images), len(self.pictures.captions)
        if counts != self.items.counts:
            raise InputError(
                f"{self.files.folder} holds vectors of {self.items.counts[0]:,} images and "
                f"{self.items.counts[1]:,} captions, the shards {counts[0]:,} and {counts[1]:,}; "
                "run `halftone evaluate` again"
            )

    @functools.cached_property
    def _model(self) -> SavedModel:
        folder = RunFolder(self.root).folder("train", self.name)
        return load_model(folder, self.recipe.evaluate.prompts)

    @functools.cached_property
    def images(self) -> StoredVectors:
        """What texts are compared with."""
        return self._side("image")

    @functools.cached_property
    def texts(self) -> StoredVectors:
        """What pictures are compared with."""
        return self._side("text")

    def _side(self, of: str) -> StoredVectors:
        count = self.items.counts[of == "text"]
        large = count > self.recipe.search.approximate_above
        cells = near_cells.count_of(count) if large else 0
        return tower_vectors.side(self.files, of, self.limit, cells=cells)

    def prepare(self) -> None:
        """Make what is missing now, so that no query waits for it; find something with each."""
        for vectors in (self.images, self.texts):
            vectors.prepare()
        self.words.rows_with("a")
        starts = self.pictures.images.starts
        self.pictures.heads(starts)  # of every shard one: what is made of its sidecar is there

    def probes(self, vectors: StoredVectors) -> int:
        """How many cells a query looks into; 0: the search is exact."""
        return vectors.cells.probes(self.recipe.search.recall) if len(vectors.cells) else 0

    def about_query(self, query: Query) -> dict:
        """How a query's results are found: {"search": "exact"}, or how well, as was measured."""
        vectors = self.images if query.picture is None else self.texts
        probes = 0 if _is_filtered(query) else self.probes(vectors)
        if not probes:
            return {"search": "exact"}
        recall = round(vectors.cells.recall(probes), 3)
        looked_at = {"cells": len(vectors.cells), "looked_at": probes}
        return {"search": "approximate", "recall": recall, **looked_at}

    def how(self, queries: Sequence[Query]) -> str:
        """In words how the queries' results are found, where any of them is not exactly."""
        found = [self.about_query(query) for query in queries]
        recalls = [about["recall"] for about in found if about["search"] == "approximate"]
        if not recalls:
            return ""
        return f" (approximate, recall {min(recalls):.2f} of the ten nearest, as was measured)"

    def find(self, query: Query) -> list[Hit]:
        """The images nearest to a text, or the captions nearest to a picture."""
        return self.find_all([query])[0]

    def find_all(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """The hits of every query; texts go through the models together."""
        texts = [query for query in queries if query.picture is None]
        if not all(query.text.strip() for query in texts):
            raise InputError("the query is empty; write what you look for")
        found = iter(self._images_near(texts) if texts else ())
        return [
            next(found) if q.picture is None else self._captions_near(q, self._vector(q.picture))
            for q in queries
        ]

    def _vector(self, picture: bytes) -> Tensor:
        """The model's vector (D,) of a picture, which is treated as those of the shards are."""
        try:
            payload = self._model.payload(picture)
        except WrongKind as reason:
            raise InputError(f"the query holds {reason}") from reason
        except Rejected as reason:
            raise InputError(f"the query is no picture Pillow can read: {reason}") from reason
        return self._model.embed_payloads([payload], 1)[0]

    def _images_near(self, queries: list[Query]) -> list[list[Hit]]:
        vectors_QD = self._model.embed_texts([query.text for query in queries])
        found = []
        for near in self._nearest(queries, vectors_QD, self.images, self._images_with):
            rows = [row for _, row in near]
            heads = self.pictures.heads(rows)
            self._check("image", rows, [image_id for image_id, _ in heads])
            both = zip(near, heads, strict=True)
            found.append([Hit(id_, id_, text, s, row=row) for (s, row), (id_, text) in both])
        wanted = [number for number, query in enumerate(queries) if query.shades]
        if wanted:
            shaded = self._shaded([(queries[i].text, found[i]) for i in wanted])
            for number, hits in zip(wanted, shaded, strict=True):
                found[number] = hits
        return found

    def _captions_near(self, query: Query, vector_D: Tensor) -> list[Hit]:
        (near,) = self._nearest([query], vector_D[None], self.texts, self._captions_with)
        captions = self.pictures.captions_at([row for _, row in near])
        self._check("text", [row for _, row in near], [caption.id for caption in captions])
        owners = self.items.ids_at("image", [caption.image for caption in captions])
        return [
            Hit(c.id, image_id, c.text, score, row=c.image)
            for (score, _), c, image_id in zip(near, captions, owners, strict=True)
        ]

    def _check(self, side: str, rows: list[int], ids: list[str]) -> None:
        """Refuses shards that are not those that the vectors are of."""
        if self.items.ids_at(side, rows) != ids:
            raise InputError(
                f"{self.files.folder} holds vectors of other samples than "
                f"{self.pictures.shards.folder}; run `halftone evaluate` again"
            )

    def _nearest(
        self,
        queries: Sequence[Query],
        vectors_QD: Tensor,
        vectors: StoredVectors,
        rows_with: Callable[[Query], np.ndarray],
    ) -> list[list[tuple[float, int]]]:
        """(score, row), best first, of those nearest to each query that its filters let through.

        A filtered query is exact.
        """
        out: list[list[tuple[float, int]]] = [[] for _ in queries]
        free = [i for i, query in enumerate(queries) if not _is_filtered(query)]
        if free:
            top, probes = max(queries[i].top for i in free), self.probes(vectors)
            for i, near in zip(
                free, _pairs(vectors.top_k(vectors_QD[free], top, probes=probes)), strict=True
            ):
                out[i] = near
        for i in set(range(len(queries))) - set(free):
            kept_N = rows_with(queries[i])
            (out[i],) = _pairs(vectors.top_k(vectors_QD[i : i + 1], queries[i].top, kept_N))
        return [
            [(score, row) for score, row in near[: query.top] if row >= 0 and score >= query.least]
            for query, near in zip(queries, out, strict=True)
        ]

    def _shaded(self, answers: list[tuple[str, list[Hit]]]) -> list[list[Hit]]:
        """The hits with the relevance that the sentence encoder gives their images to a text."""
        texts = [text for text, _ in answers]
        vectors_QD = torch.from_numpy(embed.encode(texts, self.recipe.embed, self.root))
        out = []
        for vector_D, (_, hits) in zip(vectors_QD, answers, strict=True):
            rows = np.array([hit.row for hit in hits], np.int64)
            captions_MCD, mask_MC = self._captions.of_images(rows)
            r_M1 = relevance_of(captions_MCD, vector_D[None], self.recipe.label, mask_MC=mask_MC)
            told = zip(hits, r_M1[:, 0].tolist(), strict=True)
            out.append([replace(hit, relevance=relevance) for hit, relevance in told])
        return out

    @functools.cached_property
    def _captions(self) -> StoredCaptions:
        found = embed.of_shards(self.recipe, self.root, self.recipe.evaluate.split)
        return StoredCaptions(*found, self.limit)

    def told(self, query: Query) -> list[str]:
        """Sentences on what of a query came to nothing: unknown words, filters without a match."""
        out = []
        if query.picture is None and (unknown := self._model.vocabulary.unknown(query.text)):
            out.append(f"the model does not know {_quoted(unknown)}")
        for name, comes_of_it in (("words", "nothing is left"), ("without", "it changes nothing")):
            asked = self.words.asked(text := getattr(query, name))
            absent = [word for word in asked if not len(self.words.rows_with(word))]
            if text.strip() and not asked:
                out.append(f"there is no word in {name} {text!r}: it changes nothing")
            elif absent:
                out.append(f"no caption has {_quoted(absent)}: {comes_of_it}")
            elif name == "words" and asked and not self.words.captions_with(asked, []).any():
                out.append(f"no caption has all of {_quoted(asked)}: nothing is left")
        return out

    def _captions_with(self, query: Query) -> np.ndarray:
        """Whether a query's filters let each caption (N,) through."""
        words, without = map(self.words.asked, (query.words, query.without))
        return self.words.captions_with(words, without)

    def _images_with(self, query: Query) -> np.ndarray:
        """Whether a query's filters let each image (M,) through."""
        words, without = map(self.words.asked, (query.words, query.without))
        return self.words.images_with(words, without, self.items.image_of_N)

    def seen(self, picture: bytes) -> bytes:
        """The picture as the model sees it: upright, and cut as the shards are."""
        return checked(picture, self._model.shard).data

    def shown(self, hits: list[Hit]) -> list[Hit]:
        """The hits with their pictures in them."""
        samples = self.pictures.samples([hit.row for hit in hits])
        return [replace(h, picture=thumbnail(s)) for h, s in zip(hits, samples, strict=True)]


def _is_filtered(query: Query) -> bool:
    return bool(query.words.strip() or query.without.strip())


def _pairs(found: tuple[Tensor, Tensor]) -> list[list[tuple[float, int]]]:
    """(score, row) of every query's neighbours."""
    return [
        list(zip(*of_one, strict=True)) for of_one in zip(*(x.tolist() for x in found), strict=True)
    ]


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(map(repr, words))


def read_picture(uri: str) -> bytes:
    """The bytes of a query's picture."""
    try:
        return bytes_of(uri)
    except Rejected as reason:
        raise InputError(f"no picture at {uri}: {reason}; give a file that exists") from reason


def default_queries(gallery: SearchIndex) -> list[Query]:
    """The recipe's queries, or captions from evenly spaced images of the split."""
    settings = gallery.recipe.search
    texts = list(settings.queries)
    if not texts:
        count = len(gallery.pictures.images)
        step = max(1, count // settings.pages_queries)
        some = np.arange(0, count, step)[: settings.pages_queries]
        texts = [sample.captions[-1]["text"] for sample in gallery.pictures.samples(some)]
    return [Query(text, top=settings.top, shades=settings.shades) for text in texts]
