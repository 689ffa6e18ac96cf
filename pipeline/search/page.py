"""The search page."""

from dataclasses import replace

from pipeline.evaluation import tower_vectors
from pipeline.labels import embed, label
from pipeline.reports import render
from pipeline.reports.pictures import Hit, data_uri, small
from pipeline.reports.render import Made, Page
from pipeline.search.index import Query, SearchIndex, default_queries
from pipeline.sharding import images
from pipeline.storage import store
from schemas.settings import Recipe

LAYOUT = 4  # counts up when the page changes, so that it is made again
PREVIEW = 256  # pixels of the longer side of a query's picture


def page(recipe: Recipe, root: str, name: str) -> Page:
    """The page of a model with the recipe's queries, or captions of the split."""

    def made(version: str) -> Made:
        index = SearchIndex(recipe, root, name)
        queries = default_queries(index)
        return Made(html(index, queries, index.find_all(queries), version))

    uri = store.join(root, f"search-{name}.html")
    return Page(uri, LAYOUT, depends_on(recipe, root, name), made, "search.html")


def answer(index: SearchIndex, query: Query) -> tuple[list[Hit], Page]:
    """The hits of one query, and their page."""
    hits = index.find(query)
    asked = [query.text, query.picture, query.words, query.without]
    depends = [depends_on(index.recipe, index.root, index.name), *asked]

    def made(version: str) -> Made:
        return Made(html(index, [query], [hits], version))

    return hits, Page(store.join(index.root, "search.html"), LAYOUT, depends, made)


def depends_on(recipe: Recipe, root: str, name: str) -> list:
    """The vectors searched, the settings, and by what results are shaded."""
    vectors = tower_vectors.evaluated(recipe, root, name).version
    settings, shades = recipe.search.model_dump(mode="json"), None
    if recipe.search.shades:
        captions = embed.files(recipe, root).of_split(recipe.evaluate.split)
        shades = recipe.embed.encoder, captions.version, label.depends_on(recipe.label)
    return [vectors, settings, shades]


def html(index: SearchIndex, queries: list[Query], found: list[list[Hit]], version: str) -> str:
    """The page: every query with what is nearest."""
    shown = []
    for query, hits in zip(queries, found, strict=True):
        samples = index.pictures.samples([hit.row for hit in hits])
        own = [query.text in {c["text"] for c in sample.captions} for sample in samples]
        hits = [replace(h, own=o) for h, o in zip(index.shown(hits), own, strict=True)]
        about = {"text": query.text, "picture": preview(index, query.picture)}
        about |= {"words": query.words, "without": query.without}
        shown.append({**about, "hits": hits, "told": index.told(query)})
    recipe = index.recipe
    return render.render(
        "search.html.j2",
        data=recipe.name,
        model=index.name,
        split=recipe.evaluate.split,
        images=len(index.pictures.images),
        how=index.how(queries),
        shades=any(query.shades for query in queries),
        queries=shown,
        root=index.root,
        version=version,
    )


def preview(index: SearchIndex, picture: bytes | None) -> str | None:
    """A query's picture as the model sees it, as a data URI; None of a text or of features."""
    if picture is None or picture.startswith(b"\x93NUMPY"):
        return None
    return data_uri(small(images.open_picture(index.seen(picture)), PREVIEW))
