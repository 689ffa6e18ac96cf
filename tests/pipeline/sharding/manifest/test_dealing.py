"""A manifest in parts: the shards that all rows at once would have."""

import csv
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.sharding import ingest, shard
from pipeline.sharding.manifest import spans
from pipeline.storage import parquet, store
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
    listed = [
        "kind,id,reason",
        "image,part7,why",
        "caption,part9#1,",
        "image,nobody,",
        "image,part6,",
    ]
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


def run_until(recipe: Recipe, root: Path, pieces: int) -> bool:
    """Deal out and shard until so many pieces are made; whether that was all."""
    for plan, make in shard.steps(recipe, str(root)):
        made = {}
        for piece in plan.pending:
            if not parquet.finished(piece.output, piece.fingerprint):
                if not pieces:
                    return False
                pieces -= 1
            made[piece.name] = make(piece)
        plan.finish(made)
    return True


def test_stopped_after_any_piece_it_goes_on_to_the_same_bytes(tmp_path, in_parts):
    write(tmp_path, 24)
    recipe = recipe_of(tmp_path, source={"cut_val": 0.3})
    ingested(recipe, tmp_path / "once")
    assert run_until(recipe, tmp_path / "once", 10**6)
    ingested(recipe, tmp_path / "often")
    times = 0
    while not run_until(recipe, tmp_path / "often", 3):
        times += 1
    assert times > 2
    assert files_without_rows(tmp_path / "often") == files_without_rows(tmp_path / "once")
    assert files(tmp_path / "often", "2-shards/rows") == files(tmp_path / "once", "2-shards/rows")


def test_a_shards_task_is_told_where_its_rows_are_and_holds_none_itself(tmp_path, in_parts):
    write(tmp_path)
    recipe = recipe_of(tmp_path)
    ingested(recipe, tmp_path)
    plan = shard.plan(recipe, str(tmp_path))
    assert {type(piece.inputs["rows"]).__name__ for piece in plan.pieces} == {"Stretch"}
    rows = [piece.inputs["rows"].read() for piece in plan.pieces]
    assert [len(table) for table in rows] == [4] * 15


def test_dealt_rows_that_were_lost_are_dealt_out_again(tmp_path, in_parts):
    write(tmp_path)
    recipe = recipe_of(tmp_path)
    ingested(recipe, tmp_path)
    finish(shard.plan(recipe, str(tmp_path)), shard.write_shard)
    before = files_without_rows(tmp_path), files(tmp_path, "2-shards/rows")
    store.remove(f"{tmp_path}/2-shards/rows/bucket-00001.runs")
    assert shard.finished(recipe, str(tmp_path)).complete  # nothing needs them
    store.remove(f"{tmp_path}/2-shards/train-000003.tar")
    finish(shard.plan(recipe, str(tmp_path)), shard.write_shard)
    assert (files_without_rows(tmp_path), files(tmp_path, "2-shards/rows")) == before


REFUSED = {
    "a holdout of all": ({"source": {"holdout": 60}}, "holdout 60 needs more"),
    "a cut of nothing": ({"source": {"cut_test": 1e-9}}, "of 60 train images is none"),
    "cuts of all": ({"source": {"cut_val": 0.5, "cut_test": 0.5}}, "leave nothing of train"),
    "a list of strangers": ({"shard": {"exclude": "{}/exclude.txt"}}, "1 of 1 listed ids are not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_all_at_once_refuses_is_refused_in_parts_in_the_same_words(tmp_path, request, case):
    write(tmp_path)
    (tmp_path / "exclude.txt").write_text("kind,id,reason\nimage,nobody,\n")
    sections, sentence = REFUSED[case]
    filled = {
        k: {n: v if n != "exclude" else v.format(tmp_path) for n, v in values.items()}
        for k, values in sections.items()
    }
    said = []
    for root in ("whole", "parts"):
        with pytest.raises(InputError, match=sentence) as error:
            planned(recipe_of(tmp_path, **filled), tmp_path / root)
        said.append(str(error.value).replace(root, "whole"))
        if root == "whole":
            request.getfixturevalue("in_parts")
    assert said[0] == said[1]
