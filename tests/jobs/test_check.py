"""halftone check: what a source holds, said before anything is written."""

import io
import json
import os
import tarfile

import pytest
from PIL import Image

from jobs.cli import main


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "abcdef":
        Image.new("RGB", (20, 10), (ord(name), 0, 0)).save(folder / f"{name}.jpg")
    return folder


def checked(*argv, capsys, root) -> tuple[int, dict]:
    """The exit status and what --json prints."""
    before = sorted(os.listdir(root))
    try:
        main.main("check", [*map(str, argv), "--json", "--root", str(root / "run")])
        status = 0
    except SystemExit as end:
        status = end.code
    assert sorted(os.listdir(root)) == before, "nothing is written"
    return status, json.loads(capsys.readouterr().out)


def test_counts_samples_and_what_was_passed_over(pictures, tmp_path, capsys):
    for name in "abcde":
        (pictures / f"{name}.txt").write_text(f"picture {name}\nthe {name}\n")
    (pictures / "notes.heic").write_text("no picture")
    status, found = checked(pictures, capsys=capsys, root=tmp_path)
    assert (status, found["kind"]) == (0, "folder")
    assert (found["images"], found["captions"], found["splits"]) == (6, 10, {"train": 6})
    assert found["samples"][0]["holds"] == "20 × 10"
    assert found["samples"][0]["captions"] == ["picture a", "the a"]
    assert found["passed_over"] == ["files that are no images: 1, the first notes.heic"]
    assert found["told"] == ["splits: all is train, as nothing says one"]
    assert "images without a caption: 1, the first f" in found["looks_wrong"]
    assert "all images are in one split, train" in found["looks_wrong"]


def test_what_looks_wrong_is_said(pictures, tmp_path, capsys):
    rows = [
        "image,caption,split,id",
        *(
            f"{n}.jpg,a photo,{s},{k}.5"
            for k, (n, s) in enumerate(
                zip("abcdef", ("train", "train", "train", "Test", "test", "dev"), strict=True)
            )
        ),
    ]
    (pictures / "t.csv").write_text(
        "\n".join([*rows, "gone.jpg,Ã©t,train,9.5", "A.jpg,,train,8.5"])
    )
    how = ("--source.kind", "csv", "--source.id_column", "id")
    status, found = checked(pictures / "t.csv", *how, capsys=capsys, root=tmp_path)
    assert status == 0 and found["splits"] == {"train": 5, "test": 2, "val": 1}
    said = "\n".join(found["looks_wrong"])
    for part in (
        "captions that are all equal: 6 of 7, 'a photo'",
        "captions that were decoded wrongly once: 1, the first Ã©t",
        "files missing: 2, the first ",
        "ids that look like numbers with a fraction: 8, the first 0.5",
        "empty captions: 1, the first 8.5#0",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("captions_val2017.json", "coco"), ("dataset.json", "karpathy"), ("list.json", "csv"),
        ("t.tsv.gz", "csv"), ("0.tar", "webdataset"), ("Flickr8k.token.txt", "flickr_tokens"),
        ("hf://me/data", "huggingface"), ("features", "precomp"), ("tars", "webdataset"),
        ("saved", "huggingface"), ("pictures", "folder"),
    ],
)  # fmt: skip
def test_the_kind_of_a_source_is_seen(name, kind, pictures, tmp_path):
    from pipeline import sources

    texts = {
        "captions_val2017.json": '{"images": [], "annotations": []}',
        "dataset.json": '{"images": [{"filename": "a.jpg", "sentences": []}]}',
        "list.json": '[{"image": "a.jpg"}]',
    }
    for file in ("captions_val2017.json", "dataset.json", "list.json", "t.tsv.gz", "0.tar",
                 "Flickr8k.token.txt"):  # fmt: skip
        (tmp_path / file).write_text(texts.get(file, ""))
    for folder, file in (("features", "train_ims.npy"), ("tars", "0.tar"), ("saved", "state.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("")
    assert sources.kind_of(name if "://" in name else str(tmp_path / name)) == kind


def test_a_source_of_which_nothing_can_be_used_cannot_be_read(tmp_path, capsys):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO(b""))
    status, found = checked(tmp_path / "0.tar", capsys=capsys, root=tmp_path)
    assert status == 1 and found["told"] == []
    assert "none of 1 images can be used, the first: a sample without" in found["errors"][0]


def test_what_cannot_be_read_ends_with_a_sentence(pictures, tmp_path, capsys):
    (pictures / "t.csv").write_text("image,caption\na.jpg,red, white\n")
    status, found = checked(pictures / "t.csv", capsys=capsys, root=tmp_path)
    assert status == 1
    assert "line 2 has 3 cells, the header has 2" in found["errors"][0]
    with tarfile.open(tmp_path / "torn.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    data = (tmp_path / "torn.tar").read_bytes()
    (tmp_path / "torn.tar").write_bytes(data[:700])
    status, found = checked(tmp_path / "torn.tar", capsys=capsys, root=tmp_path)
    assert status == 1 and "torn.tar" in found["errors"][0]
