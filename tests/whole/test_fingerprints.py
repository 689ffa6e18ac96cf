"""Fingerprints stay what they are: another one makes every run folder anew.

tests/golden/fingerprints.json holds, for the shipped recipes and for odd ones, the fingerprint of
every piece and plan and the version of every page, on run folders of hand-written indexes; and for
every setting there is, what changes with it.
"""

import functools
import hashlib
import json
import typing

import pyarrow as pa
import pytest

from jobs.cli import recipes
from pipeline.evaluation import evaluate, tower_vectors
from pipeline.labels import calibrate, embed, label
from pipeline.labels.encoders import encoder_label, sentences
from pipeline.reranking import rerank
from pipeline.sharding import ingest, shard
from pipeline.sharding.checks import audit
from pipeline.storage import parquet, store
from pipeline.storage.run_folder import RunFolder
from pipeline.training import train
from schemas.embedding import tower_schema
from schemas.manifest import MANIFEST
from schemas.settings import SECTIONS, Recipe
from tests.helpers.paths import GOLDEN

ROOT, GIVEN = "memory://fingerprints/run", "memory://fingerprints/given"
OTHER = "memory://fingerprints/other"
SHARDS = ("train-000000", "train-000001", "val-000000", "test-000000")
SIDES = {"i2t": {"beta": 10.0}, "t2i": {"beta": 5.0}}
BASE = {
    "source": {"train_images": 6, "val_images": 2, "test_images": 2},
    "train": {"losses": {"info_nce": {}, "smooth_ndcg": {"tau": 0.05}}},
    "rerank": {"method": ["inverted_softmax", "leaprr"]},
    "calibrate": {"judgements": f"{GIVEN}/judgements.csv", "captions": f"{GIVEN}/captions.csv"},
}
# Recipes that the shipped ones are not.
ODD = {
    "base": {},
    "a table": {"source": {"kind": "csv", "path": f"{GIVEN}/captions.csv"}},
    "fitted": {"embed": {"encoder": "lsa-64"}},
    "ensemble": {"embed": {"encoder": "ensemble", "members": {"MiniLM": 2.0, "tfidf": 1.0}}},
    "calibrated": {"label": {"map": "logistic", "calibration": f"{GIVEN}/map.json"}},
    "read again": {"label": {"cross_encoder": "cross", "lists": ["t2t"], "top_k": 5}},
    "decided": {"label": {"overrides": f"{GIVEN}/overrides.csv"}},
    "another judge": {"label": {"map": "logistic"}, "evaluate": {"encoder": "judge"}},
    "excluded": {
        "shard": {"exclude": f"{GIVEN}/exclude.csv"},
        "evaluate": {"exclude": f"{GIVEN}/exclude.csv", "split": "val"},
    },
    "best by labels": {"train": {"select": "best_ndcg"}},
    "sentences": {"rerank": {"texts": "sentences", "pool": "transductive"}},
    "weights": {"rerank": {"weights": f"{GIVEN}/weights"}},
    "lists of another run": {"leaprr": {"lists": OTHER}},
}
# What a setting is set to where neither the next number nor another word will do.
OTHERWISE = {
    "source.kind": ("csv", {"source": {"path": f"{GIVEN}/captions.csv"}}),
    "source.splits": {"val": "drop"},
    "source.columns": ["image", "caption"],
    "source.fetch_respects": ["noindex"],
    "embed.encoder": "tfidf",
    "embed.members": ({"tfidf": 2}, {"embed": {"encoder": "ensemble", "members": {"lsa": 1}}}),
    "embed.fit_captions": (9, {"embed": {"encoder": "tfidf"}}),
    "embed.max_mean_cosine": 0.5,
    "label.calibration": (f"{GIVEN}/map.json", {"label": {"map": "logistic"}}),
    "label.overrides": f"{GIVEN}/overrides.csv",
    "label.lists": ["t2t"],
    "label.map": "half",
    "label.approximate_above": 10_000,  # below it no cells are needed
    "model.tune_image": {"mode": "frozen"},
    "model.tune_text": {"lr": 1e-5},
    "train.betas": [0.9, 0.98],
    "model.image_size": 96,
    "train.losses": {"smooth_ndcg": {"tau": 0.1}},
    "train.interpolate": ([0.5], {"model": {"image": "pretrained", "text": "pretrained"}}),
    "train.soup": ["one", "two"],
    "train.batch_size": 64,
    "train.lanes": 4,
    "shard.exclude": f"{GIVEN}/exclude.csv",
    "evaluate.exclude": f"{GIVEN}/exclude.csv",
    "evaluate.split": "val",
    "evaluate.judgements": f"{GIVEN}/judgements.csv",
    "evaluate.protocols": ["coco_1k"],
    "evaluate.prompts": ["a photo of {}"],
    "rerank.method": ["leaprr"],
    "rerank.betas": [1.0],
    "rerank.weights": f"{GIVEN}/weights",
    "leaprr.lists": OTHER,
    "leaprr.hidden": 64,
    "leaprr.heads": 8,
    "calibrate.judgements": f"{GIVEN}/overrides-judged.csv",
    "calibrate.captions": f"{GIVEN}/more-captions.csv",
    "calibrate.encoders": ["tfidf"],
    "calibrate.lowest": -1.0,
    "calibrate.highest": 2.0,
    "search.queries": ["a dog"],
    "serve.names": ["here"],
}


