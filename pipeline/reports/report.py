"""The report: one self-contained page about all the models of a run folder."""

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError, StageMissing
from pipeline.evaluation import evaluate
from pipeline.evaluation import results as measured
from pipeline.evaluation.graded_relevance import GradedRelevance, judge_of
from pipeline.evaluation.results import Protocol, Result
from pipeline.labels.encoders import encoder_label
from pipeline.reports import false_negatives, figures, render, tables
from pipeline.reports.examples import Examples
from pipeline.reports.pictures import Pictures
from pipeline.reports.render import Made, Page
from pipeline.storage import parquet, store
from pipeline.storage.run_folder import Files, RunFolder
from schemas.settings import Recipe

LAYOUT = 4  # counts up when the page changes, so that it is made again
STAGES = {"evaluate": "as trained", "reranked": "re-ranked"}  # whose rankings there may be
Models = dict[str, dict[str, Result]]  # results by model and stage


@dataclass(frozen=True)
class Report:
    """The models of a run folder that stand in one table, and what they do; read once."""

    recipe: Recipe  # of the last model, whose examples are shown
    root: str
    models: Models
    undecided: list[dict]  # likely false negatives of the evaluated split

    @property
    def page(self) -> Page:
        """The report as a page of the run folder."""
        recipe, root = self.recipe, self.root
        told = [(r.label, r.as_dict()) for of_one in self.models.values() for r in of_one.values()]
        settings = recipe.report.model_dump(mode="json")
        return Page(
            uri=store.join(root, "report.html"),
            layout=LAYOUT,
            depends=[told, recipe.about, settings, self.undecided],
            render=lambda version: build(recipe, root, self.models, self.undecided, version),
            artifact="report.html",
        )

    def results(self, names: list[str]) -> list[Result]:
        """Of some of the models, each with what re-ranking made of it."""
        return [result for name in names for result in self.models[name].values()]


def read(recipe: Recipe, root: str, saved: list[tuple[str, Recipe]], names: list[str]) -> Report:
    """The report of the models `names`, the recipe of the last of them given.

    Beside them stand those of the run folder's models (name, settings) that were measured by the
    same protocol, if nothing they depend on has changed since.
    """
    known = {name: results_of(root, name) for name in dict.fromkeys([*dict(saved), *names])}
    if missing := ", ".join(name for name in names if "evaluate" not in known[name]):
        raise InputError(f"no metrics of {missing} in {root}; run `halftone evaluate` first")
    protocol, beside = _comparable(known[names[-1]]), []
    for name, settings in saved:
        if name not in names and _comparable(known[name]) == protocol:
            with contextlib.suppress(StageMissing):
                if evaluate.plan(settings, root, name).complete:
                    beside.append(name)
    undecided = false_negatives.undecided(recipe, root)[: recipe.report.suspects]
    return Report(recipe, root, {name: known[name] for name in [*beside, *names]}, undecided)


def results_of(root: str, name: str) -> dict[str, Result]:
    """What a model's rankings give, by stage; those that there are."""
    out = {}
    for stage, label in (("evaluate", name), ("reranked", f"{name}, re-ranked")):
        uri = RunFolder(root).folder(stage, name, measured.FILE)
        if result := measured.read(uri, label):
            out[stage] = result
    return out


def _comparable(of_model: dict[str, Result]) -> Protocol | None:
    """By what a model was measured, without what is the model's own; None where it was not."""
    if "evaluate" not in of_model:
        return None
    return replace(of_model["evaluate"].protocol, labels_trained_on=None)


def build(recipe: Recipe, root: str, models: Models, undecided: list[dict], version: str) -> Made:
    """The page and its figures; pictures and examples are of the last model."""
    run, label = RunFolder(root), encoder_label(recipe.embed.encoder)
    splits = store.read_json(run.folder("label", label, "histograms.json"))["splits"]
    # Relevance in the train split, or in the evaluated one where there is none.
    histograms = splits.get("train") or splits[recipe.evaluate.split]
    uris = {name: run.folder("train", name, "history.json") for name in models}
    histories = {name: store.read_json(uri)["records"] for name, uri in uris.items()}
    rankings = {}
    for name, of_model in models.items():
        rankings |= {r.label: _captions(run.files(s, name)) for s, r in of_model.items()}
    relevance = GradedRelevance(judge_of(recipe, root))
    drawn = [
        *figures.curves(histories),
        figures.spread(histograms, f"Relevance by {recipe.embed.encoder}, map {recipe.label.map}"),
        figures.recall(rankings, relevance),
    ]
    *_, (name, of_model) = models.items()
    mine = {STAGES[stage]: rankings[r.label].to_pylist() for stage, r in of_model.items()}
    examples = Examples(recipe.report, mine, relevance, Pictures(root, recipe.evaluate.split))
    found = [result for of_model in models.values() for result in of_model.values()]
    columns, rows = tables.models(found)
    protocol, truth = found[-1].protocol, any("true" in column for column in columns)
    html = render.render(
        "report.html.j2",
        version=version,
        data=recipe.name,
        about=recipe.about or "A Halftone run.",
        protocol=protocol,
        protocol_line=measured.sentence(protocol),
        intervals=any(result.intervals for result in found),
        columns=columns,
        rows=rows,
        figures=drawn,
        model=name,
        shade="true relevance" if truth else f"relevance by {protocol.label_encoder}",
        encoder=recipe.embed.encoder,
        facts=_facts(recipe, root),
        **examples.shown(undecided),
    )
    return Made(html, figures=drawn)


def _captions(files: Files) -> pa.Table:
    """The rankings of captions as queries, of all shards, in order."""
    table = parquet.read_tables(files.uris)
    return table.filter(pc.equal(table["direction"], "t2i"))


def _facts(recipe: Recipe, root: str) -> list[tuple[str, str]]:
    shards = RunFolder(root).index("shard")
    counts: Counter[str] = Counter()
    for entry in shards["pieces"]:
        counts[entry["split"]] += entry["samples"]
    sections = recipe.model_dump(mode="json")
    return [
        ("data version", shards["version"]),
        ("images", ", ".join(f"{split} {count:,}" for split, count in counts.items())),
        ("seed", str(recipe.train.seed)),
        *((name, json.dumps(sections[name])) for name in ("embed", "label", "model", "train")),
    ]
