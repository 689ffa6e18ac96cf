"""halftone score: any model's vectors, scores or TREC runs, under the field's protocols."""

import json

from jobs.cli import external_options, recipes, scopes
from jobs.cli.command import Command
from jobs.cli.show import Show
from pipeline.errors import InputError
from pipeline.storage import store

OPTIONS = (
    ("run-i2t", "TREC run of images as queries"),
    ("run-t2i", "TREC run of texts as queries"),
    ("positives", "CSV, JSON or qrels (A.qrels,B.qrels) of the pairs that match"),
    ("people", "CSV of people's image_id,caption_id,score, to measure agreement with"),
    ("protocol", ", ".join(external_options.PROTOCOLS)),
    ("write-trec", "folder for TREC runs and qrels"),
)


def arguments(parser) -> None:
    external_options.arguments(parser, *OPTIONS)


def run(root: str, options) -> None:
    from pipeline.evaluation import human_agreement, protocols, tower_vectors, trec
    from pipeline.evaluation.external import positives
    from pipeline.evaluation.results import sentence
    from pipeline.reports import tables

    names = (options.protocol or ("given" if options.positives else "own")).split(",")
    if options.positives and "given" not in names:
        raise InputError("--positives are the pairs of the protocol given; name it, or leave them")
    if external_options.kind(options):
        system = external_options.read(options)
    else:
        system = tower_vectors.read_vectors(recipes.saved(root, {}, options.name), root)
    given = positives.matches(options.positives, system.items) if options.positives else None
    found = protocols.measure(system, names, given)
    if options.people:
        found["judgements"] = human_agreement.measure(system, human_agreement.read(options.people))
    show = Show(quiet=options.json)
    if options.json:
        print(json.dumps({name: result.as_dict() for name, result in found.items()}))
    else:
        for result in found.values():
            show.table("", *tables.figures(result), sentence(result.protocol))
    if options.write_trec:
        for uri in trec.write(store.absolute(options.write_trec), system):
            show.line(uri)


COMMAND = Command(scopes.folder, run, arguments=arguments)
