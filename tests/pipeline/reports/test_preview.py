"""The contact sheet: which samples are on it, in what words, and when it is made again."""

import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from jobs.cli.main import main
from pipeline.errors import InputError
from pipeline.reports import preview
from schemas.settings import Recipe
from tests.helpers.stages import sharded

HOSTILE = '<script>alert("x")</script> & מזל'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Ten pictures in shards of four, three of them rejected; the folder and its settings."""
    root = tmp_path_factory.mktemp("run")
    with open(root / "all.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "split"])
        for n in range(13):
            name, split = f"p{n:02}.jpg", "train" if n < 10 else "test"
            buffer = io.BytesIO()
            pixels = np.full((40, 60, 3), 20 * n, np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG")
            (root / name).write_bytes(b"torn" if n in (3, 6, 7) else buffer.getvalue())
            table.writerow([name, HOSTILE if n == 0 else f"caption {n}", split])
    source = {"kind": "csv", "path": str(root / "all.csv"), "images": str(root)}
    recipe = Recipe(name="t", source=source, shard={"samples": 4})
    sharded(recipe, root)
    return str(root), recipe


def captions(page: str) -> list[str]:
    return re.findall(r'<ul><li dir="auto">(.*?)</li>', page)


def test_all_samples_are_shown_when_there_are_few(run):
    page = preview.html(run[0], "train", 100)
    assert len(captions(page)) == 7 == page.count("data:image/jpeg;base64,")
    assert "7 samples with 7 captions in" in page and "3 shards" in page
    assert all(f"train-00000{n}" in page for n in range(3))


def test_of_many_some_are_shown_evenly_spaced_and_always_the_same(run):
    every, some = (captions(preview.html(run[0], "train", n)) for n in (7, 4))
    assert some == [every[n] for n in (0, 2, 4, 6)]
    assert preview.html(run[0], "train", 4) == preview.html(run[0], "train", 4)


def test_captions_are_escaped_and_nothing_is_loaded_from_elsewhere(run):
    page = preview.html(run[0], "train", 100)
    assert "<script" not in page and "&lt;script&gt;" in page and "מזל" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_what_was_rejected_is_told_with_its_reason(run):
    page = preview.html(run[0], "train", 1)
    table = page[page.index("<h2>Rejected</h2>") :]
    assert re.search(r"3 × not an image", table)
    for n in (3, 6, 7):
        assert f"p{n:02}" in table and f"caption {n}" in table
    assert "<h2>Rejected</h2>" not in preview.html(run[0], "test", 1)


def test_features_are_told_by_their_shape(tmp_path):
    np.save(tmp_path / "train_ims.npy", np.ones((3, 4, 8), np.float32))
    (tmp_path / "train_caps.txt").write_text("".join(f"caption {n}\n" for n in range(15)))
    recipe = Recipe(name="t", source={"kind": "precomp", "path": str(tmp_path)})
    root = str(tmp_path / "run")
    sharded(recipe, root)
    page = preview.html(root, "train", 5)
    assert page.count("features 4 × 8") == 3 and "<img" not in page


def test_a_split_that_is_not_there_is_a_sentence(run):
    with pytest.raises(InputError, match="no split 'tset'.*did you mean 'test'"):
        preview.html(run[0], "tset", 5)


def test_the_command_makes_the_page_once(run, ray_here, capsys):
    root, recipe = run
    argv = ["--recipe", "drawn_tiny", "--root", root, "--split", "test", "--images", "2", "--json"]
    stages = []
    for _ in range(2):
        main("preview", argv)
        stages.append(json.loads(capsys.readouterr().out.splitlines()[-1])["models"]["main"])
    assert [stage["preview"]["made"] for stage in stages] == [1, 0]
    with pytest.raises(SystemExit) as end:
        main("preview", [*argv[:-3], "--images", "none"])
    assert end.value.code == 2 and "--images none is no count" in capsys.readouterr().err