@pytest.fixture
def constant(monkeypatch):
    """Files and models on this machine are as they were recorded."""
    patch(monkeypatch.setattr)


def patch(set_) -> None:
    set_(store, "stamp", lambda uri: [7, "then"])
    set_(sentences, "fingerprint", lambda name, revision=None: f"files of {name} {revision}")
    set_(sentences, "path", lambda name: None)


# ---- run folders of hand-written indexes ---------------------------------------------------------


def file(name: str, salt: str) -> dict:
    return {
        "bytes": 100 + len(name),
        "sha256": hashlib.sha256(f"{name}{salt}".encode()).hexdigest(),
    }


def index(folder: str, names: typing.Iterable[str], endings: tuple[str, ...], **more) -> None:
    """The index of a folder with pieces of these names, and of each the files with the endings."""
    pieces = []
    for name in names:
        files = {f"{name}{ending}": file(f"{folder}/{name}", ending) for ending in endings}
        counts = {"samples": 3, "captions": 6, "images": 3, "dim": 8, "rejected": {}, "queries": 9}
        about = {"name": name, "split": name.split("-")[0], "fingerprint": f"of {name}"}
        pieces.append({**about, **counts, "files": files, **more})
    whole = {"version": f"version of {folder}", "fingerprint": "f", "settings": {}}
    store.write_json(f"{folder}/index.json", {**whole, "pieces": pieces})


def manifest(recipe: Recipe) -> pa.Table:
    source = recipe.source  # what is cut off train is not there already
    val = 0 if source.holdout or source.cut_val else 2
    counts = {"train": 6, "val": val, "test": 0 if source.cut_test else 2}
    rows = [
        {
            **{"image_id": f"{split}{n}", "uri": f"drawn:{split}/{n}", "split": split},
            "captions": [{"caption_id": f"{split}{n}#{c}", "text": f"{n} {c}"} for c in (0, 1)],
            **{"width": 64, "height": 64, "sha256": None, "source": "drawn"},
        }
        for split, count in counts.items()
        for n in range(count)
    ]
    return pa.Table.from_pylist(rows, MANIFEST)


def towers(split: str) -> pa.Table:
    rows = [(f"{split}{n}", f"{split}{n}", "image") for n in range(2)]
    rows += [(f"{split}{n}#{c}", f"{split}{n}", "text") for n in range(2) for c in (0, 1)]
    ids, images, modality = (list(column) for column in zip(*rows, strict=True))
    vectors = pa.array([[1.0, 0.0]] * len(rows), pa.list_(pa.float32(), 2))
    return pa.table([ids, images, modality, vectors], tower_schema(2))


