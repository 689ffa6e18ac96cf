"""Recipes: a YAML file, or the name of one that comes with Halftone, and overrides on top."""

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import InputError, did_you_mean
from pipeline.storage import store
from pipeline.storage.run_folder import RunFolder
from schemas.settings import ModelSettings, Recipe, TrainSettings
from schemas.settings.training import BRING_SIZES, SIZES

FOLDER = Path(__file__).resolve().parents[2] / "recipes"


def known() -> dict[str, str]:
    """The recipes that come with Halftone: name to the line about it."""
    return {file.stem: _load(file).get("about", "") for file in sorted(FOLDER.glob("*.yaml"))}


def resolve(recipe: str, overrides: dict, only: str | None) -> list[tuple[str, Recipe]]:
    """(name, settings) of a recipe's models; `only` picks a variant, or names the one model."""
    base, given = _read(recipe), overrides.get("source", {})
    if given.get("kind") not in (None, (base.get("source") or {}).get("kind")):
        base["source"] = {}  # the recipe's is of other data: nothing of it is meant for these
    variants = base.get("variants") or {}
    if variants and (only is None or only in variants):
        names = [only] if only else list(variants)
    else:
        names, variants = [only or "main"], {}
    out = []
    for name in names:
        values = _merged(_merged(base, variants.get(name) or {}), overrides)
        values["place"] = list(variants).index(name) if name in variants else 0
        out.append((name, _absolute(_checked(values, recipe, overrides))))
    if recipe not in known():  # of those that come along it is known
        given = {**(base.get("source") or {}), **given}
    _check_read(out[0][1], given)
    return out


def seeded(models: list[tuple[str, Recipe]], seeds: str) -> list[tuple[str, Recipe]]:
    """Every model once for each training seed of a list such as `0,1,2`, as NAME.seed0, …"""
    if not re.fullmatch(r"\d+(,\d+)*", seeds) or len(set(numbers := seeds.split(","))) < 2:
        raise InputError(f"--seeds {seeds!r} is not a list of two or more seeds; give 0,1,2")
    out = []
    for name, recipe in models:
        for seed in map(int, numbers):
            trained = recipe.train.model_copy(update={"seed": seed})
            out.append((f"{name}.seed{seed}", recipe.model_copy(update={"train": trained})))
    return out


def saved(root: str, overrides: dict, only: str | None) -> list[tuple[str, Recipe]]:
    """(name, settings) of the models in a run folder, from the settings that were kept there.

    In the order of their recipe. What is to be trained otherwise is none of those that were not
    trained, unless one is named.
    """
    run, out = RunFolder(root), []
    names = run.models()
    for name in [name for name in names if only in (None, name)]:
        kept, over = run.settings(name), overrides
        if only is None and not (kept.get("train") or {}).get("epochs", 1):
            over = {k: v for k, v in overrides.items() if k not in ("model", "train")}
        values = _merged(kept, over)
        out.append((name, _absolute(_checked(values, run.settings_uri(name), overrides))))
    out.sort(key=lambda model: (bool(model[1].train.epochs), model[1].place, model[0]))
    if out:
        _check_read(out[0][1], overrides.get("source", {}))
    if only and not out and names:
        raise InputError(f"no model {only!r} in {root}{did_you_mean(only, names)}")
    return out


BEFORE = ".before-training"  # how what a tuned model was before is called, after its own name
# What of a model's settings says how it is tuned, and nothing of what it is before.
TUNING = [
    *("freeze", "layer_decay", "lora_rank", "gradient_checkpointing"),
    *(name for name in ModelSettings.model_fields if name.startswith("tune_")),
]


def with_before(root: str, models: list[tuple[str, Recipe]]) -> list[tuple[str, Recipe]]:
    """The models, and first each pretrained one that is tuned, once, as it was before training.

    It is called after the pretrained model, so that it is one row whichever models are named. One
    whose weights are gone is left out, unless it was made when they were there.
    """
    rows: dict[str, tuple[str, Recipe]] = {}
    tuned = [(n, r) for n, r in models if takes_steps(r) and two_towers(r.model)]
    if not tuned:
        return models
    for name, recipe in tuned:
        if not recipe.evaluate.before_training:
            continue
        model = {key: ModelSettings.model_fields[key].default for key in TUNING}
        row = untouched(recipe, recipe.model.model_copy(update=model))
        called = store.name_of(str(row.model.pretrained)) + BEFORE
        if called in dict(rows.values()):  # of the same name, and another picture size or the like
            called = name + BEFORE
        if _there(row.model.pretrained) or RunFolder(root).known("train", called):
            rows.setdefault(row.model_dump_json(exclude={"about", "leaprr"}), (called, row))
    return [*rows.values(), *((n, r) for n, r in models if not n.endswith(BEFORE))]


