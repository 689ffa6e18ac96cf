"""One small Ray, one tiny sentence encoder and one finished run, shared by all tests."""

import os
import string

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

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> str:
    """Folder of a sentence-transformers model: a random vector a word, averaged."""
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
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    model = SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_weights=weights.numpy())], device="cpu"
    )
    model.save(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def ray_here():
    """Ray on this machine, started once."""
    import ray

    from jobs.cluster import tasks

    tasks.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny_encoder, ray_here) -> str:
    """The folder of a run that went through all stages; tests copy it before they change it."""
    from jobs.cli.main import main
    from tests.helpers.stages import TINY

    root = tmp_path_factory.mktemp("runs") / "tiny"
    main("run", [*TINY, "--root", str(root), "--encoder", tiny_encoder])
    return str(root)


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
