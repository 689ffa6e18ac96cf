"""Any small data set, in every format, as other programs save it: the same rows, or a sentence.

`HALFTONE_EXAMPLES=10000` for a long run.
"""

import contextlib
import csv
import io
import json
import re
import tarfile
import tempfile
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sharding import loading
from pipeline.sharding.images import Rejected
from pipeline.sources import precomp as arrays
from pipeline.sources import splits as rule
from pipeline.sources.readers import parquet as tables
from pipeline.sources.readers import samples as tar_samples
from schemas.settings import SourceSettings
from tests.helpers.fuzz import damaged, fuzzed, resaved

WORDS = {  # of a split, as people write it
    "train": ("train", "Train", "training", "TRAIN"),
    "val": ("val", "validation", "dev", "Valid"),
    "test": ("test", "TEST", "testing"),
}
LETTERS = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"])
TEXTS = st.lists(st.text(LETTERS, min_size=1, max_size=8), min_size=1, max_size=4).map(" ".join)
# What no format may take for something else than a caption.
ODD = st.sampled_from(
    [
        *("[sic] a dog", '12" wide', "a, b; c", "say \"hi\"", "nan", "None", "it's", "1.0", "a\\b"),
        *("['not', a list", "(brackets)", "#0 first", "A 狗 dog", "a | b", "{x}", "café", "null"),
    ]
)  # fmt: skip
# A strategy that is made anew for every example is looked through anew, too.
CAPTIONS = st.one_of(TEXTS, ODD)
NAMES = st.text("abcdefgh012_é", min_size=1, max_size=6).filter(lambda n: n[0] != "_")
COUNTS, TIMES, SPLITS = st.integers(1, 4), st.integers(1, 3), st.sampled_from(list(WORDS))


class Image(NamedTuple):
    """What is right of an image."""

    name: str
    split: str
    captions: tuple[str, ...]
    data: bytes


@st.composite
def collections(draw) -> list[Image]:
    count = draw(COUNTS)
    names = draw(
        st.lists(
            NAMES,
            min_size=count,
            max_size=count,
            unique_by=lambda n: unicodedata.normalize("NFC", n).casefold(),
        )
    )
    several = draw(TIMES)
    return [
        Image(
            name,
            draw(SPLITS),
            tuple(draw(CAPTIONS) for _ in range(several)),
            f"image {name}".encode(),
        )
        for name in names
    ]


def plain(text: str) -> str:
    return " ".join(text.split())


# ---- writers: files of a collection, and the settings of their source ----------------------------


def pictures(folder: Path, images) -> None:
    for image in images:
        (folder / f"{image.name}.jpg").write_bytes(image.data)


def said(draw, image: Image) -> str:
    return draw(st.sampled_from(WORDS[image.split]))


def text_table(draw, folder, images):
    """A table of text: a row an image with a list, or a row a caption."""
    pictures(folder, images)
    how = draw(st.sampled_from(["minimal", "all", "slashes"]))
    kinds = {
        "minimal": {},
        "all": {"quoting": csv.QUOTE_ALL},
        "slashes": {"quoting": csv.QUOTE_ALL, "doublequote": False, "escapechar": "\\"},
    }
    printed = draw(st.sampled_from([json.dumps, repr, lambda texts: json.dumps(texts, indent=1)]))
    rows = []
    for image in images:
        split, path = said(draw, image), draw(st.sampled_from(["", "./"])) + f"{image.name}.jpg"
        if draw(st.booleans()):
            rows.append([path, printed(list(image.captions)), split])
        else:
            rows += [[path, text, split] for text in image.captions]
    out = io.StringIO()
    sign = draw(st.sampled_from([",", "\t", ";", "|"]))
    writer = csv.writer(out, delimiter=sign, lineterminator="\n", **kinds[how])
    writer.writerows([("image", "caption", "split"), *rows])
    runs = {len(run) % 2 for run in re.findall(r"\\+", out.getvalue())}
    assume(runs != {0})  # nobody could know whether two slashes are one, so it is refused
    name = draw(st.sampled_from(["t.csv", "t.tsv", "t.txt"]))
    (folder / name).write_bytes(draw(resaved(out.getvalue())))
    return {"kind": "csv", "path": str(folder / name)}


