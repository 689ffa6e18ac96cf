"""Ingest and shard: what a manifest holds, which bytes a tar has, and what is rejected and why."""

import csv
import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline import _plan, _store, ingest, shard
from pipeline._errors import InputError
from schemas.settings import Recipe

DRAWN = {"kind": "drawn", "train_images": 20, "val_images": 5, "test_images": 7, "image_size": 32}


def drawn(**sections) -> Recipe:
    source = DRAWN | sections.pop("source", {})
    sections = {"shard": {"samples": 8}} | sections
    return Recipe(name="t", source=source, **sections)


def run(plan, write, *, backwards=False) -> dict:
    """The index, after the pending pieces were made."""
    pieces = plan.pending[::-1] if backwards else plan.pending
    return plan.finish({piece.name: write(piece) for piece in pieces})


def ingested(recipe: Recipe, root) -> str:
    run(ingest.plan(recipe, str(root)), ingest.write_part)
    return str(root)


def sharded(recipe: Recipe, root, **how) -> dict:
    ingested(recipe, root)
    return run(shard.plan(recipe, str(root)), shard.write_shard, **how)


def files(root, stage="2-shards") -> dict[str, str]:
    """Hash of every file of a stage, by name."""
    folder = Path(root) / stage
    return {file.name: _store.sha256(file.read_bytes()) for file in sorted(folder.iterdir())}


def samples(root) -> list[dict]:
    """The sidecars' rows of all shards, each with its tar."""
    return [
        {**row, "tar": str(file.with_suffix(".tar"))}
        for file in sorted((Path(root) / "2-shards").glob("*.parquet"))
        for row in _store.read_table(str(file)).to_pylist()
    ]


@pytest.fixture(scope="module")
def drawn_run(tmp_path_factory) -> str:
    """A run folder with the shards of a few drawn scenes."""
    root = tmp_path_factory.mktemp("drawn")
    sharded(drawn(), root)
    return str(root)


# ---- ingest ------------------------------------------------------------------------------------


def table_of(folder, rows, name="captions.csv") -> Recipe:
    """A recipe that reads a CSV of (image, caption, split) rows."""
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption", "split"), *rows])
    return Recipe(name="t", source={"kind": "csv", "path": str(folder / name)})


def with_source(recipe: Recipe, **changes) -> Recipe:
    return recipe.model_copy(update={"source": recipe.source.model_copy(update=changes)})


def with_shard(recipe: Recipe, **changes) -> Recipe:
    return recipe.model_copy(update={"shard": recipe.shard.model_copy(update=changes)})


def images_of(recipe: Recipe, root) -> dict[str, list[str]]:
    """Image ids by split as the shards will have them."""
    tables = ingest.rows_by_split(f"{ingested(recipe, root)}/1-manifest", recipe.source)
    return {split: table["image_id"].to_pylist() for split, table in tables.items()}


FIVE = [(f"{name}.jpg", f"caption {name}", "train") for name in "abcde"]


def test_a_data_set_without_images_is_refused(tmp_path):
    recipe = table_of(tmp_path, [])
    plan = ingest.plan(recipe, str(tmp_path))
    run(plan, ingest.write_part)
    with pytest.raises(InputError, match=r"captions\.csv holds no image"):
        ingest.check(plan)


def test_an_image_id_that_is_there_twice_is_refused(tmp_path):
    table_of(tmp_path, FIVE, "1.csv")
    recipe = with_source(table_of(tmp_path, FIVE[2:3], "2.csv"), path=str(tmp_path / "*.csv"))
    plan = ingest.plan(recipe, str(tmp_path))
    run(plan, ingest.write_part)
    with pytest.raises(InputError, match="1 image ids appear more than once, the first is 'c'"):
        ingest.check(plan)


