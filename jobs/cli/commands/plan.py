"""halftone plan: what a recipe asks of a described cluster, before anything is rented."""

import json
from dataclasses import asdict

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.show import Show

COLUMNS = ["stage", "pieces", "at once", "time", "GB a task", "GB stored", ""]


def arguments(parser) -> None:
    parser.add_argument("--samples", type=int, default=None, help="train images, if not ingested")
    parser.add_argument(
        "--captions-per-image", type=float, default=5.0, help="with --samples (default 5)"
    )
    parser.add_argument("--image-kb", type=float, default=100.0, help="of a picture (default 100)")


def run(root: str, models: list, options) -> None:
    from jobs.cluster import estimate

    recipe, cluster = models[0][1], models[0][1].cluster
    given = options.samples, options.captions_per_image, options.image_kb * 1e3
    data = estimate.collection(recipe, root, *given)
    found = estimate.stages(recipe, data, dict(models))
    estimate.check_storage(found, cluster)
    hours = sum(stage.seconds or 0 for stage in found) / 3600
    if options.json:
        stages = [asdict(stage) for stage in found]
        return print(json.dumps({"collection": asdict(data), "stages": stages, "hours": hours}))
    show = Show()
    about = (
        f"{data.held()}; {data.known}. Not counted: what towers hold while they train, LeaPRR. "
        "`halftone train --dry-run` measures a training's steps."
    )
    gpus = f", {cluster.gpus} GPUs of {cluster.gpu_memory_gb:g} GB" if cluster.gpus else ""
    node = f"{cluster.cpus} cores, {cluster.memory_gb:g} GB{gpus}"
    title = f"{recipe.name} on {cluster.nodes} node{'s' * (cluster.nodes > 1)} of {node}"
    show.table(title, COLUMNS, [_row(stage) for stage in found], about)
    return show.out.print(f"{hours:,.2f} hours, of the stages whose time is known")


def _row(stage) -> list[str]:
    sizes = [f"{value / 1e9:,.2f}" for value in (stage.memory, stage.storage)]
    counts = [f"{stage.pieces:,}", f"{stage.at_once:,}"]
    return [stage.name, *counts, _time(stage.seconds), *sizes, stage.note]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not measured"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


COMMAND = Command(scopes.settings, run, ("cluster", "train"), arguments=arguments)
