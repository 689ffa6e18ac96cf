"""The command line: `halftone STAGE …` and `python -m jobs.STAGE …` are the same."""

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from jobs.cli import recipes
from pipeline.errors import InputError, did_you_mean
from pipeline.storage import store
from schemas.settings import SECTIONS

# What each command is, and the sections of settings that its --help shows.
COMMANDS = {
    "run": ("all stages, one after the other", SECTIONS),
    "ingest": ("annotations → manifest", ("source",)),
    "shard": ("manifest and images → WebDataset tars", ("shard", "source")),
    "embed": ("captions → sentence vectors", ("embed",)),
    "label": ("sentence vectors → relevance", ("label",)),
    "calibrate": ("people's judgements → a map from cosine to relevance", ("calibrate", "embed")),
    "train": ("shards and relevance → two-tower model", ("train", "model", "label")),
    "evaluate": ("model → rankings and metrics", ("evaluate", "label")),
    "rerank": ("rankings → better rankings", ("rerank", "leaprr", "evaluate")),
    "search": ("a text or a picture → what is nearest", ("search", "evaluate")),
    "serve": ("search in the browser, on the trained model", ("serve", "search", "evaluate")),
    "report": ("a run folder → one page", ("report",)),
    "compare": ("finished models → what differs, and whether it matters", ()),
    "score": ("any model's vectors or scores → figures under the field's protocols", ()),
    "info": ("what a run folder holds", ()),
    "lint": ("a run folder or any tars → what is wrong with them", ()),
    "repair": ("shards that are broken → the same bytes again", ("shard", "source")),
    "preview": ("shards → a page of pictures and captions", ()),
    "audit": ("shards → duplicates, and a list to exclude them by", ("audit",)),
    "recipes": ("the recipes there are", ()),
    "plan": ("a recipe and a cluster → time, memory, storage, cost", ("cluster", "train")),
    "doctor": ("every node of the cluster → what would stop a run there", ()),
}
STAGES = ("ingest", "shard", "embed", "label", "train", "evaluate", "rerank", "search")
MODULES = {"run": "jobs.end_to_end", "doctor": "jobs.doctor"}
MODULES |= {stage: f"jobs.{stage}" for stage in STAGES}
DEFAULT = "drawn"  # the recipe that needs nothing

# Flags people already type, and the setting each stands for.
ALIASES = {
    "train.batch_size": "--batch-size",
    "train.epochs": "--epochs",
    "train.lr": "--lr",
    "train.precision": "--precision",
    "train.workers": "--workers",
    "train.seed": "--seed",
    "train.resume": "--resume",
    "embed.encoder": "--encoder",
    "audit.distance": "--distance",
    "calibrate.judgements": "--judgements",
    "calibrate.captions": "--captions",
}
OWN = ("audit", "calibrate")  # sections whose short flags are their own command's alone


