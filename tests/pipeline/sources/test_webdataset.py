"""Tars of samples: img2dataset's, open_clip's, our own, and broken ones."""

import io
import json
import tarfile

import fsspec
import pytest

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sharding import ingest, shard
from pipeline.sources import source
from pipeline.sources.readers import samples
from pipeline.storage import parquet, store
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


def reason(row) -> str | None:
    """Why a row was set aside."""
    return row["problem"]


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
    assert reason(failed).startswith("a sample without picture or features: '000000001' has ")
    with pytest.raises(InputError, match="no image in the sample"):
        load(failed)
    assert reason(empty).startswith("a sample without caption: '000000002' has .jpg, .json, .txt")
    assert captions(fourth)[0][1] == "Hündchen 🐶"
    assert (other["image_id"], load(other)) == ("00001-000010000", b"image 000010000")


def test_open_clip_tars_and_what_else_is_in_tars(tmp_path):
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    link = tarfile.TarInfo("a/0.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        *(("a", folder), ("a/0.png", link), ("a/0.txt", "linked")),
        *(("a/1.jpg", b"one"), ("a/1.txt", "A dog\nrunning")),
        *(("a/1.cls", "7"), ("b/1.txt", "A cat"), ("b/1.PNG", b"two"), ("c.seg.png", b"three")),
        *(("d.webp", b"four"), ("d.json", {"captions": ["one", "two"]}), ("e.npy", b"\x93NUMPY")),
        *(("e.txt", "features"), ("README", "no sample"), ("._e.txt", "nor is this")),
    ]
    write_tar(tmp_path / "cc3m-val-0001.tar", members, format=tarfile.PAX_FORMAT)
    rows = rows_of("webdataset", f"{tmp_path}/*.tar")
    found = {row["image_id"].removeprefix("cc3m-val-0001-"): row for row in rows}
    good = {name: load(row) for name, row in found.items() if not reason(row)}
    assert good == {"a/1": b"one", "b/1": b"two", "d": b"four", "e": b"\x93NUMPY"}
    assert {name: reason(row)[:40] for name, row in found.items() if reason(row)} == {
        "a/0": "a member that is no plain file: 'a/0.png",
        "c": "a sample without picture or features: 'c",
    }
    assert {row["split"] for row in rows} == {"val"}
    assert [text for _, text in captions(found["d"])] == ["one", "two"]
    assert [text for _, text in captions(found["a/1"])] == ["A dog\nrunning"]


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
    members = [(f"{n}.{end}", "in the tar") for n in names for end in ("jpg", "txt")]
    write_tar(tmp_path / "t.tar", members, format=tarfile.GNU_FORMAT, errors="surrogateescape")
    before = sorted(tmp_path.rglob("*"))
    rows = rows_of("webdataset", tmp_path / "t.tar")
    assert [load(row) for row in rows] == [b"in the tar"] * len(names)
    assert "t-caf\\xe9" in [row["image_id"] for row in rows]
    assert sorted(tmp_path.rglob("*")) == before


def test_splits_are_told_by_json_setting_name_and_folder_in_this_order(tmp_path):
    (tmp_path / "test").mkdir()
    words = {"2": "restval", "3": "Validation", "4": None, "5": "minival"}
    members = [("1.jpg", b""), ("1.txt", "one")]
    for key, word in words.items():
        members += [(f"{key}.jpg", b""), (f"{key}.json", {"split": word, "caption": "a"})]
    for name in ("test/0.tar", "train-0.tar", "test_0.tar", "0.tar"):
        write_tar(tmp_path / name, members)

    def splits(name, **settings):
        return [row["split"] for row in rows_of("webdataset", tmp_path / name, **settings)]

    own = ["train", "val"]
    assert splits("test/0.tar") == splits("test_0.tar") == ["test", *own, "test", "minival"]
    assert splits("train-0.tar") == ["train", *own, "train", "minival"]
    assert splits("test_0.tar", split="val") == ["val", *own, "val", "minival"]
    dropped = splits("test_0.tar", splits={"restval": "drop"})
    assert dropped == ["test", "val", "test", "minival"]
    assert "0.tar says no split for 2 of its images" in refused("webdataset", tmp_path / "0.tar")


