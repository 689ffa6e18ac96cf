"""Stage 8: a text finds images, a picture finds captions; in a terminal and as a page."""

import functools
import io
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from pipeline import _pages, _plan, _store, evaluate, train
from pipeline._batches import decode
from pipeline._errors import InputError
from pipeline._pictures import Pictures, data_uri
from pipeline._ranking import Vectors
from schemas.settings import Recipe


@dataclass(frozen=True)
class Hit:
    """A result: an image with its first caption, or a caption."""

    id: str
    image_id: str
    text: str
    score: float
    own: bool = False  # the query belongs to it
    relevance: float | None = None
    picture: str | None = None  # data URI


class Gallery:
    """The ranked split of a run, ready to be searched with its model."""

    def __init__(self, recipe: Recipe, root: str, name: str):
        self.recipe, self.root, self.name = recipe, root, name
        split = recipe.evaluate.split
        folder = evaluate.vectors_folder(root, name)
        entries = evaluate.evaluated(recipe, root, name)
        uris = tuple(_store.join(folder, f"{entry['name']}.parquet") for entry in entries)
        self.vectors = Vectors.read(uris, _plan.version(entries))
        self.pictures = Pictures(root, split)

    @functools.cached_property
    def _model(self):
        return train.load_model(_plan.folder(self.root, "train", self.name))

    @torch.inference_mode()
    def by_text(self, text: str, top: int) -> list[Hit]:
        """The images nearest to a text."""
        if not text.strip():
            raise InputError("the query is empty; write what you look for")
        model, vocabulary, recipe = self._model
        words, lengths = vocabulary.encode([text], recipe.model.max_words)
        device = next(model.parameters()).device
        return self.images_near(model.encode_text(words.to(device), lengths)[0].cpu(), top)

    @torch.inference_mode()
    def by_image(self, data: bytes, top: int) -> list[Hit]:
        """The captions nearest to a picture (JPEG or PNG bytes), or to a feature array (.npy)."""
        model, _, recipe = self._model
        payload = torch.from_numpy(np.array(decode_query(data, recipe.model.image_size)))[None]
        device = next(model.parameters()).device
        try:
            vector = model.encode_image(payload.to(device))[0].cpu()
        except (RuntimeError, ValueError) as error:
            kind = "images" if recipe.model.image == "pixels" else "region features (.npy)"
            raise InputError(f"model {self.name} takes {kind}; the query is neither") from error
        scores, rows = torch.topk(self.vectors.texts @ vector, min(top, len(self.vectors.texts)))
        return [
            Hit(
                id=self.vectors.text_ids[row],
                image_id=self.vectors.text_image_ids[row],
                text=self.pictures.captions[self.vectors.text_ids[row]],
                score=score,
            )
            for score, row in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def images_near(self, vector: torch.Tensor, top: int) -> list[Hit]:
        scores, rows = torch.topk(self.vectors.images @ vector, min(top, len(self.vectors.images)))
        ids = [self.vectors.image_ids[row] for row in rows.tolist()]
        return [
            Hit(id=i, image_id=i, text=self.pictures.caption_texts(i)[0], score=score)
            for score, i in zip(scores.tolist(), ids, strict=True)
        ]

    def shown(self, hits: list[Hit]) -> list[Hit]:
        """The hits with their pictures."""
        return [replace(hit, picture=self.pictures.thumbnail(hit.image_id)) for hit in hits]


def decode_query(data: bytes, size: int) -> np.ndarray:
    try:
        return decode(data, size)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise InputError(f"the query is no picture Pillow can read: {error}") from error


def version(recipe: Recipe, root: str, name: str) -> str:
    """What a search page depends on."""
    vectors = _plan.need_index(evaluate.vectors_folder(root, name), "evaluate")
    split = recipe.evaluate.split
    entries = _plan.version(_plan.of_split(vectors, split))
    return _store.fingerprint("search", entries, recipe.search.model_dump(mode="json"))


def page(gallery: Gallery, queries: list[str]) -> str:
    """The search page: every query with its nearest images."""
    top = gallery.recipe.search.top
    written_for = {
        text: image_id
        for image_id in gallery.vectors.image_ids
        for text in gallery.pictures.caption_texts(image_id)
    }
    shown = []
    for text in queries:
        hits = gallery.shown(gallery.by_text(text, top))
        hits = [replace(h, own=written_for.get(text) == h.image_id) for h in hits]
        shown.append({"text": text, "hits": hits})
    return _render(gallery, shown)


def ask(gallery: Gallery, text: str | None, image: str | None) -> tuple[list[Hit], str]:
    """The hits of a text, or of the picture at a URI, and their page."""
    top = gallery.recipe.search.top
    if text is not None:
        return gallery.by_text(text, top), page(gallery, [text])
    try:
        data = _store.read_bytes(_store.absolute(image))
    except OSError as error:
        raise InputError(f"no picture at {image}; give a file that exists") from error
    hits = gallery.by_image(data, top)
    text = f"the captions nearest to {_store.name_of(image)}"
    query = {"text": text, "hits": gallery.shown(hits)}
    if not data.startswith(b"\x93NUMPY"):
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        picture.thumbnail((256, 256))
        query["picture"] = data_uri(picture)
    return hits, _render(gallery, [query])


def default_queries(gallery: Gallery) -> list[str]:
    """The recipe's queries, or captions from evenly spaced images of the split."""
    settings = gallery.recipe.search
    if settings.queries:
        return list(settings.queries)
    ids = gallery.vectors.image_ids
    step = max(1, len(ids) // settings.pages_queries)
    return [gallery.pictures.caption_texts(i)[-1] for i in ids[::step][: settings.pages_queries]]


def _render(gallery: Gallery, queries: list[dict]) -> str:
    recipe = gallery.recipe
    return _pages.render(
        "search.html.j2",
        data=recipe.name,
        model=gallery.name,
        split=recipe.evaluate.split,
        images=len(gallery.vectors.image_ids),
        queries=queries,
        root=gallery.root,
        version=version(recipe, gallery.root, gallery.name),
    )
