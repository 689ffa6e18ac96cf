"""Stage 6: tower vectors of every shard, then the rankings of every query and their metrics."""

import functools

import numpy as np
import pyarrow as pa
import torch

from pipeline.errors import InputError
from pipeline.evaluation import external, intervals, protocols
from pipeline.evaluation import graded_relevance as _graded
from pipeline.evaluation import human_agreement as _people
from pipeline.evaluation import ranking as _ranking
from pipeline.evaluation import task_memory as _task_memory
from pipeline.labels import embed, label
from pipeline.labels import judged_pairs as _judged
from pipeline.sharding import exclusions as _exclusions
from pipeline.sharding.exclusions import Leaving
from pipeline.storage import cache as _cache
from pipeline.storage import plan as _plan
from pipeline.storage import store as _store
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.vector_columns import vector_column
from pipeline.training import train
from pipeline.training.data import stream
from schemas.embedding import tower_schema
from schemas.ranking import RANKING
from schemas.settings import Recipe

write_rankings = _ranking.write_rankings
RESULTS = 1  # counts up when metrics.json changes, so that it is made again
# Settings that rankings do not depend on, or depend on by contents.
OF_OTHERS = {"batch_size", "exclude", "resamples", "encoder", "judgements", "protocols"}


def plan_vectors(recipe: Recipe, root: str, name: str) -> Plan:
    """A piece for every shard of the evaluated split, of val, and of the train bank."""
    shards = _plan.need_index(_plan.folder(root, "shard"), "shard")
    model = _plan.need_index(_plan.folder(root, "train", name), "train")
    folder = vectors_folder(root, name)
    entries = _plan.of_split(shards, recipe.evaluate.split)
    if not any(entry["samples"] for entry in entries):
        known = ", ".join(sorted({entry["split"] for entry in shards["pieces"]}))
        raise InputError(f"evaluate.split {recipe.evaluate.split!r} holds nothing; known: {known}")
    entries += _plan.of_split(shards, "val") + bank_shards(shards, recipe.rerank.bank_images)
    pieces = [
        Piece(
            name=entry["name"],
            output=_store.join(folder, f"{entry['name']}.parquet"),
            fingerprint=_store.fingerprint("vectors", model["version"], entry["files"]),
            inputs={
                "tar": _plan.folder(root, "shard", f"{entry['name']}.tar"),
                "file": entry["files"][f"{entry['name']}.tar"],
                "copies": recipe.train.cache_gb * 1e9,
                "split": entry["split"],
                "model": _plan.folder(root, "train", name),
                "version": model["version"],
                "batch_size": recipe.evaluate.batch_size,
            },
            memory=_task_memory.of_vectors(entry, recipe, model),
        )
        for entry in {entry["name"]: entry for entry in entries if entry["samples"]}.values()
    ]
    return Plan.of("vectors", folder, pieces, {})


def vectors_folder(root: str, name: str) -> str:
    return _plan.folder(root, "evaluate", name, "vectors")


def evaluated(recipe: Recipe, root: str, name: str) -> list[dict]:
    """The entries of the evaluated split's vectors, or a sentence that names the splits."""
    vectors = _plan.need_index(vectors_folder(root, name), "evaluate")
    entries = _plan.of_split(vectors, recipe.evaluate.split)
    if not entries:
        known = ", ".join(sorted({entry["split"] for entry in vectors["pieces"]}))
        raise InputError(
            f"evaluate.split {recipe.evaluate.split!r} is not evaluated; known: {known}"
        )
    return entries


def read_vectors(models: list[tuple[str, Recipe]], root: str) -> _ranking.Vectors:
    """Vectors of the evaluated split, by the one model (name, settings) of a run folder."""
    if len(models) != 1:
        names = ", ".join(name for name, _ in models) or "no model"
        raise InputError(f"{root} holds {names}; name one with --name, or other vectors")
    [(name, recipe)] = models
    entries = evaluated(recipe, root, name)
    folder = vectors_folder(root, name)
    uris = tuple(_store.join(folder, f"{entry['name']}.parquet") for entry in entries)
    vectors = _ranking.Vectors.read(uris, _plan.version(entries))
    return vectors.without(_leaving(recipe, uris))


def bank_shards(shards: dict, images: int) -> list[dict]:
    """The first train shards that hold so many images (train shards are in random order)."""
    kept: list[dict] = []
    for entry in _plan.of_split(shards, "train"):
        if sum(e["samples"] for e in kept) < images:
            kept.append(entry)
    return kept


@functools.lru_cache(maxsize=1)
def _model(folder: str, version: str):
    return train.load_model(folder)


@torch.inference_mode()
def write_vectors(piece: Piece) -> dict:
    """Write the tower vectors of one shard; a summary with their number."""
    if summary := _store.finished(piece.output, piece.fingerprint):
        return summary
    inputs = piece.inputs
    model, vocabulary, recipe = _model(inputs["model"], inputs["version"])
    device = next(model.parameters()).device
    tar = _cache.kept(inputs["tar"], inputs["file"], inputs["copies"])
    samples = list(stream(tar, image_size=recipe.model.image_size))
    rows, vectors = [], []
    for start in range(0, len(samples), inputs["batch_size"]):
        batch = samples[start : start + inputs["batch_size"]]
        payload = torch.from_numpy(np.stack([image for _, image in batch]))
        vectors.append(model.encode_image(payload.to(device)).cpu())
        rows += [(about["image_id"], about["image_id"], "image") for about, _ in batch]
    captions = [(c, about["image_id"]) for about, _ in samples for c in about["captions"]]
    for start in range(0, len(captions), inputs["batch_size"]):
        batch = captions[start : start + inputs["batch_size"]]
        texts = [caption["text"] for caption, _ in batch]
        words, lengths = vocabulary.encode(texts, recipe.model.max_words)
        vectors.append(model.encode_text(words.to(device), lengths).cpu())
        rows += [(caption["caption_id"], image_id, "text") for caption, image_id in batch]
    matrix = torch.cat(vectors).numpy()
    ids, image_ids, modality = (list(column) for column in zip(*rows, strict=True))
    table = pa.table(
        {
            "id": ids,
            "image_id": image_ids,
            "modality": modality,
            "vector": vector_column(matrix),
        },
        schema=tower_schema(matrix.shape[1]),
    )
    summary = {"split": inputs["split"], "images": len(samples), "captions": len(captions)}
    return _store.write_table(piece.output, table, piece.fingerprint, summary)