def json_lines(draw, folder, images):
    pictures(folder, images)
    lines = [
        json.dumps(
            {"image": f"{i.name}.jpg", "caption": list(i.captions), "split": said(draw, i)},
            ensure_ascii=draw(st.booleans()),
        )
        for i in images
    ]
    (folder / "t.jsonl").write_bytes(draw(resaved("\n".join(lines) + "\n")))
    return {"kind": "csv", "path": str(folder / "t.jsonl")}


def parquet(draw, folder, images):
    """Paths, bytes or records of bytes; captions as lists, texts or bytes."""
    cells: list = [i.data for i in images]
    if kind := draw(st.sampled_from(["paths", "bytes", "records"])):
        if kind == "paths":
            pictures(folder, images)
            cells = [f"{i.name}.jpg" for i in images]
        elif kind == "records":
            cells = [{"bytes": i.data, "path": None} for i in images]
    texts: list = [list(i.captions) for i in images]
    if draw(st.booleans()):
        texts = [[text.encode() for text in own] for own in texts]
    columns = {"image": cells, "caption": texts, "split": [said(draw, i) for i in images]}
    columns["id"] = [i.name for i in images]
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=2)
    return {"kind": "csv", "path": str(folder / "t.parquet"), "id_column": "id"}


def coco(draw, folder, images):
    pictures(folder, images)
    split = images[0].split
    content = {
        "images": [{"id": k, "file_name": f"{i.name}.jpg"} for k, i in enumerate(images)],
        "annotations": [
            {"id": 10 * k + n, "image_id": k, "caption": text}
            for k, i in enumerate(images)
            for n, text in enumerate(i.captions)
        ],
    }
    name = f"captions_{draw(st.sampled_from(['train', 'val', 'test']))}2017.json"
    split = name[9:-9]
    text = json.dumps(content, ensure_ascii=draw(st.booleans()))
    (folder / name).write_bytes(draw(resaved(text)))
    images[:] = [i._replace(split=split) for i in images]
    return {"kind": "coco", "path": str(folder / name), "images": str(folder)}


def karpathy(draw, folder, images):
    pictures(folder, images)
    entries = [
        {
            "filename": f"{i.name}.jpg",
            "split": said(draw, i),
            "sentences": [{"raw": text} for text in i.captions],
        }
        for i in images
    ]
    text = json.dumps({"images": entries}, ensure_ascii=draw(st.booleans()))
    (folder / "d.json").write_bytes(draw(resaved(text)))
    return {"kind": "karpathy", "path": str(folder / "d.json"), "images": str(folder)}


def flickr_tokens(draw, folder, images):
    pictures(folder, images)
    lines = [f"{i.name}.jpg#{k}\t{text}" for i in images for k, text in enumerate(i.captions)]
    (folder / "f.token.txt").write_bytes(draw(resaved("\n".join(lines) + "\n")))
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        own = [f"{i.name}.jpg" for i in images if i.split == split]
        (folder / f"Flickr_8k.{name}Images.txt").write_bytes(draw(resaved("\n".join(own) + "\n")))
    return {"kind": "flickr_tokens", "path": str(folder / "f.token.txt"), "images": str(folder)}


def tree(draw, folder, images):
    """A folder a split, a text beside each image."""
    ending = draw(st.sampled_from([".txt", ".TXT"]))
    for image in images:
        own = folder / "data" / said(draw, image).lower()
        own.mkdir(parents=True, exist_ok=True)
        (own / f"{image.name}.jpg").write_bytes(image.data)
        stem = image.name + draw(st.sampled_from(["", ".jpg"]))
        (own / f"{stem}{ending}").write_bytes(draw(resaved("\n".join(image.captions) + "\n")))
        (own / f"._{image.name}.jpg").write_bytes(b"a Mac's")
    return {"kind": "folder", "path": str(folder / "data")}


