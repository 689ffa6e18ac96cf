"""Finished models side by side: what differs in how they were made, and in what they do."""

from typing import Any, NamedTuple

import numpy as np
import yaml

from pipeline.errors import InputError, did_you_mean
from pipeline.evaluation import ranking
from pipeline.evaluation.intervals import Queries, permutation
from pipeline.labels.encoders import encoder_label
from pipeline.storage import run_folder, store
from schemas.settings import Recipe

PERMUTATIONS = 10_000
# What an NDCG is comparable under: any, and one against the encoder's relevance.
GRADED = {"ndcg": ("gain", "ndcg_at"), "ndcg_label": ("label_encoder", "label_map")}


class Result(NamedTuple):
    """One model of a run folder and its rankings."""

    label: str
    about: dict[str, Any]  # settings by dotted name, and versions
    protocol: dict[str, Any]
    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    queries: dict[str, Queries]


def read(run: str, *, reranked: bool = False) -> Result:
    """The model that RUN or RUN:MODEL names, as trained or re-ranked."""
    root, name = _model(run)
    stage = "reranked" if reranked else "evaluate"
    folder = run_folder.folder(root, stage, name)
    index = run_folder.need_index(folder, "rerank" if reranked else "evaluate")
    found = store.read_json(store.join(folder, "metrics.json"))
    settings = yaml.safe_load(store.read_text(store.join(root, f"settings-{name}.yaml")))
    uris = [store.join(folder, f"{entry['name']}.parquet") for entry in index["pieces"]]
    recipe = Recipe(**settings)
    about = {**_flat(recipe.model_dump(mode="json")), **_versions(root, name, recipe)}
    return Result(
        f"{store.name_of(root)}:{name}",
        about,
        found["protocol"],
        found["metrics"],
        found.get("intervals", {}),
        ranking.queries(uris),
    )


def _model(run: str) -> tuple[str, str]:
    """Run folder and model; a model need not be named where there is one alone."""
    root, colon, name = run.rpartition(":")
    if not colon or "/" in name:
        root, name = run, ""
    root = store.absolute(root)
    files = [f for f in store.list_files(root) if f.startswith("settings-")]
    names = sorted(f.removeprefix("settings-").removesuffix(".yaml") for f in files)
    if not names:
        raise InputError(f"{root} holds no model; name a run folder that was evaluated")
    if not name and len(names) > 1:
        raise InputError(f"{root} holds {', '.join(names)}; write {run}:{names[0]}")
    name = name or names[0]
    if name not in names:
        raise InputError(f"no model {name!r} in {root}{did_you_mean(name, names)}")
    return root, name


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _versions(root: str, name: str, recipe: Recipe) -> dict[str, str]:
    """Of the data, the caption vectors, the labels and the model."""
    encoder = encoder_label(recipe.embed.encoder)
    places = {
        "data version": ("shard",),
        "caption vectors' version": ("embed", encoder),
        "label version": ("label", encoder),
        "model version": ("train", name),
    }
    found = {
        key: run_folder.read_index(run_folder.folder(root, *place)) for key, place in places.items()
    }
    return {key: index["version"][:12] if index else "none" for key, index in found.items()}


def changes(base: Result, other: Result) -> list[tuple[str, str, str]]:
    """(what, in base, in the other) of settings, versions and protocol that differ."""
    sides = [
        {**r.about, **{f"protocol.{k}": v for k, v in r.protocol.items()}} for r in (base, other)
    ]
    names = dict.fromkeys([*sides[0], *sides[1]])
    pairs = [(name, *(str(side.get(name, "–")) for side in sides)) for name in names]
    return [(name, a, b) for name, a, b in pairs if a != b]


def same_versions(base: Result, other: Result) -> str:
    """The versions that do not differ, in words."""
    alike = [
        f"{name} {value}"
        for name, value in base.about.items()
        if name.endswith("version") and other.about.get(name) == value
    ]
    return f"The same: {', '.join(alike)}." if alike else "No version is the same."


def p_values(base: Result, other: Result) -> dict[str, float]:
    """Of every figure's difference; none where the two did not answer the same queries."""
    if any(
        not np.array_equal(np.sort(queries.query_ids), np.sort(other.queries[way].query_ids))
        for way, queries in base.queries.items()
    ):
        return {}
    sides = ({way: _in_order(q) for way, q in r.queries.items()} for r in (base, other))
    found = permutation(*sides, PERMUTATIONS)  # type: ignore[call-arg, arg-type]
    for kind, matters in GRADED.items():
        if any(base.protocol.get(name) != other.protocol.get(name) for name in matters):
            found = {name: p for name, p in found.items() if kind not in name}
    return found


def _in_order(queries: Queries) -> Queries:
    order = np.argsort(queries.query_ids)
    values = {name: value_Q[order] for name, value_Q in queries.values.items()}
    return Queries(queries.query_ids[order], queries.image_ids[order], values)


def rows(base: Result, others: list[Result]) -> tuple[list[str], list[list[str]]]:
    """The table: a row a figure; the base with its interval, the others' differences and p."""
    columns = ["", base.label, *(part for r in others for part in (r.label, "difference", "p"))]
    tests = [p_values(base, other) for other in others]
    out = []
    for name, value in base.metrics.items():
        row = [name, _with_interval(base, name)]
        for other, p in zip(others, tests, strict=True):
            if name in other.metrics:
                difference = _figure(name, other.metrics[name] - value, "+")
                row += [_with_interval(other, name), difference, _p(p.get(name))]
            else:
                row += ["–", "–", "–"]
        out.append(row)
    return columns, out


def _with_interval(result: Result, name: str) -> str:
    figure = _figure(name, result.metrics[name])
    if name not in result.intervals:
        return figure
    low, high = (_figure(name, end) for end in result.intervals[name])
    return f"{figure} [{low}, {high}]"


def _figure(name: str, value: float, sign: str = "") -> str:
    digits = 3 if "ndcg" in name or "judged" in name else 1
    return f"{value:{sign}.{digits}f}"


def _p(p: float | None) -> str:
    if p is None:
        return "–"
    return f"{p:.4f}" if p > 1.5 / PERMUTATIONS else f"< {2 / PERMUTATIONS:g}"
