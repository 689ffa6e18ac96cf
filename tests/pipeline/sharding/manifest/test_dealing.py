"""A manifest in parts: the shards that all rows at once would have, whatever is killed meanwhile."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.sharding import ingest, shard
from pipeline.sharding.manifest import spans
from pipeline.storage import store
from schemas.settings import Recipe
from tests.helpers.datasets import files
from tests.helpers.stages import finish

PARTS = 5


def write(folder: Path, count: int = 60, name: str = "part", splits=("train",)) -> None:
    """Tables of so many images in all, with two captions each; none of the pictures is there."""
    rows = [
        (f"{name}{n}.jpg", f"caption {n} {k}", splits[n % len(splits)])
        for n in range(count)
        for k in range(2)
    ]
    each = -(-len(rows) // PARTS // 2) * 2
    for part in range(PARTS):
        with open(folder / f"{name}-{part}.csv", "w", newline="") as file:
            own = rows[part * each : (part + 1) * each]
            csv.writer(file).writerows([("image", "caption", "split"), *own])


def recipe_of(folder: Path, **sections) -> Recipe:
    source = {"kind": "csv", "path": f"{folder}/*.csv"} | sections.pop("source", {})
    shard_settings = {"samples": 4, "failure_budget": 1.0} | sections.pop("shard", {})
    return Recipe(name="t", source=source, shard=shard_settings)


@pytest.fixture
def in_parts(monkeypatch) -> None:
    """From now on every collection is large."""
    monkeypatch.setattr(spans, "ROWS", 11)
    monkeypatch.setattr(spans, "BLOCK", 5)


def ingested(recipe: Recipe, root: Path) -> None:
    plan = ingest.plan(recipe, str(root))
    made = {piece.name: ingest.write_part(piece) for piece in plan.pending}
    ingest.check(plan, made, recipe.source)
    plan.finish(made)


def planned(recipe: Recipe, root: Path) -> list[tuple[str, str]]:
    """Names and fingerprints of the shards, which stand for all that is in them."""
    ingested(recipe, root)
    return [(piece.name, piece.fingerprint) for piece in shard.plan(recipe, str(root)).pieces]


CASES = {
    "train alone": {},
    "a holdout": {"source": {"holdout": 17}},
    "cuts": {"source": {"cut_val": 0.2, "cut_test": 0.3}},
    "a holdout and a cut": {"source": {"holdout": 25, "cut_test": 0.3}},
    "a shard larger than a bucket": {"shard": {"samples": 25}},
    "another seed": {"shard": {"seed": 3}},
}


@pytest.mark.parametrize("case", CASES)
def test_in_parts_rows_go_where_all_at_once_would_go(tmp_path, request, case):
    write(tmp_path)
    recipe = recipe_of(tmp_path, **CASES[case])
    whole = planned(recipe, tmp_path / "whole")
    request.getfixturevalue("in_parts")
    assert planned(recipe, tmp_path / "parts") == whole
    assert set(store.list_folders(f"{tmp_path}/parts/2-shards/rows")) == set()


def test_several_splits_and_a_list_of_exclusions_in_parts(tmp_path, request):
    write(tmp_path, splits=("train", "dev", "other", "train"))
    listed = ["kind,id,reason", "image,part7,why", "caption,part9#1,", "image,nobody,", "image,part6,"]
    (tmp_path / "exclude.txt").write_text("\n".join(listed))
    recipe = recipe_of(tmp_path, shard={"exclude": f"{tmp_path}/exclude.txt"})
    whole = planned(recipe, tmp_path / "whole")
    finish(shard.plan(recipe, f"{tmp_path}/whole"), shard.write_shard)
    request.getfixturevalue("in_parts")
    assert planned(recipe, tmp_path / "parts") == whole
    finish(shard.plan(recipe, f"{tmp_path}/parts"), shard.write_shard)
    assert files(tmp_path / "whole") == files_without_rows(tmp_path / "parts")


def files_without_rows(root: Path) -> dict[str, str]:
    folder = root / "2-shards"
    found = (file for file in sorted(folder.iterdir()) if file.is_file())
    return {file.name: store.sha256(file.read_bytes()) for file in found}