def run_folder(recipe: Recipe, root: str) -> None:
    """All stages of a run, as far as plans read them, and nothing of another run."""
    store.remove(root)
    index(f"{root}/1-manifest", ["part-00000"], (".parquet",))
    parquet.write_table(f"{root}/1-manifest/part-00000.parquet", manifest(recipe), "f", {})
    index(f"{root}/2-shards", SHARDS, (".tar", ".parquet"))
    if recipe.shard.grow:
        sidecars(recipe, root)
    encoders = {recipe.embed.encoder, *recipe.embed.members, *recipe.calibrate.encoders, "tfidf"}
    for name in sorted(encoders | {recipe.evaluate.encoder or "tfidf"}):
        folder = encoder_label(name)
        index(f"{root}/3-embeddings/{folder}", SHARDS, (".parquet",))
        index(f"{root}/3-embeddings/{folder}/fitted", ["terms"], (".parquet",))
        index(f"{root}/4-relevance/{folder}", SHARDS, (".parquet",))
    index(f"{root}/5-model/main", ["model"], (".safetensors",))
    for name in ("one", "two"):  # which a soup may be of
        store.write_bytes(RunFolder(root).settings_uri(name), b"name: t")
        metrics = {"val/rsum": 1.0}
        index(f"{root}/5-model/{name}", ["model"], (".safetensors",), metrics=metrics)
    index(f"{root}/6-rankings/main/vectors", SHARDS, (".parquet",))
    split = recipe.evaluate.split
    vectors = f"{root}/6-rankings/main/vectors/{split}-000000.parquet"
    parquet.write_table(vectors, towers(split), "f", {})
    measured = {"metrics": {"rsum": 100.0}, "protocol": {"split": "test"}}
    store.write_json(f"{root}/6-rankings/main/metrics.json", measured)
    steps = {"steps": [{"method": "inverted_softmax", **SIDES}], "bank_images": 3, "val/rsum": 9.0}
    index(f"{root}/7-reranker/main", recipe.rerank.method, (".parquet",), **steps)
    for method in recipe.rerank.method:
        if method.endswith("leaprr"):
            folder = f"{root}/7-reranker/main/{method}"
            index(folder, ["leaprr"], (".safetensors",), metrics={"val/rsum": 8.0})


def sidecars(recipe: Recipe, root: str) -> None:
    """Who is in which shard, as where nothing has grown yet."""
    fixed = recipe.shard.model_copy(update={"grow": False})
    plan = shard.plan(recipe.model_copy(update={"shard": fixed}), root)
    rows = {piece.name: piece.inputs["rows"].select(["image_id"]) for piece in plan.pieces}
    for name in SHARDS:
        table = rows.get(name, rows["train-000000"][:0])
        parquet.write_table(f"{root}/2-shards/{name}.parquet", table, "f", {})


def given() -> None:
    """The files that settings name."""
    index(f"{GIVEN}/weights", ["leaprr"], (".safetensors",))
    texts = {
        "captions.csv": "image_id,caption_id,caption\na,a#0,one\nb,b#0,two\nc,c#0,three\n",
        "more-captions.csv": "image_id,caption_id,caption\na,a#0,one\nb,b#0,2\nc,c#0,three\n",
        "judgements.csv": "caption_id,caption_id,score\na#0,b#0,1\na#0,c#0,0\n",
        "overrides-judged.csv": "caption_id,caption_id,score\na#0,b#0,0\na#0,c#0,1\n",
        "overrides.csv": "image_id,caption_id,relevance\ntrain0,train1#0,1\n",
        "exclude.csv": "kind,id,reason\nimage,val1,\nimage,test1,\ncaption,train0#1,\n",
        "map.json": json.dumps({"map": "logistic", "centre": 0.5, "width": 0.25}),
    }
    for name, text in texts.items():
        store.write_bytes(f"{GIVEN}/{name}", text.encode())


# ---- what stands for their contents --------------------------------------------------------------


