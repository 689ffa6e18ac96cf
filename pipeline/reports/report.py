"""The report: one self-contained page about all the models of a run folder."""

import json

from pipeline.reports import render
from pipeline.reports.examples import Showcase
from pipeline.reports.figures import figures
from pipeline.reports.results import protocol_line, results, table
from pipeline.storage import run_folder, store
from schemas.settings import Recipe

LAYOUT = 3  # counts up when the page changes, so that it is made again


def version(recipe: Recipe, root: str, names: list[str]) -> str:
    """What the page depends on."""
    settings = recipe.report.model_dump(mode="json")
    return store.fingerprint("report", LAYOUT, results(root, names), recipe.about, settings)


def build(recipe: Recipe, root: str, names: list[str]) -> str:
    """The page; pictures and gallery are of the last model named."""
    columns, rows = table(root, names)
    found = results(root, names)
    gallery = Showcase(recipe, root, names[-1])
    truth = any("true" in column for column in columns)
    shown = {
        "drawn": gallery.drawn(),
        "worst": gallery.worst(),
        "moved": gallery.moved(),
        "suspects": gallery.suspects(),
    }
    return render.render(
        "report.html.j2",
        version=version(recipe, root, names),
        data=recipe.name,
        about=recipe.about or "A Halftone run.",
        protocol=found[-1].protocol,
        protocol_line=protocol_line(found[-1].protocol),
        intervals=any(result.intervals for result in found),
        columns=columns,
        rows=rows,
        figures=figures(recipe, root, names),
        model=names[-1],
        shade="true relevance" if truth else f"relevance by {found[0].protocol['label_encoder']}",
        encoder=recipe.embed.encoder,
        facts=_facts(recipe, root),
        **shown,
        thumbnails=gallery.thumbnails(),
    )


def _facts(recipe: Recipe, root: str) -> list[tuple[str, str]]:
    shards = run_folder.need_index(run_folder.folder(root, "shard"), "shard")
    counts: dict[str, int] = {}
    for entry in shards["pieces"]:
        counts[entry["split"]] = counts.get(entry["split"], 0) + entry["samples"]
    sections = recipe.model_dump(mode="json")
    return [
        ("data version", shards["version"]),
        ("images", ", ".join(f"{split} {count:,}" for split, count in counts.items())),
        ("seed", str(recipe.train.seed)),
        *((name, json.dumps(sections[name])) for name in ("embed", "label", "model", "train")),
    ]
