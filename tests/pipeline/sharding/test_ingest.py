"""Ingest: what a manifest holds, its splits, and the data sets that are refused."""

import json
import os

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import InputError
from pipeline.sharding import ingest
from pipeline.sharding.manifest import contents, layout, unique
from pipeline.sharding.manifest.spans import Manifest
from pipeline.sharding.manifest.truth import facts_of
from pipeline.storage import parquet
from schemas.settings import Recipe
from tests.helpers.datasets import FIVE, drawn, files, table_of, with_source
from tests.helpers.stages import ingested


def images_of(recipe: Recipe, root) -> dict[str, list[str]]:
    """Image ids by split as the shards will have them."""
    manifest = ingest.read(f"{ingested(recipe, root)}/1-manifest")
    order = layout.splits(manifest, recipe.source)
    return {split: manifest["image_id"].take(rows).to_pylist() for split, rows in order.items()}


def test_an_image_id_that_is_there_twice_is_refused(tmp_path):
    table_of(tmp_path, FIVE, "1.csv")
    recipe = with_source(table_of(tmp_path, FIVE[2:3], "2.csv"), path=str(tmp_path / "*.csv"))
    plan = ingest.plan(recipe, str(tmp_path))
    made = {piece.name: ingest.write_part(piece) for piece in plan.pieces}
    said = "1 image ids appear more than once, the first is 'c', in .*1.csv and in .*2.csv"
    with pytest.raises(InputError, match=said):
        ingest.check(plan, made, recipe.source)


def test_the_images_of_every_split_are_counted(tmp_path):
    root = ingested(drawn(), tmp_path)
    assert ingest.totals(f"{root}/1-manifest") == {"train": 20, "val": 5, "test": 7}


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


MANY = [(f"{n}.jpg", f"caption {n}", "") for n in range(200)]


def test_what_is_cut_off_train_stays_where_it_is_when_others_come(tmp_path):
    cut = {"cut_val": 0.1, "cut_test": 0.2}
    few = images_of(with_source(table_of(tmp_path, MANY[:150]), **cut), tmp_path / "r")
    every = [image_id for ids in few.values() for image_id in ids]
    assert sorted(every) == sorted(str(n) for n in range(150))
    assert 5 < len(few["val"]) < 26 and 18 < len(few["test"]) < 45
    more = images_of(with_source(table_of(tmp_path, MANY[::-1]), **cut), tmp_path / "s")
    assert all(set(ids) <= set(more[split]) for split, ids in few.items())
    other = images_of(with_source(table_of(tmp_path, MANY), **cut, cut_seed=1), tmp_path / "t")
    assert set(other["test"]) != set(more["test"])


