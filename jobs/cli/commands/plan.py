"""halftone plan: what a recipe asks of a described cluster, before anything is rented."""

import json
from dataclasses import asdict

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.show import Show
from jobs.cluster import estimate
from jobs.cluster.estimate import GB, StageEstimate

COLUMNS = ["stage", "pieces", "at once", "time", "GB a task", "GB network", "GB stored", "rates"]


def arguments(parser) -> None:
    parser.add_argument("--samples", type=int, default=None, help="train images, if not ingested")
    parser.add_argument(
        "--captions-per-image", type=float, default=5.0, help="with --samples (default 5)"
    )
    parser.add_argument("--image-kb", type=float, default=100.0, help="of a picture (default 100)")


def run(root: str, models: list, options) -> None:
    recipe, cluster = models[0][1], models[0][1].cluster
    given = options.samples, options.captions_per_image, options.image_kb * 1e3
    data = estimate.collection(recipe, root, *given)
    found = estimate.stages(recipe, data, dict(models))
    estimate.check_storage(found, cluster)
    hours = sum(stage.seconds for stage in found) / 3600
    cost = hours * cluster.nodes * cluster.price_per_hour
    remarks = estimate.warnings(recipe, data, found)
    if options.json:
        whole = {"hours": hours, "cost": cost, "warnings": remarks}
        print(
            json.dumps({"collection": asdict(data), "stages": [asdict(s) for s in found]} | whole)
        )
        return
    show = Show()
    about = f"{data.held()}; {data.known}. Re-ranking not counted."
    title = f"{recipe.name} on {estimate.described(cluster)}"
    show.table(title, COLUMNS, [_row(stage) for stage in found], about)
    show.out.print(f"{hours:,.2f} hours" + (f", price {cost:,.0f}" if cost else ""))
    for remark in remarks:
        show.out.print(f"warn  {remark}", soft_wrap=True)


def _row(stage: StageEstimate) -> list[str]:
    sizes = [f"{value / GB:,.2f}" for value in (stage.memory, stage.network, stage.storage)]
    rates = ", ".join(filter(None, (stage.basis, stage.note)))
    return [stage.name, f"{stage.pieces:,}", f"{stage.at_once:,}", _time(stage), *sizes, rates]


def _time(stage: StageEstimate) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if stage.seconds > 2 * size:
            return f"{stage.seconds / size:,.1f} {unit}"
    return f"{stage.seconds:.0f} s"


COMMAND = Command(scopes.settings, run, ("cluster", "train"), arguments=arguments)
