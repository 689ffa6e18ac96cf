"""Tars of samples: img2dataset's, open_clip's, our own, and broken ones."""

import io
import json
import tarfile

import fsspec
import pytest

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sharding import ingest, shard
from pipeline.sources import source, webdataset
from schemas.settings import Recipe, SourceSettings
from tests.pipeline.sources.test_formats import captions, refused, rows_of


def write_tar(path, members, **options):
    """A tar of (name, bytes, text or JSON-able) members."""
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
                continue
            if not isinstance(data, bytes):
                data = data.encode() if isinstance(data, str) else json.dumps(data).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def load(row):
    return sources.load(row["source"], row["uri"], SourceSettings())


def as_img2dataset(key, caption, status="success"):
    about = {
        **{"caption": caption, "key": key, "status": status, "error_message": None},
        **{"url": f"https://example.org/{key}.jpg", "width": 256, "height": 200, "exif": "{}"},
    }
    image = [(f"{key}.jpg", f"image {key}".encode())] if status == "success" else []
    return [*image, (f"{key}.json", about), (f"{key}.txt", caption or "")]


def test_img2dataset_tars(tmp_path):
    members = [
        *as_img2dataset("000000000", "A dog"),
        *as_img2dataset("000000001", "A cat", "failed_to_download"),
        *as_img2dataset("000000002", None),
        *as_img2dataset("000000003", "Hündchen 🐶"),
    ]
    write_tar(tmp_path / "00000.tar", members)
    write_tar(tmp_path / "00001.tar", as_img2dataset("000010000", "Two"))
    (tmp_path / "00000.parquet").write_bytes(b"img2dataset's own table")
    (tmp_path / "00000_stats.json").write_text("{}")
    first, failed, empty, fourth, other = rows_of("webdataset", tmp_path)
    assert first["image_id"] == "00000-000000000"
    assert captions(first) == [("00000-000000000#0", "A dog")]
    assert load(first) == b"image 000000000"
    assert failed["uri"] == f"{tmp_path}/00000.tar#000000001"
    with pytest.raises(InputError, match="no image in the sample: "):
        load(failed)
    assert [text for _, text in captions(empty)] == [""], "the shard stage quarantines it"
    assert captions(fourth)[0][1] == "Hündchen 🐶"
    assert (other["image_id"], load(other)) == ("00001-000010000", b"image 000010000")


def test_open_clip_tars_and_what_else_is_in_tars(tmp_path):
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    link = tarfile.TarInfo("a/0.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        *(("a", folder), ("a/0.png", link), ("a/1.jpg", b"one"), ("a/1.txt", "A dog\nrunning")),
        *(("a/1.cls", "7"), ("b/1.txt", "A cat"), ("b/1.PNG", b"two"), ("c.seg.png", b"three")),
        *(("d.webp", b"four"), ("d.json", {"captions": ["one", "two"]}), ("e.npy", b"\x93NUMPY")),
        *(("e.txt", "features"), ("README", "no sample"), ("._e.txt", "nor is this")),
    ]
    write_tar(tmp_path / "cc3m-val-0001.tar", members, format=tarfile.PAX_FORMAT)
    rows = rows_of("webdataset", f"{tmp_path}/*.tar")
    assert [
        (row["image_id"].removeprefix("cc3m-val-0001-"), len(row["captions"])) for row in rows
    ] == [*(("a/1", 1), ("b/1", 1), ("c", 1), ("d", 2), ("e", 1))]
    assert {row["split"] for row in rows} == {"val"}
    assert [text for _, text in captions(rows[3])] == ["one", "two"]
    assert captions(rows[2])[0][1] == ""
    assert [load(rows[k]) for k in (0, 1, 3, 4)] == [b"one", b"two", b"four", b"\x93NUMPY"]
    with pytest.raises(InputError, match="no image in the sample"):
        load(rows[2])


def test_our_own_shards_keep_ids_captions_splits_and_bytes(tmp_path):
    drawn = {"kind": "drawn", "train_images": 5, "val_images": 2, "test_images": 0}
    recipe = Recipe(name="t", source={**drawn, "image_size": 32})
    for stage, make in ((ingest, ingest.write_part), (shard, shard.write_shard)):
        plan = stage.plan(recipe, str(tmp_path))
        plan.finish({piece.name: make(piece) for piece in plan.pending})
    rows = rows_of("webdataset", f"{tmp_path}/2-shards")
    manifest = ingest.read(f"{tmp_path}/1-manifest").to_pylist()
    expected = {row["image_id"]: row for row in manifest}
    assert sorted(expected) == sorted(row["image_id"] for row in rows)
    for row in rows:
        original = expected[row["image_id"]]
        assert (row["captions"], row["split"]) == (original["captions"], original["split"])
        assert load(row) == load(original)


