"""Stage 7: re-rankers fitted on train and val (7-reranker/), and their rankings (8-reranked/).

A method is a name of `reranking.baselines.METHODS`, `leaprr`, or a chain of them joined by "+".
Settings are chosen on val; LeaPRR, which has weights, is trained like the towers.
"""

import functools
import json
import resource
import time
from dataclasses import dataclass

import pyarrow as pa
import torch

from pipeline.errors import InputError, did_you_mean
from pipeline.evaluation import evaluate, ranking, task_memory, tower_vectors
from pipeline.evaluation.results import Protocol
from pipeline.reranking import baselines, fitting
from pipeline.reranking.inputs import SplitVectors, bank_size, inputs_of, problem_of, vectors_of
from pipeline.reranking.leaprr.model import load_leaprr
from pipeline.reranking.problem import SIDES, Problem
from pipeline.retrieval.scores import BlockScores
from pipeline.sharding.exclusions import Excluded
from pipeline.storage import parquet, run_folder, store
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import RunFolder
from pipeline.training import saved_model
from pipeline.training.distributed import ProcessGroup
from schemas.settings import Recipe, RerankSettings
from schemas.trials import TRIALS

summary = saved_model.summary  # LeaPRR's training leaves what that of the towers does


def plan(recipe: Recipe, root: str, name: str) -> Plan:
    """A piece for every method: the settings of its steps, chosen on val."""
    check(recipe.rerank.method)
    inputs, versions = inputs_of(recipe, root, name)
    folder = RunFolder(root).folder("rerank", name)
    matters = recipe.rerank.relevant("bytes", "bank", "fit")
    chosen_on = inputs["vectors"]["val"].towers
    memory = task_memory.of_rankings(chosen_on, None, recipe, scored=True)
    weights = recipe.rerank.weights
    given = run_folder.need_index(weights, "rerank")["version"] if weights else ""
    pieces = []
    for method in recipe.rerank.method:
        own = given if "leaprr" in method else ""
        piece = Piece(
            name=method,
            output=store.join(folder, f"{method}.parquet"),
            fingerprint=store.fingerprint("rerank", method, matters, versions, own),
            inputs={**inputs, "method": method},
            memory=memory,
        )
        pieces.append(piece)
    return Plan.of("rerank", folder, pieces, matters)


def check(methods: tuple[str, ...]) -> None:
    """Refuse a method that there is not, and LeaPRR anywhere but at the end of a chain."""
    known = [*baselines.METHODS, "leaprr"]
    for method in methods:
        steps = method.split("+")
        for step in steps:
            if step not in known:
                raise InputError(f"unknown method {step!r}{did_you_mean(step, known)}")
        if "leaprr" in steps[:-1]:
            raise InputError(f"{method!r} goes on after leaprr; leaprr is a chain's last step")


