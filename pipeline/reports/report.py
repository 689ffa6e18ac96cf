"""The report: one self-contained page about all the models of a run folder."""

import contextlib
import functools
from dataclasses import dataclass, replace

from pipeline.errors import InputError, StageMissing
from pipeline.evaluation import compare, evaluate, tower_vectors
from pipeline.evaluation import results as measured
from pipeline.evaluation.graded_relevance import GradedRelevance, judge_of
from pipeline.evaluation.results import Protocol, Result
from pipeline.labels.encoders import encoder_label
from pipeline.reports import false_negatives, figures, render, tables
from pipeline.reports.pictures import Pictures
from pipeline.reports.render import Figure, Made, Page
from pipeline.reports.sections import (
    caption_kinds,
    curves,
    differences,
    hubs,
    made_of,
    results_table,
    shades,
)
from pipeline.reports.sections.examples import Examples, Thumbnails, hit, suspects
from pipeline.reports.sections.systems import COLOURS, STAGES, System
from pipeline.storage import store
from pipeline.storage.run_folder import RunFolder
from schemas.settings import Recipe

LAYOUT = 6  # counts up when the page changes, so that it is made again
GALLERIES = 6  # models whose queries are shown: the best on val
Models = dict[str, dict[str, Result]]  # results by model and stage


@dataclass(frozen=True)
class Report:
    """The models of a run folder that stand in one table, and what they do; read once."""

    recipe: Recipe  # of the last model that was asked for
    root: str
    models: Models
    recipes: dict[str, Recipe]  # of the models
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
            render=lambda version: build(recipe, root, self, version),
            artifact="report.html",
        )

    def results(self, names: list[str]) -> list[Result]:
        """Of some of the models, each with what re-ranking made of it."""
        return [result for name in names for result in self.models[name].values()]

    @functools.cached_property
    def systems(self) -> list[System]:
        """Every ranking of the models, each model's as trained before its re-ranked ones."""
        out, run = [], RunFolder(self.root)
        for number, (name, of_model) in enumerate(self.models.items()):
            for stage, result in of_model.items():
                recipe, again = self.recipes[name], stage == "reranked"
                model = compare.of_folder(self.root, name, recipe, result.label, reranked=again)
                out.append(System(name, number, stage, model, run.files(stage, name)))
        return out

    @functools.cached_property
    def histories(self) -> dict[str, dict]:
        """The training of every model."""
        run = RunFolder(self.root)
        return {n: store.read_json(run.folder("train", n, "history.json")) for n in self.models}

    def galleries(self) -> list[list[System]]:
        """The systems of each model whose queries are shown, the best on val first."""

        def on_val(name: str) -> float:
            return self.histories[name].get("summary", {}).get("metrics", {}).get("val/rsum", -1.0)

        order = sorted(self.models, key=on_val, reverse=True)[:GALLERIES]
        return [[s for s in self.systems if s.model == name] for name in order]


