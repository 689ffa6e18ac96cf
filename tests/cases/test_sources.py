"""Data sets as people have them: what is read of each, or the sentence that refuses it.

One table. A case is files, settings of the source, and what is right: captions by image id, images
by split, how many samples were set aside, or a part of the sentence.
"""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.sharding import ingest, shard
from schemas.settings import Recipe
from tests.helpers.datasets import picture, samples

ANY = object()  # captions that the case is not about
JSON, PARQUET = "json", "parquet"


def csv(text, **source):
    """A table beside p0.jpg to p3.jpg."""
    return {"t.csv": text}, {"kind": "csv", "path": "t.csv", **source}


def tsv(text, **source):
    return {"t.tsv": text}, {"kind": "csv", "path": "t.tsv", **source}


def parquet(columns, **source):
    return {"t.parquet": pa.table(columns)}, {"kind": "csv", "path": "t.parquet", **source}


def coco(images, captions, **source):
    """Files named as given, and (image, caption) by the images' numbers."""
    content = {
        "images": [{"id": k, "file_name": name} for k, name in enumerate(images)],
        "annotations": [
            {"id": k, "image_id": image, "caption": text}
            for k, (image, text) in enumerate(captions)
        ],
    }
    where = {"kind": "coco", "path": "captions_train.json", "images": "."}
    return {"captions_train.json": content}, where | source


def karpathy(images, **source):
    """(file, split, captions) of each image."""
    entries = [
        {"filename": f, "split": split, "sentences": [{"raw": text} for text in texts]}
        for f, split, texts in images
    ]
    where = {"kind": "karpathy", "path": "d.json", "images": "."}
    return {"d.json": {"images": entries}}, where | source


def folder(files, **source):
    return files, {"kind": "folder", "path": ".", **source}


