"""How long a training will take: a few steps of it, thrown away."""

import time

import torch

from pipeline.storage.plan import Piece
from pipeline.training.distributed import ProcessGroup
from pipeline.training.trainer import TowerTrainer

STEPS, WARM, SECONDS = 20, 2, 20.0  # steps timed, not timed, and the time after which it is enough


def probe(piece: Piece) -> dict:
    """Steps of an epoch and of all, seconds a step with one process here, and share of waiting.

    Takes real steps on the real batches and writes nothing to the run folder.
    """
    training = TowerTrainer(piece, ProcessGroup())
    settings, steps = training.settings, training.steps
    started = waited = 0.0
    for number, batch in enumerate(training.batches(0)):
        if number == min(WARM, steps - 1):
            started, waited = time.perf_counter(), 0.0
        waited += batch.waited
        record = training.learner.step(batch, number)
        spent = time.perf_counter() - started if started else 0.0
        if number + 1 == WARM + STEPS or spent > SECONDS:
            break
    record()  # waits for the device
    seconds = time.perf_counter() - started
    timed = max(1, number + 1 - min(WARM, steps - 1))
    device = training.world.device.type
    return {
        "steps_per_epoch": steps,
        "steps": steps * settings.epochs,
        "seconds_per_step": seconds / timed,
        "data_wait": waited / seconds,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "parameters": sum(p.numel() for p in training.learner.model.parameters()),
    }