@pytest.mark.parametrize(
    ("rows", "cut", "sentence"),
    [
        ([*FIVE, ("f.jpg", "f", "val")], {"cut_val": 0.5}, "makes a val split, and there is one"),
        (FIVE, {"cut_val": 0.5, "cut_test": 0.5}, "leave nothing of train"),
        (FIVE, {"cut_test": 1e-6}, "of 5 train images is none"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(tmp_path, rows, cut, sentence):
    with pytest.raises(InputError, match=sentence):
        images_of(with_source(table_of(tmp_path, rows), **cut), tmp_path / "r")


def test_splits_are_renamed_and_dropped(tmp_path):
    rows = [("a.jpg", "a", "train"), ("b.jpg", "b", "restval"), ("c.jpg", "c", "dev")]
    recipe = table_of(tmp_path, [*rows, ("d.jpg", "d", "other")])
    recipe = with_source(recipe, splits={"restval": "train", "dev": "val", "other": "drop"})
    assert images_of(recipe, tmp_path / "r") == {"train": ["a", "b"], "val": ["c"]}


def test_a_dropped_split_takes_its_truth_with_it(tmp_path):
    root = ingested(drawn(source={"splits": {"val": "drop"}}), tmp_path)
    kept = set(ingest.read(f"{root}/1-manifest")["image_id"].to_pylist())
    assert {name.split("#")[0] for name in facts_of(f"{root}/1-manifest")} == kept


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


# ---- data sets that are refused ----------------------------------------------------------------


def ingest_all(recipe: Recipe, root) -> None:
    plan = ingest.plan(recipe, str(root))
    made = {piece.name: ingest.write_part(piece) for piece in plan.pieces}
    ingest.check(plan, made, recipe.source)
    plan.finish(made)


def karpathy(folder, *images) -> Recipe:
    (folder / "data.json").write_text(json.dumps({"images": images}))
    source = {"kind": "karpathy", "path": f"{folder}/data.json", "images": str(folder)}
    return Recipe(name="t", source=source)


def said(text="a dog", id_=0, name="a.jpg", split="train") -> dict:
    return {"filename": name, "split": split, "sentences": [{"raw": text, "sentid": id_}]}


REFUSED = {  # a recipe, and what the sentence says
    "no image": (lambda folder: karpathy(folder), "holds no image"),
    "an image twice": (
        lambda folder: karpathy(folder, said(id_=1), said(id_=2)),
        "1 image ids appear more than once, the first is",
    ),
    "a caption twice": (
        lambda folder: karpathy(folder, said(name="a.jpg"), said(name="b.jpg")),
        "1 caption ids appear more than once",
    ),
    "a split with a slash": (
        lambda folder: karpathy(folder, said(split="../up")),
        "found a split called '../up'.*say what it is by source.splits",
    ),
    "a number for a split": (lambda folder: karpathy(folder, said(split=0)), "split called '0'"),
    "no row that can be used": (
        lambda folder: karpathy(folder, said(name=None)),
        "none of 1 images can be used, the first: no file name",
    ),
    "a name that is not UTF-8": (
        lambda folder: karpathy(folder, said(name=os.fsdecode(b"caf\xe9.jpg"))),
        "a byte that is not UTF-8",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_data_set_that_cannot_be_meant_is_refused_in_a_sentence(tmp_path, name):
    make, sentence = REFUSED[name]
    with pytest.raises(InputError, match=sentence) as error:
        ingest_all(make(tmp_path), tmp_path / "run")
    assert "\n" not in str(error.value)


# ---- large manifests ---------------------------------------------------------------------------


def table(rows: int, **changes) -> pa.Table:
    captions = [{"caption_id": "é", "text": "a"}, {"caption_id": None, "text": "🐕"}]
    row = {"uri": "u", "split": "train", "captions": captions, "source": "csv", "width": 7}
    rows = [{"image_id": f"{n}"} | row | (changes if n == 3 else {}) for n in range(rows)]
    return pa.Table.from_pylist(rows, ingest.MANIFEST)


def large(rows: pa.Table) -> pa.Table:
    return rows.cast(parquet.large(rows.schema))


def test_a_digest_depends_on_what_rows_hold_and_not_on_how_they_lie_in_memory():
    whole = large(table(9))
    apart = pa.concat_tables([whole.slice(0, 2), whole.slice(2, 4), whole.slice(6)])
    padded = pa.concat_tables([whole.slice(5), whole, whole]).slice(4, 9)
    taken = whole.take(list(range(9)))
    digests = {contents.digest(rows) for rows in (whole, apart, padded, taken)}
    assert len(digests) == 1
    assert contents.digest(whole.slice(1)) not in digests


@pytest.mark.parametrize(
    "change",
    [
        *[{"image_id": "x"}, {"uri": "v"}, {"split": "val"}, {"width": 8}, {"width": None}],
        *[{"sha256": ""}, {"source": "x"}, {"height": 0}, {"captions": []}],
        {"captions": [{"caption_id": "é", "text": "a"}]},
        {"captions": [{"caption_id": "é", "text": "a"}, {"caption_id": "", "text": "🐕"}]},
        {"captions": [{"caption_id": "éa", "text": ""}, {"caption_id": None, "text": "🐕"}]},
        {"captions": [{"caption_id": "é", "text": "a🐕"}, {"caption_id": None, "text": ""}]},
    ],
    ids=str,
)
def test_every_change_of_a_row_changes_the_digest(change):
    assert contents.digest(large(table(5))) != contents.digest(large(table(5, **change)))


def test_a_part_is_written_in_blocks_and_none_is_lost(tmp_path, monkeypatch):
    ingested(drawn(), tmp_path / "whole")
    monkeypatch.setattr(ingest, "BLOCK", 7)
    ingested(drawn(), tmp_path / "blocks")
    for stage in ("whole", "blocks"):
        rows = ingest.read(f"{tmp_path}/{stage}/1-manifest")
        assert rows.num_rows == 32
    one, other = (ingest.read(f"{tmp_path}/{stage}/1-manifest") for stage in ("whole", "blocks"))
    assert one.equals(other)
    assert facts_of(f"{tmp_path}/whole/1-manifest") == facts_of(f"{tmp_path}/blocks/1-manifest")


def test_an_empty_image_id_is_refused():
    rows = large(table(5, image_id=""))
    with pytest.raises(InputError, match="1 images have an empty id"):
        unique.check_rows(rows, np.arange(5), Manifest("", ()))
