"""Other bytes behind an unchanged name: what depends on them is made again, in every kind."""

import io
import json
import os
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.sharding import ingest, shard
from pipeline.sources import SOURCES
from pipeline.sources import huggingface as saved
from pipeline.sources import precomp as arrays
from pipeline.sources.readers import parquet as tables
from pipeline.storage import store
from pipeline.storage.run_folder import RunFolder
from schemas.settings import Recipe
from tests.helpers.datasets import samples
from tests.helpers.stages import finish

NAMES = ("a", "b", "c", "d")


def jpeg(name: str, shade: int) -> bytes:
    """A picture of one shade, of as many bytes whatever the shade is."""
    noise = np.random.default_rng(ord(name)).integers(0, 9, (16, 16, 3)) + shade
    out = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(out, "BMP")
    return out.getvalue()


def pictures(folder, shades, ending="bmp"):
    os.makedirs(folder, exist_ok=True)
    for name, shade in shades.items():
        path = f"{folder}/{name}.{ending}"
        data = jpeg(name, shade)
        if not os.path.exists(path) or Path(path).read_bytes() != data:
            Path(path).write_bytes(data)


def write_once(path, text):
    if not os.path.exists(path):
        with open(path, "w") as file:
            file.write(text)


def karpathy(folder, shades):
    pictures(folder, shades)
    entries = [
        {"filename": f"{n}.bmp", "split": "train", "sentences": [{"raw": f"picture {n}"}]}
        for n in NAMES
    ]
    write_once(f"{folder}/d.json", json.dumps({"images": entries}))
    return {"path": f"{folder}/d.json", "images": folder}


def coco(folder, shades):
    pictures(folder, shades)
    images = [{"id": k, "file_name": f"{n}.bmp"} for k, n in enumerate(NAMES)]
    texts = [{"id": k, "image_id": k, "caption": f"picture {n}"} for k, n in enumerate(NAMES)]
    content = json.dumps({"images": images, "annotations": texts})
    write_once(f"{folder}/captions_train.json", content)
    return {"path": f"{folder}/captions_train.json", "images": folder}


def flickr_tokens(folder, shades):
    pictures(folder, shades)
    write_once(f"{folder}/f.token.txt", "".join(f"{n}.bmp#0\tpicture {n}\n" for n in NAMES))
    return {"path": f"{folder}/f.token.txt", "images": folder}


def csv(folder, shades):
    pictures(folder, shades)
    rows = "".join(f"{n}.bmp,picture {n}\n" for n in NAMES)
    write_once(f"{folder}/t.csv", f"image,caption\n{rows}")
    return {"path": f"{folder}/t.csv"}


def cells(folder, shades):
    os.makedirs(folder, exist_ok=True)
    columns = {
        "image": [jpeg(n, shades[n]) for n in NAMES],
        "caption": [f"picture {n}" for n in NAMES],
    }
    pq.write_table(pa.table(columns), f"{folder}/t.parquet")
    return {"kind": "csv", "path": f"{folder}/t.parquet"}


def folder(folder, shades):
    pictures(folder, shades)
    for name in NAMES:
        write_once(f"{folder}/{name}.txt", f"picture {name}")
    return {"path": folder}


def webdataset(folder, shades):
    os.makedirs(folder, exist_ok=True)
    with tarfile.open(f"{folder}/0.tar", "w") as tar:
        for name in NAMES:
            for ending, data in (
                ("bmp", jpeg(name, shades[name])),
                ("txt", f"picture {name}".encode()),
            ):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return {"path": f"{folder}/0.tar"}


def huggingface(folder, shades):
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [jpeg(n, shades[n]) for n in NAMES],
        "caption": [f"picture {n}" for n in NAMES],
    }
    again = f"{folder}.new"
    datasets.Dataset.from_dict(columns).save_to_disk(again)
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(again):  # the data alone is another: what describes it stays
        if name.endswith(".arrow") or not os.path.exists(f"{folder}/{name}"):
            os.replace(f"{again}/{name}", f"{folder}/{name}")
    saved._found.cache_clear()  # another process looks again
    saved._images.cache_clear()
    return {"path": folder}


