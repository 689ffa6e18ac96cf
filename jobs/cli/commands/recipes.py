"""halftone recipes: the recipes there are, a line each."""

import json

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.recipes import known


def run(options) -> None:
    recipes = known()
    if options.json:
        print(json.dumps(recipes))
        return
    width = max(map(len, recipes))
    for name, about in recipes.items():
        print(f"{name:<{width}}  {about}")


COMMAND = Command(scopes.nothing, run)
