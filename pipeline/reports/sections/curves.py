"""How models were trained: their losses, term by term, and what they cost."""

from collections.abc import Iterator

from pipeline.reports import render
from pipeline.reports.render import Figure
from pipeline.reports.sections.systems import System

OF_A_LOSS = "train.losses."  # what a loss's settings begin with
Histories = dict[str, dict]  # history.json by model


def figures(systems: list[System], histories: Histories) -> Iterator[Figure]:
    """The terms of the losses by step, an axis each, and rSum on val after every epoch."""
    records = {name: history["records"] for name, history in histories.items()}
    models = [system for system in systems if system.stage == "evaluate"]
    known = {key for rows in records.values() for row in rows for key in row}
    named = (k.split(".")[2] for s in models for k in s.measured.about if k.startswith(OF_A_LOSS))
    terms = [name for name in dict.fromkeys(named) if f"train/{name}" in known]
    keys = {f"train/{name}": name for name in terms} or {"train/loss": "loss"}

    def losses(axes) -> None:
        for axis, (key, title) in zip(axes, keys.items(), strict=True):
            _lines(axis, models, records, key)
            axis.set_ylabel(title)
        axes[-1].set_xlabel("optimizer step")

    svg = render.figure(losses, panels=len(keys))
    many = len(keys) > 1
    caption = (
        "Training losses with their weights, each on an axis of its own"
        if many
        else (f"Training loss: {next(iter(keys.values()))}")
    )
    yield Figure("loss", svg, caption, _ends(models, records, keys))
    if "val/rsum" in known:

        def val(axis) -> None:
            _lines(axis, models, records, "val/rsum", marker=".")
            axis.set_xlabel("optimizer step")
            axis.set_ylabel("rSum")

        caption = "rSum on val after every epoch"
        rows = _ends(models, records, {"val/rsum": "rSum"})
        yield Figure("val", render.figure(val), caption, rows)
    yield from _between(models, histories)


def _between(models: list[System], histories: Histories) -> Iterator[Figure]:
    """Figures on val of what lies between weights before training and the trained ones."""
    told = {name: history.get("summary", {}) for name, history in histories.items()}
    points = {
        name: [{"step": point["alpha"], **point} for point in summary.get("interpolation", [])]
        for name, summary in told.items()
    }
    if not any(points.values()):
        return

    def val(axis) -> None:
        _lines(axis, models, points, "val/rsum", marker=".")
        for system in models:
            for point in points[system.model]:
                if point["alpha"] == told[system.model]["alpha"]:
                    axis.plot(point["alpha"], point["val/rsum"], "o", color=system.colour)
        axis.set_xlabel("α: 0 before training, 1 trained")
        axis.set_ylabel("rSum")

    rows = [
        [name, f"{point['alpha']:g}", f"{point['val/rsum']:.1f}", "handed on" * chosen]
        for name, of_one in points.items()
        for point in of_one
        for chosen in [point["alpha"] == told[name]["alpha"]]
    ]
    caption = "rSum on val between the weights before training and the trained ones"
    columns = ["model", "α", "rSum", ""]
    yield Figure("interpolation", render.figure(val), caption, (columns, rows))


def costs(systems: list[System], histories: Histories) -> tuple[list[str], list[list[str]]]:
    """What the training of each model took."""
    columns = ["", "parameters", "epochs", "handed on", "pairs a second", "data wait"]
    rows = []
    for system in systems:
        if system.stage != "evaluate":
            continue
        history = histories[system.model]
        summary, epochs = history.get("summary", {}), _epochs(history["records"])
        pairs = [e["train/samples_per_second"] for e in epochs if "train/samples_per_second" in e]
        waits = [e["train/data_wait"] for e in epochs if "train/data_wait" in e]
        rows.append(
            [
                system.model,
                f"{summary['parameters']:,}" if "parameters" in summary else "–",
                str(len(epochs)),
                _handed_on(summary),
                f"{sorted(pairs)[len(pairs) // 2]:,.0f}" if pairs else "–",
                f"{100 * max(waits):.1f} %" if waits else "–",
            ]
        )
    return columns, rows


def _handed_on(summary: dict) -> str:
    """Which weights became the model."""
    if "soup" in summary:
        return f"mean of {', '.join(summary['soup']['of'])}"
    if not summary.get("epoch"):
        return "as it came" if "epoch" in summary else "–"
    between = f", α {summary['alpha']:g}" if "alpha" in summary else ""
    return f"epoch {summary['epoch']}{between}"


def _epochs(records: list[dict]) -> list[dict]:
    return [record for record in records if record.get("epoch")]


def _lines(axis, models: list[System], records: dict[str, list[dict]], key: str, **style) -> None:
    for system in models:
        points = [(r["step"], r[key]) for r in records[system.model] if key in r]
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, label=system.model, linewidth=1.4, **system.line, **style)
    axis.legend(frameon=False, fontsize=8)


def _ends(models: list[System], records: dict[str, list[dict]], keys: dict[str, str]):
    """The figure's numbers: where each curve begins, its extremes and where it ends."""
    rows = []
    for key, title in keys.items():
        for system in models:
            values = [r[key] for r in records[system.model] if key in r]
            if values:
                told = (values[0], min(values), max(values), values[-1])
                rows.append([system.model, title, *(f"{value:.4g}" for value in told)])
    return ["model", "curve", "first", "least", "most", "last"], rows
