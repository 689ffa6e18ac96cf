"""Secrets come by the environment alone, and are found in nothing that a run leaves behind."""

import pytest

from jobs.cli import main
from jobs.tracking import tracker
from pipeline.errors import InputError
from pipeline.storage import store
from tests.helpers.stages import make_here

SECRET = "wJalrXUtnFEMI/K7MDENG/verysecret"


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/run",
        f"https://me:{SECRET}@host:5000/x",
        "s3://:hidden@bucket",
        "postgresql://mlflow:12345@db:5432/mlflow",
    ],
)
def test_a_uri_with_a_password_is_refused_without_repeating_it(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for refused in (lambda: store.absolute(uri), lambda: tracker.default_uri("/run")):
        with pytest.raises(InputError, match="by the environment") as error:
            refused()
        assert not any(part in str(error.value) for part in (SECRET, "hidden", "12345", "AKIA"))


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/run", "http://head:5000", "http://head:5000/@me", "s3://b/a:b@c", "gs://b/x@y"],
)
def test_other_uris_are_left_as_they_are(uri):
    assert store.absolute(uri) == uri


@pytest.mark.parametrize("flag", ["--root", "--source.path", "--source.images", "--shard.exclude"])
def test_the_command_line_refuses_it_too(flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main.main("ingest", ["--recipe", "flickr8k", flag, f"s3://key:{SECRET}@bucket/run"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and SECRET not in said and "holds a password" in said
    assert list(tmp_path.iterdir()) == []


def test_keys_of_the_environment_are_in_nothing_that_is_left_behind(tmp_path, monkeypatch, capfd):
    """Run folder, MLflow's database and artifacts, and what was printed."""
    make_here(monkeypatch)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEKEY")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    sizes = ["--source.train_images", "24", "--shard.samples", "12", "--encoder", "trigrams"]
    for command in ("ingest", "shard", "embed"):
        root = ["--recipe", "drawn_tiny", "--root", str(tmp_path / "run")]
        main.main(command, [*root, *sizes])
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name == "mlflow.db" for file in files)
    assert any(file.suffix == ".tar" for file in files)
    assert any(file.name.startswith("settings") for file in files)
    printed = capfd.readouterr()
    left = {"printed": (printed.out + printed.err).encode()}
    left |= {str(file): file.read_bytes() for file in files}
    for where, data in left.items():
        assert SECRET.encode() not in data and b"AKIAEXAMPLEKEY" not in data, where