def tar(draw, folder, images):
    with tarfile.open(folder / "0.tar", "w") as file:
        for image in images:
            about = {"captions": list(image.captions), "split": said(draw, image)}
            about["image_id"] = image.name
            shout = draw(st.booleans())
            members = [("jpg", image.data), ("json", json.dumps(about).encode())]
            for ending, data in draw(st.permutations(members)):
                info = tarfile.TarInfo(f"{image.name}.{ending.upper() if shout else ending}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return {"kind": "webdataset", "path": str(folder / "0.tar")}


def features(draw, folder, images):
    several = len(images[0].captions)
    for split in WORDS:
        own = [i for i in images if i.split == split]
        if own:
            rows = np.array([[images.index(i) + 1] * 3 for i in own], np.float32)
            np.save(folder / f"{split}_ims.npy", rows)
            texts = "".join(f"{text}\n" for i in own for text in i.captions)
            (folder / f"{split}_caps.txt").write_bytes(texts.encode())
            names = "".join(f"{i.name}\n" for i in own)
            (folder / f"{split}_ids.txt").write_bytes(draw(resaved(names)))
    assert several
    return {"kind": "precomp", "path": str(folder)}


def saved(draw, folder, images):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    columns = {
        "image": [i.data for i in images],
        "caption": [list(i.captions) for i in images],
        "split": [said(draw, i) for i in images],
        "id": [i.name for i in images],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "saved"))
    return {"kind": "huggingface", "path": str(folder / "saved"), "id_column": "id"}


FORMATS = {
    make.__name__: make
    for make in (text_table, json_lines, parquet, coco, karpathy, flickr_tokens, tree, tar, saved)
}
FORMATS["features"] = features
NO_PICTURES = ("features",)


def read(settings: dict) -> dict[str, Image]:
    """What `ingest` makes of a source, with the bytes that `shard` would read."""
    given = SourceSettings(**settings)
    found, parts = {}, {}
    for one in sources.parts(given):
        said = rule.Splits(given, one.split)
        for row in sources.rows(given, one, said):
            problems = [row["problem"], *(c["problem"] for c in row["captions"])]
            if any(problems):  # set aside with its reason, and counted
                raise InputError(f"{given.path}: {next(filter(None, problems))}")
            try:
                ((_, load),) = loading.in_order([row | {"source": given.kind}], given, 2**20)
                data = load()
            except Rejected as reason:  # set aside with its reason, and counted
                raise InputError(f"{given.path}: {reason}") from reason
            texts = tuple(plain(caption["text"]) for caption in row["captions"])
            name = row["image_id"].rpartition("/")[2]
            if name in found:  # as `ingest` refuses it
                raise InputError(f"{given.path}: {name!r} is there twice")
            found[name] = Image(name, row["split"], texts, data)
        parts[one.uri] = said.summary()
    rule.check(parts, given)
    return found


def forget() -> None:
    """Files of one name hold other bytes in the next example."""
    for cached in (arrays._header, tables._starts, tables._column, tar_samples._says_retrieval):
        cached.cache_clear()


@pytest.mark.parametrize("name", FORMATS)
def test_any_collection_is_read_as_it_was_written(name):
    @fuzzed
    @given(data=st.data())
    def holds(data):
        images = data.draw(collections())
        with tempfile.TemporaryDirectory() as folder:
            settings = FORMATS[name](data.draw, Path(folder), images)
            forget()
            try:
                found = read(settings)
            except InputError as refused:
                assert folder in str(refused), "it names the place"
                return
        right = {unicodedata.normalize("NFC", i.name): i for i in images}
        assert found.keys() == right.keys()
        for key, image in found.items():
            assert image.captions == tuple(plain(text) for text in right[key].captions)
            assert image.split == right[key].split
            if name not in NO_PICTURES:
                assert image.data == right[key].data

    holds()


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "saved"])
def test_a_damaged_file_is_read_or_refused_and_never_a_traceback(name):
    @fuzzed
    @given(data=st.data())
    def holds(data):
        images = data.draw(collections())
        with tempfile.TemporaryDirectory() as folder:
            settings = FORMATS[name](data.draw, Path(folder), images)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            spoilt = data.draw(st.sampled_from(files))
            spoilt.write_bytes(data.draw(damaged(spoilt.read_bytes())))
            forget()
            with contextlib.suppress(InputError, FileNotFoundError):  # of what a path now names
                read(settings)

    holds()
