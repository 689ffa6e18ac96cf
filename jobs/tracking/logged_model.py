"""A trained model with all that it takes to load it elsewhere: weights, code, requirements."""

import ast
import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from pipeline.errors import InputError
from pipeline.storage import run_folder, store

# What stage 5's model imports, by the names they are installed by.
ALWAYS = {"fsspec", "numpy", "pandas", "pillow", "pydantic", "PyYAML", "regex"}
ALWAYS |= {"pyarrow", "safetensors", "torch"}
OURS = ("pipeline", "schemas")
KEPT = "model"  # what its files are called among a logged model's artifacts
FILES = ("index.json", "vocabulary.json", "model.safetensors")


def log_model(folder: str):
    """MLflow's ModelInfo of a folder's trained model, logged to the run that is active."""
    import mlflow
    import pandas
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Schema

    about = run_folder.need_index(folder, "train")["pieces"][0]["recipe"]["model"]
    vocabulary = store.read_json(store.join(folder, "vocabulary.json"))
    own_code, theirs = imports_of(_towers(about))
    text = ColSpec(DataType.string, "text", required=False)
    image = ColSpec(AnyType(), "image", required=False)
    vectors = Schema([ColSpec(Array(DataType.double))])
    with tempfile.TemporaryDirectory() as copy:
        for name in FILES:
            (Path(copy) / name).write_bytes(store.read_bytes(store.join(folder, name)))
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("model.py")),
            artifacts={KEPT: copy},
            signature=ModelSignature(Schema([text, image]), vectors),
            input_example=pandas.DataFrame({"text": ["a dog in the snow"]}),
            # Our own code goes along, so the model loads where Halftone is not installed.
            code_paths=[*(_place(name) for name in OURS), *own_code],
            pip_requirements=pinned(ALWAYS | needed(about, vocabulary) | theirs),
        )


@contextlib.contextmanager
def fetched(uri: str, root: str) -> Iterator[str]:
    """The folder of a model that MLflow keeps (models:/NAME@best, runs:/ID/model), for a while.

    It is asked where a run folder `root` would be tracked. Raises InputError where none is there.
    """
    import mlflow

    from jobs.tracking.server import current, default_uri

    with tempfile.TemporaryDirectory() as copy, current(asked := default_uri(root)):
        try:
            where = mlflow.artifacts.download_artifacts(uri, dst_path=copy)
        except (mlflow.MlflowException, OSError) as error:
            said = str(error).splitlines()[0]
            raise InputError(f"MLflow at {asked} has no model {uri}: {said:.300}") from error
        flavors = mlflow.models.Model.load(where).flavors
        kept = flavors.get("python_function", {}).get("artifacts", {}).get(KEPT)
        if kept is None:
            raise InputError(f"{uri} is no model of Halftone's: it keeps no artifact {KEPT!r}")
        yield str(Path(where) / kept["path"])


def needed(settings: dict, vocabulary: list | dict) -> set[str]:
    """Distributions that towers of these settings (`model`) import beyond what all do."""
    names = set()
    if "pretrained" in (settings["image"], settings["text"]):
        names |= {"transformers"}
    modes = [(settings.get(f"tune_{side}") or {}).get("mode") for side in ("image", "text")]
    if settings["lora_rank"] or "lora" in modes:
        names |= {"peft"}
    if isinstance(vocabulary, dict):
        names |= {"tokenizers"}
        if any(name.endswith(".model") for name in vocabulary.get("files", ())):
            names |= {"sentencepiece", "protobuf"}
    return names


def pinned(names: Iterable[str]) -> list[str]:
    """Requirements of the versions that are installed here, without +cpu and the like."""
    return [f"{name}=={metadata.version(name).split('+')[0]}" for name in sorted(names)]


def imports_of(modules: Iterable[str]) -> tuple[list[str], set[str]]:
    """Folders and files of own code that modules need, and the distributions that code imports.

    A module that is installed is one of a distribution; any other goes along with its whole
    package, and what its file imports is looked at in turn.
    """
    code: dict[str, str] = {}
    installed: set[str] = set()
    known = metadata.packages_distributions()
    waiting, seen = list(modules), set()
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in seen or top in OURS or top in sys.stdlib_module_names:
            continue
        seen.add(name)
        if any("site-packages" in Path(place).parts for place in _places(top)):
            installed |= set(known.get(top, ())[:1])
            continue
        code[top] = _place(top)
        waiting += _imported(name)
    return list(code.values()), installed


def _towers(settings: dict) -> list[str]:
    """Modules of towers of one's own."""
    named = [settings[side].partition(":") for side in ("image", "text")]
    return [module for module, colon, _ in named if colon]


def _places(top: str) -> list[str]:
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise InputError(
            f"the model's code imports {top}, which is not found here, so the logged model would "
            "not load; run the command where it can be imported"
        )
    return list(spec.submodule_search_locations or ()) or [str(spec.origin)]


def _place(top: str) -> str:
    return str(Path(_places(top)[0]).absolute())


def _imported(module: str) -> Iterator[str]:
    """The modules that a module's file may import, packages above it among them."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = spec.parent.split(".")[: 1 - node.level or None] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield source
            for alias in node.names:  # of a package a name may be a module
                if _is_module(f"{source}.{alias.name}"):
                    yield f"{source}.{alias.name}"


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, AttributeError, ValueError):
        return False