def write_reranker(piece: Piece) -> dict:
    """Choose each step's settings on val and write all trials; a summary with the steps."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    inputs, settings, device = piece.inputs, piece.inputs["rerank"], ProcessGroup().device
    val = problem_of(inputs["vectors"], settings, "val")
    val = val and val.to(device)
    methods = [method for method in inputs["method"].split("+") if method != "leaprr"]
    steps, trials = fitting.chain(methods, val, settings.betas)
    summary = {"method": inputs["method"], "steps": steps, "bank_images": bank_size(inputs)}
    ends, model = "leaprr" in inputs["method"], None
    if ends and settings.weights is not None:
        model = load_leaprr(settings.weights).to(device)
        steps = [*steps, {"method": "leaprr"}]
    if val is not None and (model or not ends):  # else LeaPRR's training tells what it gives on val
        with torch.inference_mode():
            summary["val/rsum"] = sum(fitting.sums(val, steps, model))
    rows = [{**trial, "setting": str(trial["setting"])} for trial in trials]
    table = pa.Table.from_pylist(rows, schema=TRIALS)
    return parquet.write_table(piece.output, table, piece.fingerprint, summary)


# ---- LeaPRR's training -------------------------------------------------------------------------


def plan_training(recipe: Recipe, root: str, name: str, fitted: dict) -> list[Plan]:
    """A plan of one piece for every method that ends with LeaPRR, unless weights are given."""
    if recipe.rerank.weights is not None:
        return []
    inputs, versions = inputs_of(recipe, root, name)
    lists = {}
    if recipe.leaprr.lists not in ("train", "val"):
        splits = ("train", recipe.evaluate.split)
        lists = vectors_of(recipe, recipe.leaprr.lists, name, splits)
    plans = []
    for entry in fitted["pieces"]:
        method = entry["name"]
        if not method.endswith("leaprr"):
            continue
        folder = RunFolder(root).folder("rerank", name, method)
        steps, bank = entry["steps"], entry["bank_images"]
        own = recipe.leaprr.model_dump(mode="json")
        others = [vectors.version for vectors in lists.values()]
        about = [method, own, recipe.rerank.relevant(), versions, steps, others, bank]
        version = store.fingerprint(versions)
        piece = Piece(
            name="leaprr",
            output=store.join(folder, "history.json"),
            fingerprint=store.fingerprint("leaprr", *about),
            inputs={**inputs, "method": method, "lists": lists, "steps": steps, "version": version},
        )
        plans.append(Plan.of("rerank", folder, [piece], own))
    return plans


def fit(piece: Piece, report, leaving=lambda: False, live=lambda figures: None) -> None:
    """Train LeaPRR to the end from its newest checkpoint, on every worker alike."""
    from pipeline.reranking.leaprr.training import LeaPRRTrainer
    from pipeline.training.loop import Loop

    def build(piece: Piece, world: ProcessGroup) -> LeaPRRTrainer:
        return LeaPRRTrainer(piece, world, *_training_problems(piece.inputs))

    Loop(build, piece, report, leaving, live).run()


def _training_problems(inputs: dict) -> tuple[Problem, Problem | None]:
    """What LeaPRR learns from, and what its epochs are compared on."""
    lists, settings, vectors = inputs["leaprr"].lists, inputs["rerank"], inputs["vectors"]
    val = problem_of(vectors, settings, "val")
    if lists not in ("train", "val"):
        of, split = inputs["lists"], inputs["split"]
        if not of["train"].towers or not of[split].towers:
            raise InputError(
                f"--leaprr.lists {lists} needs vectors of train and of {split}; evaluate that "
                "run first"
            )
        return problem_of(of, settings, split), val
    learned = problem_of(vectors, settings, lists)
    if learned is None:
        raise InputError(f"--leaprr.lists {lists}: this run has no {lists} split; take another")
    return learned, val if lists == "train" else None


# ---- rankings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """What new scores are made from; `version` stands for all of it."""

    vectors: tuple[tuple[str, SplitVectors], ...]  # of train, val and the evaluated split
    split: str
    settings: RerankSettings
    steps: str  # of the chain, JSON
    weights: str | None  # folder of LeaPRR's
    version: str


def best(recipe: Recipe, root: str, name: str) -> tuple[str, float]:
    """The method with the highest rSum on val, and that; else the first that is named, and -1.

    LeaPRR that learned the lists of val has none: what it gives there is no measure of it.
    """
    index = RunFolder(root).index("rerank", name)
    found = {}
    for entry in index["pieces"]:
        value = entry.get("val/rsum", -1.0)
        trained = RunFolder(root).known("rerank", name, entry["name"])
        if "leaprr" in entry["name"] and recipe.rerank.weights is None and trained:
            value = trained["pieces"][0]["metrics"].get("val/rsum", -1.0)
        found[entry["name"]] = value
    method = max(recipe.rerank.method, key=lambda method: found[method])
    return method, found[method]


def plan_reranked(recipe: Recipe, root: str, name: str, method: str | None = None) -> Plan:
    """A piece for every shard of the evaluated split, as in `evaluate`, of a method or the best.

    The best method's rankings are the stage's own; those of others lie in folders of their names.
    """
    index = RunFolder(root).index("rerank", name)
    first, _ = best(recipe, root, name)
    method = first if method is None else method
    entry = next(entry for entry in index["pieces"] if entry["name"] == method)
    steps, weights, versions = entry["steps"], None, [run_folder.version([entry])]
    if method.endswith("leaprr"):
        weights = recipe.rerank.weights or RunFolder(root).folder("rerank", name, method)
        trained = run_folder.need_index(weights, "rerank")
        steps = [*steps, {"method": "leaprr"}]
        versions.append(trained["version"])
    made = _protocol(recipe, method, entry)
    inputs, splits = inputs_of(recipe, root, name)
    matters = recipe.rerank.relevant()
    scorer = Scorer(
        vectors=tuple(inputs["vectors"].items()),
        split=recipe.evaluate.split,
        settings=recipe.rerank,
        steps=json.dumps(steps),
        weights=weights,
        version=store.fingerprint(versions, splits["train"], matters, method),
    )
    folder = RunFolder(root).folder("reranked", name, *([] if method == first else [method]))
    vectors = inputs["vectors"][recipe.evaluate.split].towers
    return evaluate.plan_rankings("reranked", folder, recipe, root, vectors, made, scorer)


def _protocol(recipe: Recipe, method: str, entry: dict) -> Protocol:
    """How the rankings were made: method, pool, bank, and every setting chosen."""
    settings = recipe.rerank
    chosen = {}
    for step in entry["steps"]:
        of = "" if len(entry["steps"]) == 1 else f"{step['method']}_"
        for direction in SIDES:
            chosen |= {f"{of}{key}_{direction}": v for key, v in step[direction].items()}
    banked = settings.pool == "inductive" or "train_pairs" in method
    return Protocol(
        rerank=method.replace("_", " ").replace("+", ", then "),
        pool=settings.pool,
        texts=recipe.embed.encoder if settings.texts == "sentences" else None,
        siblings=None if banked else "kept" if settings.siblings else "left out",
        bank_images=entry["bank_images"] if banked else None,
        chosen=chosen,
    )


@functools.lru_cache(maxsize=1)
def _scores(scorer: Scorer, excluded: Excluded) -> BlockScores:
    """The new scores of the evaluated split, made when they are asked for."""
    device, vectors = ProcessGroup().device, dict(scorer.vectors)
    problem = problem_of(vectors, scorer.settings, scorer.split, excluded).to(device)
    model = load_leaprr(scorer.weights).to(device) if scorer.weights else None
    reranker = fitting.Reranker(problem, json.loads(scorer.steps), model)
    items = tower_vectors.without(vectors[scorer.split].towers, excluded).items
    return BlockScores(items, lambda d, rows_Q: reranker.scores(d, rows_Q.to(device)).cpu())


def write_rankings(piece: Piece) -> dict:
    """Write a shard's new rankings; a summary with the time and the memory they took."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    started = time.perf_counter()
    summary = ranking.write(piece, _scores(piece.inputs["scorer"], piece.inputs["excluded"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**summary, "seconds": time.perf_counter() - started, "peak_mb": peak}


def cost(index: dict) -> dict[str, float]:
    """Milliseconds a query, rankings and metrics with it, and the largest task's memory (MB)."""
    made = [entry for entry in index["pieces"] if "seconds" in entry]
    if not made:
        return {}
    per_query = sum(entry["seconds"] for entry in made) / sum(entry["queries"] for entry in made)
    return {"ms_per_query": 1000 * per_query, "peak_mb": max(e["peak_mb"] for e in made)}
