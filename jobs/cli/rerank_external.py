"""halftone rerank on another system: a table of methods, and the best one's scores if asked for."""

import json
import tempfile
from dataclasses import replace

from rich.markup import escape

from jobs.cli import external_options
from jobs.cli.show import Show
from pipeline.errors import InputError
from pipeline.evaluation import protocols
from pipeline.evaluation.results import sentence
from pipeline.reports import tables
from pipeline.reranking import external, rerank
from pipeline.reranking.external import Others
from pipeline.storage import store
from schemas.settings import Recipe

OPTIONS = (
    ("image-matrix", "with --matrix: similarities of its images to each other (.npy)"),
    ("text-matrix", "with --matrix: similarities of its texts to each other (.npy)"),
    ("splits", "CSV (image_id, split): which images are train (the bank), val and test"),
    ("protocol", f"{', '.join(p for p in protocols.PROTOCOLS if p != 'given')} (default own)"),
    ("write", "folder for the new scores (.npy) and LeaPRR's weights"),
)


def arguments(parser) -> None:
    external_options.arguments(parser, *OPTIONS)


def named(options) -> bool:
    """Whether the options name another system."""
    return external_options.kind(options, "splits", "protocol", "write") is not None


def run(recipe: Recipe, options) -> None:
    if options.dry_run:
        raise InputError("--dry-run looks into a run folder, which is not used here; leave it out")
    rerank.check(recipe.rerank.method)
    matrices = options.image_matrix, options.text_matrix
    splits = external.read_splits(options.splits) if options.splits else None
    others = external.read(external_options.read(options), splits, recipe, matrices)
    with tempfile.TemporaryDirectory() as own:
        folder = store.absolute(options.write) if options.write else own
        _compare(others, recipe, options, folder)


def _compare(others: Others, recipe: Recipe, options, folder: str) -> None:
    """Fit and measure every method, print the table, write the best one's scores."""
    under, split = options.protocol or "own", recipe.evaluate.split
    found = {"none": protocols.measure(others.gallery, [under])[under]}
    best = None
    for method in recipe.rerank.method:
        fitted = external.fit(method, others, recipe, folder)
        made, cost = external.apply(fitted, others, split)
        found[method] = replace(protocols.measure(made, [under])[under], cost=cost)
        if best is None or fitted.val > best[0]:
            best = fitted.val, method, made
    val, chosen, made = best
    show = Show(quiet=options.json)
    if options.json:
        print(json.dumps({m: {**r.as_dict(), "best": m == chosen} for m, r in found.items()}))
    else:
        measured = [replace(result, label=method) for method, result in found.items()]
        cells = tables.methods(measured, recipe.rerank.pool, chosen, val)
        show.table("", *cells, escape(sentence(found["none"].protocol)))
    if options.write:
        for uri in external.write(folder, made):
            show.line(uri)
