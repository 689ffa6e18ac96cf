"""Stage 8: a text finds images, a picture finds captions; in a terminal, as a page, as a service.

Legend of the shape suffixes: Q queries, D width, M images, C captions of an image.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.evaluation import tower_vectors
from pipeline.labels import embed
from pipeline.labels.caption_vectors import Captions, relevance_of
from pipeline.models.words import terms
from pipeline.reports.pictures import Hit, Pictures
from pipeline.retrieval.nearest import top_k
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
    """The ranked split of a run, ready to be searched with its model."""

    def __init__(self, recipe: Recipe, root: str, name: str):
        self.recipe, self.root, self.name = recipe, root, name
        self.scores = tower_vectors.read(tower_vectors.evaluated(recipe, root, name))
        self.items = self.scores.items
        self.pictures = Pictures(root, recipe.evaluate.split)

    @functools.cached_property
    def _model(self) -> SavedModel:
        folder = RunFolder(self.root).folder("train", self.name)
        return load_model(folder, self.recipe.evaluate.prompts)

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
        ids, captions = self.items.image_ids, self.pictures.caption_texts
        vectors_QD = self._model.embed_texts([query.text for query in queries])
        nearest = _nearest(queries, vectors_QD, self.scores.images, self._images_with)
        found = [
            [Hit(ids[row], ids[row], captions(ids[row])[0], score) for score, row in near]
            for near in nearest
        ]
        wanted = [number for number, query in enumerate(queries) if query.shades]
        if wanted:
            shaded = self._shaded([(queries[i].text, found[i]) for i in wanted])
            for number, hits in zip(wanted, shaded, strict=True):
                found[number] = hits
        return found

    def _captions_near(self, query: Query, vector_D: Tensor) -> list[Hit]:
        ids, images = self.items.text_ids, self.items.text_image_ids
        (near,) = _nearest([query], vector_D[None], self.scores.texts, self._captions_with)
        texts = self.pictures.captions
        return [Hit(ids[row], images[row], texts[ids[row]], score) for score, row in near]

    def _shaded(self, answers: list[tuple[str, list[Hit]]]) -> list[list[Hit]]:
        """The hits with the relevance that the sentence encoder gives their images to a text."""
        texts = [text for text, _ in answers]
        vectors_QD = torch.from_numpy(embed.encode(texts, self.recipe.embed, self.root))
        out = []
        for vector_D, (_, hits) in zip(vectors_QD, answers, strict=True):
            rows_MC, mask_MC = self._captions.captions_of([hit.image_id for hit in hits])
            captions_MCD = self._captions.vectors[rows_MC]
            r_M1 = relevance_of(captions_MCD, vector_D[None], self.recipe.label, mask_MC=mask_MC)
            told = zip(hits, r_M1[:, 0].tolist(), strict=True)
            out.append([replace(hit, relevance=relevance) for hit, relevance in told])
        return out

    @functools.cached_property
    def _captions(self) -> Captions:
        files = embed.files(self.recipe, self.root)
        return Captions.read(files.of_split(self.recipe.evaluate.split))

    def told(self, query: Query) -> list[str]:
        """Sentences on what of a query came to nothing: unknown words, filters without a match."""
        out = []
        if query.picture is None and (unknown := self._model.vocabulary.unknown(query.text)):
            out.append(f"the model does not know {_quoted(unknown)}")
        for name, comes_of_it in (("words", "nothing is left"), ("without", "it changes nothing")):
            asked = _asked(text := getattr(query, name))
            absent = [w for w, term in asked.items() if not any(term in c for c in self._spaced)]
            if text.strip() and not asked:
                out.append(f"there is no word in {name} {text!r}: it changes nothing")
            elif absent:
                out.append(f"no caption has {_quoted(absent)}: {comes_of_it}")
            elif name == "words" and not any(_has_all(c, asked) for c in self._spaced):
                out.append(f"no caption has all of {_quoted(asked)}: nothing is left")
        return out

    @functools.cached_property
    def _spaced(self) -> list[str]:
        """The terms of every caption with blanks between and around them."""
        return [_spaced(self.pictures.captions[id_]) for id_ in self.items.text_ids]

    def _captions_with(self, query: Query) -> Tensor:
        """Rows of the captions that a query's filters let through."""
        words, without = _asked(query.words), _asked(query.without)
        kept = [_has_all(found, words) and not _has_any(found, without) for found in self._spaced]
        return torch.tensor(kept, dtype=torch.bool).nonzero()[:, 0]

    def _images_with(self, query: Query) -> Tensor:
        """Rows of the images that a query's filters let through."""
        words, without = _asked(query.words), _asked(query.without)
        captions = list(zip(self.items.text_image_ids, self._spaced, strict=True))
        left = {image_id for image_id, found in captions if _has_all(found, words)}
        left -= {image_id for image_id, found in captions if _has_any(found, without)}
        kept = [image_id in left for image_id in self.items.image_ids]
        return torch.tensor(kept, dtype=torch.bool).nonzero()[:, 0]

    def seen(self, picture: bytes) -> bytes:
        """The picture as the model sees it: upright, and cut as the shards are."""
        return checked(picture, self._model.shard).data

    def shown(self, hits: list[Hit]) -> list[Hit]:
        """The hits with their pictures in them."""
        return [replace(hit, picture=self.pictures.thumbnail(hit.image_id)) for hit in hits]


def _nearest(
    queries: Sequence[Query],
    vectors_QD: Tensor,
    candidates_ND: Tensor,
    rows_with: Callable[[Query], Tensor],
) -> list[list[tuple[float, int]]]:
    """(score, row), best first, of the candidates nearest to each query that its filters pass."""
    out: list[list[tuple[float, int]]] = [[] for _ in queries]
    free = [i for i, q in enumerate(queries) if not q.words.strip() and not q.without.strip()]
    if free:
        scores, rows = top_k(vectors_QD[free], candidates_ND, max(queries[i].top for i in free))
        for i, s, r in zip(free, scores.tolist(), rows.tolist(), strict=True):
            out[i] = list(zip(s, r, strict=True))
    for i in set(range(len(queries))) - set(free):
        kept = rows_with(queries[i])
        (scores,), (rows,) = top_k(vectors_QD[i : i + 1], candidates_ND[kept], queries[i].top)
        out[i] = list(zip(scores.tolist(), kept[rows.long()].tolist(), strict=True))
    return [
        [(score, row) for score, row in near[: query.top] if score >= query.least]
        for query, near in zip(queries, out, strict=True)
    ]


def _spaced(text: str) -> str:
    return f" {' '.join(terms(text))} "


def _asked(words: str) -> dict[str, str]:
    """The words of a filter, of each its terms as `_spaced` has them.

    A word of several terms, such as `e-mail` or one of Chinese, is found where they stand together.
    """
    return {word: _spaced(word) for word in words.split() if terms(word)}


def _has_all(caption: str, asked: dict[str, str]) -> bool:
    return all(term in caption for term in asked.values())


def _has_any(caption: str, asked: dict[str, str]) -> bool:
    return any(term in caption for term in asked.values())


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
        ids = gallery.items.image_ids
        step = max(1, len(ids) // settings.pages_queries)
        some = ids[::step][: settings.pages_queries]
        texts = [gallery.pictures.caption_texts(image_id)[-1] for image_id in some]
    return [Query(text, top=settings.top, shades=settings.shades) for text in texts]
