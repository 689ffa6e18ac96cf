"""The options of a command: those of all commands, its own, and every setting."""

import argparse
import json

from pydantic import BaseModel

from jobs.cli import recipes
from jobs.cli.command import COMMANDS, Command
from jobs.cli.scopes import DEFAULT
from pipeline.errors import InputError, did_you_mean
from schemas.settings import SECTIONS

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
}


def parse(name: str, command: Command, argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """The options of a command line, and the settings it overrides by section."""
    shallow, inner = _apart(argv)
    options, rest = parser_of(name, command).parse_known_args(shallow)
    given = [(k, v) for k, v in vars(options).items() if "." in k]
    overrides: dict = {}
    flags = [*ALIASES.values(), *command.flags.values()]
    for dotted, text in given + _deeper([*rest, *inner], flags):
        section, key = dotted.split(".", 1)
        deep = "." in key or recipes.is_nested(section, key)
        value = recipes.parse(text, repr(text)) if deep else text
        overrides.setdefault(section, {})[key] = value
    return options, overrides


def parser_of(name: str, command: Command) -> argparse.ArgumentParser:
    """Of all options; settings of other sections than the command's are read, and not shown."""
    parser = argparse.ArgumentParser(
        f"halftone {name}",
        usage=f"halftone {name} [options] [--section.key VALUE …]",
        description=COMMANDS[name],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100),
    )
    parser.set_defaults(command=name)
    for flag, about in (
        ("--recipe", f"name or YAML file (default: --root's own, or {DEFAULT})"),
        ("--root", "run folder, URI (default runs/RECIPE)"),
        ("--name", "the model: a variant's name, or with --recipe a new one"),
        ("--seeds", "each model once for each of these training seeds: 0,1,2"),
    ):
        parser.add_argument(flag, default=None, help=about)
    for flag, about in (
        ("--dry-run", "say what would be done, do nothing"),
        ("--json", "results as JSON on standard output"),
    ):
        parser.add_argument(flag, action="store_true", default=False, help=about)
    command.arguments(parser)
    aliases = {**ALIASES, **command.flags}
    for section in SECTIONS:
        shown = section in command.sections
        group = parser.add_argument_group(f"{section} settings") if shown else parser
        for key, default, about in recipes.settings_of(section):
            dotted, values = f"{section}.{key}", recipes.values_of(section, key)
            text = f"{about} (default {written(default)})".replace("%", "%%")
            flags = [f"--{dotted}"] + ([aliases[dotted]] if dotted in aliases else [])
            told = text if shown else argparse.SUPPRESS
            group.add_argument(*flags, dest=dotted, metavar=values, help=told)
    return parser


def _apart(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line without, and those of, settings inside a setting.

    The parser does not know those, and would take their values for a command's own words.
    """
    shallow, deep, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag.count(".") < 2:
            shallow.append(word)
            continue
        deep.append(flag)
        if equals or words:
            deep.append(value if equals else words.pop(0))
    return shallow, deep


def _deeper(rest: list[str], aliases: list[str]) -> list[tuple[str, str]]:
    """Settings inside a setting, such as --train.losses.smooth_ndcg.weight 5."""
    out = []
    words = [part for word in rest for part in (word.split("=", 1) if "." in word else [word])]
    known = [f"--{s}.{n}" for s in SECTIONS for n, *_ in recipes.settings_of(s)]
    while words:
        flag = words.pop(0)
        section, _, key = flag.removeprefix("--").partition(".")
        parent = ".".join(flag.split(".")[:2])
        if not flag.startswith("--"):
            raise InputError(f"unexpected {flag!r}; settings are written --section.key value")
        if "." not in key or parent not in known or not recipes.is_nested(*parent[2:].split(".")):
            flags = [*known, *aliases, "--recipe", "--root", "--name", "--dry-run"]
            raise InputError(f"unknown option {flag}{did_you_mean(flag, flags)[:400]}")
        if not words:
            raise InputError(f"{flag} needs a value")
        out.append((f"{section}.{key}", words.pop(0)))
    return out


def written(default) -> str:
    """A setting's default in its help, as one would type it."""
    if default is None:
        return "none"
    if isinstance(default, BaseModel):  # settings inside a setting, as they come
        default = default.model_dump(mode="json", exclude_defaults=True)
    return default if isinstance(default, str) else json.dumps(default)
