"""Stage 6: tower vectors of every shard, then the rankings of every query and their metrics."""

from itertools import accumulate

from pipeline.evaluation import graded_relevance, ranking, task_memory, tower_vectors
from pipeline.evaluation.graded_relevance import Judge
from pipeline.labels import label
from pipeline.sharding import exclusions
from pipeline.sharding.exclusions import Excluded
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import Files, RunFolder
from pipeline.training import train
from schemas.ranking import RANKING
from schemas.settings import Recipe


def plan(recipe: Recipe, root: str, name: str) -> Plan:
    """A piece for every shard of the evaluated split: its images and captions as queries."""
    folder = RunFolder(root).folder("evaluate", name)
    vectors = tower_vectors.files(root, name, recipe.evaluate.split)
    return plan_rankings("evaluate", folder, recipe, root, vectors, {"rerank": "none"})


def plan_rankings(
    stage: str,
    folder: str,
    recipe: Recipe,
    root: str,
    vectors: Files,
    protocol: dict,
    scorer=None,
) -> Plan:
    """The pieces of a ranking of the evaluated split; other scores are made from `scorer`."""
    excluded = exclusions.of_evaluation(recipe.evaluate, vectors)
    judge = graded_relevance.judge_of(recipe, root)
    protocol = {**_protocol(recipe, judge, vectors, excluded), **protocol}
    inputs = {
        "vectors": vectors,
        "excluded": excluded,
        "judge": judge,
        "scorer": scorer,
        "split": recipe.evaluate.split,
        "recipe": recipe,
        "protocol": protocol,
    }
    depends = [
        vectors.version,
        scorer and scorer.version,
        judge.captions.version,
        judge.truth != "" and judge.truth_version,
        recipe.evaluate.relevant(),
        RANKING.names,
        label.depends_on(judge.recipe.label),
        *(sorted(ids) for ids in excluded if ids),
    ]
    memory = task_memory.of_rankings(
        vectors.entries, judge.captions.entries, recipe, scorer is not None
    )
    # Where each shard's images and captions begin in the split, and the end.
    counts = [[entry[of] for entry in vectors.entries] for of in ("images", "captions")]
    ends = [[*accumulate(of, initial=0)] for of in counts]
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


def _protocol(recipe: Recipe, judge: Judge, vectors: Files, excluded: Excluded) -> dict:
    images = sum(entry["images"] for entry in vectors.entries) - len(excluded.images)
    captions = sum(entry["captions"] for entry in vectors.entries) - len(excluded.captions)
    left_out = {"images": len(excluded.images), "captions": len(excluded.captions)}
    return {
        "data": recipe.name,
        "split": recipe.evaluate.split,
        "images": images,
        "captions": captions,
        "captions_per_image": round(captions / images, 2),
        "ties": "expected rank",
        "gain": "2^r - 1",
        "ndcg_at": recipe.evaluate.ndcg_at,
        "label_encoder": judge.recipe.embed.encoder,
        "label_map": judge.recipe.label.map,
        "labels_trained_on": judge.recipe is recipe and train.needs_embeddings(recipe.train),
        **({"excluded": left_out} if excluded.captions else {}),
    }


def write_rankings(piece: Piece) -> dict:
    """Write the rankings of one shard by the model's vectors; a summary with their number."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    inputs = piece.inputs
    return ranking.write(piece, tower_vectors.without(inputs["vectors"], inputs["excluded"]))
