"""Shards: the same bytes whatever happens on the way, and what a tar and its sidecar hold."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from pipeline.sharding import ingest, shard, tar_writer
from pipeline.storage import run_folder, store
from tests.helpers.datasets import FIVE, drawn, files, picture, samples, table_of, with_shard
from tests.helpers.stages import finish, ingested, sharded


@pytest.fixture(scope="module")
def drawn_run(tmp_path_factory) -> str:
    """A run folder with the shards of a few drawn scenes."""
    root = tmp_path_factory.mktemp("drawn")
    sharded(drawn(), root)
    return str(root)


# ---- the same bytes ----------------------------------------------------------------------------


def test_shards_have_the_same_bytes_in_whatever_order_they_are_made(drawn_run, tmp_path):
    sharded(drawn(), tmp_path, backwards=True)
    assert files(tmp_path) == files(drawn_run)
    assert len(files(drawn_run)) == 2 * (3 + 1 + 1) + 1


def test_shards_in_a_remote_store_have_the_bytes_of_those_on_disk(drawn_run, tmp_path):
    root = f"memory://{tmp_path.name}"
    sharded(drawn(), root)
    for name, digest in files(drawn_run).items():
        assert store.sha256(store.read_bytes(f"{root}/2-shards/{name}")) == digest, name


def test_another_seed_packs_train_in_another_order_and_nothing_else(drawn_run, tmp_path):
    sharded(drawn(shard={"samples": 8, "seed": 1}), tmp_path)
    for split in ("train", "val", "test"):
        a, b = (
            [row["image_id"] for row in samples(root) if row["split"] == split]
            for root in (drawn_run, tmp_path)
        )
        assert sorted(a) == sorted(b) and (a == b) == (split != "train")


def test_a_run_that_is_finished_writes_nothing(drawn_run):
    before = {file: file.stat().st_mtime_ns for file in Path(drawn_run, "2-shards").iterdir()}
    plan = shard.plan(drawn(), drawn_run)
    assert plan.complete and not plan.pending
    for piece in plan.pieces:
        shard.write_shard(piece)
    after = {file: file.stat().st_mtime_ns for file in Path(drawn_run, "2-shards").iterdir()}
    assert after == before


@pytest.mark.parametrize(
    "changed",
    [{"samples": 9}, {"seed": 1}, {"max_pixels": 99}, {"resize": "longer"}, {"quality": 80}],
)
def test_changed_settings_are_other_shards(drawn_run, changed):
    recipe = drawn(shard={"samples": 8} | changed)
    assert len(shard.plan(recipe, drawn_run).pending) == len(shard.plan(recipe, drawn_run).pieces)


@pytest.mark.parametrize("changed", [{"failure_budget": 0.5}, {"failures_in_a_row": 7}])
def test_another_budget_leaves_the_shards_as_they_are(drawn_run, changed):
    recipe = drawn(shard={"samples": 8} | changed)
    assert not shard.plan(recipe, drawn_run).pending


def test_another_image_makes_its_own_shard_anew_and_no_other(tmp_path):
    recipe = with_shard(table_of(tmp_path, FIVE), samples=2)
    root = tmp_path / "r"
    for name, *_ in FIVE:
        picture(tmp_path / name)
    sharded(recipe, root)
    table_of(tmp_path, [("a.jpg", "another caption", "train"), *FIVE[1:]])
    ingested(recipe, root)
    owner = next(Path(s["tar"]).stem for s in samples(root) if s["image_id"] == "a")
    assert [piece.name for piece in shard.plan(recipe, str(root)).pending] == [owner]


@pytest.mark.parametrize("ending", ["tar", "parquet"])
@pytest.mark.parametrize("harm", ["lost", "torn"])
def test_a_lost_or_torn_file_is_made_again_with_the_same_bytes(tmp_path, harm, ending):
    recipe = drawn(source={"train_images": 12, "val_images": 0, "test_images": 2})
    sharded(recipe, tmp_path)
    before = files(tmp_path)
    victim = tmp_path / "2-shards" / f"train-000001.{ending}"
    if harm == "lost":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1000])
    plan = shard.plan(recipe, str(tmp_path))
    assert [piece.name for piece in plan.pending] == ["train-000001"]
    finish(plan, shard.write_shard)
    assert files(tmp_path) == before


def test_shards_that_are_no_longer_named_are_removed(tmp_path):
    sharded(drawn(), tmp_path)
    sharded(drawn(shard={"samples": 20}), tmp_path)
    assert {name.split(".")[0] for name in files(tmp_path)} == {
        *("train-000000", "val-000000", "test-000000", "index")
    }


# ---- what a tar holds --------------------------------------------------------------------------


def test_a_sidecar_finds_every_picture_in_its_tar(drawn_run):
    for row in samples(drawn_run):
        data = store.read_bytes(row["tar"], row["offset"], row["size"])
        with tarfile.open(row["tar"]) as tar:
            assert tar.extractfile(row["member"]).read() == data
        assert store.sha256(data) == row["sha256"]
        assert Image.open(io.BytesIO(data)).size == (row["width"], row["height"])


def test_the_members_of_a_sample_stand_together_without_time_or_owner(drawn_run):
    for tar in sorted(Path(drawn_run, "2-shards").glob("*.tar")):
        keys = [row["key"] for row in samples(drawn_run) if row["tar"] == str(tar)]
        with tarfile.open(tar) as archive:
            members = archive.getmembers()
        names = [f"{key}.{ending}" for key in keys for ending in ("jpg", "txt", "json")]
        assert [member.name for member in members] == names
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


def test_a_tar_has_the_bytes_that_tarfile_writes(drawn_run, tmp_path):
    for tar in sorted(Path(drawn_run, "2-shards").glob("*.tar")):
        with (
            tarfile.open(tar) as archive,
            tarfile.open(tmp_path / tar.name, "w", format=tarfile.USTAR_FORMAT) as copy,
        ):
            for info in archive:
                fresh = tarfile.TarInfo(info.name)
                fresh.size = info.size
                copy.addfile(fresh, archive.extractfile(info))
        assert (tmp_path / tar.name).read_bytes() == tar.read_bytes()


@pytest.mark.parametrize("name", ["a", "k" * 95 + ".json"])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 8**11 - 1])
def test_a_header_is_that_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert tar_writer.header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_webdataset_reads_the_same_samples(drawn_run):
    for tar in sorted(Path(drawn_run, "2-shards").glob("*.tar")):
        rows = [row for row in samples(drawn_run) if row["tar"] == str(tar)]
        read = list(webdataset.WebDataset(str(tar), shardshuffle=False))
        assert [sample["__key__"] for sample in read] == [row["key"] for row in rows]
        for row, sample in zip(rows, read, strict=True):
            assert store.sha256(sample["jpg"]) == row["sha256"]
            assert sample["txt"].decode() == row["captions"][0]["text"]
            about = json.loads(sample["json"])
            assert about == {name: row[name] for name in about} and len(about) == 6


def test_the_index_counts_what_the_tars_hold(drawn_run):
    index = run_folder.read_index(f"{drawn_run}/2-shards")
    for entry in index["pieces"]:
        rows = [row for row in samples(drawn_run) if Path(row["tar"]).stem == entry["name"]]
        assert entry["samples"] == len(rows)
        assert entry["captions"] == sum(len(row["captions"]) for row in rows)
        assert entry["rejected"] == {}
        for name, about in entry["files"].items():
            data = Path(drawn_run, "2-shards", name).read_bytes()
            assert about == {"bytes": len(data), "sha256": store.sha256(data)}
    totals = shard.totals(index)
    assert (totals["shards"], totals["samples"], totals["rejected"]) == (5, 32, 0)


def test_every_sample_of_the_manifest_is_in_one_shard_of_its_split(drawn_run):
    manifest = ingest.read(f"{drawn_run}/1-manifest", ["image_id", "split"]).to_pylist()
    expected = [(row["image_id"], row["split"], row["split"]) for row in manifest]
    found = [
        (row["image_id"], row["split"], Path(row["tar"]).name.split("-")[0])
        for row in samples(drawn_run)
    ]
    assert sorted(found) == sorted(expected)
