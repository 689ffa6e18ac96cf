"""Steps, the loader and the loop of a training on pictures, each alone and together."""

import gc
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.gpu import data
from bench.gpu.timing import busy, wait
from pipeline.training import train
from pipeline.training.data import Batch
from pipeline.training.distributed import ProcessGroup
from pipeline.training.loading.waiting import Stopwatch, watched
from pipeline.training.trainer import TowerTrainer
from schemas.settings import TrainSettings, TuneSettings

# Loaders that decode in processes count those, loaders that decode in threads count these.
DECODERS = "decode_workers" if "decode_workers" in TrainSettings.model_fields else "decode_threads"
WARM = 6  # steps that do not count: memory is found, kernels are chosen


def trainer(
    folder: Path, quick: bool, device: torch.device, tune: dict | None = None, **changed
) -> TowerTrainer:
    """A training of the collection with some settings of `train` changed; nothing is kept decoded.

    As if the collection were larger than memory. `tune` are changes of `model`.
    """
    world = ProcessGroup()
    world.device = device
    recipe = data.recipe_of(folder, quick)
    sections = {"train": recipe.train.model_copy(update=changed)}
    sections["model"] = recipe.model.model_copy(update=tune or {})
    recipe = recipe.model_copy(update=sections)
    made = TowerTrainer(train.plan(recipe, str(folder / "run"), "bench").pieces[0], world)
    if hasattr(made.train_split, "_cache_left"):
        made.train_split._cache_left = 0
    return made


def batches(training: TowerTrainer) -> Iterator[Batch]:
    """Epoch after epoch."""
    return itertools.chain.from_iterable(training.batches(epoch) for epoch in itertools.count())


def loaded(training: TowerTrainer, steps: int) -> tuple[float, float | None]:
    """Pictures a second, and a CPU second of this process, of the loader alone."""
    made, count = batches(training), 0
    for _ in range(WARM):
        next(made)
    used, started = sum(os.times()[:2]), time.perf_counter()
    for _ in range(steps):
        count += len(next(made))
    wall = time.perf_counter() - started
    used = sum(os.times()[:2]) - used
    return count / wall, count / used if used > 0.05 else None  # the clock's own step