def test_tars_in_folders_are_named_and_split_by_their_folder(tmp_path):
    for folder in ("train2017", "val2017", "deep/test"):
        (tmp_path / folder).mkdir(parents=True)
        write_tar(tmp_path / folder / "0.tar", [("1.jpg", b""), ("1.txt", "A dog")])
    found = {row["image_id"]: row["split"] for row in rows_of("webdataset", tmp_path)}
    assert found == {"test/0-1": "test", "train2017/0-1": "train", "val2017/0-1": "val"}
    for pattern in ("*/0.tar", "{train,val}2017/0.tar"):
        rows = rows_of("webdataset", f"{tmp_path}/{pattern}")
        assert {row["image_id"] for row in rows} == {"train2017/0-1", "val2017/0-1"}
        assert rows[0]["captions"][0]["caption_id"] == "train2017/0-1#0"


def test_links_to_tars_are_followed_and_hidden_ones_passed_over(tmp_path):
    (elsewhere := tmp_path / "elsewhere" / "tars").mkdir(parents=True)
    (folder := tmp_path / "folder").mkdir()
    for name in ("0.tar", "1.TAR"):
        write_tar(elsewhere / name, [("./1.jpg", b"x"), ("./1.txt", "A dog")])
    (folder / "a.tar").symlink_to(elsewhere / "0.tar")
    (folder / "inside").symlink_to(elsewhere)
    for name in ("._a.tar", ".trash/0.tar", "__MACOSX/a.tar"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    rows = rows_of("webdataset", folder)
    assert [row["image_id"] for row in rows] == ["a-1", "0-1", "1-1"]
    assert [load(row) for row in rows] == [b"x"] * 3
    assert [row["image_id"] for row in rows_of("webdataset", f"{folder}/*.tar")] == ["a-1"]
    (folder / "again").symlink_to(folder)
    assert "are one folder; remove the link" in refused("webdataset", folder)
    (folder / "again").unlink()
    (folder / "gone.tar").symlink_to(folder / "nothing")
    assert "gone.tar does not exist" in refused("webdataset", folder)


# ---- captions, ids, endings ----------------------------------------------------------------------


def one(tmp_path, members, **settings):
    """The rows of one tar."""
    return rows_of("webdataset", write_tar(tmp_path / "t.tar", members), **settings)


def test_a_line_is_a_caption_in_tars_for_retrieval_and_where_a_setting_says_so(tmp_path):
    folder = tmp_path / "data/test"
    folder.mkdir(parents=True)
    lines = {key: [f"{key} in words {k}" for k in range(5)] for key in ("s0", "s1", "s2", "s3")}
    members = [
        member
        for key, texts in lines.items()
        for member in ((f"{key}.webp", b"x"), (f"{key}.txt", "\r\n".join([*texts, "", " "])))
    ]
    write_tar(folder / "0.tar", members)
    (folder / "nshards.txt").write_text("1")

    def texts(**settings):
        rows = rows_of("webdataset", folder, **settings)
        return {row["image_id"][2:]: [text for _, text in captions(row)] for row in rows}

    assert "every .txt holds several lines" in refused("webdataset", folder)
    assert texts(text_captions="lines") == lines
    assert [len(found) for found in texts(text_captions="one").values()] == [1] * 4
    for place in (tmp_path / "data", folder):
        (place / "dataset_type.txt").write_text("retrieval\n")
        assert texts() == lines
        (place / "dataset_type.txt").unlink()
    module, settings = source("webdataset"), {"kind": "webdataset", "path": str(folder)}
    said = [
        module.inputs(SourceSettings(**settings, text_captions=word), str(folder / "0.tar"))
        for word in ("auto", "one", "lines")
    ]
    assert said[0] != said[1] != said[2] != said[0], "another manifest is another fingerprint"


def test_captions_of_json(tmp_path):
    records = [{"caption_id": "x", "text": "one"}, {"text": "two"}]
    about = {
        **{"text": {"caption": "A"}, "list": {"captions": ["A", "B"]}, "NaN": {"caption": "@"}},
        **{"null": {"caption": None}, "empty": {"captions": []}, "records": {"captions": records}},
    }
    members = []
    for key, content in about.items():
        text = json.dumps(content).replace('"@"', "NaN")
        members += [(f"{key}.jpg", b""), (f"{key}.txt", "of the text"), (f"{key}.json", text)]
    found = {row["image_id"][2:]: captions(row) for row in one(tmp_path, members)}
    assert {key: [text for _, text in texts] for key, texts in found.items()} == {
        **{"text": ["A"], "list": ["A", "B"], "NaN": ["of the text"], "null": ["of the text"]},
        **{"empty": ["of the text"], "records": ["one", "two"]},
    }
    assert [id_ for id_, _ in found["records"]] == ["x", "t-records#1"]


def test_a_caption_that_is_a_sample_keeps_its_id(tmp_path):
    abouts = [{"image_id": 7, "caption_id": k, "caption": f"said {k}"} for k in (70, 71)]
    members = [(f"{k}.{end}", a if end == "json" else b"x")
               for k, a in enumerate(abouts) for end in ("jpg", "json")]  # fmt: skip
    (row,) = one(tmp_path, members)
    assert captions(row) == [("70", "said 70"), ("71", "said 71")]


def test_endings_are_read_in_any_case_and_text_has_several(tmp_path):
    members = [("1.JPG", b"x"), ("1.TXT", "A"), ("2.Png", b"x"), ("2.JSON", {"caption": "B"})]
    members += [("3.jpg", b"x"), ("3.caption", "\ufeffC"), ("4.npy", b"f"), ("4.text", "D")]
    members += [("5.npy", b"embedding"), ("5.jpg", b"x"), ("5.txt", "E")]
    rows = one(tmp_path, members)
    assert [text for row in rows for _, text in captions(row)] == list("ABCDE")
    assert [load(row) for row in rows] == [b"x", b"x", b"x", b"f", b"x"]


def test_settings_name_the_members_and_fields(tmp_path):
    about = {"alt": "A", "caption": "B", "url": "u", "text": None}
    members = [
        ("1.depth.png", b"d"),
        ("1.image.JPG", b"x"),
        ("1.label.txt", "C"),
        ("1.json", about),
    ]

    def found(**settings):
        (row,) = one(tmp_path, members, image_column=".image.jpg", **settings)
        return row["image_id"], captions(row)[0][1], load(row)

    assert found() == ("t-1", "B", b"x")
    assert found(caption_column="alt", id_column="url") == ("u", "A", b"x")
    assert found(caption_column="label.txt", id_column="__key__") == ("t-1", "C", b"x")
    assert found(caption_column="none;text;Label.txt") == ("t-1", "C", b"x")

    def wrong(**settings):
        (row,) = one(tmp_path, members, **{"image_column": "image.jpg", **settings})
        return reason(row)

    for column in ("text", "alternative", "caption.txt"):
        assert wrong(caption_column=column).startswith("a sample without caption: '1' has ")
    assert wrong(id_column="name").startswith("a sample without id: '1' has no 'name' in a JSON")
    assert wrong(image_column="jpeg").startswith("a sample without picture or features: '1' has")


def test_a_picture_is_never_chosen_between_two(tmp_path):
    members = [("1.jpg", b"x"), ("1.png", b"mask"), ("1.txt", "A"), ("2.jpg", b"y"), ("2.txt", "B")]
    two, plain = one(tmp_path, members)
    assert reason(two).startswith("two pictures in one sample: '1' has .jpg, .png, .txt in ")
    assert load(plain) == b"y"
    first, second = one(tmp_path, members, image_column="jpg")
    assert load(first) == b"x" and load(second) == b"y"
    first, second = one(tmp_path, members, image_column="png; .jpg")
    assert load(first) == b"mask" and load(second) == b"y"


@pytest.mark.parametrize(
    ("id_", "called"),
    [("im", "im"), (391, "391"), (391.0, "391"), (None, "t-1"), ("", "t-1"), (0, "0")],
)
def test_an_id_is_a_text_or_a_whole_number(id_, called, tmp_path):
    (row,) = one(tmp_path, [("1.jpg", b""), ("1.json", {"image_id": id_, "caption": "A"})])
    assert row["image_id"] == called


def sample_a_caption(ids, sizes=None, first=0):
    """Tar members in which every caption is a sample with its picture."""
    members = []
    for k, image_id in enumerate(ids, first):
        data = b"x" * (sizes[k] if sizes else 7)
        about = {"image_id": image_id, "caption": f"said {k}", "url": f"u{image_id}"}
        members += [(f"{k:03d}.jpg", data), (f"{k:03d}.json", about)]
    return members


@pytest.mark.parametrize(("ids", "called"), [(["a", "b"], "a"), ([7, 8], "7")])
def test_samples_of_one_image_are_gathered(ids, called, tmp_path):
    rows = one(tmp_path, sample_a_caption([ids[0], ids[1]] * 5))
    assert [len(row["captions"]) for row in rows] == [5, 5]
    assert rows[0]["image_id"] == called
    assert captions(rows[0])[:2] == [("t-000#0", "said 0"), ("t-002#0", "said 2")]
    by_url = one(tmp_path, sample_a_caption([ids[0]] * 5), id_column="url")
    assert [(row["image_id"], len(row["captions"])) for row in by_url] == [(f"u{called}", 5)]
    assert len(one(tmp_path, sample_a_caption([ids[0]] * 5), id_column="__key__")) == 5


def test_samples_of_one_id_with_other_pictures_are_not_gathered(tmp_path):
    first, *others = one(tmp_path, sample_a_caption([1, 1, 2], [7, 8, 7]))[::-1][1:]
    assert first["image_id"] == "1" and len(first["captions"]) == 1
    (other,) = others
    assert reason(other).startswith("two samples of one id that differ: '1' is '000' (bytes: 7)")
    assert other["image_id"] == "t-001"


def test_numbers_of_captions_are_kept_or_follow_the_image(tmp_path):
    def members(start):
        return [
            (f"{k}.{end}", b"" if end == "jpg" else {
                "image_id": f"im{k}",
                "captions": [{"caption_id": start * k + c, "text": f"{k} {c}"} for c in (0, 1)],
            })
            for k in (0, 1) for end in ("jpg", "json")
        ]  # fmt: skip

    def ids(start):
        return [id_ for row in one(tmp_path, members(start)) for id_, _ in captions(row)]

    assert ids(10) == ["0", "1", "10", "11"]
    assert ids(0) == ["im0#0", "im0#1", "im1#0", "im1#1"]


# ---- several tars --------------------------------------------------------------------------------


def made(path, root, **settings) -> list[dict]:
    """The images of the whole stage."""
    recipe = Recipe(name="t", source={"kind": "webdataset", "path": str(path), **settings})
    plan = ingest.plan(recipe, str(root))
    summaries = {piece.name: ingest.write_part(piece) for piece in plan.pending}
    ingest.check(plan, summaries, recipe.source)
    plan.finish(summaries)
    return ingest.images(f"{root}/1-manifest").to_pylist()


def test_an_image_whose_captions_are_in_several_tars_is_one(tmp_path):
    write_tar(tmp_path / "0.tar", sample_a_caption([1, 1, 2]))
    write_tar(tmp_path / "1.tar", sample_a_caption([3, 2, 1], first=3))
    rows = made(tmp_path, tmp_path / "run")
    assert [(row["image_id"], [text for _, text in captions(row)]) for row in rows] == [
        ("1", ["said 0", "said 1", "said 5"]),
        ("2", ["said 2", "said 4"]),
        ("3", ["said 3"]),
    ]
    assert ingest.totals(f"{tmp_path}/run/1-manifest") == {"train": 3}


def test_an_id_of_two_pictures_in_two_tars_is_refused_with_both_places(tmp_path):
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "0.tar", sample_a_caption([1, 2], [3, 4]))
    write_tar(tmp_path / "more/0.tar", sample_a_caption([3, 2], [3, 5]))
    with pytest.raises(InputError) as error:
        made(tmp_path, tmp_path / "run")
    sentence = str(error.value)
    assert "1 image ids appear more than once, the first is '2'" in sentence
    assert f"in {tmp_path}/0.tar and in {tmp_path}/more/0.tar" in sentence
    assert "name it by source.id_column (of tars a field of the JSON, or __key__)" in sentence
    assert len(made(tmp_path, tmp_path / "other", id_column="__key__")) == 4


