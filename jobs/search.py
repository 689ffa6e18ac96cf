"""halftone search: a text finds images, --image FILE finds captions; without either, a page."""

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.run import Run
from pipeline.errors import InputError
from pipeline.storage import store


def arguments(parser) -> None:
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("query", nargs="?", default=None, help="what to look for")
    asked.add_argument("--image", default=None, help="a picture (or .npy features) to look for")
    parser.add_argument("--words", default="", help="only results with a caption of these words")
    parser.add_argument("--without", default="", help="only results without these words")


def run(run: Run) -> None:
    options = run.options
    asked = options.query is not None or options.image
    if not asked and (options.words or options.without):
        raise InputError("--words and --without are of a query's results; write what to look for")
    answer(run) if asked and not run.dry else write_page(run)


def write_page(run: Run) -> None:
    """The page of the recipe's queries, or of captions of the split."""
    from pipeline.search import index, page

    with run.stage("search") as stage:
        uri = store.join(run.root, f"search-{run.name}.html")
        if stage.page(uri, page.version(run.recipe, run.root, run.name)):
            gallery = index.SearchIndex(run.recipe, run.root, run.name)
            data = page.page(gallery, index.default_queries(gallery)).encode()
            store.write_bytes(uri, data)
            run.track.artifact("search", "search.html", data)


def answer(run: Run) -> None:
    """The hits of one query, in the terminal and as a page."""
    from pipeline.search import index, page

    options, uri = run.options, store.join(run.root, "search.html")
    picture = index.read_picture(options.image) if options.image else None
    shades = run.recipe.search.shades and not picture
    asked = {"words": options.words, "without": options.without, "top": run.recipe.search.top}
    query = index.Query(options.query or "", picture, shades=shades, **asked)
    hits, html = page.ask(index.SearchIndex(run.recipe, run.root, run.name), query)
    store.write_bytes(uri, html.encode())
    run.show.table("", *page.table(hits), f"model {run.name}; as a page: {uri}")
    run.results["hits"] = [
        {"image": h.image_id, "score": h.score, "relevance": h.relevance, "text": h.text}
        for h in hits
    ]


COMMAND = Command(scopes.best_model, run, ("search", "evaluate"), arguments=arguments)

if __name__ == "__main__":
    main.main("search")
