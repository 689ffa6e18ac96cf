"""Re-ranking any system: its vectors or its matrix of scores, in the splits of its images."""

import csv
import hashlib
import resource
import time
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.evaluation import external
from pipeline.reranking import fitting, rerank
from pipeline.reranking.leaprr.model import LeaPRR
from pipeline.reranking.leaprr.training import LeaPRRTrainer
from pipeline.reranking.problem import SIDES, Problem
from pipeline.reranking.similarities import Matrices, Similarities, Towers
from pipeline.retrieval.scores import Gallery, Reranked
from pipeline.storage import store
from pipeline.storage.plan import Piece, Plan
from schemas.settings import Recipe, RerankSettings


@dataclass(frozen=True)
class Others:
    """Another system: its gallery, the problem of each split, and a hash of all of it."""

    gallery: Gallery  # the evaluated split's
    problems: dict[str, Problem]
    version: str


def read(system: Gallery, splits: dict | None, recipe: Recipe, matrices=(None, None)) -> Others:
    """The system as problems, given {image id: split}; without it all images are evaluated.

    `matrices` are of its images' and of its texts' similarities (.npy), where there are any.
    """
    split, settings = recipe.evaluate.split, recipe.rerank
    if settings.texts != "towers":
        raise InputError("rerank.texts sentences is for a run folder; leave it out here")
    owner = {id_: row for row, id_ in enumerate(system.image_ids)}
    owners = {
        "image": torch.arange(len(system.image_ids)),
        "text": torch.tensor([owner[id_] for id_ in system.text_image_ids]),
    }
    rows = _rows(system, splits, split, owners["text"], settings.bank_images)
    sims = _similarities(system, matrices, rows["train"], settings)
    nobody = {side: torch.arange(0) for side in owners}
    problems = {
        name: Problem(
            sims,
            gallery=of,
            bank=nobody if name == "train" else rows["train"],
            owner=owners,
            pool=settings.pool,
            siblings=settings.siblings,
        )
        for name, of in rows.items()
        if len(of["image"])
    }
    gallery = system.part(*(rows[split][side].tolist() for side in ("image", "text")))
    return Others(gallery, problems, _version(system, matrices, splits))


def read_splits(uri: str) -> dict[str, str]:
    """{image id: split} of a CSV."""
    reader = csv.DictReader(store.read_text(store.absolute(uri)).splitlines())
    if not {"image_id", "split"} <= set(reader.fieldnames or ()):
        raise InputError(f"{uri} must begin with a line that names image_id and split")
    return {row["image_id"]: row["split"] for row in reader}


def _rows(system: Gallery, splits: dict | None, split: str, owner_N, bank_images: int) -> dict:
    """{split: rows of its images and texts}; images of no split are left out."""
    ids = system.image_ids
    splits = dict.fromkeys(ids, split) if splits is None else splits
    found = {}
    for name in {"train", "val", split}:
        images = torch.tensor([n for n, id_ in enumerate(ids) if splits.get(id_) == name]).long()
        if name == "train":
            images = images[:bank_images]
        texts = torch.isin(owner_N, images).nonzero()[:, 0]
        found[name] = {"image": images, "text": texts}
    if not len(found[split]["image"]):
        raise InputError(
            f"none of the {len(ids):,} images is in {split}, the split to re-rank; the first "
            f"image is {ids[0]!r}, the splits are {', '.join(sorted(set(splits.values())))}"
        )
    return found


def _similarities(system: Gallery, matrices, bank: dict, settings: RerankSettings) -> Similarities:
    if system.vectors is not None:
        return Towers(*system.vectors)
    given = (None if uri is None else external.array(uri) for uri in matrices)
    known = bank if settings.pool == "inductive" and len(bank["image"]) else None
    return Matrices(system.matrix, *given, known=known)


