"""Sources: what rows the annotation formats give, and what they say of files that are wrong."""

import io
import json
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sources import SOURCES, source
from pipeline.sources import splits as rule
from schemas.manifest import MANIFEST
from schemas.settings import SourceSettings
from tests.helpers.paths import DATA

FLICKR8K = DATA / "flickr8k"


def rows_of(kind, path=None, images=None, **settings):
    """All rows of a source, each checked against the manifest's schema."""
    as_text = {"path": path and str(path), "images": images and str(images)}
    settings = SourceSettings(kind=kind, **as_text, **settings)
    parts = sources.parts(settings)
    json.dumps([sources.inputs(settings, part) for part in parts])  # goes into a fingerprint
    found = [(part, rule.Splits(settings, part.split)) for part in parts]
    rows = [row for part, said in found for row in sources.rows(settings, part, said)]
    rule.check({part.uri: said.summary() for part, said in found}, settings)
    pa.Table.from_pylist(rows, schema=MANIFEST)
    return rows


def captions(row):
    return [(caption["caption_id"], caption["text"]) for caption in row["captions"]]


def refused(kind, *args, **settings):
    """The sentence of the error."""
    with pytest.raises(InputError) as error:
        rows_of(kind, *args, **settings)
    return str(error.value)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def test_an_unknown_kind_is_answered_with_a_near_one():
    with pytest.raises(InputError, match="unknown source.kind 'karpaty'; did you mean 'karpathy'"):
        source("karpaty")


@pytest.mark.parametrize("kind", sorted(set(SOURCES) - {"drawn"}))
def test_a_path_that_is_missing_or_wrong_is_named(kind, tmp_path):
    assert "source.path is not given" in refused(kind)
    gone = tmp_path / "gone.csv"
    sentence = refused(kind, gone)
    assert str(gone) in sentence
    assert "does not exist" in sentence or "no *_ims.npy" in sentence


def test_another_version_of_what_draws_changes_rows_and_what_they_depend_on(monkeypatch):
    module, settings = source("drawn"), SourceSettings(train_images=1)
    part, *_ = sources.parts(settings)
    (before,), inputs = module.rows(settings, part), module.inputs(settings, part.uri)
    monkeypatch.setattr(module, "DRAWN_BY", "Pillow=0.1")
    (after,) = module.rows(settings, part)
    assert module.inputs(settings, part.uri) != inputs
    assert after["uri"] != before["uri"], "so the shard is made again"
    assert module.load(after["uri"]) == module.load(before["uri"])


# ---- karpathy ----------------------------------------------------------------------------------


def write_json(folder, content):
    path = folder / "dataset.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def image_entry(**changes):
    entry = {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "A dog .", "sentid": 7}]}
    return entry | changes


def test_karpathy_rows(tmp_path, images):
    coco = {"filename": "COCO_2.jpg", "filepath": "val2014", "split": "restval"}
    coco["sentences"] = [{"raw": "Ein Hündchen."}, {"raw": ""}]
    path = write_json(tmp_path, {"images": [image_entry(), coco], "dataset": "x"})
    first, second = rows_of("karpathy", path, images)
    assert first == {
        "image_id": "1",
        "uri": f"{images}/1.jpg",
        "split": "train",
        "captions": [{"caption_id": "7", "text": "A dog .", "problem": None}],
        "width": None,
        "height": None,
        "sha256": None,
        "source": "karpathy",
        "stamp": None,
        "problem": None,
    }
    assert (second["image_id"], second["split"]) == ("COCO_2", "train")
    assert second["uri"] == f"{images}/val2014/COCO_2.jpg"
    assert captions(second) == [("COCO_2#0", "Ein Hündchen."), ("COCO_2#1", "")]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{'images': []}", "is not valid JSON (line 1"),
        ([], "is JSON, but no dict"),
        ({"image": []}, "has no list 'images'"),
        (
            {"images": [image_entry(), {"filename": "2.jpg", "sentences": []}]},
            "says no split for 1 of its images, for others it does",
        ),
    ],
)
def test_karpathy_says_what_is_wrong_and_where(content, sentence, tmp_path, images):
    assert sentence in refused("karpathy", write_json(tmp_path, content), images)


def test_one_bad_entry_of_a_karpathy_file_is_set_aside(tmp_path, images):
    entries = [
        *(image_entry(), image_entry(filename=None), image_entry(filename="2.jpg", sentences="A")),
        image_entry(filename="3.jpg", sentences=[{}, {"raw": float("nan")}, {"raw": "A cat."}]),
    ]
    rows = rows_of("karpathy", write_json(tmp_path, {"images": entries}), images)
    assert [row["problem"] for row in rows][2:] == [None, None]
    assert rows[1]["problem"].startswith("no file name: ")
    assert [bool(c["problem"]) for row in rows[2:] for c in row["captions"]] == [
        True,
        True,
        True,
        False,
    ]


