"""Ids that are there twice, found by buckets of them as among all."""

import pyarrow as pa
import pytest

from pipeline.errors import InputError
from pipeline.sharding import ingest, shard
from pipeline.sharding.manifest import spans
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece, Plan
from schemas.manifest import MANIFEST
from schemas.settings import Recipe, SourceSettings


def row(image: str, *captions: str, uri: str = "", kind: str = "csv") -> dict:
    said = [{"caption_id": id_, "text": f"text of {id_}", "problem": None} for id_ in captions]
    return {
        "image_id": image,
        "uri": uri or image,
        "split": "train",
        "captions": said,
        "source": kind,
    }


def manifest(root, parts: list[list[dict]], kind: str = "csv") -> tuple[Plan, dict, SourceSettings]:
    """The parts as `ingest` would have written them, and what its check is asked."""
    folder, pieces, made = f"{root}/1-manifest", [], {}
    for number, rows in enumerate(parts):
        name = f"part-{number:05d}"
        piece = Piece(name, f"{folder}/{name}.parquet", "f", {})
        said = {"images": {}, "origins": {"rows": len(rows)}, "renamed": []}
        summary = {
            "part": f"file {number}",
            "splits": {"train": len(rows)},
            "said": said,
            "passed": {},
        }
        table = pa.Table.from_pylist(rows, MANIFEST)
        made[name] = parquet.write_table(piece.output, table, "f", summary)
        pieces.append(piece)
    settings = SourceSettings(kind=kind)
    return Plan.of("ingest", folder, pieces, {"kind": kind}), made, settings


PARTS = [
    [row("a", "a#0"), row("b", "b#0", "b#1"), row("c", "c#0")],
    [row("d", "d#0"), row("e", "e#0"), row("f", "f#0")],
    [row("g", "g#0"), row("h", "h#0")],
]


@pytest.fixture(params=["whole", "parts"])
def way(request, monkeypatch) -> str:
    if request.param == "parts":
        monkeypatch.setattr(spans, "ROWS", 3)
        monkeypatch.setattr(spans, "BLOCK", 2)
    return request.param


REFUSED = {
    "in two files": (
        row("b", "x"),
        "1 image ids .* the first is 'b', in file 0 and in file 2; give",
    ),
    "in one file": (row("g", "x"), "the first is 'g', twice in file 2; give every image one row"),
    "a caption": (row("x", "b#1"), "1 caption ids .* the first is 'b#1', in file 0 and in file 2"),
    "a caption twice": (
        row("x", "y", "y"),
        "the first is 'y', twice in file 2; give every caption",
    ),
    "no id": (row("", "x"), "1 images have an empty id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_id_that_is_there_twice_is_named_with_both_its_places(tmp_path, way, case):
    more, sentence = REFUSED[case]
    plan, made, settings = manifest(tmp_path, [*PARTS[:2], [*PARTS[2], more]])
    with pytest.raises(InputError, match=sentence):
        ingest.check(plan, made, settings)


def test_of_several_the_first_in_the_manifest_is_named(tmp_path, way):
    again = [row(name, f"x{name}") for name in "hgfedcb"]
    plan, made, settings = manifest(tmp_path, [*PARTS, again])
    with pytest.raises(InputError, match="7 image ids .*'b', in file 0 and in file 3"):
        ingest.check(plan, made, settings)


def test_ids_that_are_all_there_once_leave_nothing_behind(tmp_path, way):
    plan, made, settings = manifest(tmp_path, PARTS)
    ingest.check(plan, made, settings)
    assert store.list_folders(plan.folder) == []


def test_rows_of_one_image_become_one_where_the_first_stands(tmp_path, way):
    """As in tars where every caption is a sample of its own."""
    rows = [
        row(f"i{n % 5}", f"c{n}", uri=f"/data/{n // 4}.tar#{512 * n}+100", kind="webdataset")
        for n in range(12)
    ]
    plan, made, settings = manifest(tmp_path, [rows[:4], rows[4:8], rows[8:]], "webdataset")
    ingest.check(plan, made, settings)
    plan.finish(made)
    assert ingest.totals(plan.folder) == {"train": 5}
    recipe = Recipe(name="t", source={"kind": "webdataset"}, shard={"samples": 2})
    pieces = shard.plan(recipe, str(tmp_path)).pieces
    found = [(piece.name, piece.fingerprint) for piece in pieces]
    assert found == EXPECTED.setdefault("rows", found) and len(found) == 3


EXPECTED: dict[str, list] = {}
