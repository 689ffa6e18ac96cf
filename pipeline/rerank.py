"""Stage 7: inverted softmax over a bank of train queries, and the rankings it gives.

A candidate that is near to everything (a hub) is worth less: score'(q, c) = s(q, c) − h(c) with
h(c) = log Σ_b exp(β s(b, c)) / β over train queries b. Inductive: no other test query is looked at.
"""

import math

import pyarrow as pa
import torch

from pipeline import _plan, _ranking, _store, evaluate
from pipeline._errors import InputError
from pipeline._plan import Piece, Plan
from pipeline._ranking import Vectors, other, positives
from pipeline.formulas.metrics import recall_at
from schemas.settings import Recipe

BIAS = pa.schema([("id", pa.string()), ("direction", pa.string()), ("bias", pa.float32())])
write_rankings = _ranking.write_rankings


def plan(recipe: Recipe, root: str, name: str) -> Plan:
    """One piece: the temperature of each direction, chosen on val, and every candidate's bias."""
    vectors = _plan.need_index(evaluate.vectors_folder(root, name), "evaluate")
    folder = _plan.folder(root, "rerank", name)
    evaluate.evaluated(recipe, root, name)
    splits = ("train", "val", recipe.evaluate.split)
    of = {split: _plan.of_split(vectors, split) for split in splits}
    if not of["train"]:
        raise InputError("re-ranking needs a bank of train queries; this run has no train split")
    settings = recipe.rerank.model_dump(mode="json")
    versions = {split: _plan.version(entries) for split, entries in of.items()}
    uris = {
        split: tuple(
            _store.join(evaluate.vectors_folder(root, name), f"{e['name']}.parquet")
            for e in entries
        )
        for split, entries in of.items()
    }
    piece = Piece(
        name="inverted-softmax",
        output=_store.join(folder, "bias.parquet"),
        fingerprint=_store.fingerprint("rerank", settings, versions),
        inputs={
            "uris": uris,
            "versions": versions,
            "split": recipe.evaluate.split,
            "settings": recipe.rerank,
        },
    )
    return _plan.plan("rerank", folder, [piece], settings)


def write_reranker(piece: Piece) -> dict:
    """Choose β on val and write the bias of every candidate; a summary with β and what val says."""
    if summary := _store.finished(piece.output, piece.fingerprint):
        return summary
    uris, versions = piece.inputs["uris"], piece.inputs["versions"]
    settings, split = piece.inputs["settings"], piece.inputs["split"]
    bank = Vectors.read(uris["train"], versions["train"]).head(settings.bank_images)
    val = Vectors.read(uris["val"], versions["val"]) if uris["val"] else None
    gallery = Vectors.read(uris[split], versions[split])
    chosen, rows = {}, []
    for direction in ("i2t", "t2i"):
        trials = {
            beta: _recalls(val, direction, beta, bank) if val else None for beta in settings.betas
        }
        known = val is not None
        beta = max(trials, key=trials.get) if known else settings.betas[len(settings.betas) // 2]
        chosen[direction] = {"beta": beta, "val": {str(b): v for b, v in trials.items()}}
        ids, _, candidates = gallery.side(other(direction))
        bias = hubness(candidates, bank.side(direction)[2], beta)
        rows += [
            {"id": i, "direction": direction, "bias": b}
            for i, b in zip(ids, bias.tolist(), strict=True)
        ]
    summary = {"method": "inverted softmax", "bank_images": len(bank.image_ids), "chosen": chosen}
    table = pa.Table.from_pylist(rows, schema=BIAS)
    return _store.write_table(piece.output, table, piece.fingerprint, summary)


def hubness(candidates_ND: torch.Tensor, bank_BD: torch.Tensor, beta: float) -> torch.Tensor:
    """How near each candidate is to the bank's queries (N,): log-mean-exp at temperature 1/β."""
    bank_BD = bank_BD.double()
    parts = [
        torch.logsumexp(beta * (bank_BD @ part.double().T), dim=0)
        for part in candidates_ND.split(4096)
    ]
    return ((torch.cat(parts) - math.log(len(bank_BD))) / beta).float()


def _recalls(val: Vectors, direction: str, beta: float, bank: Vectors) -> float:
    """Sum of R@1, R@5, R@10 in percent on val."""
    _, query_images, queries = val.side(direction)
    _, candidate_images, candidates = val.side(other(direction))
    bias = hubness(candidates, bank.side(direction)[2], beta)
    total = 0.0
    for start in range(0, len(queries), _ranking.BLOCK):
        part = slice(start, start + _ranking.BLOCK)
        scores_QN = _ranking.scores(queries[part], candidates, bias)
        positive_QN = positives(query_images[part], candidate_images)
        total += sum(float(recall_at(scores_QN, positive_QN, k).sum()) for k in _ranking.DEPTHS)
    return 100 * total / len(queries)


def plan_reranked(recipe: Recipe, root: str, name: str) -> Plan:
    """Stage 8: a piece for every shard of the evaluated split, as in `evaluate`."""
    reranker = _plan.need_index(_plan.folder(root, "rerank", name), "rerank")
    folder = _plan.folder(root, "reranked", name)
    chosen = reranker["pieces"][0]["chosen"]
    protocol = {
        "rerank": "inverted softmax",
        "pool": "inductive",
        "bank_images": reranker["pieces"][0]["bank_images"],
        **{f"beta_{direction}": value["beta"] for direction, value in chosen.items()},
    }
    bias = (_plan.folder(root, "rerank", name, "bias.parquet"), reranker["version"])
    return evaluate.plan_rankings("reranked", folder, recipe, root, name, protocol, bias)