def test_restval_may_be_dropped_by_its_own_name(tmp_path, images):
    splits = ("train", "restval", "val", "Test")
    entries = [
        image_entry(filename=f"{k}.jpg", split=split, sentences=[{"raw": "A dog."}])
        for k, split in enumerate(splits)
    ]
    path = write_json(tmp_path, {"images": entries})
    found = [row["split"] for row in rows_of("karpathy", path, images)]
    assert found == ["train", "train", "val", "test"]
    rows = rows_of("karpathy", path, images, splits={"restval": "drop"})
    assert [row["split"] for row in rows] == ["train", "val", "test"]
    said = refused("karpathy", path, images, splits={"tset": "val"})
    assert (
        "source.splits names 'tset', and no image is in such a split; did you mean 'test'" in said
    )


def test_the_image_folder_must_be_there(tmp_path, images):
    path = write_json(tmp_path, {"images": [image_entry()]})
    assert "source.images is not given" in refused("karpathy", path)
    assert "does not exist" in refused("karpathy", path, images / "gone")
    assert "is not a folder" in refused("karpathy", path, path)
    assert "is a folder; expected a Karpathy JSON" in refused("karpathy", images, images)


# ---- flickr_tokens -----------------------------------------------------------------------------

TOKENS = "a_1.jpg#0\tA dog runs .\nb.jpg#0\tA cat .\r\na_1.jpg#1\tTwo\tdogs .\nc.jpg.1#0\t\n"


def test_flickr_tokens_rows(tmp_path, images):
    path = tmp_path / "tokens.txt"
    path.write_text(TOKENS, newline="")
    first, second, third = rows_of("flickr_tokens", path, images)
    assert (first["image_id"], first["uri"]) == ("a_1", f"{images}/a_1.jpg")
    assert captions(first) == [("a_1#0", "A dog runs ."), ("a_1#1", "Two\tdogs .")]
    assert captions(second) == [("b#0", "A cat .")]
    assert (third["image_id"], third["uri"]) == ("c", f"{images}/c.jpg")
    assert captions(third) == [("c#0", "")], "the shard stage quarantines it"
    assert {row["split"] for row in (first, second, third)} == {"train"}


def test_flickr_tokens_split_lists(tmp_path, images):
    path = tmp_path / "tokens.txt"
    path.write_text(TOKENS)
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("b.jpg\n")
    (tmp_path / "Flickr_8k.testImages.txt").write_text("a_1.jpg\nunknown.jpg\n")
    rows = rows_of("flickr_tokens", path, images)
    assert {row["image_id"]: row["split"] for row in rows} == {"a_1": "test", "b": "train"}
    settings = SourceSettings(kind="flickr_tokens", path=str(path))
    assert len(source("flickr_tokens").inputs(settings, str(path))) == 3


def test_flickr_tokens_name_a_bad_line(tmp_path, images):
    path = tmp_path / "tokens.txt"
    path.write_text("a.jpg#0\tA dog .\na.jpg A cat .\n")
    assert "line 2 is 'a.jpg A cat .'; expected NAME.jpg#0" in refused(
        "flickr_tokens", path, images
    )
    path.write_bytes("a.jpg#0\tA dog .\nb.jpg#0\tcafé .\n".encode("latin-1"))
    assert "line 2 is not UTF-8 (byte 0xe9" in refused("flickr_tokens", path, images)


# ---- precomp -----------------------------------------------------------------------------------


def write_precomp(folder, split, features, lines, ids=None):
    np.save(folder / f"{split}_ims.npy", features)
    (folder / f"{split}_caps.txt").write_text("".join(f"{line}\n" for line in lines))
    if ids:
        (folder / f"{split}_ids.txt").write_text("".join(f"{name}\n" for name in ids))


def features(images, dtype=np.float16, shape=(3, 4)):
    return np.random.default_rng(0).normal(size=(images, *shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(3, 4), (6,)])
def test_precomp_rows_and_their_features(dtype, shape, tmp_path):
    array = features(2, dtype, shape)
    write_precomp(tmp_path, "train", array, list("abcdef"), ids=["one.jpg", "two.v2.jpg"])
    first, second = rows_of("precomp", tmp_path)
    assert (first["image_id"], second["image_id"]) == ("one", "two.v2")
    assert second["uri"] == f"{tmp_path}/train_ims.npy#1"
    assert captions(second) == [("two.v2#0", "d"), ("two.v2#1", "e"), ("two.v2#2", "f")]
    loaded = np.load(io.BytesIO(source("precomp").load(second["uri"])), allow_pickle=False)
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(loaded, array[1])


