"""Stage 6: tower vectors of every shard, then the rankings of every query and their metrics."""

from dataclasses import replace

from pipeline.evaluation import (
    external,
    graded_relevance,
    human_agreement,
    protocols,
    ranking,
    results,
    task_memory,
)
from pipeline.evaluation.results import Protocol, Result
from pipeline.evaluation.tower_vectors import _leaving, read_vectors, vectors_folder
from pipeline.labels import judged_pairs, label
from pipeline.sharding.exclusions import Excluded
from pipeline.storage import run_folder, store
from pipeline.storage.plan import Piece, Plan
from pipeline.training import train
from schemas.ranking import RANKING
from schemas.settings import Recipe

write_rankings = ranking.write_rankings
# Settings that rankings do not depend on, or depend on by contents.
OF_OTHERS = {"batch_size", "exclude", "resamples", "encoder", "judgements", "protocols"}


def plan(recipe: Recipe, root: str, name: str) -> Plan:
    """A piece for every shard of the evaluated split: its images and captions as queries."""
    folder = run_folder.folder(root, "evaluate", name)
    return plan_rankings("evaluate", folder, recipe, root, name, Protocol(rerank="none"))


def plan_rankings(
    stage: str,
    folder: str,
    recipe: Recipe,
    root: str,
    name: str,
    made: Protocol,
    scorer=None,
) -> Plan:
    """The pieces of a ranking of the evaluated split, made as the protocol `made` says.

    Other scores than the model's own are made from `scorer`.
    """
    vectors = run_folder.need_index(vectors_folder(root, name), "evaluate")
    judge, labels = graded_relevance.inputs_of(recipe, root)
    judged_by = judge["judged_by"]
    split = recipe.evaluate.split
    entries = run_folder.of_split(vectors, split)
    vector_folder = vectors_folder(root, name)
    uris = tuple(store.join(vector_folder, f"{e['name']}.parquet") for e in entries)
    leaving = _leaving(recipe, uris)
    common = {
        "vectors": uris,
        "leaving": leaving,
        "version": run_folder.version(entries),
        **judge,
        "scorer": scorer,
        "split": split,
        "recipe": recipe,
        "protocol": _protocol(made, recipe, judged_by, entries, leaving).settings,
    }
    depends = [
        common["version"],
        scorer and scorer.version,
        common["embeddings_version"],
        bool(judge["truth"]) and judge["truth_version"],
        recipe.evaluate.model_dump(exclude=OF_OTHERS),
        RANKING.names,
        label.depends_on(judged_by.label),
        *(sorted(ids) for ids in leaving if ids),
    ]
    pieces = [
        Piece(
            name=entry["name"],
            output=store.join(folder, f"{entry['name']}.parquet"),
            fingerprint=store.fingerprint(stage, entry["name"], depends),
            inputs={**common, "shard": uri},
            memory=task_memory.of_rankings(entries, labels, recipe, scorer is not None),
        )
        for entry, uri in zip(entries, common["vectors"], strict=True)
    ]
    return Plan.of(stage, folder, pieces, common["protocol"])


def _protocol(
    made: Protocol, recipe: Recipe, judged_by: Recipe, entries: list[dict], leaving: Excluded
) -> Protocol:
    images = sum(entry["images"] for entry in entries) - len(leaving.images)
    captions = sum(entry["captions"] for entry in entries) - len(leaving.captions)
    excluded = {"images": len(leaving.images), "captions": len(leaving.captions)}
    return replace(
        made,
        data=recipe.name,
        split=recipe.evaluate.split,
        images=images,
        captions=captions,
        captions_per_image=round(captions / images, 2),
        gain=results.GAIN,
        ndcg_at=recipe.evaluate.ndcg_at,
        label_encoder=judged_by.embed.encoder,
        label_map=judged_by.label.map,
        labels_trained_on=judged_by is recipe and train.needs_embeddings(recipe.train),
        excluded=excluded if leaving.captions else None,
    )


def results_version(plan: Plan, recipe: Recipe) -> str:
    """What the results of a model's own ranking depend on."""
    uri = recipe.evaluate.judgements
    people = uri and store.sha256(judged_pairs.read_named_file(uri))
    return results.version(plan, recipe, recipe.evaluate.protocols, people)


def result(plan: Plan, recipe: Recipe, root: str, name: str) -> Result:
    """The results of a model's own ranking, under the other protocols too that are asked for.

    Agreement with people stands among its figures.
    """
    found, settings = results.of_ranking(plan, recipe, {}, name), recipe.evaluate
    if not settings.judgements and not settings.protocols:
        return found
    gallery = external.of_vectors(read_vectors([(name, recipe)], root))
    tables = protocols.measure(gallery, list(settings.protocols), resamples=settings.resamples)
    if settings.judgements:
        people = human_agreement.read(settings.judgements)
        people = human_agreement.measure(gallery, people, settings.resamples)
        found.metrics.update(people.metrics)
        found.intervals.update(people.intervals)
        tables["judgements"] = people
    return replace(found, tables=tables)
