"""The card of a model that is handed on: README.md with what hubs read, and what people ask."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import InputError
from pipeline.evaluation import compare
from pipeline.evaluation.results import Model, sentence
from pipeline.reports import tables
from pipeline.storage import run_folder, store
from pipeline.storage.run_folder import RunFolder
from schemas.settings import Recipe, of_before

NOT_STATED = "not stated"
LIBRARIES = {
    "hf": "transformers",
    "open_clip": "open_clip",
    "sentence-transformers": "sentence-transformers",
    "onnx": "onnx",
    "torch": "pytorch",
}
USES = {
    "hf": """from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("FOLDER").eval()
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER", backend="pil")
texts = model.get_text_features(**tokenizer(["a dog"], padding=True, return_tensors="pt"))
images = model.get_image_features(**processor([picture], return_tensors="pt"))
# the vectors are their pooler_output, divided by its norm""",
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
texts = model.eval().encode_text(tokenizer(["a dog"]), normalize=True)
images = model.encode_image(preprocess(picture)[None], normalize=True)""",
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
vectors = model.encode(["a dog"])  # and of pictures, where both towers are in it""",
    "onnx": """import onnxruntime

text = onnxruntime.InferenceSession("FOLDER/text.onnx")
(vectors,) = text.run(["vectors"], {"words": ids, "lengths": lengths})  # int64: (B, L), (B,)
image = onnxruntime.InferenceSession("FOLDER/image.onnx")
(vectors,) = image.run(["vectors"], {"images": pixels})  # see towers.json""",
    "torch": """import torch

text = torch.export.load("FOLDER/text.pt2").module()
vectors = text(ids, lengths)  # int64: (B, L), (B,), padded as towers.json says
image = torch.export.load("FOLDER/image.pt2").module()
vectors = image(pixels)""",
}


@dataclass(frozen=True)
class How:
    """What was exported."""

    to: str  # the form
    sides: tuple[str, ...]  # image, text
    pictures: str  # how the image tower's are made; empty where there are none
    differences: dict[str, float]  # by tower, how far its vectors are from the model's at most


def card(folder: str, name: str, root: str | None, how: How) -> str:
    """The card's text, of the model in a folder of stage 5; `root` is its run folder's, if any."""
    to, sides = how.to, how.sides
    about = run_folder.need_index(folder, "train")["pieces"][0]
    recipe = Recipe(**of_before(about["recipe"]))
    settings = recipe.model
    base = settings.pretrained if "pretrained" in (settings.image, settings.text) else None
    licence = licence_of(base) if base else None
    parts = [
        _front(to, base, licence),
        f"# {recipe.name}: {name}\n\n{recipe.about}".rstrip(),
        f"Image-text retrieval: {' and '.join(sides)} tower{'s' * (len(sides) > 1)} into one space,"
        " compared by cosine.",
        f"## Use\n\n```python\n{USES[to]}\n```",
        _made(about, recipe, how),
        _results(root, name, recipe),
        _licence(base, licence),
    ]
    return "\n\n".join(parts) + "\n"


def _front(to: str, base: str | None, licence: str | None) -> str:
    """The YAML that hubs read; only what is known."""
    told: dict[str, Any] = {"library_name": LIBRARIES[to]}
    told["pipeline_tag"] = "feature-extraction"
    told["tags"] = ["image-text-retrieval", "halftone"]
    if base and not Path(base).is_absolute():  # a folder here is nothing elsewhere
        told["base_model"] = base
    if licence:
        told["license"] = licence
    return f"---\n{yaml.safe_dump(told, sort_keys=False).strip()}\n---"


def _made(about: dict, recipe: Recipe, how: How) -> str:
    """What went in, and how near the export is."""
    shard = about.get("shard", recipe.shard.model_dump())
    lines = [f"- data: {recipe.source.kind} source {store.name_of(recipe.source.path or 'drawn')}"]
    if how.pictures:
        before = "" if shard["resize"] == "keep" else f"{shard['resize']} {shard['size']} first; "
        lines.append(f"- pictures: {before}{how.pictures}")
    losses, count = ", ".join(recipe.train.losses), f"{about['parameters']:,}"
    lines.append(f"- trained: {recipe.train.epochs} epochs, losses {losses}; {count} parameters")
    far = (
        ", ".join(f"{side} {value:.1e}" for side, value in how.differences.items())
        or "not measured"
    )
    lines.append(
        f"- this export ({how.to}): largest difference from the model's own vectors: {far}"
    )
    return "## How it was made\n\n" + "\n".join(lines)


def _results(root: str | None, name: str, recipe: Recipe) -> str:
    """The table of figures with its protocol, and the versions of what they stand on."""
    found: Model | None = None
    if root is not None and RunFolder(root).known("evaluate", name):
        try:
            settings = Recipe(**RunFolder(root).settings(name))
            found = compare.of_folder(root, name, settings, name)
        except (InputError, FileNotFoundError):
            found = None
    if found is None:
        return "## Results\n\nNot measured, or measured elsewhere."
    titles, rows = tables.figures(found)
    lines = ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]
    versions = [f"- {k}: {v}" for k, v in found.about.items() if k.endswith("version")]
    return "\n".join(["## Results", "", *lines, "", sentence(found.protocol), "", *versions])


def _licence(base: str | None, licence: str | None) -> str:
    if base is None:
        return "## Licence\n\nThe weights were trained from scratch; the licence of the data holds."
    named = Path(base).name if Path(base).is_absolute() else base
    said = f"## Licence\n\nBase model: {named}. Its licence: {licence or NOT_STATED}."
    return said if licence else f"{said} Its own files, as far as they are here, name none."


def licence_of(base: str) -> str | None:
    """The licence that a base model's card, config.json or LICENSE states; None where none does."""
    if front := _text(base, "README.md"):
        parts = front.split("---\n", 2)
        told = _yaml(parts[1]) if front.startswith("---\n") and len(parts) == 3 else {}
        if isinstance(said := told.get("license"), str):
            named = told.get("license_name") if said == "other" else None
            return str(named or said)
    if isinstance(said := _yaml(_text(base, "config.json") or "").get("license"), str):
        return said
    lines = [line.strip() for line in (_text(base, "LICENSE") or "").splitlines()]
    return next((line for line in lines if line), None)


def _text(base: str, file: str) -> str | None:
    """A file of a model's folder, or of a hub's model as far as it was fetched before."""
    from transformers.utils import cached_file

    try:
        path = cached_file(
            base, file, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        return Path(path).read_text("utf-8") if path else None
    except (OSError, ValueError):
        return None


def _yaml(text: str) -> dict:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
