"""halftone score: any model's vectors, scores or TREC runs, under the field's protocols."""

import json

from jobs import _cli, _recipes
from jobs._show import Show
from pipeline import _people, _store, evaluate, external, protocols


def arguments(parser) -> None:
    for flag, about in (
        ("embeddings", "Parquet file or folder: id, image_id, modality, vector"),
        ("images", "image vectors (.npy)"),
        ("texts", "text vectors (.npy), in the order of their images"),
        ("matrix", "similarities, images × texts (.npy)"),
        ("image-ids", "the images' ids, one a line"),
        ("text-ids", "the texts' ids, one a line"),
        ("run-i2t", "TREC run of images as queries"),
        ("run-t2i", "TREC run of texts as queries"),
        ("positives", "CSV or JSON of the pairs that match"),
        ("people", "CSV of people's image_id,caption_id,score, to measure agreement with"),
        ("protocol", ", ".join(protocols.PROTOCOLS)),
        ("write-trec", "folder for TREC runs and qrels"),
    ):
        parser.add_argument(f"--{flag}", default=None, help=about)


def run(root: str, options) -> None:
    system = _system(root, options)
    given = external.matches(options.positives) if options.positives else None
    names = (options.protocol or ("given" if given else "own")).split(",")
    tables = protocols.measure(system, names, given)
    if options.people:
        tables["judgements"] = _people.measure(system, _people.read(options.people))
    show = Show(quiet=options.json)
    if options.json:
        print(json.dumps({name: table._asdict() for name, table in tables.items()}))
    else:
        for table in tables.values():
            show.table("", ["", "value", "95 %"], protocols.rows(table), protocols.line(table))
    if options.write_trec:
        for uri in external.write_trec(_store.absolute(options.write_trec), system):
            show.line(uri)


def _system(root: str, o):
    """What is measured: of other people, or the model of a run folder."""
    if o.embeddings:
        return external.of_table(_store.absolute(o.embeddings))
    if o.images and o.texts:
        return external.of_arrays(o.images, o.texts, o.image_ids, o.text_ids)
    if o.matrix:
        return external.of_matrix(o.matrix, o.image_ids, o.text_ids)
    if o.run_i2t or o.run_t2i:
        return external.of_trec(o.run_i2t, o.run_t2i)
    return external.of_vectors(evaluate.read_vectors(_recipes.saved(root, {}, o.name), root))


if __name__ == "__main__":
    _cli.main("score")
