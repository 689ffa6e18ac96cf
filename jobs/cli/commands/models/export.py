"""halftone export MODEL --to FORM: a trained model as other libraries load it."""

import contextlib
import json
from pathlib import Path

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.show import Show
from pipeline.errors import InputError

FORMS = ("hf", "open_clip", "sentence-transformers", "onnx", "torch")
SIDES = ("image", "text")
MLFLOW = ("models:/", "runs:/", "mlflow-artifacts:/")  # how its URIs begin


def arguments(parser) -> None:
    about = "run folder, RUN:MODEL, a model's or checkpoint's folder, or an MLflow URI"
    parser.add_argument("model", nargs="?", default=None, help=about)
    parser.add_argument("--to", default=None, help=f"the form: {', '.join(FORMS)}")
    parser.add_argument("--tower", default=None, choices=SIDES, help="one tower alone")
    parser.add_argument("--output", default=None, help="folder (default exported/MODEL-FORM)")


def run(options) -> None:
    from jobs.tracking import logged_model
    from pipeline.export import forms
    from pipeline.export.given import given
    from pipeline.reports import model_card

    asked = options.model or options.root
    if asked is None or options.to is None:
        raise InputError("export needs a model and --to: halftone export runs/mine --to hf")
    show, sides = Show(quiet=options.json), (options.tower,) if options.tower else SIDES
    with contextlib.ExitStack() as stack:
        if asked.startswith(MLFLOW):
            root = scopes.root_of(options.root, scopes.DEFAULT)
            asked = stack.enter_context(logged_model.fetched(asked, root))
        found = given(asked, options.name)
        model = found.load()
        folder = Path(options.output or f"exported/{found.name}-{options.to}").absolute()
        if options.dry_run:
            return show.line(f"  would export {found.folder} to {folder}")
        made = forms.export(model, options.to, folder, sides)
        pictures = "" if model.features or "image" not in sides else str(model.preprocessing)
        # The figures are of the weights handed on, not of a checkpoint's.
        place = found.folder, found.name, None if found.checkpoint else found.root
        how = model_card.How(options.to, sides, pictures, made.differences)
        (folder / "README.md").write_text(model_card.card(*place, how), encoding="utf-8")
    if options.json:
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        told = {"folder": str(folder), "differences": made.differences, "files": files}
        return print(json.dumps({**told, "unchecked": made.unchecked}))
    far = ", ".join(f"{side} {value:.1e}" for side, value in made.differences.items())
    far = far or f"not measured: {made.unchecked}"
    show.line(f"  largest difference from the model's own vectors: {far}")
    return show.where({"exported": str(folder)})


COMMAND = Command(scopes.nothing, run, arguments=arguments)
