"""One small Ray, one tiny sentence encoder and one finished run, shared by all tests.

With `pytest -n 3 --dist loadgroup` what is on one Ray runs in one process, what forks workers in
one, and files stay together.
"""

import fcntl
import gc
import os
import string
from collections.abc import Callable, Generator
from pathlib import Path

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # 15 by default: beside other work they would starve
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_OFFLINE": "1",
    }
)
for inherited in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):  # tests never write to anyone's server
    os.environ.pop(inherited, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from _pytest.nodeid import coerce_node_id  # noqa: E402

torch.set_num_threads(1)

FIRST = ("ray", "workers", "own cluster, whole", "own cluster, ")
FIRST += ("tests/pipeline/formulas/test_fused", "tests/pipeline/training/test_train")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported now stays: it is not searched for garbage, now or ever."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Its group for several processes.

    What is on Ray, what starts a Ray of its own, what forks workers (from one process, that has
    imported all), its file.
    """
    if item.get_closest_marker("own_cluster"):
        group = f"own cluster, {item.path.parent.name}"
    elif {"ray_here", "finished_run"} & set(getattr(item, "fixturenames", ())):
        group = "ray"
    elif hasattr(getattr(item, "module", None), "gloo"):
        group = "workers"
    else:
        group = item.nodeid.partition("::")[0]
    item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long groups first; in them, what need not wait until a run is finished."""

    def turn(item: pytest.Item) -> tuple[int, bool]:
        group = next((mark.args[0] for mark in item.iter_markers("xdist_group")), "")
        place = next((n for n, name in enumerate(FIRST) if group.startswith(name)), len(FIRST))
        own = item.get_closest_marker("own_cluster")
        return place, bool(own) and "finished_run" in getattr(item, "fixturenames", ())

    items.sort(key=turn)
    for item in items:  # xdist 3.8 writes the group where pytest 9.2 no longer looks for it
        if "@" in (grouped := getattr(item, "_nodeid", "")):
            item._id = coerce_node_id(grouped)


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` has filled, in the process of this test run that came first."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> str:
    """Folder of a sentence-transformers model: a random vector a word, averaged."""
    return str(made_once(tmp_path_factory, "encoder", _write_encoder) / "tiny")


def _write_encoder(folder: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    letters = string.ascii_lowercase
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    pieces += [f"{a}{b}" for a in letters for b in letters]
    pieces += [f"##{a}{b}" for a in letters for b in letters]
    vocabulary = {piece: number for number, piece in enumerate(["[UNK]", *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(vocabulary), 32, generator=generator)
    model = SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_weights=weights.numpy())], device="cpu"
    )
    model.save(str(folder / "tiny"))


@pytest.fixture(scope="session")
def bucket():
    """URI of a bucket on an S3 server of this machine; processes started from now on find it."""
    from fsspec import filesystem
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        filesystem("s3").mkdir("halftone")
        yield "s3://halftone"
    server.stop()


@pytest.fixture(scope="session")
def ray_here(bucket):
    """Ray on this machine, started once; its workers find the bucket."""
    import ray

    from jobs.cluster import tasks

    tasks.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def first_stages(tmp_path_factory, tiny_encoder) -> Path:
    """Stages 1 to 3 of a small run; tests train in copies."""
    from pipeline.labels import embed
    from pipeline.sharding import ingest, shard
    from tests.helpers.stages import finish
    from tests.pipeline.training.test_train import recipe_with

    def make(folder: Path) -> None:
        recipe = recipe_with(tiny_encoder)
        finish(ingest.plan(recipe, str(folder)), ingest.write_part)
        finish(shard.plan(recipe, str(folder)), shard.write_shard)
        finish(embed.plan(recipe, str(folder)), embed.write_embeddings)

    return made_once(tmp_path_factory, "first-stages", make)


@pytest.fixture(scope="session")
def finished_run(request, tmp_path_factory, tiny_encoder) -> str:
    """The folder of a run that went through all stages; tests copy it before they change it."""
    from jobs.cli.main import main
    from tests.helpers.stages import TINY

    def run(folder: Path) -> None:
        request.getfixturevalue("ray_here")
        main("run", [*TINY, "--root", str(folder / "tiny"), "--encoder", tiny_encoder])

    return str(made_once(tmp_path_factory, "runs", run) / "tiny")


@pytest.fixture(params=["disk", "file", "memory", "s3"])
def folder(request, tmp_path) -> str:
    """A new folder in every kind of store."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return {
        "disk": str(tmp_path / "folder"),
        "file": f"file://{tmp_path}/folder",
        "memory": f"memory://{tmp_path.name}",
    }[request.param]