def alone(training: TowerTrainer, steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds a step of the learner on one batch again and again; peak GiB of the device."""
    made = batches(training)
    batch = next(made)
    kept = batch.to(device)
    for number in range(WARM):
        training.learner.step(kept, number)
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    for number in range(steps):
        training.learner.step(kept, number)
    wait(device)
    seconds = (time.perf_counter() - started) / steps
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return seconds, peak


def looped(training: TowerTrainer, steps: int, device: torch.device) -> dict:
    """Seconds a step with the loader, shares of waiting and of the device at work."""
    waiting = Stopwatch(device)
    made = watched(batches(training), waiting)
    for number in range(WARM):
        training.learner.step(next(made), number)
    wait(device)
    started, before = time.perf_counter(), waiting.seconds
    for number in range(steps):
        record = training.learner.step(next(made), number)
        if number % training.settings.log_every == 0:
            record()
    wait(device)
    seconds = time.perf_counter() - started
    waited = waiting.seconds - before

    def some() -> None:
        for number in range(min(8, steps)):
            training.learner.step(next(made), number)

    at_work = busy(some, device)
    idle = None if at_work is None else 1 - at_work
    return {"seconds": seconds / steps, "waited": waited / seconds, "idle": idle}


def steps(device: torch.device, quick: bool, folder: Path) -> dict:
    """The learner alone by batch, loss and the settings that change its speed."""
    cases = [("as set", 16, {})] if quick else CASES
    rows, figures = [], {}
    for about, size, changed in cases:
        took = {}
        for name, losses in (("InfoNCE", data.INFO_NCE), ("+ S-NDCG", data.WITH_NDCG)):
            training = trainer(folder, quick, device, batch_size=size, losses=losses, **changed)
            many = 2 if quick else max(6, 12_288 // size)
            took[name], peak = alone(training, many, device)
            share = took[name] / took["InfoNCE"]
            label = f"{about}, {name}"
            rows.append([label, size, 1e3 * took[name], size / took[name], share, peak])
            figures |= {f"pairs_{size}_{about}_{name}": size / took[name]}
            del training
            free(device)
        figures[f"ratio_{size}_{about}"] = took["+ S-NDCG"] / took["InfoNCE"]
    return {
        "title": "a step of CLIP ViT-B/32's shape, bf16, the learner alone",
        "columns": ["", "B", "ms", "pairs/s", "x InfoNCE", "GiB"],
        "rows": rows,
        "figures": figures,
    }


CASES = [
    ("as set", 512, {}),
    ("as set", 1024, {}),
    ("chunks of 512", 4096, {"chunk": 512}),
    ("compiled", 1024, {"compile": True}),
]


def tuning(device: torch.device, quick: bool, folder: Path) -> dict:
    """The learner alone by what of the towers is trained, with a learned temperature."""
    size, rows, figures = 16 if quick else 512, [], {}
    losses = {"info_nce": {"temperature": "learned"}}
    for name, tune in MODES.items():
        how = {"batch_size": size, "losses": losses, "epochs": 9}
        training = trainer(folder, quick, device, tune, **how)
        seconds, peak = alone(training, 2 if quick else 200, device)
        trained = sum(p.numel() for p in training.learner.parameters)
        rows.append([name, size, 1e3 * seconds, size / seconds, trained / 1e6, peak])
        figures[f"tuning_{name}"] = size / seconds
        training.close()
        del training
        free(device)
    return {
        "title": "a step of CLIP ViT-B/32's shape, bf16, by what is trained, the learner alone",
        "columns": ["", "B", "ms", "pairs/s", "million trained", "GiB"],
        "rows": rows,
        "figures": figures,
    }


BOTH = ("tune_image", "tune_text")
MODES = {
    "full": {},
    "last 1": dict.fromkeys(BOTH, TuneSettings(mode="last", layers=1)),
    "LoRA": dict.fromkeys(BOTH, TuneSettings(mode="lora")),
    "half the patches": {"tune_image": TuneSettings(patch_dropout=0.5)},
    "LiT": {"tune_image": TuneSettings(mode="frozen")},
}


def loader(device: torch.device, quick: bool, folder: Path) -> dict:
    """Pictures a second by the number of decoders, without and with random crops."""
    cores = os.cpu_count() or 1
    counts = (1, 2) if quick else sorted({1, 2, 4, 8, 16, cores} & set(range(1, cores + 1)))
    rows, best = [], 0.0
    for count, crop in [*((count, 1.0) for count in counts), (counts[-1], 0.7)]:
        training = trainer(folder, quick, device, **{DECODERS: count, "crop": crop})
        rate, of_cpu = loaded(training, 2 if quick else 16)
        rows.append([count, crop, rate, of_cpu])
        best = max(best, rate if crop == 1.0 else 0.0)
        del training
    title = f"the loader alone, {'32' if quick else '224'} px JPEG, {cores} cores"
    columns = [DECODERS.replace("decode_", ""), "crop", "pictures/s", "a CPU second of its own"]
    return {"title": title, "columns": columns, "rows": rows, "figures": {"pictures": best}}


def loop(device: torch.device, quick: bool, folder: Path) -> dict:
    """The loop with the loader against the learner alone, in one process, one after the other."""
    rows, figures = [], {}
    decoders = 1 if quick else max(1, (os.cpu_count() or 2) - 1)
    for size in (16,) if quick else (512, 1024):
        how = {"batch_size": size, DECODERS: decoders}
        training = trainer(folder, quick, device, **how)
        many = 2 if quick else 24_576 // size
        single, _ = alone(training, many, device)
        found = looped(training, many, device)
        share = single / found["seconds"]
        row = [size, size / single, size / found["seconds"], share, found["waited"]]
        rows.append([*row, found["idle"]])
        figures |= {f"loop_{size}": share, f"waited_{size}": found["waited"]}
        del training
        free(device)
    columns = ["B", "learner, pairs/s", "loop, pairs/s", "loop / learner", "waited for data"]
    return {
        "title": f"the loop with pictures, InfoNCE + S-NDCG, {decoders} {DECODERS}",
        "columns": [*columns, "device idle"],
        "rows": rows,
        "figures": figures,
    }


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