def test_a_caption_id_of_two_tars_is_refused_with_both_places(tmp_path):
    for name in ("0", "1"):
        record = {"caption_id": "same", "text": "A"}
        about = {"image_id": name, "captions": [record]}
        write_tar(tmp_path / f"{name}.tar", [("1.jpg", b""), ("1.json", about)])
    with pytest.raises(InputError, match="1 caption ids .* 'same', in .*0.tar and in .*1.tar"):
        made(tmp_path, tmp_path / "run")


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


def test_a_folder_in_a_store_is_read_with_those_in_it(tmp_path):
    memory = fsspec.filesystem("memory")
    data = write_tar(tmp_path / "t.tar", [("1.jpg", b"x"), ("1.txt", "A\nB")]).read_bytes()
    for name in ("train/0.tar", "test/0.tar", "test/._0.tar", "test/0.json"):
        memory.pipe_file(f"/in-folders/{name}", data)
    memory.pipe_file("/in-folders/dataset_type.txt", b"retrieval")
    for path in ("memory://in-folders", "memory://in-folders/*/0.tar"):
        rows = rows_of("webdataset", path)
        assert [row["image_id"] for row in rows] == ["test/0-1", "train/0-1"]
        assert [row["split"] for row in rows] == ["test", "train"]
        assert [len(row["captions"]) for row in rows] == [2, 2] and load(rows[0]) == b"x"