def test_a_caption_id_that_is_there_twice_is_refused(tmp_path):
    sentences = [{"raw": "a dog", "sentid": 7}]
    images = [
        {"filename": f"{name}.jpg", "split": "train", "sentences": sentences} for name in "ab"
    ]
    (tmp_path / "data.json").write_text(json.dumps({"images": images}))
    source = {"kind": "karpathy", "path": f"{tmp_path}/data.json", "images": str(tmp_path)}
    plan = ingest.plan(Recipe(name="t", source=source), str(tmp_path))
    run(plan, ingest.write_part)
    with pytest.raises(InputError, match="caption"):
        ingest.check(plan)


def test_the_images_of_every_split_are_counted(tmp_path):
    plan = ingest.plan(drawn(), str(tmp_path))
    run(plan, ingest.write_part)
    assert ingest.check(plan) == {"train": 20, "val": 5, "test": 7}


def test_a_holdout_is_the_end_of_train_and_nothing_is_lost(tmp_path):
    recipe = with_source(table_of(tmp_path, FIVE), holdout=2)
    assert images_of(recipe, tmp_path / "r") == {"train": ["a", "b", "c"], "val": ["d", "e"]}


@pytest.mark.parametrize("holdout", [5, 6])
def test_a_holdout_that_leaves_no_train_image_is_refused(tmp_path, holdout):
    recipe = with_source(table_of(tmp_path, FIVE), holdout=holdout)
    with pytest.raises(InputError, match=f"source.holdout {holdout} needs more .*'train': 5"):
        images_of(recipe, tmp_path / "r")


def test_a_holdout_is_refused_where_there_is_a_val_split(tmp_path):
    recipe = table_of(tmp_path, [*FIVE, ("f.jpg", "caption f", "val")])
    with pytest.raises(InputError, match="no val split of its own"):
        images_of(with_source(recipe, holdout=2), tmp_path / "r")
    renamed = with_source(recipe, holdout=2, splits={"val": "test"})
    assert [len(ids) for ids in images_of(renamed, tmp_path / "s").values()] == [3, 2, 1]


def test_splits_are_renamed_and_dropped(tmp_path):
    rows = [("a.jpg", "a", "train"), ("b.jpg", "b", "restval"), ("c.jpg", "c", "dev")]
    recipe = table_of(tmp_path, [*rows, ("d.jpg", "d", "other")])
    recipe = with_source(recipe, splits={"restval": "train", "dev": "val", "other": "drop"})
    assert images_of(recipe, tmp_path / "r") == {"train": ["a", "b"], "val": ["c"]}


def test_a_dropped_split_takes_its_truth_with_it(tmp_path):
    root = ingested(drawn(source={"splits": {"val": "drop"}}), tmp_path)
    kept = set(ingest.read(f"{root}/1-manifest")["image_id"].to_pylist())
    assert {name.split("#")[0] for name in ingest.truth(f"{root}/1-manifest")} == kept


def test_a_lost_table_of_truth_is_written_again(tmp_path):
    root = ingested(drawn(), tmp_path)
    before = files(root, "1-manifest")
    (tmp_path / "1-manifest" / "truth-00000.parquet").unlink()
    ingested(drawn(), tmp_path)
    assert files(root, "1-manifest") == before


def test_a_changed_annotation_file_is_read_again(tmp_path):
    recipe = table_of(tmp_path, FIVE)
    root = ingested(recipe, tmp_path / "r")
    assert ingest.plan(recipe, root).complete
    table_of(tmp_path, FIVE[:3])
    assert not ingest.plan(recipe, root).complete
    assert images_of(recipe, root) == {"train": ["a", "b", "c"]}


# ---- the same bytes ----------------------------------------------------------------------------


def test_shards_have_the_same_bytes_in_whatever_order_they_are_made(drawn_run, tmp_path):
    sharded(drawn(), tmp_path, backwards=True)
    assert files(tmp_path) == files(drawn_run)
    assert len(files(drawn_run)) == 2 * (3 + 1 + 1) + 1


def test_shards_in_a_remote_store_have_the_bytes_of_those_on_disk(drawn_run, tmp_path):
    root = f"memory://{tmp_path.name}"
    sharded(drawn(), root)
    for name, digest in files(drawn_run).items():
        assert _store.sha256(_store.read_bytes(f"{root}/2-shards/{name}")) == digest, name


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


