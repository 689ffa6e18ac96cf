"""halftone rerank on another system: a table of methods, and the best one's scores if asked for."""

import json
import tempfile
from dataclasses import replace

from rich.markup import escape

from jobs.cli import external_options, scopes
from jobs.cli.external_options import PROTOCOLS
from jobs.cli.show import Show
from pipeline.errors import InputError
from pipeline.storage import store
from schemas.settings import Recipe

OPTIONS = (
    ("image-matrix", "with --matrix: similarities of its images to each other (.npy)"),
    ("text-matrix", "with --matrix: similarities of its texts to each other (.npy)"),
    ("splits", "CSV (image_id, split): which images are train (the bank), val and test"),
    ("protocol", f"{', '.join(p for p in PROTOCOLS if p != 'given')} (default own)"),
    ("write", "folder for the new scores (.npy) and LeaPRR's weights"),
)


def arguments(parser) -> None:
    external_options.arguments(parser, *OPTIONS)


def scope(command, options, overrides: dict) -> None:
    """Another system where the options name one, else every model of the run folder."""
    if external_options.kind(options, "splits", "protocol", "write") is None:
        return scopes.each_model(command, options, overrides)
    _, models = scopes.models_of(options, overrides)
    return run(models[0][1], options)


def run(recipe: Recipe, options) -> None:
    from pipeline.reranking import external, rerank

    if options.dry_run:
        raise InputError("--dry-run looks into a run folder, which is not used here; leave it out")
    rerank.check(recipe.rerank.method)
    matrices = options.image_matrix, options.text_matrix
    splits = external.read_splits(options.splits) if options.splits else None
    system = external.read(external_options.read(options), splits, recipe, matrices)
    with tempfile.TemporaryDirectory() as own:
        folder = store.absolute(options.write) if options.write else own
        _compare(system, recipe, options, folder)


def _compare(system, recipe: Recipe, options, folder: str) -> None:
    """Fit and measure every method, print the table, write the best one's scores."""
    from pipeline.evaluation import protocols
    from pipeline.evaluation.results import sentence
    from pipeline.reports import tables
    from pipeline.reranking import external

    under, split = options.protocol or "own", recipe.evaluate.split
    found = {"none": protocols.measure(system.gallery, [under])[under]}
    best = None
    for method in recipe.rerank.method:
        fitted = external.fit(method, system, recipe, folder)
        made, cost = external.apply(fitted, system, split)
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