READ = {  # what is given, and captions by image id
    # ---- captions that are what was written
    "a list as pandas prints it": (
        csv("image,caption\np0.jpg,\"['A boat.', \"\"The ship's deck.\"\", 'Water, boat']\"\n"),
        {"p0": ["A boat.", "The ship's deck.", "Water, boat"]},
    ),
    "a list as numpy prints it": (
        csv("image,caption\np0.jpg,\"['A boat.'\n 'Water, a boat, blue']\"\n"),
        {"p0": ["A boat.", "Water, a boat, blue"]},
    ),
    "an indented JSON list": (
        csv('image,caption\np0.jpg,"[\n ""A boat."",\n ""Water, boat""\n]"\n'),
        {"p0": ["A boat.", "Water, boat"]},
    ),
    "a JSON list with null": (
        csv('image,caption\np0.jpg,"[""A boat."", null]"\n'), {"p0": ["A boat."]}),
    "a caption in brackets": (csv("image,caption\np0.jpg,[sic] boat\n"), {"p0": ["[sic] boat"]}),
    "tabs and bare quotes": (
        tsv('image\tcaption\np0.jpg\t"A cake\np1.jpg\ta shelf of 12"\np2.jpg\t"hi" he said\n'),
        {"p0": ['"A cake'], "p1": ['a shelf of 12"'], "p2": ['"hi" he said']},
    ),
    "bytes in Parquet": (
        parquet({"image": ["p0.jpg"], "caption": pa.array(["A café".encode()])}),
        {"p0": ["A café"]},
    ),
    "ids of bytes": (
        parquet({"image": ["p0.jpg"], "caption": ["a"], "id": [b"n0"]}, id_column="id"),
        {"n0": ["a"]},
    ),
    "ids that a table made floats": (
        csv("image,caption,id\np0.jpg,a,391895.0\np1.jpg,b,\n", id_column="id"),
        {"391895": ["a"], "p1": ["b"]},
    ),
    "ids that are floats": (
        parquet({"image": ["p0.jpg"], "caption": ["a"], "id": [391895.0]}, id_column="id"),
        {"391895": ["a"]},
    ),
    "a null among captions of Parquet": (
        parquet({"image": ["p0.jpg"], "caption": [["a", None, "b"]]}), {"p0": ["a", "b"]}),
    # ---- tables in other dialects
    "semicolons": (csv("image;caption\np0.jpg;Straße, grün\n"), {"p0": ["Straße, grün"]}),
    "bars with blanks": (csv("image_name| n| comment\np0.jpg| 0| a\n"), {"p0": ["a"]}),
    "tabs in a .csv": (csv("filepath\ttitle\np0.jpg\ta, b\n"), {"p0": ["a, b"]}),
    "ends of lines of an old Mac": (csv("image,caption\rp0.jpg,a\rp1.jpg,b\r"), ANY),
    "UTF-16": (csv("image,caption\np0.jpg,grün\n".encode("utf-16")), {"p0": ["grün"]}),
    "a byte order mark": (csv("\ufeffimage,caption\np0.jpg,a\n"), {"p0": ["a"]}),
    "slashes before quotes": (
        csv('image,caption\np0.jpg,"a sign, \\"stop\\", red"\np1.jpg,b\n'),
        {"p0": ['a sign, "stop", red'], "p1": ["b"]},
    ),
    "a table that is called .txt": (
        ({"c.txt": "image,caption\np0.jpg,a\n"}, {"kind": "csv", "path": "c.txt"}), {"p0": ["a"]}),
    "no header": (tsv("a\tp0.jpg\n", columns=["caption", "image"]), {"p0": ["a"]}),
    "JSON lines": (
        (
            {"t.jsonl": '{"image": "p0.jpg", "caption": ["a", "b\u2028c"]}\n'},
            {"kind": "csv", "path": "t.jsonl"},
        ),
        {"p0": ["a", "b c"]},
    ),
    "a JSON list of records": (
        ({"t.json": [{"image": "p0.jpg", "text": "a"}]}, {"kind": "csv", "path": "t.json"}),
        {"p0": ["a"]},
    ),
    "columns in other letters": (csv("Image,Caption\np0.jpg,a\n"), {"p0": ["a"]}),
    # ---- names of files
    "blanks behind a path": (csv("image,caption\np0.jpg ,a\n"), {"p0": ["a"]}),
    "blanks before a path": (csv("image,caption\n p1.jpg,b\n"), {"p1": ["b"]}),
    "one file in two ways": (csv("image,caption\n./p0.jpg,a\np0.jpg,b\n"), {"p0": ["a", "b"]}),
    "separators of Windows": (csv("image,caption\nin\\p4.jpg,a\n"), {"in/p4": ["a"]}),
    "another Unicode form": (csv("image,caption\ncafe\u0301.jpg,a\n"), {"café": ["a"]}),
    "COCO names with folders": (coco(["in/p4.jpg"], [(0, "a")]), {"in/p4": ["a"]}),
    "COCO names of Windows": (coco(["in\\p4.jpg"], [(0, "a")]), {"in/p4": ["a"]}),
    # ---- folders
    "captions in capitals": (folder({"A.TXT": "a", "A.JPG": Image}), {"A": ["a"]}),
    "captions behind the ending": (folder({"q.jpg.txt": "a", "q.jpg": Image}), {"q": ["a"]}),
    "captions of another ending": (
        folder({"q.caption": "a", "q.jpg": Image}, caption_ending=".caption"), {"q": ["a"]}),
    "a Mac's hidden files": (
        folder({"._q.jpg": "x", "._q.txt": "x", "q.txt": "a", "q.jpg": Image}), {"q": ["a"]}),
    "odd endings": (
        folder({f"x.{e}": Image for e in ("jfif", "jpe")} | {"x.jfif.txt": "a", "x.jpe.txt": "b"}),
        {"x.jfif": ["a"], "x.jpe": ["b"]},
    ),
    # ---- odd folders
    **{
        f"a folder called {name}": (
            ({f"{name}/t.csv": "image,caption\np.jpg,a\n", f"{name}/p.jpg": Image},
             {"kind": "csv", "path": f"{name}/{pattern}"}),
            {"p": ["a"]},
        )
        for name, pattern in (("a::b", "t.csv"), ("what?", "*.csv"), ("50% off {x}", "*.csv"),
                              ("data [v2]", "*.csv"), ("a#1", "t.csv"))
    },
}  # fmt: skip