def _version(system: Gallery, matrices, splits: dict | None) -> str:
    parts = [system.matrix] if system.vectors is None else system.vectors
    hashes = [hashlib.sha256(np.ascontiguousarray(part.numpy())).hexdigest() for part in parts]
    hashes += [uri and store.sha256(store.read_bytes(store.absolute(uri))) for uri in matrices]
    return store.fingerprint(hashes, system.image_ids, system.text_image_ids, splits)


@dataclass(frozen=True)
class Fitted:
    """A method fitted to a system: its steps, LeaPRR if it ends with it, and rSum on val."""

    steps: list[dict]
    model: LeaPRR | None
    val: float


def fit(method: str, others: Others, recipe: Recipe, folder: str) -> Fitted:
    """Choose the chain's settings on val, and train LeaPRR into a folder where it ends with it."""
    val, names = others.problems.get("val"), method.split("+")
    steps, _ = fitting.chain([n for n in names if n != "leaprr"], val, recipe.rerank.betas)
    model, lists = None, recipe.leaprr.lists
    if "leaprr" in names:
        weights = recipe.rerank.weights or _trained(method, others, recipe, steps, folder)
        steps, model = [*steps, {"method": "leaprr"}], rerank.load_leaprr(weights)
    seen = model is not None and recipe.rerank.weights is None and lists == "val"
    if val is None or seen:  # what LeaPRR gives on val is seen in its training
        return Fitted(steps, model, -1.0)
    with torch.inference_mode():
        found = [fitting.recalls(fitting.views(val, d, steps, model)) for d in SIDES]
    return Fitted(steps, model, sum(found))


def _trained(method: str, others: Others, recipe: Recipe, steps: list, folder: str) -> str:
    """The folder with LeaPRR's weights, trained here unless they are there already."""
    lists, settings = recipe.leaprr.lists, recipe.leaprr
    if lists not in ("train", "val") or lists not in others.problems:
        raise InputError(
            f"leaprr.lists {lists}: --splits names no such images; name val or train images there"
        )
    val = others.problems.get("val") if lists == "train" else None
    folder, own = store.join(folder, method), settings.model_dump(mode="json")
    pool = recipe.rerank.model_dump(mode="json", include={"pool", "siblings", "bank_images"})
    piece = Piece(
        name="leaprr",
        output=store.join(folder, "history.json"),
        fingerprint=store.fingerprint("leaprr", method, own, pool, steps, others.version),
        inputs={"leaprr": settings, "steps": steps, "version": others.version},
    )
    plan = Plan.of("rerank", folder, [piece], own)
    if plan.pending:
        training = LeaPRRTrainer(piece, lambda records: None, others.problems[lists], val)
        while training.epoch < settings.epochs:
            training.run_epoch()
        training.publish()
    plan.finish({piece.name: rerank.summary(piece)} if plan.pending else {})
    return folder


def apply(fitted: Fitted, others: Others, split: str) -> tuple[Reranked, dict]:
    """The gallery with new scores of both directions, and what they took."""
    problem, started = others.problems[split], time.perf_counter()
    reranker = fitting.Reranker(problem, fitted.steps, fitted.model)
    scores = {}
    for direction, (asking, _) in SIDES.items():
        parts = problem.gallery[asking].split(512)
        scores[direction] = torch.cat([reranker.scores(direction, part) for part in parts])
    g = others.gallery
    made = Reranked(
        g.image_ids, g.text_ids, g.text_image_ids, matrix=scores["i2t"], t2i=scores["t2i"].T
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return made, {
        "ms_per_query": 1000 * seconds / (len(g.image_ids) + len(g.text_ids)),
        "peak_mb": peak,
    }


def write(folder: str, gallery: Reranked) -> list[str]:
    """Writes the new scores (.npy), images down and texts across; their URIs."""
    return [
        _array(store.join(folder, f"{way}.npy"), scores)
        for way, scores in (("i2t", gallery.matrix), ("t2i", gallery.t2i))
    ]


def _array(uri: str, scores: torch.Tensor) -> str:
    with store.temporary(uri) as path, open(path, "wb") as file:
        np.save(file, np.ascontiguousarray(scores.numpy()))
    return uri
