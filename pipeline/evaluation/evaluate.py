"""Stage 6: tower vectors of every shard, then the rankings of every query and their metrics."""

from dataclasses import replace
from itertools import accumulate

from pipeline.evaluation import (
    graded_relevance,
    human_agreement,
    protocols,
    ranking,
    results,
    task_memory,
    tower_vectors,
)
from pipeline.evaluation.results import Protocol, Result
from pipeline.labels import label
from pipeline.sharding import exclusions
from pipeline.storage import parquet, store, text_files
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import Files, RunFolder
from pipeline.training.objective import needs_embeddings
from schemas.ranking import RANKING
from schemas.settings import Recipe


def plan(recipe: Recipe, root: str, name: str) -> Plan:
    """A piece for every shard of the evaluated split: its images and captions as queries."""
    folder = RunFolder(root).folder("evaluate", name)
    vectors = tower_vectors.files(root, name, recipe.evaluate.split)
    return plan_rankings("evaluate", folder, recipe, root, vectors, Protocol(rerank="none"))


def plan_rankings(
    stage: str, folder: str, recipe: Recipe, root: str, vectors: Files, made: Protocol, scorer=None
) -> Plan:
    """The pieces of a ranking of the evaluated split, made as the protocol `made` says.

    Other scores than the model's own are made from `scorer`.
    """
    excluded = exclusions.of_evaluation(recipe.evaluate, vectors)
    judge = graded_relevance.judge_of(recipe, root)
    # Where each shard's images and captions begin in the split, and the end.
    counts = [[entry[of] for entry in vectors.entries] for of in ("images", "captions")]
    ends = [[*accumulate(of, initial=0)] for of in counts]
    images, captions = (of[-1] - len(out) for of, out in zip(ends, excluded, strict=True))
    left_out = {"images": len(excluded.images), "captions": len(excluded.captions)}
    protocol = replace(
        made,
        data=recipe.name,
        split=recipe.evaluate.split,
        images=images,
        captions=captions,
        captions_per_image=round(captions / images, 2),
        gain=results.GAIN,
        ndcg_at=recipe.evaluate.ndcg_at,
        label_encoder=judge.recipe.embed.encoder,
        label_map=judge.recipe.label.map,
        labels_trained_on=judge.recipe is recipe and needs_embeddings(recipe.train),
        prompts=list(recipe.evaluate.prompts) or None,
        excluded=left_out if excluded.captions else None,
    ).settings
    inputs = {
        **{"vectors": vectors, "excluded": excluded, "judge": judge, "scorer": scorer},
        **{"split": recipe.evaluate.split, "recipe": recipe, "protocol": protocol},
    }
    depends = [
        *(vectors.version, scorer and scorer.version, judge.captions.version),
        judge.truth != "" and judge.truth_version,
        recipe.evaluate.relevant(),
        RANKING.names,
        label.depends_on(judge.recipe.label),
        *(sorted(ids) for ids in excluded if ids),
    ]
    memory = task_memory.of_rankings(vectors, judge.captions, recipe, scorer is not None)
    pieces = [
        Piece(
            name=name,
            output=store.join(folder, f"{name}.parquet"),
            fingerprint=store.fingerprint(stage, name, depends),
            inputs={**inputs, "rows": [(of[number], of[number + 1]) for of in ends]},
            memory=memory,
        )
        for number, name in enumerate(vectors.names)
    ]
    return Plan.of(stage, folder, pieces, protocol)


def write_rankings(piece: Piece) -> dict:
    """Write the rankings of one shard by the model's vectors; a summary with their number."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    inputs = piece.inputs
    return ranking.write(piece, tower_vectors.without(inputs["vectors"], inputs["excluded"]))


def results_version(plan: Plan, recipe: Recipe) -> str:
    """What the results of a model's own ranking depend on."""
    uri = recipe.evaluate.judgements
    people = uri and store.sha256(text_files.data(uri, "people's judgements"))
    return results.version(plan, recipe, recipe.evaluate.protocols, people)


def result(plan: Plan, recipe: Recipe, root: str, name: str) -> Result:
    """The results of a model's own ranking, under the other protocols too that are asked for.

    Agreement with people stands among its figures.
    """
    found, settings = results.of_ranking(plan, recipe, {}, name), recipe.evaluate
    if not settings.judgements and not settings.protocols:
        return found
    scores = tower_vectors.read_vectors([(name, recipe)], root)
    tables = protocols.measure(scores, list(settings.protocols), resamples=settings.resamples)
    if settings.judgements:
        people = human_agreement.read(settings.judgements)
        agreed = human_agreement.measure(scores, people, settings.resamples)
        found.metrics.update(agreed.metrics)
        found.intervals.update(agreed.intervals)
        tables["judgements"] = agreed
    return replace(found, tables=tables)
