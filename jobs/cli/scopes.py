"""What a command is run on, as its COMMAND names it: functions of (command, options, overrides)."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from jobs.cli import recipes
from jobs.cli.run import Run
from jobs.cli.show import Show
from jobs.cluster import torchrun
from pipeline.errors import InputError
from pipeline.storage import store

DEFAULT = "drawn"  # the recipe that needs nothing


def nothing(command, options, overrides: dict) -> None:
    """`run(options)`."""
    command.run(options)


def unread_folder(command, options, overrides: dict) -> None:
    """`run(root, options)`; nothing in the folder is looked at: that may be what fails."""
    command.run(root_of(options.root, DEFAULT), options)


def folder(command, options, overrides: dict) -> None:
    """`run(root, options)`."""
    root, _ = models_of(options, overrides)
    command.run(root, options)


def settings(command, options, overrides: dict) -> None:
    """`run(root, [(model, recipe), …], options)`."""
    command.run(*models_of(options, overrides), options)


def source(command, options, overrides: dict) -> None:
    """`run(root, [(model, recipe), …], options)`, on the source that the command line names."""
    if options.source is not None:
        given = overrides.setdefault("source", {})
        given.setdefault("path", options.source)
        if "kind" not in given and options.recipe is None:
            from pipeline import sources

            given["kind"] = sources.kind_of(options.source)
    command.run(*models_of(options, overrides), options)


def source_or_recipe(command, options, overrides: dict) -> None:
    """`run(run)` for every model: of the recipe, or of one that fits the source that is named."""
    if options.source is not None:
        from jobs.cli import own_data

        own_data.choose(options, overrides)
    each_model(command, options, overrides)


def each_model(command, options, overrides: dict) -> None:
    """`run(run)` for every model; a worker of torchrun's that is not the first trains alone.

    Pretrained ones stand as they were before training, too; torchrun takes steps alone.
    """
    if torchrun.rank() is None:
        return _runs(command, options, overrides, recipes.with_before)
    if torchrun.rank():
        root, models = models_of(options, overrides)
        return torchrun.take_part(root, _taking_steps(root, models))
    return _runs(command, options, overrides, _taking_steps)


def _taking_steps(root: str, models: list) -> list:
    return [model for model in models if recipes.takes_steps(model[1])]


def each_or_pretrained(command, options, overrides: dict) -> None:
    """`run(run)` for every model, or for the one that --pretrained names."""
    if options.pretrained is None:
        return each_model(command, options, overrides)
    if options.seeds is not None:
        raise InputError("--pretrained is no training, so it has no --seeds; leave them out")
    called = options.name or store.name_of(os.path.abspath(options.pretrained))
    options.name = None

    def pretrained(root: str, models: list) -> list:
        known = dict(models)
        if called in known and recipes.takes_steps(known[called]):
            raise InputError(
                f"{called} is a trained model of {root}, which --pretrained would replace; give "
                "this one another --name"
            )
        tuned = (recipe for recipe in known.values() if recipes.takes_steps(recipe))
        like = known.get(called) or next(tuned, None)
        if like is None:  # the data's, and no prompts of another model as it comes
            like = models[0][1]
            read = {"prompts": overrides.get("evaluate", {}).get("prompts", ())}
            like = like.model_copy(update={"evaluate": like.evaluate.model_copy(update=read)})
        return [(called, recipes.of_pretrained(like, options.pretrained, overrides))]

    return _runs(command, options, overrides, pretrained)


def data(command, options, overrides: dict) -> None:
    """`run(run)` once: what it makes does not differ between models."""
    _runs(command, options, overrides, lambda root, models: models[:1])


def best_model(command, options, overrides: dict) -> None:
    """`run(run)` for the model that is best on val."""
    from pipeline.training.saved_model import best_val

    def best(root: str, models: list) -> list:
        return [max(models, key=lambda m: best_val(root, m[0]))] if len(models) > 1 else models

    _runs(command, options, overrides, best)


def _runs(command, options, overrides: dict, choose: Callable[[str, list], list]) -> None:
    root, models = models_of(options, overrides)
    # Where JSON is asked for it has standard output to itself: Ray prints what befalls nodes there.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        show, recipe = Show(), models[0][1].name
        show.heading(f"halftone {options.command}", f"recipe {recipe}, run folder {root}")
        runs = [Run(recipe, root, name, show, options) for name, recipe in choose(root, models)]
        for run in runs:
            if len(runs) > 1:
                show.heading(f"\nmodel {run.name}")
            command.run(run)
            if not run.dry:
                run.track.finish()
        stages = [result for run in runs for result in run.results.values() if "made" in result]
        if stages and not any(result["made"] for result in stages) and not options.dry_run:
            show.line("Everything was there already; nothing was computed.")
        if not options.dry_run:
            command.closing(runs)
    if options.json:
        print(json.dumps({"root": root, "models": {run.name: run.results for run in runs}}))


def models_of(options, overrides: dict) -> tuple[str, list]:
    """The run folder and its models: of the recipe named, or those whose settings lie there."""
    if options.recipe is None and options.root is not None and options.seeds is None:
        root = root_of(options.root, "")
        if models := recipes.saved(root, overrides, options.name):
            return root, models
    models = recipes.resolve(options.recipe or DEFAULT, overrides, options.name)
    if called := getattr(options, "called", None):
        models = [(name, recipe.model_copy(update={"name": called})) for name, recipe in models]
    root = root_of(options.root, models[0][1].name)
    return root, models if options.seeds is None else recipes.seeded(models, options.seeds)


def root_of(root: str | None, recipe: str) -> str:
    """The run folder: absolute, because workers and submitted jobs run in other directories."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if root is None:
        home = Path.home() / "halftone" / "runs" if submitted else Path("runs")
        return store.absolute(str(home / recipe))
    if submitted and store.is_local(root) and not os.path.isabs(root):
        do = "give an absolute path or a URI that every node can write"
        said = f"--root {root} is relative to a working directory that ends with the job"
        raise InputError(f"{said}; {do}")
    root = store.absolute(root)
    if store.is_local(root) and Path(root).exists() and not Path(root).is_dir():
        raise InputError(f"--root {root} is a file; give a folder")
    return root
