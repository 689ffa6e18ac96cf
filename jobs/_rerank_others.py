"""halftone rerank on another system: a table of methods, and the best one's scores if asked for."""

import json
import tempfile

from rich.markup import escape

from jobs._show import Show
from pipeline import _rerank_others, _store, external, protocols, rerank
from pipeline._errors import InputError
from pipeline._rerank_others import Others
from schemas.settings import Recipe

OPTIONS = (
    ("embeddings", "another system: Parquet file or folder: id, image_id, modality, vector"),
    ("images", "another system: image vectors (.npy)"),
    ("texts", "another system: text vectors (.npy), in the order of their images"),
    ("matrix", "another system: similarities, images × texts (.npy)"),
    ("image-matrix", "with --matrix: similarities of its images to each other (.npy)"),
    ("text-matrix", "with --matrix: similarities of its texts to each other (.npy)"),
    ("image-ids", "the images' ids, one a line"),
    ("text-ids", "the texts' ids, one a line"),
    ("splits", "CSV (image_id, split): which images are train (the bank), val and test"),
    ("protocol", f"another system's: {', '.join(protocols.PROTOCOLS)} (default own)"),
    ("write", "folder for the other system's new scores (.npy) and LeaPRR's weights"),
)


def arguments(parser) -> None:
    for flag, about in OPTIONS:
        parser.add_argument(f"--{flag}", default=None, help=about)


def named(options) -> bool:
    """Whether the options name another system."""
    return bool(options.embeddings or options.images or options.matrix)


def run(recipe: Recipe, options) -> None:
    rerank.check(recipe.rerank.method)
    matrices = options.image_matrix, options.text_matrix
    splits = _rerank_others.read_splits(options.splits) if options.splits else None
    others = _rerank_others.read(_system(options), splits, recipe, matrices)
    with tempfile.TemporaryDirectory() as own:
        folder = _store.absolute(options.write) if options.write else own
        _compare(others, recipe, options, folder)


def _system(o) -> external.Gallery:
    if o.embeddings:
        return external.of_table(_store.absolute(o.embeddings))
    if o.matrix:
        return external.of_matrix(o.matrix, o.image_ids, o.text_ids)
    if not o.texts:
        raise InputError("--images are vectors of images alone; give --texts with them")
    return external.of_arrays(o.images, o.texts, o.image_ids, o.text_ids)


def _compare(others: Others, recipe: Recipe, options, folder: str) -> None:
    """Fit and measure every method, print the table, write the best one's scores."""
    under, split = options.protocol or "own", recipe.evaluate.split
    tables = {"none": protocols.measure(others.gallery, [under])[under]}
    costs, best = {}, None
    for method in recipe.rerank.method:
        fitted = _rerank_others.fit(method, others, recipe, folder)
        made, costs[method] = _rerank_others.apply(fitted, others, split)
        tables[method] = protocols.measure(made, [under])[under]
        if best is None or fitted.val > best[0]:
            best = fitted.val, method, made
    _, chosen, made = best
    show = Show(quiet=options.json)
    if options.json:
        found = {m: {**t._asdict(), **costs.get(m, {})} for m, t in tables.items()}
        print(json.dumps({m: {**values, "best": m == chosen} for m, values in found.items()}))
    else:
        *cells, protocol = _rerank_others.table(tables, costs, chosen, recipe)
        show.table("", *cells, escape(protocol))
    if options.write:
        for uri in _rerank_others.write(folder, made):
            show.line(uri)