@pytest.mark.parametrize("changed", [{"samples": 9}, {"seed": 1}, {"max_pixels": 99}])
def test_changed_settings_are_other_shards(drawn_run, changed):
    recipe = drawn(shard={"samples": 8} | changed)
    assert len(shard.plan(recipe, drawn_run).pending) == len(shard.plan(recipe, drawn_run).pieces)


def test_another_failure_budget_leaves_the_shards_as_they_are(drawn_run):
    recipe = drawn(shard={"samples": 8, "failure_budget": 0.5})
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
    run(plan, shard.write_shard)
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
        data = _store.read_bytes(row["tar"], row["offset"], row["size"])
        with tarfile.open(row["tar"]) as tar:
            assert tar.extractfile(row["member"]).read() == data
        assert _store.sha256(data) == row["sha256"]
        assert Image.open(io.BytesIO(data)).size == (row["width"], row["height"])


def test_the_members_of_a_sample_stand_together_without_time_or_owner(drawn_run):
    for tar in sorted(Path(drawn_run, "2-shards").glob("*.tar")):
        keys = [row["key"] for row in samples(drawn_run) if row["tar"] == str(tar)]
        with tarfile.open(tar) as archive:
            members = archive.getmembers()
        names = [f"{key}.{ending}" for key in keys for ending in ("jpg", "txt", "json")]
        assert [member.name for member in members] == names
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


def test_webdataset_reads_the_same_samples(drawn_run):
    for tar in sorted(Path(drawn_run, "2-shards").glob("*.tar")):
        rows = [row for row in samples(drawn_run) if row["tar"] == str(tar)]
        read = list(webdataset.WebDataset(str(tar), shardshuffle=False))
        assert [sample["__key__"] for sample in read] == [row["key"] for row in rows]
        for row, sample in zip(rows, read, strict=True):
            assert _store.sha256(sample["jpg"]) == row["sha256"]
            assert sample["txt"].decode() == row["captions"][0]["text"]
            about = json.loads(sample["json"])
            assert about == {name: row[name] for name in about} and len(about) == 6


def test_the_index_counts_what_the_tars_hold(drawn_run):
    index = _plan.read_index(f"{drawn_run}/2-shards")
    for entry in index["pieces"]:
        rows = [row for row in samples(drawn_run) if Path(row["tar"]).stem == entry["name"]]
        assert entry["samples"] == len(rows)
        assert entry["captions"] == sum(len(row["captions"]) for row in rows)
        assert entry["rejected"] == {}
        for name, about in entry["files"].items():
            data = Path(drawn_run, "2-shards", name).read_bytes()
            assert about == {"bytes": len(data), "sha256": _store.sha256(data)}
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


# ---- pictures and captions as people have them -------------------------------------------------


def picture(path, mode="RGB", size=(24, 16), form=None, **how) -> Path:
    """A picture of noise, which does not compress away."""
    noise = np.frombuffer(random.Random(str(path)).randbytes(size[0] * size[1] * 3), np.uint8)
    image = Image.fromarray(noise.reshape(size[1], size[0], 3)).convert(mode)
    image.save(path, form, **how)
    return path


def from_files(folder, rows, **settings) -> list[dict]:
    """The sidecar's rows of a CSV's images, after the stage has checked them."""
    recipe = table_of(folder, [(name, caption, "train") for name, caption in rows])
    recipe = with_shard(recipe, **settings)
    root = folder / "run"
    ingested(recipe, root)
    plan = shard.plan(recipe, str(root))
    made = {piece.name: shard.write_shard(piece) for piece in plan.pending}
    shard.check(plan, made, recipe)
    plan.finish(made)
    return samples(root)


