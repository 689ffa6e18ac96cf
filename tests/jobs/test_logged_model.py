"""The model that MLflow keeps: the same model, by columns, anywhere, with all it needs."""

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
from PIL import Image

from bench import export as bench
from jobs.tracking import logged_model
from pipeline.training.saved_model import load_model
from tests.helpers import odd_pictures
from tests.pipeline.training.test_train import data, fit, recipe_with  # noqa: F401

FILES = odd_pictures.files()
TEXTS = ["a red circle", "two stars", "data: a chart of sales", "/data/dog.jpg"]
# What the code that goes along imports while a model is loaded and asked, by top names.
RECORDED = """
import builtins, json, sys
mine, plain = set(), builtins.__import__
def noted(name, given=None, *more, **how):
    ours = str((given or {}).get("__file__")).startswith(sys.argv[1])
    level = how.get("level") or (more[2] if more[2:] else 0)
    if ours and not level:
        mine.add(name.split(".")[0])
    return plain(name, given, *more, **how)
builtins.__import__ = noted
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
table = pandas.DataFrame(json.loads(sys.argv[2]))
vectors = model.predict(table)
builtins.__import__ = plain
here = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in OURS and m.__file__]
print(json.dumps([sorted(mine), vectors, here]))
"""


def logged(root: str, folder: Path) -> str:
    """The folder of the model that was logged of a run's model `main`."""
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    try:
        experiment = mlflow.create_experiment("e", artifact_location=str(folder / "artifacts"))
        with mlflow.start_run(experiment_id=experiment):
            info = logged_model.log_model(root)
        return mlflow.artifacts.download_artifacts(info.model_uri, dst_path=str(folder / "model"))
    finally:
        mlflow.set_tracking_uri(None)
        os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="module")
def folder(finished_run) -> str:
    return f"{finished_run}/5-model/main"


@pytest.fixture(scope="module")
def kept(folder, tmp_path_factory) -> str:
    return logged(folder, tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def served(kept):
    return mlflow.pyfunc.load_model(kept)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def same(found: list[list[float]], expected) -> None:
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_texts_are_those_of_the_column_text(served, model):
    expected = model.embed_texts(TEXTS)
    ids = [f"image-{n}" for n in range(len(TEXTS))]
    for table in (
        pd.DataFrame({"text": TEXTS}),
        pd.DataFrame({"id": ids, "text": TEXTS, "caption": ids}, index=ids),
        [{"text": text} for text in TEXTS],
        pd.DataFrame({"text": TEXTS, "image": [None] * len(TEXTS)}),
        {"text": TEXTS},
    ):
        same(served.predict(table), expected)
    assert served.predict(pd.DataFrame({"text": []}, dtype=str)) == []


def test_pictures_of_every_kind_in_every_form_have_their_vector(served, model, tmp_path):
    paths = [tmp_path / name for name in FILES]
    for path, content in zip(paths, FILES.values(), strict=True):
        path.write_bytes(content)
    expected = model.embed_images(list(FILES.values()))
    written = [base64.b64encode(content).decode() for content in FILES.values()]
    for images in (
        list(FILES.values()),
        written,
        [base64.encodebytes(content).decode() for content in FILES.values()],
        [f"data:image/x;base64,{text}" for text in written],
        [str(path) for path in paths],
        [f"file://{path}" for path in paths],
        [Image.open(path) for path in paths],
    ):
        same(served.predict(pd.DataFrame({"image": images})), expected)
    pictures = [np.asarray(Image.open(paths[0]))]
    assert np.dot(served.predict(pd.DataFrame({"image": pictures}))[0], expected[0]) > 0.99


def test_rows_may_hold_one_or_the_other(served, model):
    picture = FILES["turned.jpg"]
    rows = [{"text": "two stars"}, {"image": picture}, {"text": "a boat"}, {"image": picture}]
    found = served.predict(rows)
    same(found[::2], model.embed_texts(["two stars", "a boat"]))
    same(found[1::2], model.embed_images([picture, picture]))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["a red circle"], "nothing to embed: give a DataFrame.*column `text` or `image`"),
        ("/data/dog.jpg", "nothing to embed"),
        (pd.DataFrame({"id": ["a"], "caption": ["a dog"]}), "nothing to embed"),
        ({"text": ["a dog"], "image": ["x", "y"]}, "1 under 'text' and 2 under 'image'"),
        ([{"text": ["a dog"]}, {"text": ["a cat"]}], r"row 0: text is \['a dog'\]"),
        ([{"text": "a", "image": b"x"}], "row 0 holds text and image; give it a text or an image"),
        ([{"text": "a"}, {"text": None, "image": None}], "row 1 holds neither"),
        ([{"text": "a"}, {"text": "  "}], "row 1: text is '  '"),
        ([{"image": "dog.jpg"}], "row 0: image 'dog.jpg' is no file, no data URI and no base64"),
        ([{"image": "https://example.org/a.jpg"}], "web address: https://example.org/a.jpg is not"),
        ([{"image": "data:image/svg+xml,<svg/>"}], "picture 1 of 1: not an image: begins with"),
        ([{"image": "data:image/jpeg;base64,/9j/4A"}], "base64 does not decode"),
        ([{"image": "data: a chart of sales"}], "data URI is torn"),
        ([{"image": "/nowhere/dog.jpg"}], "'/nowhere/dog.jpg' is no file"),
        ([{"image": FILES["plain.jpg"][:-300]}], "picture 1 of 1: image does not decode"),
        ([{"image": 7}], "picture 1 of 1: not a picture: int"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(served, given, sentence):
    with pytest.raises(mlflow.MlflowException, match=sentence):
        served.predict(given)


def test_many_texts_go_through_the_model_together(served):
    inside = served.unwrap_python_model().model.towers.text
    calls = []
    handle = inside.register_forward_hook(lambda *given: calls.append(len(given[1][0])))
    served.predict(pd.DataFrame({"text": ["a red circle"] * 500}))
    handle.remove()
    assert sum(calls) == 500 and len(calls) == 2


def test_its_signature_names_the_columns(served):
    signature = served.metadata.signature
    assert signature.inputs.input_names() == ["text", "image"]
    assert not any(column.required for column in signature.inputs.inputs)


def asked_elsewhere(kept: str, apart: Path, records: list[dict]) -> tuple[set, list, list]:
    """What a process in an empty folder imports for a model, its vectors, and the code it used."""
    code = RECORDED.replace("OURS", repr(("pipeline", "schemas", "mytower", "shared_layers")))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, kept, json.dumps(records)],
        capture_output=True, text=True, cwd=apart, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    mine, vectors, here = json.loads(done.stdout.strip().splitlines()[-1])
    return set(mine) - sys.stdlib_module_names - {"pipeline", "schemas"}, vectors, here


