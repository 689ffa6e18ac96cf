"""halftone recipes: the recipes there are, a line each."""

import json

from jobs.cli import main as _cli
from jobs.cli import recipes as _recipes


def run(options) -> None:
    recipes = _recipes.known()
    if options.json:
        print(json.dumps(recipes))
        return
    width = max(map(len, recipes))
    for name, about in recipes.items():
        print(f"{name:<{width}}  {about}")


if __name__ == "__main__":
    _cli.main("recipes")
