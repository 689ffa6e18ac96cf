"""The search page, and its results in a terminal."""

from dataclasses import replace

from pipeline.evaluation import tower_vectors
from pipeline.reports import render
from pipeline.reports.pictures import Hit, data_uri, small
from pipeline.search.index import Query, SearchIndex
from pipeline.sharding import images
from pipeline.storage import store
from schemas.settings import Recipe

PREVIEW = 256  # pixels of the longer side of a query's picture

SHADES = "○◔◑◕●"  # of relevance, from 0 to 1


def version(recipe: Recipe, root: str, name: str) -> str:
    """What a search page depends on."""
    vectors = tower_vectors.files(root, name, recipe.evaluate.split)
    return store.fingerprint("search", vectors.version, recipe.search.model_dump(mode="json"))


def ask(gallery: SearchIndex, query: Query) -> tuple[list[Hit], str]:
    """The hits of one query, and their page."""
    hits = gallery.find(query)
    return hits, _page(gallery, [query], [hits])


def page(gallery: SearchIndex, queries: list[Query]) -> str:
    """The search page: every query with what is nearest."""
    return _page(gallery, queries, gallery.find_all(queries))


def _page(gallery: SearchIndex, queries: list[Query], found: list[list[Hit]]) -> str:
    written_for = {
        text: image_id
        for image_id in gallery.items.image_ids
        for text in gallery.pictures.caption_texts(image_id)
    }
    shown = []
    for query, hits in zip(queries, found, strict=True):
        own = written_for.get(query.text)
        hits = [replace(hit, own=hit.image_id == own) for hit in gallery.shown(hits)]
        shown.append({"text": query.text, "hits": hits, "picture": preview(query.picture)})
    recipe = gallery.recipe
    return render.render(
        "search.html.j2",
        data=recipe.name,
        model=gallery.name,
        split=recipe.evaluate.split,
        images=len(gallery.items.image_ids),
        shades=any(query.shades for query in queries),
        queries=shown,
        root=gallery.root,
        version=version(recipe, gallery.root, gallery.name),
    )


def table(hits: list[Hit]) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows for a terminal, the relevance as a shade."""
    if any(hit.relevance is None for hit in hits) or not hits:
        return ["score", "image", "caption"], [[f"{h.score:.3f}", h.image_id, h.text] for h in hits]
    columns = ["", "relevance", "score", "image", "caption"]
    return columns, [
        [SHADES[round(h.relevance * 4)], f"{h.relevance:.2f}", f"{h.score:.3f}", h.image_id, h.text]
        for h in hits
    ]


def preview(picture: bytes | None) -> str | None:
    """A query's picture as a data URI; None of a text or of features."""
    if picture is None or picture.startswith(b"\x93NUMPY"):
        return None
    return data_uri(small(images.open_picture(picture), PREVIEW))
