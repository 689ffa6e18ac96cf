"""Finished models side by side: what differs in how they were made, and in what they do."""

from typing import Any

import numpy as np

from pipeline.errors import InputError, did_you_mean
from pipeline.evaluation import ranking, results
from pipeline.evaluation.intervals import Queries, permutation
from pipeline.evaluation.results import Model
from pipeline.labels.encoders import encoder_label
from pipeline.storage import store
from pipeline.storage.run_folder import RunFolder
from schemas.settings import Recipe

PERMUTATIONS = 10_000
# What an NDCG is comparable under: any, and one against the encoder's relevance.
GRADED = {"ndcg": ("gain", "ndcg_at"), "ndcg_label": ("label_encoder", "label_map")}


def read(run: str, *, reranked: bool = False) -> Model:
    """The model that RUN or RUN:MODEL names, as trained or re-ranked."""
    root, name = _model(run)
    recipe = Recipe(**RunFolder(root).settings(name))
    return of_folder(root, name, recipe, f"{store.name_of(root)}:{name}", reranked=reranked)


def of_folder(root: str, name: str, recipe: Recipe, label: str, *, reranked: bool = False) -> Model:
    """A model of a run folder that was made with the recipe, under that label."""
    stage = "reranked" if reranked else "evaluate"
    files = RunFolder(root).files(stage, name)
    found = results.need(files.folder, label, "rerank" if reranked else "evaluate")
    about = {
        **_flat(recipe.model_dump(mode="json", exclude={"place"})),
        **_versions(root, name, recipe),
    }
    return Model(**vars(found), about=about, queries=ranking.queries(files.uris))


def _model(run: str) -> tuple[str, str]:
    """Run folder and model; a model need not be named where there is one alone."""
    root, colon, name = run.rpartition(":")
    if not colon or "/" in name:
        root, name = run, ""
    root = store.absolute(root)
    names = RunFolder(root).models()
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
        deeper = isinstance(value, dict) and value
        out |= _flat(value, f"{prefix}{key}.") if deeper else {prefix + key: value}
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
    found = {key: RunFolder(root).known(*place) for key, place in places.items()}
    return {key: index["version"][:12] if index else "none" for key, index in found.items()}


def changes(base: Model, other: Model) -> list[tuple[str, str, str]]:
    """(what, in base, in the other) of settings, versions and protocol that differ."""
    sides = []
    for model in (base, other):
        protocol = {f"protocol.{name}": v for name, v in model.protocol.settings.items()}
        sides.append(model.about | protocol)
    names = dict.fromkeys([*sides[0], *sides[1]])
    pairs = [(name, *(str(side.get(name, "–")) for side in sides)) for name in names]
    return [(name, a, b) for name, a, b in pairs if a != b]


def same_versions(base: Model, other: Model) -> str:
    """The versions that do not differ, in words."""
    versions = {name: v for name, v in base.about.items() if name.endswith("version")}
    alike = [f"{name} {v}" for name, v in versions.items() if other.about.get(name) == v]
    return f"The same: {', '.join(alike)}." if alike else "No version is the same."


def p_values(base: Model, other: Model, permutations: int = PERMUTATIONS) -> dict[str, float]:
    """Of every figure's difference; none where the two did not answer the same queries."""
    a, b = ({way: _in_order(q) for way, q in r.queries.items()} for r in (base, other))
    if not all(np.array_equal(queries.query_ids, b[way].query_ids) for way, queries in a.items()):
        return {}
    found = permutation(a, b, permutations)
    ours, theirs = base.protocol.settings, other.protocol.settings
    for kind, matters in GRADED.items():
        if any(ours.get(name) != theirs.get(name) for name in matters):
            found = {name: p for name, p in found.items() if kind not in name}
    return found


def _in_order(queries: Queries) -> Queries:
    order = np.argsort(queries.query_ids)
    values = {name: value_Q[order] for name, value_Q in queries.values.items()}
    return Queries(queries.query_ids[order], queries.image_ids[order], values)
