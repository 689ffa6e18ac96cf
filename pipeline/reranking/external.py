"""Re-ranking any system: its vectors or its matrix of scores, in the splits of its images."""

import hashlib
import logging
import resource
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.evaluation import external
from pipeline.reranking import fitting
from pipeline.reranking.leaprr.model import LeaPRR, load_leaprr
from pipeline.reranking.leaprr.training import LeaPRRTrainer
from pipeline.reranking.problem import SIDES, Problem
from pipeline.reranking.similarities import Matrices, Similarities, Towers
from pipeline.retrieval.scores import Items, MatrixScores, VectorScores
from pipeline.storage import csv_files, ids, store
from pipeline.storage.plan import Piece, Plan
from pipeline.training.loop import Loop
from pipeline.training.saved_model import summary
from schemas.settings import Recipe

ROWS = 256  # looked at together
LOG = logging.getLogger(__name__)
Uris = tuple[str | None, str | None]  # of two matrices (.npy), where there are any


@dataclass(frozen=True)
class External:
    """Another system: its evaluated split, the problem of each split, and a hash of all of it."""

    gallery: VectorScores | MatrixScores
    problems: dict[str, Problem]
    version: str


def read(
    system: VectorScores | MatrixScores,
    splits: dict | None,
    recipe: Recipe,
    matrices: Uris = (None, None),
) -> External:
    """The system as problems, given {image id: split}; without it all images are evaluated.

    `matrices` are of its images' and of its texts' similarities (.npy), where there are any.
    """
    split, settings = recipe.evaluate.split, recipe.rerank
    if settings.texts != "towers":
        raise InputError("rerank.texts sentences is for a run folder; leave it out here")
    rows = _rows(system.items, splits, split, settings.bank_images)
    if isinstance(system, VectorScores):
        sims: Similarities = Towers(system.images, system.texts)
    else:
        _check_scored(system.i2t)
        known = settings.pool == "inductive" and len(rows["train"]["image"])
        of_images, of_texts = (uri and external.array(uri) for uri in matrices)
        sims = Matrices(system.i2t, of_images, of_texts, known=rows["train"] if known else None)
    owner_N = torch.from_numpy(system.items.image_of_N)
    nobody = {"image": torch.arange(0), "text": torch.arange(0)}
    problems = {
        name: Problem(
            sims,
            gallery=of,
            bank=nobody if name == "train" else rows["train"],
            owner={"image": torch.arange(len(system.items.image_ids)), "text": owner_N},
            pool=settings.pool,
            siblings=settings.siblings,
        )
        for name, of in rows.items()
        if len(of["image"])
    }
    gallery = system.take(*(rows[split][side].numpy() for side in ("image", "text")))
    return External(gallery, problems, _version(system, matrices, splits))


def _check_scored(i2t_MN: torch.Tensor) -> None:
    """Refuses pairs without a score: re-ranking compares whole rows."""
    for start, rows_RN in enumerate(i2t_MN.split(ROWS)):
        if (none_RN := rows_RN == -torch.inf).any():
            row, column = torch.nonzero(none_RN)[0].tolist()
            raise InputError(
                f"image {start * ROWS + row} and text {column} (from 0) have the score -inf, which "
                "is none; re-ranking compares whole rows: score every pair"
            )


def read_splits(uri: str) -> dict[str, str]:
    """{image id: split} of a CSV; an image that is there twice is in one split."""
    found: dict[str, str] = {}
    for line, row in csv_files.rows(uri, ("image_id", "split"), "a list of images and splits"):
        image, split = row["image_id"], row["split"]
        if found.setdefault(image, split) != split:
            said = f"puts image {image!r} in {split}, an earlier line in {found[image]}"
            raise InputError(f"{uri} line {line} {said}; give an image one split")
    return found


def _rows(items: Items, splits: dict | None, split: str, bank_images: int) -> dict:
    """{split: rows of its images and texts}; images of no split are left out, and told."""
    image_ids, names = items.image_ids, {"train", "val", split}
    splits = dict.fromkeys(image_ids, split) if splits is None else splits
    words = {name.casefold(): name for name in names}
    splits = {image: words.get(word.casefold(), word) for image, word in splits.items()}
    ids.known(splits, set(image_ids), "--splits")
    if out := [id_ for id_ in image_ids if splits.get(id_) not in names]:
        LOG.warning(
            "--splits: %s of %s images are in none of %s, the first %r (%s); they are left out",
            *(f"{len(out):,}", f"{len(image_ids):,}", ", ".join(sorted(names)), out[0]),
            splits.get(out[0], "not listed"),
        )
    found = {}
    for name in names:
        images = [row for row, id_ in enumerate(image_ids) if splits.get(id_) == name]
        rows = items.of_images(images[:bank_images] if name == "train" else images)
        of_images, of_texts = (torch.from_numpy(part.astype(np.int64)) for part in rows)
        found[name] = {"image": of_images, "text": of_texts}
    if not len(found[split]["image"]):
        raise InputError(
            f"none of the {len(image_ids):,} images is in {split}, the split to re-rank; the first "
            f"image is {image_ids[0]!r}, the splits are {', '.join(sorted(set(splits.values())))}"
        )
    return found


