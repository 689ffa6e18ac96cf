"""How fast a training's workers are, as Ray's own metrics, which its dashboard shows."""

from collections.abc import Callable

from pipeline.storage.plan import Piece

GAUGES = {
    "samples_per_second": "pairs that all workers of the training take, a second",
    "data_wait": "share of the time that this worker waited for its batches (0-1)",
    "step_seconds": "time of a step (s)",
}
TAGS = ("run", "worker")


def of_training(piece: Piece, worker: int) -> Callable[[dict[str, float]], None]:
    """A function that sets `ray_halftone_<name>` of one worker to the figures it is given.

    Gauges say what is: those that are not given any more are 0, so `set({})` ends them.
    """
    from ray.util.metrics import Gauge

    run = "/".join(piece.output.split("/")[-4:-1])  # tiny/5-model/main
    tags = {"run": run, "worker": str(worker)}
    gauges = {
        name: Gauge(f"halftone_{name}", description=about, tag_keys=TAGS)
        for name, about in GAUGES.items()
    }

    def tell(figures: dict[str, float]) -> None:
        for name, gauge in gauges.items():
            gauge.set(figures.get(name, 0.0), tags)

    return tell
