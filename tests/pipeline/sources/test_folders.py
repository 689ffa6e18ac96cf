"""COCO's caption files, and folders of images with texts beside them."""

import gzip
import json

import fsspec
import pytest

from pipeline.sources import notes, source
from schemas.settings import SourceSettings
from tests.helpers.paths import DATA
from tests.pipeline.sources.test_formats import captions, refused, rows_of, write_json

COCO5K = DATA / "coco5k"


def coco(image_id=9, caption_id=100, name="000000000009.jpg", **image):
    """As much of a COCO file as a caption file of one image has."""
    image = {"id": image_id, "file_name": name, "width": 640, "height": 480} | image
    annotations = [
        {"image_id": image_id, "id": caption_id + k, "caption": text}
        for k, text in enumerate(("A dog.", "Two\ndogs."))
    ]
    return {"info": {}, "licenses": [], "images": [image], "annotations": annotations}


def write_coco(folder, content, name="captions_val2017.json"):
    return write_json(folder, content).rename(folder / name)


def test_coco_files_are_splits_and_find_their_folders(tmp_path):
    (tmp_path / "images" / "train2017").mkdir(parents=True)
    write_coco(tmp_path, coco(), "captions_train2017.json")
    write_coco(tmp_path, coco(7, 200, "000000000007.jpg"), "captions_val2017.json")
    train, val = rows_of("coco", f"{tmp_path}/captions_*.json", tmp_path / "images")
    assert train == {
        "image_id": "000000000009",
        "uri": f"{tmp_path}/images/train2017/000000000009.jpg",
        "split": "train",
        "captions": [
            {"caption_id": "100", "text": "A dog.", "problem": None},
            {"caption_id": "101", "text": "Two\ndogs.", "problem": None},
        ],
        "width": None,
        "height": None,
        "sha256": None,
        "source": "coco",
        "stamp": None,
        "problem": None,
    }
    assert val["split"] == "val"
    assert val["uri"] == f"{tmp_path}/images/000000000007.jpg", "there is no val2017 folder"


def test_coco_images_without_a_folder_are_fetched_from_coco(tmp_path):
    url = "http://images.cocodataset.org/val2017/000000000009.jpg"
    path = write_coco(tmp_path, coco(coco_url=url))
    assert [row["uri"] for row in rows_of("coco", path)] == [url]
    sentence = refused("coco", write_coco(tmp_path, coco()))
    assert "source.images is not given, and" in sentence
    assert "captions_val2017.json image 9 has no 'coco_url'" in sentence


def test_a_coco_image_without_captions_is_kept_for_the_shard_stage_to_refuse(tmp_path):
    content = coco() | {"annotations": []}
    assert captions(rows_of("coco", write_coco(tmp_path, content), tmp_path)[0]) == []


def test_a_coco_file_whose_name_says_no_split_needs_one(tmp_path):
    path = write_coco(tmp_path, coco(), "annotations.json")
    assert "says no split (train, val, test); set source.split" in refused("coco", path, tmp_path)
    assert rows_of("coco", path, tmp_path, split="test")[0]["split"] == "test"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": None}, "has no list 'images'"),
        ({"annotations": {}}, "has no list 'annotations'"),
        ({"images": [{"file_name": "9.jpg"}]}, "image 0 has no id"),
        ({"images": [{"id": 9, "file_name": "9.jpg"}] * 2}, "image 1 has id 9, as an earlier one"),
        (
            {"annotations": [{"id": 1, "image_id": 8, "caption": ""}]},
            "is a caption of one of its images",
        ),
        ({"annotations": ["a dog"]}, "annotation 0 is no record"),
    ],
)
def test_coco_says_what_is_wrong_and_where(change, sentence, tmp_path):
    assert sentence in refused("coco", write_coco(tmp_path, coco() | change), tmp_path)


def test_one_bad_entry_of_coco_is_set_aside_and_the_rest_is_read(tmp_path):
    content = coco()
    content["images"] += [{"id": "10"}, {"id": 11.0, "file_name": "11.jpg"}]
    content["annotations"] += [
        {"id": 1, "image_id": 9, "caption": None},
        {"id": 2, "image_id": 9},
        {"id": 3, "image_id": 9, "caption": "a \ud83d dog"},
        {"id": 4, "image_id": 77, "caption": "of nobody"},
        {"id": "5", "image_id": "11", "caption": "A cat."},
    ]
    with notes.collected() as passed:
        first, second, third = rows_of("coco", write_coco(tmp_path, content), tmp_path)
    assert [(c["text"], bool(c["problem"])) for c in first["captions"]] == [
        *(("A dog.", False), ("Two\ndogs.", False), ("", True), ("", True), ("", True))
    ]
    assert second["problem"].startswith("no file name: ")
    assert captions(third) == [("5", "A cat.")]
    assert passed["captions that cannot be told whose they are"][0] == 1