def _version(system: VectorScores | MatrixScores, matrices: Uris, splits: dict | None) -> str:
    parts = [system.i2t] if isinstance(system, MatrixScores) else [system.images, system.texts]
    hashes = [hashlib.sha256(np.ascontiguousarray(part.numpy()).data).hexdigest() for part in parts]
    of_uris = [uri and store.sha256(store.read_bytes(store.absolute(uri))) for uri in matrices]
    return store.fingerprint(
        [*hashes, *of_uris], system.items.image_ids, system.items.text_image_ids, splits
    )


@dataclass(frozen=True)
class Fitted:
    """A method fitted to a system: its steps, LeaPRR if it ends with it, and rSum on val."""

    steps: list[dict]
    model: LeaPRR | None
    val: float


def fit(method: str, system: External, recipe: Recipe, folder: str) -> Fitted:
    """Choose the chain's settings on val, and train LeaPRR into a folder where it ends with it."""
    val, names = system.problems.get("val"), method.split("+")
    steps, _ = fitting.chain([n for n in names if n != "leaprr"], val, recipe.rerank.betas)
    model, lists = None, recipe.leaprr.lists
    if "leaprr" in names:
        weights = recipe.rerank.weights or _trained(method, system, recipe, steps, folder)
        steps, model = [*steps, {"method": "leaprr"}], load_leaprr(weights)
    seen = model is not None and recipe.rerank.weights is None and lists == "val"
    if val is None or seen:  # what LeaPRR gives on val is seen in its training
        return Fitted(steps, model, -1.0)
    with torch.inference_mode():
        return Fitted(steps, model, sum(fitting.sums(val, steps, model)))


def _trained(method: str, system: External, recipe: Recipe, steps: list, folder: str) -> str:
    """The folder with LeaPRR's weights, trained here unless they are there already."""
    lists, settings = recipe.leaprr.lists, recipe.leaprr
    if lists not in ("train", "val") or lists not in system.problems:
        raise InputError(
            f"leaprr.lists {lists}: --splits names no such images; name val or train images there"
        )
    val = system.problems.get("val") if lists == "train" else None
    folder, own = store.join(folder, method), settings.model_dump(mode="json")
    pool = recipe.rerank.relevant("bytes", "bank")
    del pool["texts"]  # there are no sentence vectors here
    piece = Piece(
        name="leaprr",
        output=store.join(folder, "history.json"),
        fingerprint=store.fingerprint("leaprr", method, own, pool, steps, system.version),
        inputs={"leaprr": settings, "steps": steps, "version": system.version},
    )
    plan = Plan.of("rerank", folder, [piece], own)
    if plan.pending:
        Loop(partial(LeaPRRTrainer, train=system.problems[lists], val=val), piece).run()
    plan.finish({piece.name: summary(piece)} if plan.pending else {})
    return folder


def apply(fitted: Fitted, system: External, split: str) -> tuple[MatrixScores, dict]:
    """The gallery with new scores of both directions, and what they took."""
    problem, started = system.problems[split], time.perf_counter()
    reranker = fitting.Reranker(problem, fitted.steps, fitted.model)
    made = {}
    for direction, (asking, _) in SIDES.items():
        parts = problem.gallery[asking].split(512)
        made[direction] = torch.cat([reranker.scores(direction, part) for part in parts])
    scores = MatrixScores(system.gallery.items, made["i2t"], made["t2i"].T)
    queries = sum(len(of) for of in made.values())
    return scores, {
        "ms_per_query": 1000 * (time.perf_counter() - started) / queries,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def rerank(
    scores: VectorScores | MatrixScores,
    method: str = "inverted_softmax",
    *,
    splits: dict[str, str] | None = None,
    split: str = "test",
    pool: str = "inductive",
    **settings: Any,
) -> MatrixScores:
    """The scores of one split, re-ranked: the method's settings are chosen on val.

    `splits` names each image's split; train images are the bank of an inductive pool, val is what
    settings are chosen on (without it the middle ones are taken). Without splits all images are
    ranked, which only a `transductive` pool can do. `settings` are those of `rerank`.
    """
    about = {"method": method, "pool": pool, **settings}
    recipe = Recipe(name="external", rerank=about, evaluate={"split": split})
    system = read(scores, splits, recipe)
    with tempfile.TemporaryDirectory() as folder:
        return apply(fit(method, system, recipe, folder), system, split)[0]


def write(folder: str, scores: MatrixScores) -> list[str]:
    """Writes the new scores (.npy), images down and texts across; their URIs."""
    uris = [store.join(folder, f"{direction}.npy") for direction in SIDES]
    for uri, matrix in zip(uris, (scores.i2t, scores.t2i), strict=True):
        with store.temporary(uri) as path, open(path, "wb") as file:
            np.save(file, np.ascontiguousarray(matrix.numpy()))
    return uris