# ---- tars that are not whole -------------------------------------------------------------------

TWO = [("1.jpg", b"x" * 700), ("1.txt", "A dog"), ("2.jpg", b"x" * 700), ("2.txt", "A cat")]


def test_a_tar_cut_anywhere_is_refused_and_named(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", TWO).read_bytes()
    end = 2 * (512 + 1024 + 512 + 512)  # of the last member; zeros follow
    for size in (0, 1, 511, 512, 700, 1536, 1600, 2048, 2560, 3072, end - 512, end - 100, end):
        (tmp_path / "torn.tar").write_bytes(whole[:size])
        sentence = refused("webdataset", tmp_path / "torn.tar")
        assert "torn.tar is broken: torn tar: after " in sentence, size
        assert f"it ends at byte {size:,}" in sentence, sentence
        assert "copy or write it again" in sentence
    assert "after '2.txt'" in sentence
    (tmp_path / "torn.tar").write_bytes(whole[: end + 512])
    assert len(rows_of("webdataset", tmp_path / "torn.tar")) == 2


def test_a_tar_with_a_damaged_header_is_refused(tmp_path):
    data = bytearray(write_tar(tmp_path / "t.tar", TWO).read_bytes())
    data[2560 + 20] ^= 1  # in the header of 2.jpg
    (tmp_path / "t.tar").write_bytes(data)
    sentence = refused("webdataset", tmp_path / "t.tar")
    assert "torn tar: after '1.txt': no member's header where one should be, at byte" in sentence


def test_an_empty_tar_has_no_rows(tmp_path):
    write_tar(tmp_path / "t.tar", [])
    assert rows_of("webdataset", tmp_path / "t.tar") == []


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused_by_its_bytes_and_by_its_name(mode, tmp_path):
    (folder := tmp_path / "packed").mkdir()
    write_tar(folder / "t.tar", TWO, mode=mode)
    assert f"compressed tar: it is of {mode[2:4]}" in refused("webdataset", folder)
    (folder / "t.tar").rename(folder / f"t.tar.{mode[2:]}")
    write_tar(folder / "other.tar", TWO)
    for path in (folder, f"{folder}/*.tar*", folder / f"t.tar.{mode[2:]}"):
        sentence = refused("webdataset", path)
        assert f"t.tar.{mode[2:]} is a compressed tar; unpack it" in sentence
    write_tar(folder / "t.tar", TWO)
    assert len(rows_of("webdataset", folder)) == 4, "it was unpacked, and kept"


def test_a_tar_of_which_nothing_can_be_used_is_told(tmp_path):
    write_tar(tmp_path / "0.tar", TWO)
    write_tar(tmp_path / "1.tar", [("1.jpg", b""), ("1.cls", "7"), ("2.jpg", b"")])
    run = f"{tmp_path}/run"
    assert len(made(tmp_path, run)) == 4
    told = ingest.told(store.read_json(f"{run}/1-manifest/index.json"))
    (line,) = (line for line in told if "tars in which no sample can be used" in line)
    assert f"{tmp_path}/1.tar, for a sample without caption: '1' has .jpg, .cls in " in line
    with pytest.raises(InputError, match="none of 2 images can be used, the first: a sample witho"):
        made(tmp_path / "1.tar", f"{tmp_path}/other")


def test_a_bad_sample_is_set_aside_and_counted_and_the_rest_goes_on(tmp_path):
    members = [(f"{k}.{end}", f"{end} {k}") for k in range(5) for end in ("jpg", "txt")]
    members += [("bad.jpg", b""), ("bad.txt", b"caf\xe9")]
    *good, bad = one(tmp_path, members)
    assert [reason(row) for row in good] == [None] * 5
    text = reason(bad)
    assert text.startswith("a member that cannot be used: 'bad.txt': not UTF-8 text (byte 0xe9 at")
    assert f"in {tmp_path}/t.tar; mend it" in text
    run = f"{tmp_path}/run"
    made(tmp_path / "t.tar", run)
    plan = shard.plan(Recipe(name="t", source={"kind": "webdataset"}), run)
    summary = shard.write_shard(plan.pieces[0])
    assert summary["rejected"]["a member that cannot be used"] == 1
    sidecar = parquet.read_table(plan.pieces[0].output).to_pylist()
    assert text in [row["reason"] for row in sidecar]


def test_places_without_tars_are_refused(tmp_path):
    assert "there is no .tar in source.path" in refused("webdataset", tmp_path)
    sentence = refused("webdataset", "https://example.org/00000.tar")
    assert "is a web address" in sentence and "copy the tars" in sentence


def test_a_member_that_is_too_long_for_a_text_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "TEXT_BYTES", 10)
    write_tar(tmp_path / "t.tar", [("1.jpg", b"x"), ("1.txt", "eleven char")])
    (row,) = rows_of("webdataset", tmp_path / "t.tar")
    assert "'1.txt': 11 bytes are no caption" in reason(row)


@pytest.mark.parametrize("name", ["{000..010.tar", "{{0..1}.tar"])
def test_half_a_brace_is_a_sentence(name, tmp_path):
    assert "is no pattern (Unbalanced braces" in refused("webdataset", tmp_path / name)
    write_tar(tmp_path / name, TWO)
    assert len(rows_of("webdataset", tmp_path / name)) == 2, "a file may be called so"


def test_a_part_depends_on_its_own_tar_alone(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", TWO)
    module, settings = source("webdataset"), SourceSettings(kind="webdataset", path=str(tmp_path))
    before = [module.inputs(settings, part) for part in module.parts(settings)]
    write_tar(tmp_path / "1.tar", TWO * 20)
    after = [module.inputs(settings, part) for part in module.parts(settings)]
    assert before[0] == after[0] and before[1] != after[1]