def plans(recipe: Recipe, root: str) -> typing.Iterator[tuple]:
    """(what it makes, its plan) of all stages."""
    if recipe.source.kind in ("drawn", "csv"):
        yield "ingest", ingest.plan(recipe, root)
    yield "shard", shard.plan(recipe, root)
    for number, step in enumerate(embed.steps(recipe.embed, root)):
        yield f"embed {number}", step.plan
    yield "label", label.plan(recipe, root)
    yield "train", train.plan(recipe, root, "main")
    yield "vectors", tower_vectors.plan_vectors(recipe, root, "main")
    yield "rankings", evaluate.plan(recipe, root, "main")
    yield "rerank", rerank.plan(recipe, root, "main")
    fitted = store.read_json(f"{root}/7-reranker/main/index.json")
    for plan in rerank.plan_training(recipe, root, "main", fitted):
        yield f"training {store.name_of(plan.folder)}", plan
    for method in recipe.rerank.method:
        yield f"reranked {method}", rerank.plan_reranked(recipe, root, "main", method)
    yield "audit", audit.plan(recipe, root)
    if recipe.calibrate.judgements:
        yield "calibrate", calibrate.plan(recipe, root)


def recorded(recipe: Recipe) -> dict[str, list]:
    """Fingerprints by what they are of: the plan's, then each piece's."""
    run_folder(recipe, ROOT)
    return {
        what: [plan.fingerprint, *(f"{p.name} {p.fingerprint}" for p in plan.pieces)]
        for what, plan in plans(recipe, ROOT)
    }


def of_shipped() -> dict[str, dict]:
    """Of the models of the recipes that come with Halftone, the plans' alone."""
    models = {f"{n} {m}": r for n in recipes.known() for m, r in recipes.resolve(n, {}, None)}
    out = {}
    for name, recipe in models.items():  # there are six images
        few = recipe.source.model_copy(update={"holdout": min(1, recipe.source.holdout)})
        found = recorded(recipe.model_copy(update={"source": few}))
        out[name] = {what: whole for what, (whole, *_) in found.items()}
    return out


def of_odd() -> dict[str, dict]:
    run_folder(Recipe(name="other"), OTHER)
    return {name: recorded(made_of(BASE, sections)) for name, sections in ODD.items()}


def made_of(*layers: dict) -> Recipe:
    sections: dict[str, dict] = {}
    for layer in layers:
        for section, values in layer.items():
            sections[section] = {**sections.get(section, {}), **values}
    return Recipe(name="t", **sections)


def changes() -> dict[str, list[str]]:
    """What has other fingerprints when a setting alone is another; for settings that change any.

    Where a piece stays what it was, and its plan alone does not, `(plan)` follows.
    """
    run_folder(Recipe(name="other"), OTHER)
    known = functools.cache(lambda layer: recorded(made_of(BASE, json.loads(layer))))
    out = {}
    for section in SECTIONS:
        for name, field in Recipe.model_fields[section].annotation.model_fields.items():
            value = OTHERWISE.get(f"{section}.{name}") or other(field)
            value, beside = value if isinstance(value, tuple) else (value, {})
            before = known(json.dumps(beside))
            after = recorded(made_of(BASE, beside, {section: {name: value}}))
            changed = [
                what + " (plan)" * (before[what][1:] == after[what][1:] != [])
                for what in sorted(before.keys() & after.keys())
                if before[what] != after[what]
            ]
            changed += sorted(before.keys() ^ after.keys())
            out |= {f"{section}.{name}": changed} if changed else {}
    return out


def other(field):
    """Another value of a setting."""
    default, options = field.default, typing.get_args(field.annotation)
    if typing.get_origin(field.annotation) is typing.Literal:
        return next(option for option in options if option != default)
    if literal := [o for kind in options for o in typing.get_args(kind)]:
        return literal[0]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int) or int in options:
        return (default or 0) + 1
    if isinstance(default, float) or float in options:
        return (default or 1.0) / 2
    return "another"


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> dict:
    return json.loads((GOLDEN / "fingerprints.json").read_text())


def test_shipped_recipes_keep_their_fingerprints(constant, known):
    assert of_shipped() == known["shipped"]


def test_other_recipes_keep_their_fingerprints(constant, known):
    given()
    assert of_odd() == known["odd"]


def test_a_setting_changes_what_it_changed(constant, known):
    given()
    assert changes() == known["changes"]
