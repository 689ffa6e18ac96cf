"""Data that grows: shards that are there keep their bytes, who is new comes into new ones."""

import itertools
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.sharding import shard
from pipeline.sharding.manifest import spans
from pipeline.sharding.reading import Shards
from pipeline.storage import parquet, store
from tests.helpers.datasets import picture, table_of, with_shard, with_source
from tests.helpers.stages import finish, ingested

FIRST = [f"a{n}" for n in range(7)]


@pytest.fixture(params=["one span", "parts"])
def way(request, monkeypatch) -> str:
    if request.param == "parts":
        monkeypatch.setattr(spans, "ROWS", 4)
        monkeypatch.setattr(spans, "BLOCK", 3)
    return request.param


def sharded(folder: Path, names: list[str], **source) -> dict[str, list[str]]:
    """Ids by shard, after the stage; two images a shard."""
    for name in names:
        if not (folder / f"{name}.jpg").exists():
            picture(folder / f"{name}.jpg")
    recipe = table_of(folder, [(f"{name}.jpg", f"of {name}", "train") for name in names])
    recipe = with_source(with_shard(recipe, samples=2, grow=True), **source)
    root = str(folder / "run")
    ingested(recipe, root)
    if not shard.finished(recipe, root):
        finish(shard.plan(recipe, root), shard.write_shard)
    assert shard.finished(recipe, root).complete
    shards = Shards(root)
    return {n: shards.table(n, ["image_id"])["image_id"].to_pylist() for n in shards.names()}


def hashes(folder: Path) -> dict[str, str]:
    found = (f for f in (folder / "run" / "2-shards").iterdir() if f.is_file())
    return {f.name: store.sha256(f.read_bytes()) for f in found if f.name != "index.json"}


def test_new_images_come_into_new_shards_and_the_others_keep_their_bytes(tmp_path, way):
    before, bytes_before = sharded(tmp_path, FIRST), hashes(tmp_path)
    assert sorted(itertools.chain(*before.values())) == FIRST and len(before) == 4
    new = ["b0", "b1", "b2"]
    after = sharded(tmp_path, [new[0], *FIRST[::-1], *new[1:]])  # wherever they stand
    assert {name: after[name] for name in before} == before
    assert hashes(tmp_path).items() >= bytes_before.items()
    assert sorted(itertools.chain(*(after[n] for n in after.keys() - before))) == new
    assert sorted(after) == [f"train-{n:06d}" for n in range(6)]


def test_an_image_that_is_taken_out_changes_its_own_shard_alone(tmp_path, way):
    before, bytes_before = sharded(tmp_path, FIRST), hashes(tmp_path)
    gone = before["train-000001"][0]
    after = sharded(tmp_path, [name for name in FIRST if name != gone])
    assert after == before | {"train-000001": before["train-000001"][1:]}
    same = {name for name, digest in hashes(tmp_path).items() if bytes_before.get(name) == digest}
    assert same == {name for name in bytes_before if "000001" not in name}


def test_a_shard_of_which_all_is_taken_out_is_gone_and_numbers_go_on(tmp_path, way):
    before = sharded(tmp_path, FIRST)
    gone = before["train-000001"]
    after = sharded(tmp_path, [name for name in [*FIRST, "b0"] if name not in gone])
    assert sorted(after) == ["train-000000", "train-000002", "train-000003", "train-000004"]
    assert after["train-000004"] == ["b0"]


def test_at_first_all_is_dealt_out_as_without_growing(tmp_path, way):
    grown = sharded(tmp_path, FIRST)
    recipe = with_shard(
        table_of(tmp_path, [(f"{name}.jpg", f"of {name}", "train") for name in FIRST]), samples=2
    )
    ingested(recipe, tmp_path / "other")
    rows = [piece.inputs["rows"] for piece in shard.plan(recipe, f"{tmp_path}/other").pieces]
    tables = [rows_ if way == "one span" else rows_.read() for rows_ in rows]
    assert [table["image_id"].to_pylist() for table in tables] == list(grown.values())


def test_what_is_cut_off_train_grows_too(tmp_path, way):
    before = sharded(tmp_path, FIRST, cut_val=0.4)
    after = sharded(tmp_path, [*FIRST, *(f"b{n}" for n in range(9))], cut_val=0.4)
    assert after.items() >= before.items()
    assert {name.split("-")[0] for name in after.keys() - before} == {"train", "val"}


def test_a_lost_sidecar_is_made_again_from_the_rows_that_were_dealt_out(tmp_path, way):
    sharded(tmp_path, FIRST)
    before = hashes(tmp_path)
    store.remove(f"{tmp_path}/run/2-shards/train-000002.parquet")
    sharded(tmp_path, FIRST)
    assert hashes(tmp_path) == before


def test_without_sidecar_and_rows_nobody_is_dealt_out_anew_in_silence(tmp_path):
    sharded(tmp_path, FIRST)
    store.remove(f"{tmp_path}/run/2-shards/train-000002.parquet")
    store.remove(f"{tmp_path}/run/2-shards/rows")
    with pytest.raises(InputError, match="train-000002.parquet in .* is lost"):
        sharded(tmp_path, FIRST)


def test_growing_is_refused_beside_a_holdout(tmp_path):
    with pytest.raises(InputError, match="shard.grow cannot go with source.holdout"):
        sharded(tmp_path, FIRST, holdout=2)


def test_the_sidecar_of_a_grown_shard_says_what_was_rejected(tmp_path, way):
    """Rejected images have their place, too: they may be had another time."""
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    recipe = table_of(tmp_path, [(f"{n}.jpg", n, "train") for n in ("x", "a1", "a2")])
    for name in ("a1", "a2"):
        picture(tmp_path / f"{name}.jpg")
    recipe = with_shard(recipe, samples=2, grow=True)
    ingested(recipe, tmp_path / "run")
    finish(shard.plan(recipe, f"{tmp_path}/run"), shard.write_shard)
    where = {
        row: file.stem
        for file in sorted((tmp_path / "run/2-shards").glob("*.parquet"))
        for row in parquet.read_table(str(file))["image_id"].to_pylist()
    }
    picture(tmp_path / "x.jpg")
    found = sharded(tmp_path, ["x", "a1", "a2", "b0"])
    assert {id_: name for name, ids in found.items() for id_ in ids}.items() >= where.items()
