"""Stage 5: a two-tower model is trained on the shards.

`fit` knows torch.distributed and nothing of what started it: it runs bare, under torchrun and
under Ray alike. What trains is imported where it is needed: a plan needs little of it.
"""

import contextlib
import importlib.util
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import InputError
from pipeline.labels import embed, label
from pipeline.models import vocabulary_of
from pipeline.models.preprocessing import Preprocessing
from pipeline.storage import run_folder, store
from pipeline.storage.piece_table import column, split_names, where
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import RunFolder, contents_of
from pipeline.training.data import captions_of
from pipeline.training.distributed import ProcessGroup
from pipeline.training.loading.waiting import Stopwatch, watched
from pipeline.training.objective import check, needs_embeddings, needs_labels
from pipeline.training.sampler import order_of
from schemas.settings import Recipe, TrainSettings

if TYPE_CHECKING:
    from pipeline.training.learner import Learner
    from pipeline.training.loop import Live, Report

STEPS, WARM, SECONDS = 20, 2, 20.0  # of a probe: steps timed, not timed, and when it is enough


def plan(recipe: Recipe, root: str, name: str) -> Plan:
    """One piece: the model. It depends on embeddings and labels only if a loss is graded."""
    check(recipe.train)
    shards = RunFolder(root).index("shard")
    if not trains(recipe.train):
        return _without_steps(recipe, root, name)
    _check_between(recipe, shards)
    folder = RunFolder(root).folder("train", name)
    used = [c for s in ("train", "val") for c in contents_of(run_folder.of_split(shards, s))]
    # Whether to compile was a yes or no when the first indexes were written: they stay as they are.
    told = {**recipe.train.told(), "compile": recipe.train.compile == "on"}
    settings = {"model": recipe.model.told(), "train": told}
    if needs_embeddings(recipe.train):
        embeddings = run_folder.need_index(embed.folder_of(recipe, root), "embed")
        splits = ("train", "val") if recipe.train.select == "best_ndcg" else ("train",)
        used += [c for s in splits for c in contents_of(run_folder.of_split(embeddings, s))]
    if needs_labels(recipe.train):
        settings["label"] = label.depends_on(recipe.label)
    relevant: dict[str, Any] = {**settings, "train": recipe.train.relevant()}
    if recipe.model.image == "pretrained":  # its own pictures: they were all squashed before
        relevant["pictures"] = 2
    images = sum(column(run_folder.of_split(shards, "train"), "samples"))
    s = recipe.train
    if (order := order_of(images, s.batch_size, s.lanes, s.neighbours)) > 1:
        relevant["order"] = order
    if own := _own_code(recipe):
        relevant["own_code"] = own
    piece = Piece(
        name="model",
        output=store.join(folder, "history.json"),
        fingerprint=store.fingerprint("train", relevant, used),
        inputs={"recipe": recipe, "root": root, "name": name, "data": shards["version"]},
    )
    return Plan.of("train", folder, [piece], settings)


def _own_code(recipe: Recipe) -> dict[str, str]:
    """Hashes of the files of towers and losses of one's own: when they change, so does the model.

    What these import in turn is not looked at.
    """
    named = (recipe.model.image, recipe.model.text, *recipe.train.losses)
    files = {}
    for module in sorted({name.partition(":")[0] for name in named if ":" in name}):
        with contextlib.suppress(ImportError, OSError, ValueError):  # told where it is built
            spec = importlib.util.find_spec(module)
            if spec and spec.origin:
                files[module] = store.sha256(Path(spec.origin).read_bytes())
    return files


def trains(settings: TrainSettings) -> bool:
    """Whether steps are taken; else weights that are there are put together (`put_together`)."""
    return bool(settings.epochs) and not settings.soup


def _check_between(recipe: Recipe, shards: dict) -> None:
    """Refuses to look between weights before and after where there is nothing to look by."""
    settings, model = recipe.train, recipe.model
    if not settings.interpolate:
        return
    if not model.image == model.text == "pretrained":
        raise InputError(
            "train.interpolate goes from the pretrained model's weights to the trained ones, and "
            f"towers {model.image} + {model.text} begin at random; leave it out, or take "
            "--model.image pretrained --model.text pretrained"
        )
    if not any(entry["samples"] for entry in run_folder.of_split(shards, "val")):
        raise InputError("train.interpolate chooses on val, which is empty; leave it out")
    if settings.resume not in (None, "latest"):
        raise InputError(
            f"train.interpolate needs the weights before training, which {settings.resume} is not "
            "with; leave one of them out"
        )