def break_files(folder) -> dict[str, str]:
    """Caption and reason of each kind of bad sample."""
    good = picture(folder / "good.jpg", size=(64, 48)).read_bytes()
    (folder / "truncated.jpg").write_bytes(good[:-500])
    Image.open(folder / "truncated.jpg").verify()  # which does not see it
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404 not found</html>")
    (folder / "features.npy").write_bytes(b"\x93NUMPY but not really")
    picture(folder / "large.jpg", size=(100, 90))
    picture(folder / "blank.jpg")
    picture(folder / "nul.jpg")
    return {
        "truncated": "image does not decode",
        "empty": "empty file",
        "text": "image does not decode",
        "missing": "file missing",
        "large": "too many pixels",
        "blank": "no caption",
        "nul": "caption with a NUL byte",
    }


BAD_CAPTIONS = {"blank": "   ", "nul": "a\x00dog"}
BAD = ["truncated", "empty", "text", "missing", "large", "blank", "nul"]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_sample_is_rejected_with_its_reason_and_the_others_are_kept(tmp_path, bad):
    reason = break_files(tmp_path)[bad]
    rows = [("good.jpg", "good"), (f"{bad}.jpg", BAD_CAPTIONS.get(bad, "bad"))]
    found = from_files(tmp_path, rows, max_pixels=5000, failure_budget=0.5)
    by_id = {row["image_id"]: row for row in found}
    assert by_id["good"]["reason"] is None and by_id["good"]["key"] == "good"
    assert by_id[bad]["reason"].startswith(f"{reason}:")
    assert by_id[bad]["key"] is by_id[bad]["member"] is by_id[bad]["offset"] is None
    with tarfile.open(found[0]["tar"]) as tar:
        assert tar.getnames() == ["good.jpg", "good.txt", "good.json"]
    entry = _plan.read_index(f"{tmp_path}/run/2-shards")["pieces"][0]
    assert entry["samples"] == 1 and entry["rejected"] == {reason: 1}
    accepted = shard.read_sidecar(found[0]["tar"].replace(".tar", ".parquet"), ["image_id"])
    assert accepted.to_pylist() == [{"image_id": "good"}]


def test_a_damaged_feature_file_is_rejected_and_the_others_are_kept(tmp_path):
    break_files(tmp_path)
    rows = [("good.jpg", "good"), ("features.npy", "bad")]
    found = {row["image_id"]: row for row in from_files(tmp_path, rows, failure_budget=0.5)}
    assert found["good"]["reason"] is None and found["features.npy"]["reason"]


def test_more_bad_samples_than_the_budget_stop_the_stage_with_the_counts(tmp_path):
    break_files(tmp_path)
    rows = [("good.jpg", "good"), *((f"{bad}.jpg", BAD_CAPTIONS.get(bad, "bad")) for bad in BAD)]
    with pytest.raises(InputError) as error:
        from_files(tmp_path, rows, max_pixels=5000, failure_budget=0.8)
    assert "7 of 8 samples were rejected (2 × image does not decode, " in str(error.value)
    assert "failure_budget 0.8" in str(error.value)
    found = from_files(tmp_path, rows, max_pixels=5000, failure_budget=0.9)
    assert len([row for row in found if row["reason"]]) == 7


def test_missing_images_that_were_supplied_are_found_by_the_next_run(tmp_path):
    picture(tmp_path / "a.jpg")
    rows = [("a.jpg", "a"), ("b.jpg", "b")]
    with pytest.raises(InputError, match="1 × file missing"):
        from_files(tmp_path, rows)
    picture(tmp_path / "b.jpg")
    assert [row["reason"] for row in from_files(tmp_path, rows)] == [None, None]


ODD = [
    *("a.b", "a_b", "a/b", "a\\b", "a b", "ab.", ".hidden", "été", "ete", "日本", "日木", "a-b"),
    *("x" * 81, "x" * 80, "y" * 300 + "1", "y" * 300 + "2", "../up", "-rf", "%2e", "a:b", "A_B"),
]