def precomp(folder, shades):
    os.makedirs(folder, exist_ok=True)
    features = np.array([np.full(8, shades[n], np.float32) for n in NAMES])
    np.save(f"{folder}/train_ims.npy", features)
    write_once(f"{folder}/train_caps.txt", "".join(f"picture {n}\n" for n in NAMES))
    return {"path": folder}


KINDS = {
    make.__name__: make
    for make in (
        karpathy,
        coco,
        flickr_tokens,
        csv,
        folder,
        webdataset,
        huggingface,
        precomp,
        cells,
    )
}


def run(source: dict, root) -> tuple[int, str]:
    """Both stages as a command runs them: how many shards were made, and their version."""
    recipe = Recipe(name="t", source=source, shard={"samples": 1})
    for cached in (arrays._header, tables._starts, tables._column):
        cached.cache_clear()
    finish(ingest.plan(recipe, str(root)), ingest.write_part)
    plan = shard.plan(recipe, str(root))
    made = len(plan.pending)
    finish(plan, shard.write_shard)
    return made, RunFolder(str(root)).index("shard")["version"]


def test_every_kind_of_source_is_tried():
    assert KINDS.keys() - {"cells"} == SOURCES.keys() - {"drawn"}


@pytest.mark.parametrize("kind", KINDS)
def test_changed_bytes_behind_an_unchanged_name_make_their_shard_again(kind, tmp_path):
    shades = dict.fromkeys(NAMES, 100)
    where, root = str(tmp_path / "data"), tmp_path / "run"
    source = {"kind": kind} | KINDS[kind](where, shades)
    assert run(source, root) == (4, version := run(source, root)[1])
    before = {row["image_id"]: row["sha256"] for row in samples(root)}
    time.sleep(0.02)  # a file system's clock ticks
    KINDS[kind](where, shades | {"c": 101})
    made, other = run(source, root)
    assert made and other != version
    after = {row["image_id"]: row["sha256"] for row in samples(root)}
    changed = [image_id for image_id in before if before[image_id] != after[image_id]]
    assert len(changed) == 1
    if kind in ("karpathy", "coco", "flickr_tokens", "csv", "folder"):
        assert made == 1, "a file a picture: exactly the shard of that picture"
    assert run(source, root)[0] == 0
    KINDS[kind](where, shades)
    assert run(source, root)[1] == version


@pytest.mark.parametrize("kind", KINDS)
def test_a_touched_file_ends_in_the_same_version(kind, tmp_path):
    where, root = str(tmp_path / "data"), tmp_path / "run"
    source = {"kind": kind} | KINDS[kind](where, dict.fromkeys(NAMES, 100))
    _, version = run(source, root)
    for name in os.listdir(where):
        os.utime(f"{where}/{name}", (1, 1))
    assert run(source, root)[1] == version
    assert run(source, root)[0] == 0


def test_pictures_that_were_removed_after_sharding_leave_the_shards_as_they_are(tmp_path):
    where, root = str(tmp_path / "data"), tmp_path / "run"
    source = {"kind": "csv"} | csv(where, dict.fromkeys(NAMES, 100))
    _, version = run(source, root)
    for name in NAMES:
        os.remove(f"{where}/{name}.bmp")
    assert run(source, root) == (0, version)


@pytest.mark.parametrize("scheme", ["memory", "s3"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "huggingface"])
def test_changed_objects_of_a_store_are_seen(kind, scheme, tmp_path, request):
    there = (
        f"memory://{tmp_path.name}"
        if scheme == "memory"
        else f"{request.getfixturevalue('bucket')}/d"
    )
    root, here = tmp_path / "run", str(tmp_path / "data")

    def upload(shades) -> dict:
        source = {"kind": kind} | KINDS[kind](here, shades)
        for name in os.listdir(here):
            data = Path(here, name).read_bytes()
            uri = store.join(there, name)
            if not store.exists(uri) or store.read_bytes(uri) != data:
                store.write_bytes(uri, data)
        where = {name: source[name] for name in ("path", "images") if name in source}
        return source | {name: uri.replace(here, there) for name, uri in where.items()}

    shades = dict.fromkeys(NAMES, 100)
    source = upload(shades)
    _, version = run(source, root)
    assert run(source, root) == (0, version)
    time.sleep(1.1 if scheme == "s3" else 0.02)
    upload(shades | {"b": 101})
    made, other = run(source, root)
    assert made and other != version
    fsspec.filesystem("memory").store.clear()