def test_precomp_reads_a_row_of_a_remote_file_without_the_rest():
    memory = fsspec.filesystem("memory")
    file = io.BytesIO()
    np.save(file, features(5))
    memory.pipe_file("/features/val_ims.npy", file.getvalue())
    memory.pipe_file("/features/val_caps.txt", b"a\nb\nc\nd\ne\n")
    rows = rows_of("precomp", "memory://features")
    assert [row["split"] for row in rows] == ["val"] * 5
    loaded = np.load(io.BytesIO(source("precomp").load(rows[3]["uri"])))
    np.testing.assert_array_equal(loaded, features(5)[3])


def test_precomp_splits_and_name_beginnings(tmp_path):
    for split in ("train", "dev", "test", "testall"):
        write_precomp(tmp_path, f"f30k_{split}", features(2), list("ab"))
    for path in (tmp_path / "f30k", tmp_path / "f30k_"):
        rows = rows_of("precomp", path)
        ids = [row["image_id"] for row in rows[1::2]]
        assert ids == [
            "train-000001",
            "val-000001",
            "test-000001",
        ]
    assert rows[-1]["uri"] == f"{tmp_path}/f30k_testall_ims.npy#1"
    assert "no *_ims.npy of a split" in refused("precomp", tmp_path)


def test_precomp_with_an_array_row_for_each_caption(tmp_path):
    """Five copies of each row are one image with five captions; different rows are five images."""
    write_precomp(tmp_path, "test", features(3).repeat(5, 0), range(15))
    rows = rows_of("precomp", tmp_path)
    assert [row["uri"].rsplit("#")[1] for row in rows] == ["0", "5", "10"]
    assert [text for _, text in captions(rows[1])] == ["5", "6", "7", "8", "9"]
    write_precomp(tmp_path, "val", features(10), range(10))
    assert sum(row["split"] == "val" for row in rows_of("precomp", tmp_path)) == 10


def test_precomp_says_what_does_not_fit(tmp_path):
    write_precomp(tmp_path, "train", features(3), list("abcd"))
    assert "has 4 lines, " in (sentence := refused("precomp", tmp_path))
    assert "has 3 rows; expected as many lines" in sentence
    write_precomp(tmp_path, "train", features(3), list("abc"), ids=["one"])
    assert "train_ids.txt has 1 lines; expected 3" in refused("precomp", tmp_path)
    (tmp_path / "train_caps.txt").unlink()
    assert "train_caps.txt is not beside train_ims.npy" in refused("precomp", tmp_path)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.array([{}, {}]), "holds object of shape"),
        (np.asfortranarray(features(2, shape=(4,))), "column by column"),
        (np.zeros(2), "expected numbers of shape"),
    ],
)
def test_precomp_refuses_other_arrays(array, sentence, tmp_path):
    write_precomp(tmp_path, "train", array, list("ab"))
    assert sentence in refused("precomp", tmp_path)


def test_precomp_load_names_what_it_cannot_read(tmp_path):
    load = source("precomp").load
    write_precomp(tmp_path, "train", features(2), list("ab"))
    uri = f"{tmp_path}/train_ims.npy"
    with pytest.raises(InputError, match="expected FILE.npy#ROW"):
        load(uri)
    with pytest.raises(InputError, match="has 2 rows; there is no row 2"):
        load(f"{uri}#2")
    Path(uri).write_bytes(Path(uri).read_bytes()[:-3])
    with pytest.raises(InputError, match="ends inside row 1"):
        load(f"{uri}#1")
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(InputError, match="is not a .npy file of numbers"):
        load(f"{tmp_path}/text.npy#0")


# ---- real annotations --------------------------------------------------------------------------


@pytest.fixture
def flickr8k():
    # Other people's data is no part of the repository: it lies beside a checkout, or nowhere.
    if not FLICKR8K.is_dir():
        pytest.skip(f"Flickr8k's annotations are not at {FLICKR8K}")
    return FLICKR8K


def test_flickr8k_is_the_same_through_every_source(flickr8k, images):
    karpathy = rows_of("karpathy", flickr8k / "dataset_flickr8k.json", images)
    tokens = rows_of("flickr_tokens", flickr8k / "Flickr8k.token.txt", images)
    precomp = rows_of("precomp", flickr8k)

    def texts(rows):
        return {row["image_id"]: [text.strip() for _, text in captions(row)] for row in rows}

    assert len(karpathy) == 7000
    assert texts(karpathy) == texts(tokens) == texts(precomp)
    splits = [{row["image_id"]: row["split"] for row in rows} for rows in (karpathy, precomp)]
    assert splits[0] == splits[1]


def test_flickr8k_features_load_as_they_are_stored(flickr8k):
    array = np.load(flickr8k / "val_ims.npy", mmap_mode="r")
    for row in (0, 500, 999):
        data = source("precomp").load(f"{flickr8k}/val_ims.npy#{row}")
        np.testing.assert_array_equal(np.load(io.BytesIO(data)), array[row])
