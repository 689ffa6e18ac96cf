"""Stage 6: tower vectors of every shard, then the rankings of every query and their metrics."""

from pipeline.evaluation import graded_relevance, ranking, task_memory
from pipeline.evaluation.tower_vectors import _leaving, vectors_folder
from pipeline.labels import embed, label
from pipeline.sharding.exclusions import Excluded
from pipeline.storage import run_folder, store
from pipeline.storage.plan import Piece, Plan
from pipeline.training.objective import needs_embeddings
from schemas.ranking import RANKING
from schemas.settings import Recipe

write_rankings = ranking.write_rankings
# Settings that rankings do not depend on, or depend on by contents.
OF_OTHERS = {"batch_size", "exclude", "resamples", "encoder", "judgements", "protocols"}


def plan(recipe: Recipe, root: str, name: str) -> Plan:
    """A piece for every shard of the evaluated split: its images and captions as queries."""
    folder = run_folder.folder(root, "evaluate", name)
    return plan_rankings("evaluate", folder, recipe, root, name, {"rerank": "none"})


def plan_rankings(
    stage: str,
    folder: str,
    recipe: Recipe,
    root: str,
    name: str,
    protocol: dict,
    scorer=None,
) -> Plan:
    """The pieces of a ranking of the evaluated split; other scores are made from `scorer`."""
    vectors = run_folder.need_index(vectors_folder(root, name), "evaluate")
    judged_by = graded_relevance.recipe_of_judge(recipe, root)
    label_folder = embed.folder_of(judged_by, root)
    embeddings = run_folder.need_index(label_folder, "embed")
    split = recipe.evaluate.split
    entries, labels = run_folder.of_split(vectors, split), run_folder.of_split(embeddings, split)
    manifest = run_folder.need_index(run_folder.folder(root, "ingest"), "ingest")
    knows_truth = any(n.startswith("truth") for e in manifest["pieces"] for n in e["files"])
    vector_folder = vectors_folder(root, name)
    uris = tuple(store.join(vector_folder, f"{e['name']}.parquet") for e in entries)
    leaving = _leaving(recipe, uris)
    common = {
        "vectors": uris,
        "leaving": leaving,
        "version": run_folder.version(entries),
        "embeddings": tuple(store.join(label_folder, f"{e['name']}.parquet") for e in labels),
        "embeddings_version": run_folder.version(labels),
        "truth": run_folder.folder(root, "ingest") if knows_truth else "",
        "truth_version": manifest["version"],
        "scorer": scorer,
        "split": split,
        "recipe": recipe,
        "judged_by": judged_by,
        "protocol": {**_protocol(recipe, judged_by, entries, leaving), **protocol},
    }
    depends = [
        common["version"],
        scorer and scorer.version,
        common["embeddings_version"],
        knows_truth and common["truth_version"],
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


def _protocol(recipe: Recipe, judged_by: Recipe, entries: list[dict], leaving: Excluded) -> dict:
    images = sum(entry["images"] for entry in entries) - len(leaving.images)
    captions = sum(entry["captions"] for entry in entries) - len(leaving.captions)
    excluded = {"images": len(leaving.images), "captions": len(leaving.captions)}
    return {
        "data": recipe.name,
        "split": recipe.evaluate.split,
        "images": images,
        "captions": captions,
        "captions_per_image": round(captions / images, 2),
        "ties": "expected rank",
        "gain": "2^r - 1",
        "ndcg_at": recipe.evaluate.ndcg_at,
        "label_encoder": judged_by.embed.encoder,
        "label_map": judged_by.label.map,
        "labels_trained_on": judged_by is recipe and needs_embeddings(recipe.train),
        **({"excluded": excluded} if leaving.captions else {}),
    }