def plan(recipe: Recipe, root: str, name: str) -> Plan:
    """A piece for every shard of the evaluated split: its images and captions as queries."""
    folder = _plan.folder(root, "evaluate", name)
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
    vectors = _plan.need_index(vectors_folder(root, name), "evaluate")
    judged_by = _graded.judged_by(recipe, root)
    label_folder = embed.folder_of(judged_by, root)
    embeddings = _plan.need_index(label_folder, "embed")
    split = recipe.evaluate.split
    entries, labels = _plan.of_split(vectors, split), _plan.of_split(embeddings, split)
    manifest = _plan.need_index(_plan.folder(root, "ingest"), "ingest")
    knows_truth = any(n.startswith("truth") for e in manifest["pieces"] for n in e["files"])
    vector_folder = vectors_folder(root, name)
    uris = tuple(_store.join(vector_folder, f"{e['name']}.parquet") for e in entries)
    leaving = _leaving(recipe, uris)
    common = {
        "vectors": uris,
        "leaving": leaving,
        "version": _plan.version(entries),
        "embeddings": tuple(_store.join(label_folder, f"{e['name']}.parquet") for e in labels),
        "embeddings_version": _plan.version(labels),
        "truth": _plan.folder(root, "ingest") if knows_truth else "",
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
            output=_store.join(folder, f"{entry['name']}.parquet"),
            fingerprint=_store.fingerprint(stage, entry["name"], depends),
            inputs={**common, "shard": uri},
            memory=_task_memory.of_rankings(entries, labels, recipe, scorer is not None),
        )
        for entry, uri in zip(entries, common["vectors"], strict=True)
    ]
    return Plan.of(stage, folder, pieces, common["protocol"])


def _leaving(recipe: Recipe, uris: tuple[str, ...]) -> Leaving:
    """The images and captions of the evaluated split that `evaluate.exclude` takes out."""
    if recipe.evaluate.exclude is None:
        return Leaving()
    captions: dict[str, list[str]] = {}
    for uri in uris:
        table = _store.read_table(uri, ["id", "image_id", "modality"])
        for id_, image_id, modality in zip(*table.to_pydict().values(), strict=True):
            captions.setdefault(image_id, [])
            if modality == "text":
                captions[image_id].append(id_)
    leaving = _exclusions.leaving(recipe.evaluate.exclude, captions)
    if len(leaving.images) == len(captions):
        raise InputError(
            f"evaluate.exclude {recipe.evaluate.exclude} takes all {len(captions)} images of "
            f"{recipe.evaluate.split} out; evaluate another split or shorten the list"
        )
    return leaving


def _protocol(recipe: Recipe, judged_by: Recipe, entries: list[dict], leaving: Leaving) -> dict:
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
        "labels_trained_on": judged_by is recipe and train.needs_embeddings(recipe.train),
        **({"excluded": excluded} if leaving.captions else {}),
    }


def metrics(plan: Plan) -> dict[str, float]:
    """The means over all queries of a finished ranking."""
    return intervals.figures(queries(plan))


def queries(plan: Plan) -> dict[str, intervals.Queries]:
    """Every query's own metrics in a finished ranking, by direction."""
    return _ranking.queries([piece.output for piece in plan.pieces])


def results(plan: Plan, recipe: Recipe) -> dict:
    """What metrics.json holds of any ranking: figures, their intervals, and the protocol."""
    ranking = queries(plan)
    return {
        "metrics": intervals.figures(ranking),
        "intervals": intervals.bootstrap(ranking, recipe.evaluate.resamples),
        "protocol": plan.settings,
    }


def results_uri(plan: Plan) -> str:
    return _store.join(plan.folder, "metrics.json")


def results_version(plan: Plan, recipe: Recipe) -> str:
    """What metrics.json depends on."""
    settings = recipe.evaluate.model_dump(include={"resamples", "protocols"})
    uri = recipe.evaluate.judgements
    people = uri and _store.sha256(_judged.contents_of(uri))
    return _store.fingerprint(RESULTS, plan.fingerprint, settings, people)


def all_results(plan: Plan, recipe: Recipe, root: str, name: str) -> dict:
    """`results`, with people's judgements among the figures, and tables under protocols."""
    found = results(plan, recipe) | {"tables": {}, "version": results_version(plan, recipe)}
    settings = recipe.evaluate
    if not settings.judgements and not settings.protocols:
        return found
    gallery = external.of_vectors(read_vectors([(name, recipe)], root))
    tables = protocols.measure(gallery, list(settings.protocols), resamples=settings.resamples)
    if settings.judgements:
        people = _people.measure(gallery, _people.read(settings.judgements), settings.resamples)
        found["metrics"] |= people.metrics
        found["intervals"] |= people.intervals
        tables["judgements"] = people
    return found | {"tables": {name: table._asdict() for name, table in tables.items()}}
