"""halftone search: a text finds images, --image FILE finds captions; without either, a page."""

from jobs.cli import main
from jobs.cli.run import Run
from pipeline.errors import InputError
from pipeline.search import index, page
from pipeline.storage import store


def arguments(parser) -> None:
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("query", nargs="?", default=None, help="what to look for")
    asked.add_argument("--image", default=None, help="a picture (or .npy features) to look for")
    parser.add_argument("--words", default="", help="only results with a caption of these words")
    parser.add_argument("--without", default="", help="only results without these words")


def run(run: Run, options=None) -> None:
    asked = options is not None and (options.query is not None or options.image)
    if asked and not run.dry:
        return answer(run, options)
    if options is not None and not asked and (options.words or options.without):
        raise InputError("--words and --without are of a query's results; write what to look for")
    with run.stage("search") as stage:
        uri = store.join(run.root, f"search-{run.name}.html")
        version = page.version(run.recipe, run.root, run.name)
        if stage.page(uri, version):
            gallery = index.SearchIndex(run.recipe, run.root, run.name)
            html = page.page(gallery, index.default_queries(gallery))
            store.write_bytes(uri, html.encode())
            run.track.artifact("search", "search.html", html.encode())
    return None


def answer(run: Run, options) -> None:
    """The hits of one query, in the terminal and as a page."""
    settings = run.recipe.search
    gallery = index.SearchIndex(run.recipe, run.root, run.name)
    query = index.Query(
        text=options.query or "",
        picture=index.read_picture(options.image) if options.image else None,
        top=settings.top,
        words=options.words,
        without=options.without,
        shades=settings.shades and not options.image,
    )
    uri = store.join(run.root, "search.html")
    hits, html = page.ask(gallery, query)
    store.write_bytes(uri, html.encode())
    columns, rows = page.table(hits)
    run.show.table("", columns, rows, f"model {run.name}; as a page: {uri}")
    run.results["hits"] = [
        {"image": h.image_id, "score": h.score, "relevance": h.relevance, "text": h.text}
        for h in hits
    ]


if __name__ == "__main__":
    main.main("search")