def test_coco_files_that_number_from_nought_share_no_ids(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path, coco(0, 0, "0.jpg"), f"captions_{split}.json")
    first, second = rows_of("coco", f"{tmp_path}/captions_*.json", tmp_path)
    assert (first["image_id"], second["image_id"]) == ("captions_train/0", "captions_val/0")
    assert captions(second)[1] == ("captions_val#1", "Two\ndogs.")
    write_coco(tmp_path, coco(0, 0, "1.jpg"), "captions_val.json")
    first, second = rows_of("coco", f"{tmp_path}/captions_*.json", tmp_path)
    assert (first["image_id"], second["image_id"]) == ("0", "1"), "only what is shared is prefixed"
    assert captions(first)[0][0] == "captions_train#0"


@pytest.mark.parametrize("name", ["a/0.jpg", "a\\0.jpg", "./a/0.jpg", " a/0.jpg", "{}/a/0.jpg"])
def test_coco_names_files_as_other_systems_do(name, tmp_path):
    write_files(tmp_path, a__0_jpg="image")
    path = write_coco(tmp_path, coco(name=name.format(tmp_path)))
    (row,) = rows_of("coco", path, tmp_path)
    assert row["uri"] == f"{tmp_path}/a/0.jpg" and row["stamp"]


def test_all_captions_of_coco_val2017(tmp_path):
    """The 25,014 real ones, put back into the form they were published in."""
    # Other people's data is no part of the repository: it lies beside a checkout, or nowhere.
    if not COCO5K.is_dir():
        pytest.skip(f"COCO's captions are not at {COCO5K}")
    with gzip.open(COCO5K / "val2017_captions.jsonl.gz", "rt") as file:
        entries = [json.loads(line) for line in file]
    images, annotations = {}, []
    for entry in entries:
        images[entry["image_id"]] = f"{entry['image_id']:012d}.jpg"
        texts = entry.get("captions") or [entry["caption"]]
        annotations += [{"image_id": entry["image_id"], "caption": text} for text in texts]
    content = {
        "images": [{"id": id_, "file_name": name} for id_, name in images.items()],
        "annotations": [{"id": k, **entry} for k, entry in enumerate(annotations)],
    }
    rows = rows_of("coco", write_coco(tmp_path, content), tmp_path)
    assert len(rows) == 5000
    assert sum(len(row["captions"]) for row in rows) == len(annotations) == 25014


# ---- folder ------------------------------------------------------------------------------------