def main(command: str | None = None, argv: list[str] | None = None) -> None:
    """Run a command; ends the process with 0, 1 (work failed), 2 (bad input) or 130 (stopped)."""
    argv = sys.argv[1:] if argv is None else argv
    if command is None:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview())
            raise SystemExit(0)
        command, *argv = argv
    from jobs.cluster.tasks import WorkFailed

    try:
        if command not in COMMANDS:
            raise InputError(f"unknown command {command!r}{did_you_mean(command, COMMANDS)}")
        _dispatch(command, argv)
    except InputError as error:
        print(f"halftone {command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except WorkFailed as error:
        print(
            f"halftone {command}: {error}\nWhat was finished is kept; the same command goes on.",
            file=sys.stderr,
        )
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print(f"\nhalftone {command}: stopped; the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None


def _overview() -> str:
    lines = [f"  {name:<9} {about}" for name, (about, _) in COMMANDS.items()]
    return "\n".join(
        [
            "Halftone: image-text retrieval that knows the shades between match and no match.",
            "",
            "usage: halftone COMMAND [--recipe NAME|FILE] [--root URI] [--section.key VALUE …]",
            "",
            *lines,
            "",
            "`halftone COMMAND --help` shows every setting with its default and unit.",
        ]
    )


def _dispatch(command: str, argv: list[str]) -> None:
    module = module_of(command)
    options, overrides = _parse(command, argv, arguments_of(module))
    if command == "recipes":
        return module.run(options)
    if command == "doctor":  # a root that cannot be read is a finding
        return module.run(_root(options.root, DEFAULT), options)
    from jobs.cli.run import Run
    from jobs.cli.show import Show

    root, models = _models(options, overrides)
    if command in ("info", "lint", "compare", "score"):
        return module.run(root, options)
    if command == "plan":
        return module.run(root, models, options)
    if command == "rerank" and module.rerank_external.named(options):
        return module.rerank_external.run(models[0][1], options)
    # Where JSON is asked for it has standard output to itself: Ray prints what befalls nodes there.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        show = Show()
        runs = [Run(recipe, root, name, show, options.dry_run) for name, recipe in models]
        runs = _run(command, module, runs, options)
    if options.json:
        print(json.dumps({"root": root, "models": {run.name: run.results for run in runs}}))
    return None


def _run(command: str, module: ModuleType, runs: list, options: argparse.Namespace) -> list:
    """The runs of those models that the command is about, after it went through them."""
    from pipeline.training.saved_model import best_val

    root, show = runs[0].root, runs[0].show
    show.heading(f"halftone {command}", f"recipe {runs[0].recipe.name}, run folder {root}")
    if command in ("ingest", "shard", "embed", "label", "repair", "preview", "audit", "calibrate"):
        runs = runs[:1]  # these do not differ between models
    elif command in ("search", "serve") and len(runs) > 1:
        runs = [max(runs, key=lambda run: best_val(root, run.name))]
    for run in runs:
        if len(runs) > 1:
            show.heading(f"\nmodel {run.name}")
        module.run(run, options) if hasattr(module, "arguments") else module.run(run)
        if not run.dry:
            run.track.finish()
    stages = [result for run in runs for result in run.results.values() if "made" in result]
    if stages and not any(result["made"] for result in stages) and not options.dry_run:
        show.line("Everything was there already; nothing was computed.")
    if hasattr(module, "closing") and not options.dry_run:
        module.closing(runs)
    return runs


def module_of(command: str) -> ModuleType:
    """The job of a command."""
    return importlib.import_module(MODULES.get(command, f"jobs.cli.commands.{command}"))


def arguments_of(module: ModuleType) -> Callable[[argparse.ArgumentParser], None]:
    """What adds a job's own options to a parser."""
    return getattr(module, "arguments", lambda parser: None)


def _models(options: argparse.Namespace, overrides: dict) -> tuple[str, list]:
    """The run folder and its models: of the recipe named, or those whose settings lie there."""
    if options.recipe is None and options.root is not None and options.seeds is None:
        root = _root(options.root, "")
        if models := recipes.saved(root, overrides, options.name):
            return root, models
    models = recipes.resolve(options.recipe or DEFAULT, overrides, options.name)
    root = _root(options.root, models[0][1].name)
    return root, models if options.seeds is None else recipes.seeded(models, options.seeds)


def _root(root: str | None, recipe: str) -> str:
    """The run folder: absolute, because workers and submitted jobs run in other directories."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if root is None:
        home = Path.home() / "halftone" / "runs" if submitted else Path("runs")
        return store.absolute(str(home / recipe))
    if submitted and store.is_local(root) and not os.path.isabs(root):
        raise InputError(
            f"--root {root} is relative to a working directory that ends with the job; give an "
            "absolute path or a URI that every node can write"
        )
    root = store.absolute(root)
    if store.is_local(root) and Path(root).exists() and not Path(root).is_dir():
        raise InputError(f"--root {root} is a file; give a folder")
    return root


def _parse(command: str, argv: list[str], arguments) -> tuple[argparse.Namespace, dict]:
    options, rest = _parser(command, arguments).parse_known_args(argv)
    overrides: dict = {}
    for dotted, text in [(k, v) for k, v in vars(options).items() if "." in k] + _deeper(rest):
        section, key = dotted.split(".", 1)
        deep = "." in key or recipes.is_nested(section, key)
        overrides.setdefault(section, {})[key] = _value(text) if deep else text
    return options, overrides


def _parser(command: str, arguments) -> argparse.ArgumentParser:
    """Of a command: the options of all, those that `arguments` adds, and every setting."""
    parser = argparse.ArgumentParser(
        f"halftone {command}",
        description=COMMANDS[command][0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100),
    )
    parser.add_argument(
        "--recipe", default=None, help=f"name or YAML file (default: --root's own, or {DEFAULT})"
    )
    parser.add_argument("--root", default=None, help="run folder, URI (default runs/RECIPE)")
    parser.add_argument("--name", default=None, help="the model: a variant's name, or a new one")
    parser.add_argument(
        "--seeds", default=None, help="each model once for each of these training seeds: 0,1,2"
    )
    parser.add_argument(
        "--dry-run", action="store_true", default=False, help="say what would be done, do nothing"
    )
    parser.add_argument(
        "--json", action="store_true", default=False, help="results as JSON on standard output"
    )
    arguments(parser)
    for section in SECTIONS:
        shown = section in COMMANDS[command][1]
        group = parser.add_argument_group(f"{section} settings") if shown else parser
        for name, default, about in recipes.settings_of(section):
            alias = ALIASES.get(f"{section}.{name}") if shown or section not in OWN else None
            flags = [f"--{section}.{name}", alias]
            text = f"{about} (default {_written(default)})".replace("%", "%%")
            group.add_argument(
                *filter(None, flags),
                dest=f"{section}.{name}",
                metavar="V",
                help=text if shown else argparse.SUPPRESS,
            )
    return parser


def _deeper(rest: list[str]) -> list[tuple[str, str]]:
    """Settings inside a setting, such as --train.losses.smooth_ndcg.weight 5."""
    out = []
    words = [part for word in rest for part in (word.split("=", 1) if "." in word else [word])]
    while words:
        flag = words.pop(0)
        section, _, key = flag.removeprefix("--").partition(".")
        known = [f"--{s}.{n}" for s in SECTIONS for n, *_ in recipes.settings_of(s)]
        parent = ".".join(flag.split(".")[:2])
        if not flag.startswith("--"):
            raise InputError(f"unexpected {flag!r}; settings are written --section.key value")
        if "." not in key or parent not in known or not recipes.is_nested(*parent[2:].split(".")):
            flags = [*known, *ALIASES.values(), "--recipe", "--root", "--name", "--dry-run"]
            raise InputError(f"unknown option {flag}{did_you_mean(flag, flags)[:400]}")
        if not words:
            raise InputError(f"{flag} needs a value")
        out.append((f"{section}.{key}", words.pop(0)))
    return out


def _value(text: str):
    return recipes.parse(text, repr(text))


def _written(default) -> str:
    return json.dumps(default) if isinstance(default, dict | tuple | list) else str(default)


if __name__ == "__main__":
    main()