SPLITS = {  # what is given, and images by split
    "a split column in other letters": (
        csv("image,caption,Split\np0.jpg,a,train\np1.jpg,b,Test\n"), {"train": 1, "test": 1}),
    "the field's other words": (
        csv("image,caption,split\np0.jpg,a,restval\np1.jpg,b,validation\np2.jpg,c,TRAIN\n"),
        {"train": 2, "val": 1},
    ),
    "restval is dropped": (
        karpathy(
            [("p0.jpg", "train", "a"), ("p1.jpg", "restval", "b")], splits={"restval": "drop"}),
        {"train": 1},
    ),
    "tables in folders": (
        (
            {f"{s}/t.csv": f"image,caption\n{s}.jpg,a\n" for s in ("train2017", "val2017")}
            | {f"{s}/{s}.jpg": Image for s in ("train2017", "val2017")},
            {"kind": "csv", "path": "*/t.csv"},
        ),
        {"train": 1, "val": 1},
    ),
    "Parquet in folders of splits": (
        (
            {f"default/{s}/0000.parquet": pa.table({"image": [b"no image"], "caption": ["a"]})
             for s in ("train", "test")},
            {"kind": "csv", "path": "default/*/0000.parquet"},
        ),
        {"train": 1, "test": 1},
    ),
    "folders of images": (
        folder({f"{s}/1.{e}": Image if e == "jpg" else "a" for s in ("training", "dev", "test set")
                for e in ("jpg", "txt")}),
        {"train": 1, "val": 1, "test": 1},
    ),
}  # fmt: skip

ASIDE = {  # what is given, captions by id, images set aside, captions set aside
    "a null caption of COCO": (
        coco(["p0.jpg", "p1.jpg"], [(0, "a"), (1, None), (1, "b")]),
        {"p0": ["a"], "p1": ["b"]}, 0, 1),
    "half a character": (
        coco(["p0.jpg", "p1.jpg"], [(0, "a"), (1, "x \ud83d")]), {"p0": ["a"]}, 1, 1),
    "an empty list": (csv("image,caption\np0.jpg,[]\np1.jpg,a\n"), {"p1": ["a"]}, 1, 0),
    "NaN": (
        parquet({"image": ["p0.jpg", "p1.jpg"], "caption": pa.array([float("nan"), 1.0])}),
        {}, 2, 1),
    "a row that ends early": (
        csv("image,n,caption\np0.jpg,0,a\np0.jpg,1\n"), {"p0": ["a"]}, 0, 1),
    "a row without a path": (csv("image,caption\np0.jpg,a\n,b\n"), {"p0": ["a"]}, 1, 0),
    "a list that is cut off": (
        csv("image,caption\np0.jpg,\"['a dog', 'a c\"\np1.jpg,b\n"), {"p1": ["b"]}, 1, 1),
    "a file of another case": (csv("image,caption\nP0.JPG,a\np1.jpg,b\n"), {"p1": ["b"]}, 1, 0),
    "a path of Windows' drives": (
        csv("image,caption\nC:\\data\\p0.jpg,a\np1.jpg,b\n"), {"p1": ["b"]}, 1, 0),
    "a sentence that is null": (
        karpathy([("p0.jpg", "train", ["a", None])]), {"p0": ["a"]}, 0, 1),
}  # fmt: skip

REFUSED = {  # what is given, and what the sentence says
    "a bare comma": (
        csv("image,caption\np0.jpg,A red, blue flag\n"), "line 2 has 3 cells, the header has 2"),
    "a split column that is not there": (
        csv("image,caption,Split\np0.jpg,a,test\n", split_column="spilt"),
        "no column 'spilt' (source.split_column); did you mean 'Split'?",
    ),
    "a split renamed that is not there": (
        csv("image,caption,split\np0.jpg,a,test\n", splits={"tset": "val"}),
        "source.splits names 'tset', and no image is in such a split; did you mean 'test'?",
    ),
    "some rows say a split": (
        csv("image,caption,split\np0.jpg,a,test\np1.jpg,b,\n"),
        "says no split for 1 of its images, for others it does",
    ),
    "some tables say a split": (
        (
            {"train.csv": "image,caption\np0.jpg,a\n", "more.csv": "image,caption\np1.jpg,a\n"},
            {"kind": "csv", "path": "*.csv"},
        ),
        "more.csv says no split for 1 of its images",
    ),
    "some folders say a split": (
        folder({"train/1.jpg": Image, "loose.jpg": Image}), "says no split for 5 of its images"),
    "a number for a split": (
        csv("image,caption,split\np0.jpg,a,0\n"), "found a split called '0'"),
    "a column twice": (
        csv("image,caption,caption\np0.jpg,a,b\n"), "has two columns 'caption'"),
    "captions in five columns": (
        csv("image,caption_0,caption_1\np0.jpg,a,b\n"), "has no column of the caption"),
    "one image in two tables": (
        (
            {"a.csv": "image,caption\np0.jpg,a\n", "b.csv": "image,caption\np0.jpg,a\n"},
            {"kind": "csv", "path": "*.csv"},
        ),
        "the first is 'p0', in ",
    ),
    "no header": (tsv("a\tp0.jpg\n"), "source.columns where the table has no header"),
    "an open brace": (
        ({}, {"kind": "csv", "path": "{00000..00010.csv"}), "no pattern"),
    "a link that leads back": (
        folder({"in/back": ".."}), "is a link back to"),
    "captions of no image": (
        coco(["p0.jpg"], [(7, "a")]), "is a caption of one of its images"),
}  # fmt: skip


