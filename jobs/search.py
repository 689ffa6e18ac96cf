"""halftone search: a text finds images, --image FILE finds captions; without either, a page."""

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.run import Run
from pipeline.errors import InputError


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
    answer(run) if asked and not run.dry else page(run)


def page(run: Run) -> None:
    """The page of the recipe's queries, or of captions of the split."""
    from pipeline.search.page import page

    with run.stage("search") as stage:
        stage.page(page(run.recipe, run.root, run.name), aside=True)


def answer(run: Run) -> None:
    """The hits of one query, in the terminal and as a page."""
    from pipeline.reports import tables
    from pipeline.search import index
    from pipeline.search.page import answer as answered

    options, settings = run.options, run.recipe.search
    picture = index.read_picture(options.image) if options.image else None
    asked = {"words": options.words, "without": options.without, "top": settings.top}
    asked["shades"] = settings.shades and not picture
    query = index.Query(options.query or "", picture, **asked)
    gallery = index.SearchIndex(run.recipe, run.root, run.name)
    hits, shown = answered(gallery, query)
    shown.make()
    run.results |= {"told": gallery.told(query), **gallery.about_query(query)}
    run.show.notes(run.results["told"])
    about = f"model {run.name}{gallery.how([query])}; as a page: {shown.uri}"
    run.show.table("", *tables.hits(hits), about)
    run.results["hits"] = [
        {"image": h.image_id, "score": h.score, "relevance": h.relevance, "text": h.text}
        for h in hits
    ]


COMMAND = Command(scopes.best_model, run, ("search", "evaluate"), arguments=arguments)

if __name__ == "__main__":
    main.main("search")