def test_names_that_lead_out_of_the_tar_lead_nowhere(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    names = ["../secret", "/etc/passwd", "a/../../b", "caf\udce9"]
    members = [(f"{name}.jpg", b"in the tar") for name in names]
    write_tar(tmp_path / "t.tar", members, format=tarfile.GNU_FORMAT, errors="surrogateescape")
    before = sorted(tmp_path.rglob("*"))
    rows = rows_of("webdataset", tmp_path / "t.tar")
    assert [load(row) for row in rows] == [b"in the tar"] * len(names)
    assert "t-caf\\xe9" in [row["image_id"] for row in rows]
    assert sorted(tmp_path.rglob("*")) == before


def test_splits_are_told_by_json_setting_name_and_folder_in_this_order(tmp_path):
    (tmp_path / "test").mkdir()
    members = [("1.jpg", b""), ("2.jpg", b""), ("2.json", {"split": "restval"})]
    for name in ("test/0.tar", "train-0.tar", "test_0.tar", "0.tar"):
        write_tar(tmp_path / name, members)

    def splits(name, **settings):
        return [row["split"] for row in rows_of("webdataset", tmp_path / name, **settings)]

    assert splits("test/0.tar") == splits("test_0.tar") == ["test", "restval"]
    assert splits("train-0.tar") == splits("0.tar") == ["train", "restval"]
    assert splits("test_0.tar", split="val") == ["val", "restval"]


def test_a_sample_is_read_from_a_store_by_its_range(tmp_path):
    memory = fsspec.filesystem("memory")
    members = [(f"{k}.{end}", f"{k} {end}") for k in range(50) for end in ("jpg", "txt")]
    write_tar(tmp_path / "t.tar", members)
    memory.pipe_file("/tars/train-000.tar", (tmp_path / "t.tar").read_bytes())
    rows = rows_of("webdataset", "memory://tars/train-{000..000}.tar")
    assert [load(row) for row in rows] == [f"{k} jpg".encode() for k in range(50)]
    memory.pipe_file("/tars/train-000.tar", memory.cat_file("/tars/train-000.tar", end=1000))
    with pytest.raises(InputError, match="tar is shorter than it was: "):
        load(rows[40])


# ---- tars that are not whole -------------------------------------------------------------------

TWO = [("1.jpg", b"x" * 700), ("1.txt", "A dog"), ("2.jpg", b"x" * 700), ("2.txt", "A cat")]


def test_a_tar_cut_anywhere_is_refused_and_named(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", TWO).read_bytes()
    end = 2 * (512 + 1024 + 512 + 512)  # of the last member; zeros follow
    for size in (0, 1, 511, 512, 700, 1536, 1600, 2048, 2560, 3072, end - 512, end - 100, end):
        (tmp_path / "torn.tar").write_bytes(whole[:size])
        sentence = refused("webdataset", tmp_path / "torn.tar")
        assert "torn.tar is not a whole .tar after " in sentence, size
        assert "copy it again" in sentence
    assert "after '2.txt'" in sentence
    (tmp_path / "torn.tar").write_bytes(whole[: end + 512])
    assert len(rows_of("webdataset", tmp_path / "torn.tar")) == 2


def test_a_tar_with_a_damaged_header_is_refused(tmp_path):
    data = bytearray(write_tar(tmp_path / "t.tar", TWO).read_bytes())
    data[2560 + 20] ^= 1  # in the header of 2.jpg
    (tmp_path / "t.tar").write_bytes(data)
    assert "is not a whole .tar after '1.txt'" in refused("webdataset", tmp_path / "t.tar")


def test_an_empty_tar_has_no_rows(tmp_path):
    write_tar(tmp_path / "t.tar", [])
    assert rows_of("webdataset", tmp_path / "t.tar") == []


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused(mode, tmp_path):
    write_tar(tmp_path / "t.tar", TWO, mode=mode)
    assert "unpack it if it is compressed" in refused("webdataset", tmp_path / "t.tar")


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("1.jpg", b""), ("1.jpg", b"")], "has two members '1.jpg' in one sample"),
        ([("1.jpg", b""), ("1.txt", b"caf\xe9")], "member '1.txt' is not UTF-8 text"),
        ([("1.jpg", b""), ("1.json", b"{'a'")], "member '1.json' is not JSON"),
        ([("1.jpg", b""), ("1.json", {"captions": [{"en": "A"}]})], "a caption is a record of"),
    ],
)
def test_members_that_cannot_be_read_are_named(members, sentence, tmp_path):
    write_tar(tmp_path / "t.tar", members)
    assert sentence in refused("webdataset", tmp_path / "t.tar")


def test_places_without_tars_are_refused(tmp_path):
    assert "there is no .tar in source.path" in refused("webdataset", tmp_path)
    sentence = refused("webdataset", "https://example.org/00000.tar")
    assert "is a web address" in sentence and "copy the tars" in sentence


def test_a_member_that_is_too_long_for_a_text_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "TEXT_BYTES", 10)
    write_tar(tmp_path / "t.tar", [("1.jpg", b"x"), ("1.txt", "eleven char")])
    assert captions(rows_of("webdataset", tmp_path / "t.tar")[0])[0][1] == ""


def test_a_part_depends_on_its_own_tar_alone(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", TWO)
    module, settings = source("webdataset"), SourceSettings(kind="webdataset", path=str(tmp_path))
    before = [module.inputs(settings, part) for part in module.parts(settings)]
    write_tar(tmp_path / "1.tar", TWO * 20)
    after = [module.inputs(settings, part) for part in module.parts(settings)]
    assert before[0] == after[0] and before[1] != after[1]