def written(where, files: dict, source: dict) -> Recipe:
    """The recipe of a case whose files lie in a folder, beside six pictures."""
    for name in ("p0.jpg", "p1.jpg", "p2.jpg", "p3.jpg", "in/p4.jpg", "café.jpg"):
        (where / name).parent.mkdir(exist_ok=True)
        if source["kind"] != "folder" or name.startswith("p"):
            picture(where / name)
    for name, content in files.items():
        path = where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is Image:
            picture(path, form="JPEG")
        elif content == "..":
            path.symlink_to(where)
        elif isinstance(content, pa.Table):
            pq.write_table(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
    absolute = {k: os.path.join(where, v) for k, v in source.items() if k in ("path", "images")}
    return Recipe(name="t", source=source | absolute, shard={"failure_budget": 1})


def ingested(recipe: Recipe, root) -> tuple:
    plan = ingest.plan(recipe, str(root))
    made = {piece.name: ingest.write_part(piece) for piece in plan.pending}
    ingest.check(plan, made, recipe.source)
    plan.finish(made)
    return plan, ingest.totals(plan.folder)


def sharded(recipe: Recipe, root) -> list[dict]:
    """The sidecars' rows of a case's own images, not of those that lie beside."""
    ingested(recipe, root)
    plan = shard.plan(recipe, str(root))
    plan.finish({piece.name: shard.write_shard(piece) for piece in plan.pending})
    rows = samples(root)
    beside = recipe.source.kind == "folder"
    return [row for row in rows if not (beside and row["image_id"][:2] in ("p0", "p1", "p2", "p3"))]


def captions(rows) -> dict[str, list[str]]:
    return {
        row["image_id"]: [caption["text"] for caption in row["captions"]]
        for row in rows
        if row["reason"] is None
    }


@pytest.mark.parametrize("name", READ)
def test_it_is_read_as_it_was_meant(name, tmp_path):
    (files, source), right = READ[name]
    rows = sharded(written(tmp_path, files, source), tmp_path / "run")
    assert [row["reason"] for row in rows] == [None] * len(rows)
    assert right is ANY or captions(rows) == right


@pytest.mark.parametrize("name", SPLITS)
def test_its_splits_are_those_it_says(name, tmp_path):
    (files, source), right = SPLITS[name]
    recipe = written(tmp_path, files, source)
    if source["kind"] == "folder":  # the pictures beside say no split
        for beside in ("p0", "p1", "p2", "p3"):
            (tmp_path / f"{beside}.jpg").unlink()
    assert ingested(recipe, tmp_path / "run")[1] == right


@pytest.mark.parametrize("name", ASIDE)
def test_one_bad_row_is_one_bad_row(name, tmp_path):
    (files, source), right, aside, texts_aside = ASIDE[name]
    rows = sharded(written(tmp_path, files, source), tmp_path / "run")
    assert captions(rows) == right
    assert sum(row["reason"] is not None for row in rows) == aside
    assert sum(len(row["captions_rejected"]) for row in rows) == texts_aside
    reasons = [row["reason"] for row in rows if row["reason"]]
    reasons += [c["reason"] for row in rows for c in row["captions_rejected"]]
    assert all(": " in reason for reason in reasons), "a kind, and the place"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_in_a_sentence(name, tmp_path):
    (files, source), sentence = REFUSED[name]
    with pytest.raises(InputError) as error:
        ingested(written(tmp_path, files, source), tmp_path / "run")
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_told_with_what_there_is(tmp_path):
    files, source = csv("image,caption\nP0.JPG,a\nC:\\x\\p1.jpg,b\n")
    rows = sharded(written(tmp_path, files, source), tmp_path / "run")
    assert [row["reason"].partition(" (")[2] for row in rows] == [
        "there is p0.jpg)",
        "a path of Windows: write paths relative to source.images)",
    ]


def test_pictures_with_long_texts_and_profiles_are_read(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text("notes", "x" * (3 << 20), zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=about, icc_profile=b"y" * (2 << 20))
    recipe = written(tmp_path, *csv("image,caption\na.png,a\n"))
    assert captions(sharded(recipe, tmp_path / "run")) == {"a": ["a"]}