def _without_steps(recipe: Recipe, root: str, name: str) -> Plan:
    from pipeline.training.weights import soup, untouched

    piece = (soup if recipe.train.soup else untouched).piece(recipe, root, name)
    settings = {"model": recipe.model.told(), "train": recipe.train.told()}
    return Plan.of("train", RunFolder(root).folder("train", name), [piece], settings)


def put_together(piece: Piece) -> dict:
    """Publish a model that no step is taken for; the index's summary of it."""
    from pipeline.training.weights import soup, untouched

    return (soup if piece.inputs["recipe"].train.soup else untouched).write(piece)


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
    from pipeline.training.weights.interpolation import Interpolation

    shares = piece.inputs["recipe"].train.interpolate
    finish = Interpolation(shares) if shares else None
    loop = Loop(TowerTrainer, piece, report, leaving, live, finish)
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
        **_memory(training.learner),
        "taken": number + 1,
    }


def _memory(learner: "Learner") -> dict[str, int]:
    """Numbers that are trained; bytes of weights, gradients and optimizer; and the most held.

    On a GPU the most that tensors took of its memory, else what this process had at most.
    """
    trained = sum(p.numel() for p in learner.parameters)
    weights = sum(p.numel() * p.element_size() for p in learner.model.parameters())
    slots = [v for s in learner.optimizer.state.values() for v in s.values()]
    kept = sum(v.numel() * v.element_size() for v in slots if isinstance(v, torch.Tensor))
    gradients = sum(p.numel() * p.element_size() for p in learner.parameters)
    if learner.world.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"trained": trained, "state_bytes": weights + gradients + kept, "peak_bytes": peak}


def notes(entry: dict, name: str) -> dict[str, Any]:
    """What is worth a word of a finished training, from its entry in the index."""
    found = {"model": name, "parameters": entry["parameters"], "epoch": entry["epoch"]}
    if "val/rsum" in entry["metrics"]:
        found["val_rsum"] = entry["metrics"]["val/rsum"]
    if (over := entry["metrics"].get("val/rsum_over_zero_shot")) is not None:
        found["val_rsum_over_zero_shot"] = over
    if "alpha" in entry:
        found["alpha"] = entry["alpha"]
    if "soup" in entry:
        found["soup_of"] = ", ".join(entry["soup"]["of"])
        found |= {f"soup_{k}": v for k, v in entry["soup"].items() if k == "over_best"}
    if entry.get("torn_checkpoints"):
        found["passed_over_torn"] = ", ".join(entry["torn_checkpoints"])
    if entry.get("frozen"):
        found["vectors_made_once"] = ", ".join(entry["frozen"])
    if entry.get("not_compiled"):
        found["not_compiled"] = entry["not_compiled"]
    how = entry.get("preprocessing")
    if how and not how["shrink"]:
        found["pictures"] = str(Preprocessing.of(how))
    if entry.get("cut_captions"):
        found["cut_captions"] = "{:,} of {:,}".format(*entry["cut_captions"])
    if entry.get("collapsed"):
        found["collapsed_in_epochs"] = str(entry["collapsed"])[1:-1]
    return found


def warnings(entry: dict) -> list[str]:
    """Sentences on a finished model that is worse on val than what it was made of."""
    out = []
    if (over := entry["metrics"].get("val/rsum_over_zero_shot", 0.0)) < 0:
        out.append(
            f"val rSum is {-over:.1f} below zero-shot, what it was before training; lower "
            "train.lr, or let train.interpolate look between the two"
        )
    if (over := entry.get("soup", {}).get("over_best", 0.0)) < 0:
        out.append(f"val rSum is {-over:.1f} below that of the best model in the soup")
    return out


def tried(entry: dict) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, figures on val) of what was tried: α in percent, or the models of a soup in turn."""
    for point in entry.get("interpolation", []):
        figures = {k: v for k, v in point.items() if k != "alpha"}
        step = round(100 * point["alpha"])
        yield step, {f"interpolation/{k.removeprefix('val/')}": v for k, v in figures.items()}
    for turn, one in enumerate(entry.get("soup", {}).get("tried", [])):
        figures = {k: v for k, v in one.items() if k.startswith("val/")}
        yield turn, {f"soup/{k.removeprefix('val/')}": v for k, v in figures.items()}


def unknown_words(root: str, folder: str) -> dict[str, float]:
    """Share of the words that a model does not know, of each split it was not trained on."""
    vocabulary = vocabulary_of(store.read_json(store.join(folder, "vocabulary.json")))
    entries = RunFolder(root).index("shard")["pieces"]
    splits = [s for s in split_names(where(entries, "samples")) if s != "train"]
    texts = {split: captions_of(root, split) for split in splits}
    return {f"unknown_words_of_{k}": vocabulary.unknown_share(v) for k, v in texts.items()}
