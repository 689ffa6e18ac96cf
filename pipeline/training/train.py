"""Stage 5: a two-tower model is trained on the shards.

`fit` knows torch.distributed and nothing of what started it: it runs bare, under torchrun and
under Ray alike. What trains is imported where it is needed: a plan needs little of it.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from pipeline.labels import embed, label
from pipeline.models import vocabulary_of
from pipeline.storage import run_folder, store
from pipeline.storage.piece_table import column, split_names, where
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import RunFolder, contents_of
from pipeline.training.data import captions_of
from pipeline.training.distributed import ProcessGroup
from pipeline.training.loading.waiting import Stopwatch, watched
from pipeline.training.objective import check, needs_embeddings, needs_labels
from pipeline.training.sampler import order_of
from schemas.settings import Recipe

if TYPE_CHECKING:
    from pipeline.training.loop import Live, Report

STEPS, WARM, SECONDS = 20, 2, 20.0  # of a probe: steps timed, not timed, and when it is enough


def plan(recipe: Recipe, root: str, name: str) -> Plan:
    """One piece: the model. It depends on embeddings and labels only if a loss is graded."""
    check(recipe.train)
    shards = RunFolder(root).index("shard")
    folder = RunFolder(root).folder("train", name)
    used = [c for s in ("train", "val") for c in contents_of(run_folder.of_split(shards, s))]
    # Whether to compile was a yes or no when the first indexes were written: they stay as they are.
    told = {**recipe.train.model_dump(), "compile": recipe.train.compile == "on"}
    settings = {"model": recipe.model.model_dump(), "train": told}
    if needs_embeddings(recipe.train):
        embeddings = run_folder.need_index(embed.folder_of(recipe, root), "embed")
        splits = ("train", "val") if recipe.train.select == "best_ndcg" else ("train",)
        used += [c for s in splits for c in contents_of(run_folder.of_split(embeddings, s))]
    if needs_labels(recipe.train):
        settings["label"] = label.depends_on(recipe.label)
    relevant: dict[str, Any] = {**settings, "train": recipe.train.relevant()}
    images = sum(column(run_folder.of_split(shards, "train"), "samples"))
    s = recipe.train
    if (order := order_of(images, s.batch_size, s.lanes, s.neighbours)) > 1:
        relevant["order"] = order
    piece = Piece(
        name="model",
        output=store.join(folder, "history.json"),
        fingerprint=store.fingerprint("train", relevant, used),
        inputs={"recipe": recipe, "root": root, "name": name, "data": shards["version"]},
    )
    return Plan.of("train", folder, [piece], settings)


def fit(
    piece: Piece,
    report: "Report",
    leaving: Callable[[], bool] = lambda: False,
    live: "Live" = lambda figures: None,
) -> None:
    """Train to the end from the newest checkpoint; `report` gets every epoch's records.

    Every worker calls this and reports equally often; worker 0 writes. `leaving` says, to all
    workers alike, that one of them is about to be taken away: a checkpoint is written at once.
    `live` gets this worker's own pace, every `train.log_every` steps.
    """
    from pipeline.training.loop import Loop
    from pipeline.training.trainer import TowerTrainer

    loop = Loop(TowerTrainer, piece, report, leaving, live)
    try:
        loop.run()
    finally:
        loop.trainer.close()


def ready() -> None:
    """Import what `fit` needs, so that it starts at once in this process."""
    import pipeline.training.loop
    import pipeline.training.trainer  # noqa: F401


def probe(piece: Piece) -> dict:
    """How long a training will take, by a few steps of it.

    Steps of an epoch and of all, seconds a step with one process here, and share of waiting.

    Takes real steps on the real batches and writes nothing to the run folder.
    """
    from pipeline.training.trainer import TowerTrainer

    training = TowerTrainer(piece, ProcessGroup(), keep=False)
    settings, steps = training.settings, training.steps
    data, started, waited = Stopwatch(training.world.device), 0.0, 0.0
    for number, batch in enumerate(watched(training.batches(0), data)):
        if number == min(WARM, steps - 1):
            started, waited = time.perf_counter(), data.seconds
        record = training.learner.step(batch, number)
        spent = time.perf_counter() - started if started else 0.0
        if number + 1 == WARM + STEPS or spent > SECONDS:
            break
    record()  # waits for the device
    seconds = time.perf_counter() - started
    training.close()
    timed = max(1, number + 1 - min(WARM, steps - 1))
    device = training.world.device.type
    return {
        "steps_per_epoch": steps,
        "steps": steps * settings.epochs,
        "seconds_per_step": seconds / timed,
        "data_wait": (data.seconds - waited) / seconds,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "parameters": sum(p.numel() for p in training.learner.model.parameters()),
    }


def notes(entry: dict, name: str) -> dict[str, Any]:
    """What is worth a word of a finished training, from its entry in the index."""
    found = {"model": name, "parameters": entry["parameters"], "epoch": entry["epoch"]}
    if "val/rsum" in entry["metrics"]:
        found["val_rsum"] = entry["metrics"]["val/rsum"]
    if entry.get("torn_checkpoints"):
        found["passed_over_torn"] = ", ".join(entry["torn_checkpoints"])
    if entry.get("not_compiled"):
        found["not_compiled"] = entry["not_compiled"]
    if entry.get("collapsed"):
        found["collapsed_in_epochs"] = str(entry["collapsed"])[1:-1]
    return found


def unknown_words(root: str, folder: str) -> dict[str, float]:
    """Share of the words that a model does not know, of each split it was not trained on."""
    vocabulary = vocabulary_of(store.read_json(store.join(folder, "vocabulary.json")))
    entries = RunFolder(root).index("shard")["pieces"]
    splits = [s for s in split_names(where(entries, "samples")) if s != "train"]
    texts = {split: captions_of(root, split) for split in splits}
    return {f"unknown_words_of_{k}": vocabulary.unknown_share(v) for k, v in texts.items()}