def write_files(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_folder_rows(tmp_path):
    write_files(
        tmp_path,
        b_jpg="image",
        b_txt="\ufeffA dog\r\n\n  \nTwo dogs\n",
        a_PNG="image",
        notes_txt="of no image",
        README_md="",
        dogs__b_heic="image",
        dogs__old__1_jpg="image",
        dogs__old__1_txt="An old dog",
        testtubes__2_jpg="image",
        train_station__1_webp="image",
        train_station__1_txt="A cat",
    )
    with notes.collected() as passed:
        rows = rows_of("folder", tmp_path)
    assert [(row["image_id"], row["split"]) for row in rows] == [
        *(("a", "train"), ("b", "train"), ("dogs/old/1", "train")),
        *(("testtubes/2", "train"), ("train.station/1", "train")),
    ]
    assert passed == {
        "captions beside no image": [1, "notes.txt"],
        "files that are no images": [2, "README.md"],
    }
    assert captions(rows[0]) == [], "the shard stage quarantines it"
    assert captions(rows[1]) == [("b#0", "A dog"), ("b#1", "Two dogs")]
    assert rows[2]["uri"] == f"{tmp_path}/dogs/old/1.jpg"
    parts = source("folder").parts(SourceSettings(kind="folder", path=str(tmp_path)))
    assert parts == [f"{tmp_path}{name}" for name in ("", "/dogs", "/testtubes", "/train.station")]
    assert {row["split"] for row in rows_of("folder", f"{tmp_path}/", split="test")} == {"test"}


def test_a_folder_of_a_store_reads_as_one_on_disk():
    memory = fsspec.filesystem("memory")
    for name in ("a.jpg", "more/b.jpg"):
        memory.pipe_file(f"/folder/{name}", b"image")
        memory.pipe_file(f"/folder/{name[:-4]}.txt", name.encode())
    rows = rows_of("folder", "memory://folder")
    assert [(row["image_id"], captions(row)[0][1]) for row in rows] == [
        *(("a", "a.jpg"), ("more/b", "more/b.jpg"))
    ]
    assert [source_bytes(row) for row in rows] == [b"image"] * 2


def source_bytes(row):
    from pipeline import sources

    return sources.load(row["source"], row["uri"], SourceSettings())


def test_links_are_followed_and_a_loop_is_told(tmp_path):
    write_files(tmp_path, dogs__1_jpg="image", dogs__1_txt="A dog")
    (tmp_path / "again").symlink_to(tmp_path / "dogs")
    (tmp_path / "2.jpg").symlink_to(tmp_path / "dogs" / "1.jpg")
    (tmp_path / "3.jpg").symlink_to(tmp_path / "nowhere.jpg")
    rows = rows_of("folder", tmp_path)
    assert [row["image_id"] for row in rows] == ["2", "3", "again/1", "dogs/1"]
    assert source_bytes(rows[0]) == b"image"
    assert captions(rows[2]) == [("again/1#0", "A dog")]
    with pytest.raises(FileNotFoundError):
        source_bytes(rows[1])
    (tmp_path / "dogs" / "loop").symlink_to(tmp_path)
    assert f"loop is a link back to {tmp_path}" in refused("folder", tmp_path)


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train/1", "val/2", "test/3"], ["test", "train", "val"]),
        (["train2017/1", "val2017/2", "Test-images/3"], ["test", "train", "val"]),
        (["images/training/1", "images/dev/2", "images/test set/3"], ["val", "test", "train"]),
    ],
)
def test_the_splits_of_a_folder_are_those_of_its_folders(names, split, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / f"{name}.jpg").write_text("image")
    assert [row["split"] for row in rows_of("folder", tmp_path)] == split
    (tmp_path / "loose.jpg").write_text("image")
    assert "says no split for 1 of its images" in refused("folder", tmp_path)
    rows = rows_of("folder", tmp_path, split="train")
    assert {row["split"] for row in rows} == {"train"}


def test_captions_are_found_as_other_programs_call_them(tmp_path):
    for image, text in (
        *(("IMG_1.JPG", "IMG_1.TXT"), ("q.jpg", "q.jpg.txt"), ("r.jpg", "r.txt")),
        *(("s.jfif", "s.txt"), ("t.jp2", "t.txt"), ("u.ppm", "u.txt")),
    ):
        (tmp_path / image).write_text("image")
        (tmp_path / text).write_text(f"of {image}")
    for hidden in ("._q.jpg", "._q.jpg.txt", ".DS_Store"):
        (tmp_path / hidden).write_text("none of it")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "1.jpg").write_text("none of it")
    found = {
        row["image_id"]: [text for _, text in captions(row)] for row in rows_of("folder", tmp_path)
    }
    assert found == {
        **{"IMG_1": ["of IMG_1.JPG"], "q": ["of q.jpg"], "r": ["of r.jpg"]},
        **{"s": ["of s.jfif"], "t": ["of t.jp2"], "u": ["of u.ppm"]},
    }
    (tmp_path / "r.caption").write_text("another")
    rows = rows_of("folder", tmp_path, caption_ending=".caption")
    assert [captions(row) for row in rows if row["captions"]] == [[("r#0", "another")]]


def test_a_changed_text_and_a_new_image_change_their_part_alone(tmp_path):
    write_files(tmp_path, a_jpg="", a_txt="one", dogs__b_jpg="", dogs__b_txt="two")
    module, settings = source("folder"), SourceSettings(kind="folder", path=str(tmp_path))

    def stamps():
        return [module.inputs(settings, part) for part in module.parts(settings)]

    before = stamps()
    write_files(tmp_path, dogs__b_jpg="another picture")
    assert stamps() == before, "what an image holds is its row's to say"
    write_files(tmp_path, dogs__b_txt="two!")
    root, dogs = stamps()
    assert root == before[0] and dogs != before[1]
    write_files(tmp_path, c_jpg="")
    assert stamps() != [root, dogs]


def test_a_folder_says_what_it_cannot_read(tmp_path):
    (tmp_path / "file.txt").write_text("")
    assert "file.txt is a file; expected a folder of images" in refused(
        "folder", tmp_path / "file.txt"
    )
    write_files(tmp_path, a_jpg="")
    (tmp_path / "a.txt").write_bytes(b"A dog\nCaf\xe9\n")
    assert "a.txt line 2 is not UTF-8" in refused("folder", tmp_path)