def takes_steps(recipe: Recipe) -> bool:
    """Whether a model is trained, and not put together of weights that are there."""
    return bool(recipe.train.epochs) and not recipe.train.soup


def two_towers(model: ModelSettings) -> bool:
    """Whether both towers are a pretrained model's, which matched pictures and texts before."""
    return model.image == model.text == "pretrained"


def untouched(recipe: Recipe, model: ModelSettings) -> Recipe:
    """The recipe of a model that no step is taken for, on the same data."""
    how = {name: getattr(recipe.train, name) for name in ("cache_gb", "timeout", "max_failures")}
    train = TrainSettings(epochs=0, **how)
    return recipe.model_copy(update={"model": model, "train": train, "variants": {}, "place": 0})


def _there(pretrained: str | None) -> bool:
    """Whether a model's folder is still there; of a hub's names nothing is known."""
    return pretrained is None or not Path(pretrained).is_absolute() or Path(pretrained).is_dir()


def of_pretrained(recipe: Recipe, given: str, overrides: dict) -> Recipe:
    """The recipe of a pretrained model of pictures and texts as it comes, by its configuration."""
    from pipeline.models import architecture  # takes a while

    asked: dict[str, Any] = {"image": "pretrained", "text": "pretrained"}
    asked["pretrained"] = _absolute_folder(given)
    try:
        config = architecture(ModelSettings(**asked)) or {}
    except ValueError as error:
        raise InputError(f"--pretrained: {error}") from error
    vision, text = config.get("vision_config"), config.get("text_config")
    if not vision or not text or "image_size" not in vision:
        raise InputError(
            f"--pretrained {given!r} is of the kind {config.get('model_type')!r}, not a model of "
            "pictures of one size and of texts; give one such as CLIP or SigLIP"
        )
    asked["dim"] = config.get("projection_dim") or vision["hidden_size"]
    model = _checked({"name": "", "model": asked | overrides.get("model", {})}, given, overrides)
    return untouched(recipe, model.model)


def _check_read(recipe: Recipe, given: Iterable[str]) -> None:
    """Refuses settings of the source that its kind does not read."""
    names = {name.partition(".")[0] for name in given} - {"kind"}
    if not names:
        return
    from pipeline import sources  # takes a while, and most commands name none

    if unread := sorted(names - sources.read_by(recipe.source.kind)):
        reading = [kind for kind in sources.SOURCES if unread[0] in sources.read_by(kind)]
        raise InputError(
            f"source.{unread[0]} is not read by the {recipe.source.kind} source; it is a setting "
            f"of {', '.join(reading)}"
        )


def _read(recipe: str) -> dict:
    if recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise InputError(f"no recipe file {recipe}; `halftone recipes` lists those there are")
        return {"name": Path(recipe).stem, **_load(Path(recipe))}
    if recipe not in known():
        raise InputError(f"unknown recipe {recipe!r}{did_you_mean(recipe, known())}")
    return {"name": recipe, **_load(FOLDER / f"{recipe}.yaml")}


class _Loader(yaml.SafeLoader):
    """YAML in which 5e-4 is a number and a date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def parse(text: str, where: str) -> Any:
    """The value of a YAML text; `where` names it in an error."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _load(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8; save the file as UTF-8") from error
    values = parse(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path} holds no settings; see `halftone recipes`")
    variants = values.get("variants") or {}
    if not isinstance(variants, dict) or not all(
        isinstance(over, dict | None) for over in variants.values()
    ):
        raise InputError(f"{path}: variants must be {{name: {{section: {{…}}}}}}")
    return values


def _merged(base: dict, over: dict) -> dict:
    """`over`'s keys put into the sections of `base`; a dotted key goes deeper (losses.x.weight)."""
    out = copy.deepcopy(base)
    _without_sizes(out.get("model"), over.get("model"))
    for section, values in over.items():
        if not isinstance(values, dict):
            out[section] = values
            continue
        for key, value in values.items():
            *path, last = f"{section}.{key}".split(".")
            place = out
            for depth, step in enumerate(path, 1):
                place = place.setdefault(step, {})
                if not isinstance(place, dict):
                    raise InputError(f"{'.'.join(path[:depth])} holds {place!r}, not settings")
            place[last] = value
    return out