def required(kept: str) -> set[str]:
    """Top names of the modules of its requirements, which are of the installed versions."""
    from importlib import metadata

    lines = (Path(kept) / "requirements.txt").read_text().split()
    named = dict(line.split("==") for line in lines)
    for name, version in named.items():
        assert metadata.version(name).split("+")[0] == version
    known = metadata.packages_distributions()
    tops = {"yaml" if top == "_yaml" else top for top, names in known.items() for n in names
            if n.lower() in {name.lower() for name in named}}  # fmt: skip
    assert {"torch", "numpy", "mlflow"} <= set(named)
    return tops


def test_it_loads_anywhere_and_requires_what_it_imports(kept, model, tmp_path):
    picture = base64.b64encode(FILES["turned.jpg"]).decode()
    records = [{"text": "a red circle", "image": None}, {"text": None, "image": picture}]
    mine, vectors, here = asked_elsewhere(kept, tmp_path, records)
    same(vectors[:1], model.embed_texts(["a red circle"]))
    same(vectors[1:], model.embed_images([FILES["turned.jpg"]]))
    assert all(Path(file).is_relative_to(kept) for file in here)  # its own code, not what is here
    assert mine and mine <= required(kept) | {"mlflow"}
    unused = {"torch", "numpy", "pandas", "PIL", "pydantic", "yaml", "regex"} - mine
    assert not unused  # nothing is required for nothing


TOWER = """
import einops_like
import torch

from mytower.layers import Mean
from . import layers


class Tower(torch.nn.Module):
    @classmethod
    def from_settings(cls, settings, given):
        tower = cls()
        tower.mean, tower.project = Mean(), torch.nn.Linear(3, settings.dim)
        return tower

    def forward(self, images):
        assert einops_like.HERE and layers.Mean is Mean
        return self.project(self.mean(images.float()))
"""