def test_odd_image_ids_become_distinct_keys_without_dot_and_slash():
    keys = [shard._key(image_id) for image_id in ODD]
    assert len(set(keys)) == len(ODD)
    for key in keys:
        assert key and not set(key) & set("./\\: ") and key.isascii() and len(key) <= 80


def test_odd_image_ids_come_back_from_the_tar(tmp_path):
    rows = []
    for number, image_id in enumerate(ODD):
        picture(tmp_path / f"{number}.jpg")
        captions = [{"caption_id": f"{number}#0", "text": image_id}]
        row = {"image_id": image_id, "uri": f"{tmp_path}/{number}.jpg", "split": "train"}
        rows.append(row | {"captions": captions, "source": "csv"})
    table = shard.pa.Table.from_pylist(rows, schema=ingest.MANIFEST)
    settings = Recipe(name="t").shard
    inputs = {"rows": table, "split": "train", "settings": settings}
    shard.write_shard(_plan.Piece("train-000000", f"{tmp_path}/train-000000.parquet", "f", inputs))
    read = list(webdataset.WebDataset(f"{tmp_path}/train-000000.tar", shardshuffle=False))
    assert [json.loads(sample["json"])["image_id"] for sample in read] == ODD
    assert [sample["txt"].decode() for sample in read] == [" ".join(i.split()) for i in ODD]


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGBA", "png"), ("P", "png"), ("P", "gif"), ("CMYK", "jpeg"), ("LA", "png"), ("RGB", "webp")],
)
def test_pictures_of_other_kinds_become_rgb_jpeg(tmp_path, mode, form):
    picture(tmp_path / f"a.{form}", mode)
    (row,) = from_files(tmp_path, [(f"a.{form}", "a")])
    data = _store.read_bytes(row["tar"], row["offset"], row["size"])
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (24, 16))
    assert row["member"].endswith(".jpg") and row["sha256"] == _store.sha256(data)


@pytest.mark.parametrize(("mode", "form"), [("RGB", "jpeg"), ("L", "jpeg"), ("RGB", "png")])
def test_pictures_that_every_trainer_reads_keep_their_bytes(tmp_path, mode, form):
    file = picture(tmp_path / f"a.{form}", mode)
    (row,) = from_files(tmp_path, [(file.name, "a")])
    assert _store.read_bytes(row["tar"], row["offset"], row["size"]) == file.read_bytes()
    assert row["member"] == {"jpeg": "a.jpg", "png": "a.png"}[form]


def test_captions_lose_needless_blanks_and_empty_ones_are_left_out(tmp_path):
    picture(tmp_path / "a.jpg")
    (row,) = from_files(tmp_path, [("a.jpg", "  "), ("a.jpg", " a\n dog\t"), ("a.jpg", "été")])
    assert row["captions"] == [
        {"caption_id": "a#1", "text": "a dog"},
        {"caption_id": "a#2", "text": "été"},
    ]
    (sample,) = webdataset.WebDataset(row["tar"], shardshuffle=False)
    assert sample["txt"] == b"a dog" and json.loads(sample["json"])["captions"] == row["captions"]


def test_features_are_kept_as_they_are_and_those_that_are_not_finite_are_rejected(tmp_path):
    features = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    features[2, 1, 1] = np.nan
    np.save(tmp_path / "train_ims.npy", features)
    (tmp_path / "train_caps.txt").write_text("".join(f"caption {n}\n" for n in range(8)))
    source = {"kind": "precomp", "path": str(tmp_path)}
    sharded(Recipe(name="t", source=source), tmp_path)
    rows = samples(tmp_path)
    assert Counter(row["reason"] for row in rows) == {None: 3, "features are not finite": 1}
    for row in rows:
        if row["reason"]:
            assert row["uri"].endswith("#2")
            continue
        data = _store.read_bytes(row["tar"], row["offset"], row["size"])
        number = int(row["uri"].rsplit("#", 1)[1])
        assert np.array_equal(np.load(io.BytesIO(data)), features[number])
        assert row["member"].endswith(".npy") and len(row["captions"]) == 2