def _without_sizes(base: Any, over: Any) -> None:
    """Take away the sizes that were meant for another tower than one that brings its own."""
    if isinstance(base, dict) and isinstance(over, dict):
        for side, size in SIZES.items():
            if over.get(side) in BRING_SIZES and over[side] != base.get(side):
                base.pop(size, None)


def _checked(values: dict, recipe: str, overrides: dict) -> Recipe:
    """The recipe of these values; an error names the file, or the option that was typed."""
    try:
        return Recipe(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        path = [str(step) for step in problem["loc"]]
        name = ".".join(path) or "recipe"
        if problem["type"] == "extra_forbidden":
            model: Any = Recipe
            for step in path[:-1]:
                model = model.model_fields[step].annotation
            near = did_you_mean(path[-1], model.model_fields)
            raise InputError(f"unknown setting {name!r}{near}") from error
        found = f" (found {problem['input']!r})" if len(path) > 1 else ""
        message = problem["msg"].removeprefix("Value error, ")
        typed = len(path) > 1 and any(
            key.split(".")[0] == path[1] for key in overrides.get(path[0], {})
        )
        said = f"--{name}" if typed else f"{recipe}: {name}"
        raise InputError(f"{said}: {message}{found}") from error


def _absolute_folder(name: str) -> str:
    """A folder's absolute path; any other name as it is."""
    with contextlib.suppress(OSError):
        if Path(name).is_dir():
            return str(Path(name).absolute())
    return name


def _absolute_unless(*words: str) -> Callable[[str], str]:
    return lambda value: value if value in words else store.absolute(value)


# The settings that name files or folders, and how each becomes absolute.
PATHS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "source": {"path": store.absolute, "images": store.absolute},
    "shard": {"exclude": store.absolute},
    "embed": {
        "encoder": _absolute_folder,
        "members": lambda members: {_absolute_folder(n): weight for n, weight in members.items()},
    },
    "label": {
        **{"calibration": store.absolute, "overrides": store.absolute},
        "cross_encoder": _absolute_folder,
    },
    "model": {"pretrained": _absolute_folder},
    "train": {"resume": _absolute_unless("latest")},
    "evaluate": {
        **{"exclude": store.absolute, "judgements": store.absolute},
        "encoder": _absolute_folder,
    },
    "rerank": {"weights": store.absolute},
    "leaprr": {"lists": _absolute_unless("train", "val")},
    "calibrate": {
        **{"judgements": store.absolute, "captions": store.absolute},
        "encoders": lambda names: tuple(map(_absolute_folder, names)),
    },
}


def _absolute(recipe: Recipe) -> Recipe:
    """Paths made absolute: the workers run in other directories."""
    sections = {}
    for section, names in PATHS.items():
        given = getattr(recipe, section)
        known = {name: getattr(given, name) for name in names}
        update = {name: names[name](value) for name, value in known.items() if value is not None}
        sections[section] = given.model_copy(update=update)
    return recipe.model_copy(update=sections)


KINDS = {bool: "true|false", int: "N", float: "X", str: "TEXT"}  # of a setting's values


def settings_of(section: str) -> Iterator[tuple[str, Any, str]]:
    """(name, default, description) of every setting of a section."""
    model: type[BaseModel] = Recipe.model_fields[section].annotation  # type: ignore[assignment]
    for name, info in model.model_fields.items():
        yield name, info.default, info.description or ""


def values_of(section: str, name: str) -> str:
    """What a setting may be, in short: its words, or the kind of its value."""
    annotation = Recipe.model_fields[section].annotation.model_fields[name].annotation
    kinds: list[str] = []

    def look(at: Any) -> None:
        inner = get_args(at)
        if get_origin(at) is Literal:
            kinds.extend(map(str, inner))
        elif get_origin(at) is dict or (isinstance(at, type) and issubclass(at, BaseModel)):
            kinds.append("{…}")
        elif inner:  # an option, a union, a tuple: what is in it
            for one in inner:
                look(one)
        elif at in KINDS:
            kinds.append(KINDS[at])

    look(annotation)
    words = "|".join(dict.fromkeys(kinds)) or "V"
    return f"[{words}, …]" if get_origin(annotation) is tuple else words


def is_nested(section: str, name: str) -> bool:
    """Whether a setting is written as YAML on the command line (a mapping or a list)."""
    default = Recipe.model_fields[section].annotation.model_fields[name].default
    return isinstance(default, dict | tuple | BaseModel)