def test_a_tower_of_ones_own_goes_along(data, tmp_path, monkeypatch):  # noqa: F811
    recipe, root = data
    package = tmp_path / "code" / "mytower"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "towers.py").write_text(TOWER.replace("einops_like", "shared_layers"))
    layers = "import safetensors.torch, sklearn\nfrom torch import nn\n\n\nclass Mean(nn.Module):\n"
    (package / "layers.py").write_text(
        f"{layers}    def forward(self, x):\n        return x.mean((2, 3))\n"
    )
    (tmp_path / "code" / "shared_layers.py").write_text("import scipy\n\nHERE = True\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    flags = ["--model.image", "mytower.towers:Tower", "--model.dim", "8", "--train.epochs", "1"]
    fit(recipe_with(recipe.embed.encoder, *flags), root, "own")
    kept = logged(f"{root}/5-model/own", tmp_path)
    expected = load_model(f"{root}/5-model/own").embed_images([FILES["plain.jpg"]])
    apart = tmp_path / "apart"
    apart.mkdir()
    records = [{"image": base64.b64encode(FILES["plain.jpg"]).decode()}]
    mine, vectors, here = asked_elsewhere(kept, apart, records)
    same(vectors, expected)
    assert {Path(file).name for file in here} >= {"towers.py", "layers.py", "shared_layers.py"}
    assert all(Path(file).is_relative_to(kept) for file in here)
    assert {"scipy", "sklearn"} <= mine <= required(kept) | {"mlflow", "mytower", "shared_layers"}


def test_a_pretrained_tower_requires_what_its_process_imports(data, tmp_path):  # noqa: F811
    """With low-rank updates, whose package is loaded when the model is."""
    recipe, root = data
    folder = bench.saved(bench.pretrained("clip"), tmp_path / "weights")
    flags = [*("--model.image", "pretrained", "--model.text", "pretrained")]
    flags += [*("--model.pretrained", folder, "--model.image_size", "48")]
    flags += [*("--model.lora_rank", "2", "--train.epochs", "1")]
    fit(recipe_with(recipe.embed.encoder, *flags), root, "clip")
    kept = logged(f"{root}/5-model/clip", tmp_path)
    shutil.rmtree(folder)
    apart = tmp_path / "apart"
    apart.mkdir()
    picture = base64.b64encode(FILES["plain.jpg"]).decode()
    mine, vectors, _ = asked_elsewhere(kept, apart, [{"text": "a dog"}, {"image": picture}])
    expected = load_model(f"{root}/5-model/clip")
    same(vectors[:1], expected.embed_texts(["a dog"]))
    same(vectors[1:], expected.embed_images([FILES["plain.jpg"]]))
    assert {"transformers", "peft", "tokenizers"} <= mine <= required(kept) | {"mlflow"}


def test_mlflows_own_server_answers(kept, model, tmp_path):
    """As `mlflow models serve --env-manager local` does, in a folder that is not the checkout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*(sys.executable, "-m", "mlflow", "models", "serve", "-m", kept)]
    command += [*("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port))]
    command += ["--workers", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, env={**environment, "PATH": programs}, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server, tmp_path / "log")
        picture = base64.b64encode(FILES["turned.jpg"]).decode()
        records = [{"text": "two stars"}, {"image": picture}]
        for body in (
            {"dataframe_records": records},
            {"dataframe_split": {"columns": ["text", "image"],
                                 "data": [["two stars", None], [None, picture]]}},
        ):  # fmt: skip
            answer = requests.post(f"{url}/invocations", json=body, timeout=300)
            assert answer.status_code == 200, answer.text
            vectors = answer.json()["predictions"]
            same(vectors[:1], model.embed_texts(["two stars"]))
            same(vectors[1:], model.embed_images([FILES["turned.jpg"]]))
        columns = {"inputs": {"text": ["two stars", "a boat"]}}
        answer = requests.post(f"{url}/invocations", json=columns, timeout=300)
        same(answer.json()["predictions"], model.embed_texts(["two stars", "a boat"]))
        refused = {"dataframe_records": [{"image": "dog.jpg"}]}
        answer = requests.post(f"{url}/invocations", json=refused, timeout=300)
        assert answer.status_code == 400 and "is no file" in answer.text
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    """Return once the server answers; a guard ends the wait."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            if requests.get(f"{url}/ping", timeout=10).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_unknown_words_are_a_metric_of_the_training(finished_run):
    client = mlflow.MlflowClient(f"sqlite:///{Path(finished_run).parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("drawn_tiny").experiment_id
    (run,) = client.search_runs([experiment], "tags.`halftone.stage` = 'train'")
    assert 0 <= run.data.metrics["unknown_words_of_val"] < 0.5
    assert 0 <= run.data.metrics["unknown_words_of_test"] < 0.5


def test_code_that_is_not_found_is_named():
    with pytest.raises(logged_model.InputError, match="imports nowhere_at_all, which is not found"):
        logged_model.imports_of(["nowhere_at_all.towers"])


@pytest.mark.parametrize(
    ("settings", "vocabulary", "names"),
    [
        ({"image": "pixels", "text": "gru"}, ["a"], set()),
        ({"image": "pretrained", "text": "gru"}, ["a"], {"transformers"}),
        (
            {"image": "pixels", "text": "pretrained"},
            {"tokenizer": "{}"},
            {"transformers", "tokenizers"},
        ),
        (
            {"image": "pixels", "text": "pretrained", "lora_rank": 4},
            {"files": {"spiece.model": ""}},
            {"transformers", "tokenizers", "peft", "sentencepiece", "protobuf"},
        ),
    ],
)
def test_what_towers_need_is_required(settings, vocabulary, names):
    assert logged_model.needed({"lora_rank": 0, **settings}, vocabulary) == names
    assert len(logged_model.pinned(names)) == len(names)