def read(recipe: Recipe, root: str, saved: list[tuple[str, Recipe]], names: list[str]) -> Report:
    """The report of the models `names`, the recipe of the last of them given.

    They stand in the order of `saved`. Beside them stand those of the run folder's models (name,
    settings) that were measured by the same protocol, if nothing they depend on has changed since.
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
    recipes = {**dict(saved), names[-1]: recipe}
    shown = [name for name in recipes if name in beside or name in names]
    models = {name: known[name] for name in dict.fromkeys([*shown, *names])}
    recipes = {name: recipes.get(name, recipe) for name in models}
    return Report(recipe, root, models, recipes, undecided)


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
    return replace(of_model["evaluate"].protocol, labels_trained_on=None, prompts=None)


def build(recipe: Recipe, root: str, report: Report, version: str) -> Made:
    """The page and its figures."""
    systems, histories = report.systems, report.histories
    relevance = _graded(recipe, root, systems[0].model)
    drawn = [*curves.figures(systems, histories), *_shades(recipe, root, systems, relevance)]
    thumbnails = Thumbnails(Pictures(root, recipe.evaluate.split, recipe.train.cache_gb * 1e9))
    galleries = report.galleries()
    shown = [
        {"model": some[0].model, "number": some[0].number, "method": _method(some)}
        | Examples(recipe.report, some, relevance, thumbnails).shown()
        for some in galleries
    ]
    suspected = suspects(report.undecided, thumbnails)
    best = galleries[0][0]
    results: list[Result] = [system.measured for system in systems]
    truth = relevance.facts is not None
    html = render.render(
        "report.html.j2",
        version=version,
        data=recipe.name,
        about=recipe.about or "A Halftone run.",
        protocol=best.measured.protocol,
        protocol_line=_protocol_line(galleries[0]),
        intervals=any(result.intervals for result in results),
        table=results_table.table(systems),
        level=results_table.LEVEL,
        lower=results_table.LOWER_IS_BETTER,
        permutations=results_table.PERMUTATIONS,
        seeds=tables.seeds(results),
        others=_other_protocols(systems),
        figures=drawn,
        costs=curves.costs(systems, histories),
        kinds=caption_kinds.table(systems, thumbnails.pictures.texts),
        differences=differences.table(best, systems),
        hubs=hubs.table(systems, root, recipe.evaluate.split),
        hub_depth=hubs.DEPTH,
        hub_pictures=_hubs(galleries[0], thumbnails),
        best=best.model,
        left_out=len(report.models) - len(galleries),
        galleries=shown,
        suspects=suspected,
        shade="true relevance" if truth else f"relevance by {best.measured.protocol.label_encoder}",
        encoder=recipe.embed.encoder,
        facts=made_of.data(root),
        settings=made_of.settings(systems),
        colours=COLOURS,
        thumbnails=thumbnails.uris(),
    )
    return Made(html, figures=drawn)


def _graded(recipe: Recipe, root: str, model: str) -> GradedRelevance:
    """Relevance by row of the evaluated split, as a model's vectors have it."""
    limit = recipe.train.cache_gb * 1e9
    towers = tower_vectors.evaluated(recipe, root, model)
    return GradedRelevance(judge_of(recipe, root), tower_vectors.read(towers, limit).items, limit)


def _shades(recipe: Recipe, root: str, systems: list[System], relevance) -> list[Figure]:
    """How relevance is spread, how true it is where that is known, and what of it is found."""
    folder = RunFolder(root).folder("label", encoder_label(recipe.embed.encoder), "histograms.json")
    splits = store.read_json(folder)["splits"]
    # Relevance in the train split, or in the evaluated one where there is none.
    histograms = splits.get("train") or splits[recipe.evaluate.split]
    title = f"Relevance by {recipe.embed.encoder}, map {recipe.label.map}"
    truth = shades.against_truth(relevance)
    spread = figures.spread(histograms, title)
    return [spread, *([truth] if truth else []), shades.recall(systems, relevance)]


def _protocol_line(systems: list[System]) -> str:
    """By what all was measured, and how the lists that were re-ranked were.

    Whether training used the labels is told of each model by itself, and by which prompts texts
    were read.
    """
    own = {"labels_trained_on": None, "prompts": None}
    return measured.sentence(replace(systems[-1].measured.protocol, **own))


def _method(systems: list[System]) -> str:
    """How the model's rankings were re-ranked."""
    protocol = systems[-1].measured.protocol
    return f"{protocol.rerank}, {protocol.pool}".capitalize()


def _hubs(systems: list[System], thumbnails: Thumbnails) -> list[tuple[str, list[tuple]]]:
    """The images that most captions find, of each of a model's rankings: (hit, how many)."""
    out = []
    for system in systems:
        top = hubs.hubness(system, "t2i").top
        found = [(hit(thumbnails, image_id, float("nan"), 0.0), n) for image_id, n in top]
        out.append((STAGES[system.stage], found))
    return out


def _other_protocols(systems: list[System]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(sentence, columns, rows) of every other protocol that systems were measured by."""
    out = []
    for name in dict.fromkeys(name for system in systems for name in system.measured.tables):
        found = [(s.label, s.measured.tables[name]) for s in systems if name in s.measured.tables]
        keys = list(dict.fromkeys(key for _, result in found for key in result.metrics))
        rows = []
        for label, result in found:
            cells = [
                f"{measured.figure(k, result.metrics[k])} {measured.interval(result, k)}".strip()
                if k in result.metrics
                else "–"
                for k in keys
            ]
            rows.append([label, *cells])
        out.append((measured.sentence(found[-1][1].protocol), ["", *keys], rows))
    return out
