"""The commands there are, and what a command's module says of it."""

import importlib
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import InputError, did_you_mean

# What each command is, in the order of `halftone --help`.
COMMANDS = {
    "run": "all stages, one after the other",
    "ingest": "annotations → manifest",
    "shard": "manifest and images → WebDataset tars",
    "embed": "captions → sentence vectors",
    "label": "sentence vectors → relevance",
    "calibrate": "people's judgements → a map from cosine to relevance",
    "train": "shards and relevance → two-tower model",
    "evaluate": "model → rankings and metrics",
    "rerank": "rankings → better rankings",
    "search": "a text or a picture → what is nearest",
    "serve": "search in the browser, on the trained model",
    "report": "a run folder → one page",
    "compare": "finished models → what differs, and whether it matters",
    "export": "a trained model → a folder for transformers, open_clip, onnxruntime, …",
    "score": "any model's vectors or scores → figures under the field's protocols",
    "info": "what a run folder holds",
    "check": "a source → what it holds, and what looks wrong in it",
    "lint": "a run folder or any tars → what is wrong with them",
    "repair": "shards that are broken → the same bytes again",
    "preview": "shards → a page of pictures and captions",
    "audit": "shards → duplicates, and a list to exclude them by",
    "recipes": "the recipes there are",
    "plan": "a recipe and a cluster → pieces, time, memory, storage",
    "doctor": "every node of the cluster → what would stop a run there",
}
STAGES = ("ingest", "shard", "embed", "label", "train", "evaluate", "rerank", "search")
# Where a command's COMMAND is, if not in the module of its name in jobs/cli/commands: in modules
# that are run by themselves, and in the folder of commands on models.
MODULES = {name: f"jobs.{name}" for name in (*STAGES, "doctor")} | {"run": "jobs.end_to_end"}
OF_MODELS = {name: f"jobs.cli.commands.models.{name}" for name in ("compare", "export")}


def nothing(*args: Any) -> None:
    """What a command does that has nothing to do there."""


@dataclass(frozen=True)
class Command:
    """A command of `halftone`; its module imports what takes long in `run`, where it is needed."""

    scope: Callable  # what `run` is given: a function of scopes.py
    run: Callable[..., None] = nothing
    sections: tuple[str, ...] = ()  # of settings that its --help shows
    flags: Mapping[str, str] = field(default_factory=dict)  # its own short ones, by setting
    arguments: Callable[[ArgumentParser], None] = nothing  # adds options that are no settings
    closing: Callable[[list], None] = nothing  # after all runs, which it is given


def command_of(name: str) -> Command:
    """The command of a name, or the sentence that names a near one."""
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}")
    places = MODULES | OF_MODELS
    return importlib.import_module(places.get(name, f"jobs.cli.commands.{name}")).COMMAND
