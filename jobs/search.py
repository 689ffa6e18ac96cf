"""halftone search: a text finds images, --image FILE finds captions; without either, a page."""

from jobs import _cli
from jobs._run import Run
from pipeline import _store, search


def arguments(parser) -> None:
    parser.add_argument("query", nargs="?", default=None, help="what to look for")
    parser.add_argument("--image", default=None, help="a picture (or .npy features) to look for")


def run(run: Run, options=None) -> None:
    if options is not None and (options.query or options.image) and not run.dry:
        return answer(run, options)
    with run.stage("search") as stage:
        uri = _store.join(run.root, f"search-{run.name}.html")
        version = search.version(run.recipe, run.root, run.name)
        if stage.page(uri, version):
            gallery = search.Gallery(run.recipe, run.root, run.name)
            page = search.page(gallery, search.default_queries(gallery))
            _store.write_bytes(uri, page.encode())
            run.track.artifact("search", "search.html", page.encode())
    return None


def answer(run: Run, options) -> None:
    gallery = search.Gallery(run.recipe, run.root, run.name)
    hits, page = search.ask(gallery, options.query, options.image)
    uri = _store.join(run.root, "search.html")
    _store.write_bytes(uri, page.encode())
    rows = [[f"{hit.score:.3f}", hit.image_id, hit.text] for hit in hits]
    run.show.table("", ["score", "image", "caption"], rows, f"model {run.name}; as a page: {uri}")
    run.results["hits"] = [{"image": h.image_id, "score": h.score, "text": h.text} for h in hits]


if __name__ == "__main__":
    _cli.main("search")
