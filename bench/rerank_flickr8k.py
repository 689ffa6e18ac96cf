r"""Re-ranking over training seeds: every method, both pools, LeaPRR, and LeaPRR's transfer.

    halftone run --recipe flickr8k_regions --source.path FOLDER --source.holdout 500 \
        --train.select best --name info_nce --seeds 0,1,2 --root RUN
    python -m bench.rerank_flickr8k RUN:info_nce.seed{0,1,2} [--lists RUN:NAME] [--to RUN:NAME]

LeaPRR learns from val, or from the evaluated split of `--lists`, a model that has not learned it:
in docs/reranking.md one trained on half of train and evaluated on the other half. Captions are
compared by the sentence encoder. A line a model and method, then the table, and what LeaPRR does
on towers it was not trained on: another seed's, and those of `--to`; twenty minutes.
"""

import argparse
import functools
import itertools
import statistics
import tempfile
import time

import torch

from jobs.cli import recipes
from pipeline.reranking import fitting
from pipeline.reranking.inputs import problem_of, vectors_of
from pipeline.reranking.leaprr.model import LeaPRR
from pipeline.reranking.leaprr.training import LeaPRRTrainer
from pipeline.reranking.problem import SIDES, Problem
from pipeline.storage import store
from pipeline.storage.plan import Piece
from pipeline.training.loop import Loop
from schemas.settings import LeaPRRSettings, RerankSettings

CHAINS = [
    "none",
    *("inverted_softmax", "qb_norm", "dual_softmax", "dynamic_dual_softmax", "krnn"),
    *("query_expansion", "database_augmentation", "train_pairs"),
    *("inverted_softmax+krnn", "inverted_softmax+train_pairs"),
    *("leaprr", "inverted_softmax+leaprr", "inverted_softmax+train_pairs+leaprr"),
]
OVERRIDES = {"embed": {"encoder": "all-MiniLM-L6-v2"}, "rerank": {"texts": "sentences"}}


class Model:
    """A run folder's model as re-ranking problems, by split and pool."""

    def __init__(self, named: str):
        root, _, name = named.rpartition(":")
        root = store.absolute(root)
        ((_, self.recipe),) = recipes.saved(root, OVERRIDES, name)
        splits = ("train", "val", self.recipe.evaluate.split)
        self.vectors = vectors_of(self.recipe, root, name, splits)

    def problem(self, pool: str, split: str | None = None) -> Problem:
        settings = RerankSettings(texts="sentences", pool=pool)
        return problem_of(self.vectors, settings, split or self.recipe.evaluate.split)

    @functools.cache  # noqa: B019 as long as the program
    def steps(self, pool: str, chain: str) -> list[dict]:
        """A chain's steps before LeaPRR, chosen on val."""
        names = [name for name in chain.split("+") if name not in ("none", "leaprr")]
        with torch.inference_mode():
            return fitting.chain(names, self.problem(pool, "val"), RerankSettings().betas)[0]


def rsum(problem, steps: list[dict], model: LeaPRR | None = None) -> float:
    with torch.inference_mode():
        return sum(fitting.recalls(fitting.views(problem, d, steps, model)) for d in SIDES)


def learned(here: Model, lists: Model | None, pool: str, steps: list[dict], seed: int) -> LeaPRR:
    """LeaPRR trained on the lists of val, or of another model and then the best epoch on val."""
    settings = LeaPRRSettings(seed=seed)
    val, among = here.problem(pool, "val"), None
    if lists is not None:
        val, among = lists.problem(pool), val
    with tempfile.TemporaryDirectory() as folder:
        inputs = {"leaprr": settings, "steps": steps, "version": ""}
        piece = Piece("leaprr", f"{folder}/history.json", "bench", inputs)
        training, best = Loop(functools.partial(LeaPRRTrainer, train=val, val=among), piece), {}
        while training.epoch < settings.epochs:
            training.run_epoch()
            if training.best["epoch"] == training.epoch:
                best = {k: v.clone() for k, v in training.trainer.model.state_dict().items()}
        training.settle()
    training.trainer.model.load_state_dict(best)
    return training.trainer.model.eval()


def measured(here: Model, lists: Model | None, pool: str, chain: str, seed: int):
    """(rSum on val, None where LeaPRR has seen it; rSum on test; steps; LeaPRR) of a chain."""
    val, test, steps = here.problem(pool, "val"), here.problem(pool), here.steps(pool, chain)
    if "leaprr" not in chain:
        return rsum(val, steps), rsum(test, steps), steps, None
    model = learned(here, lists, pool, steps, seed)
    steps = [*steps, {"method": "leaprr"}]
    on_val = None if lists is None else rsum(val, steps, model)
    return on_val, rsum(test, steps, model), steps, model


def told(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def compared(pool: str, tests: dict[str, list[float]]) -> None:
    """The best single method against the best combination, by their means."""
    groups = [[label for label in tests if ("+" in label) == more] for more in (False, True)]
    if all(groups):
        one, many = (max(of, key=lambda label: statistics.mean(tests[label])) for of in groups)
        gain = statistics.mean(tests[many]) - statistics.mean(tests[one])
        variances = [statistics.variance(tests[label]) / len(tests[label]) for label in (one, many)]
        errors = gain / sum(variances) ** 0.5
        print(f"\n{pool}: {many} beats {one} by {gain:.1f}, {errors:.1f} standard errors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--lists", default=None)
    parser.add_argument("--to", default=None)
    parser.add_argument("--chains", default=",".join(CHAINS))
    parser.add_argument("--pools", default="inductive,transductive")
    options = parser.parse_args()
    models = [Model(named) for named in options.models]
    others = Model(options.lists) if options.lists else None
    pools = options.pools.split(",")
    found: dict[str, dict[str, list[float]]] = {pool: {} for pool in pools}
    kept = []
    for pool, chain in itertools.product(pools, options.chains.split(",")):
        for seed, here in enumerate(models):
            started = time.process_time()
            val, test, *fitted = measured(here, others, pool, chain, seed)
            found[pool].setdefault(chain, []).append(test)
            if (pool, chain) == ("inductive", "leaprr"):
                kept.append(fitted)
            seconds = time.process_time() - started
            print(pool, seed, chain, val, round(test, 1), f"{seconds:.0f} s", flush=True)
    print(f"\n| method | {' | '.join(pools)} |\n|---{'|---' * len(pools)}|")
    for chain in options.chains.split(","):
        print(f"| {chain} | " + " | ".join(told(found[pool][chain]) for pool in pools) + " |")
    for pool in pools:
        compared(pool, found[pool])
    if kept:
        moved = [rsum(models[n].problem("inductive"), *kept[n - 1]) for n in range(len(kept))]
        print(f"LeaPRR of one seed's towers on another's: {told(moved)}")
    if kept and options.to:
        there = Model(options.to).problem("inductive")
        moved = [rsum(there, *fitted) for fitted in kept]
        print(f"on {options.to}: {rsum(there, []):.1f} without, {told(moved)} with theirs")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
