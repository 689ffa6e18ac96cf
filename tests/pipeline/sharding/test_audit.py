"""Duplicates: which pictures and captions are found alike, and what the exclusion list does."""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from jobs.cli.main import main
from pipeline.sharding.checks import audit
from pipeline.sharding.checks.hashes import (
    equal_pairs,
    first_of,
    near_pairs,
    normalised,
    of_picture,
    originals,
)
from schemas.settings import Recipe
from tests.helpers.stages import finish, sharded

# ---- hashes ------------------------------------------------------------------------------------


def scene(seed: int, side: int = 192) -> Image.Image:
    """A picture with shapes and colours of its own."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def reopened(image: Image.Image, kind: str, **how) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, kind, **how)))


ALIKE = {
    "JPEG": lambda im: reopened(im, "JPEG", quality=40),
    "WebP": lambda im: reopened(im, "WEBP", quality=50),
    "half the size": lambda im: im.resize((96, 96)),
    "squashed": lambda im: im.resize((192, 120)),
    "brighter": lambda im: im.point(lambda v: min(255, int(v * 1.05))),
    "blurred": lambda im: im.filter(ImageFilter.GaussianBlur(1)),
}
OTHERS = {
    "mirrored": lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned": lambda im: im.transpose(Image.Transpose.ROTATE_90),
    "inverted": lambda im: im.point(lambda v: 255 - v),
    "another": lambda im: scene(99),
}


def bits(a: Image.Image, b: Image.Image) -> int:
    a, b = (of_picture(image).perceptual for image in (a, b))
    return (a ^ b).bit_count()


@pytest.mark.parametrize("seed", range(3))
def test_a_picture_is_near_its_copies_and_far_from_others(seed):
    image = scene(seed)
    assert {name: b for name, make in ALIKE.items() if (b := bits(image, make(image))) > 6} == {}
    assert {n: b for n, make in OTHERS.items() if (b := bits(image, make(image))) <= 12} == {}


def test_the_same_pixels_in_other_files_have_the_same_exact_hash():
    image = scene(1)
    hashes = [of_picture(reopened(image, kind)) for kind in ("PNG", "BMP", "TIFF")]
    assert len(set(hashes)) == 1
    assert of_picture(image.resize((96, 384))).pixels != hashes[0].pixels


@pytest.mark.parametrize("colour", ["white", "black", "#445566"])
def test_a_flat_picture_has_no_shapes_to_compare(colour):
    assert of_picture(Image.new("RGB", (40, 30), colour)).perceptual is None


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("A dog runs .", "a dog  runs", True),
        ("A DOG, running!", "a dog running", True),
        ("ﬁne café", "fine cafe\u0301", True),
        ("a dog", "a cat", False),
        ("🐕", "🐈", False),
        ("two_dogs", "two dogs", True),
    ],
)
def test_captions_are_compared_without_case_punctuation_and_spacing(one, other, same):
    assert (normalised(one) == normalised(other)) is same


# ---- pairs, against brute force ----------------------------------------------------------------


def clustered(rng, rows: int) -> np.ndarray:
    """Hashes of which many are a few bits apart, and some equal."""
    centres = rng.integers(0, 2**64, 1 + rows // 4, dtype=np.uint64)
    hashes = centres[rng.integers(0, len(centres), rows)]
    for _ in range(int(rng.integers(0, 8))):
        flip = np.uint64(1) << rng.integers(0, 64, rows, dtype=np.uint64)
        hashes = np.where(rng.random(rows) < 0.5, hashes ^ flip, hashes)
    return hashes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 120), st.integers(0, 10))
def test_near_pairs_are_all_those_of_a_double_loop(seed, rows, distance):
    hashes = clustered(np.random.default_rng(seed), rows)
    i, j = near_pairs(hashes, distance)
    found = list(zip(i.tolist(), j.tolist(), strict=True))
    numbers = [int(h) for h in hashes]
    expected = {
        (a, b)
        for b in range(rows)
        for a in range(b)
        if (numbers[a] ^ numbers[b]).bit_count() <= distance
    }
    assert len(found) == len(set(found)) and set(found) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=40))
def test_equal_pairs_join_all_copies_and_nothing_else(rows):
    keys, splits = (np.array([row[n] for row in rows], np.int64) for n in (0, 1))
    i, j = equal_pairs(keys, first_of(keys, splits))
    pairs = set(zip(i.tolist(), j.tolist(), strict=True))
    assert all(a < b and keys[a] == keys[b] for a, b in pairs)
    assert len(pairs) == len(i) <= 3 * len(rows)
    # Every row has a pair with the first row of its key, or is it; every split's first too.
    for row in range(len(rows)):
        first = {s: np.flatnonzero((keys == keys[row]) & (splits == s)) for s in range(3)}
        firsts = [places[0] for places in first.values() if len(places)]
        mine = first[splits[row]][0]
        assert row == mine or (mine, row) in pairs
        assert all((min(a, mine), max(a, mine)) in pairs for a in firsts if a != mine)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda p: p[0] < p[1])))
def test_what_stays_has_no_like_and_what_leaves_is_left_out_for_one_that_stays(pairs):
    i, j = (np.array([pair[n] for pair in pairs], np.int64) for n in (0, 1))
    like = originals(12, i, j)
    stays = {row for row in range(12) if like[row] < 0}
    assert not any(a in stays and b in stays for a, b in pairs)
    for row in set(range(12)) - stays:
        assert like[row] in stays and (like[row], row) in pairs


def test_a_hundred_thousand_hashes_are_not_compared_each_with_each():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[:50] = hashes[50:100] ^ np.uint64(0b111)
    i, j = near_pairs(hashes, 6)
    assert set(zip(range(50), range(50, 100), strict=True)) <= set(
        zip(i.tolist(), j.tolist(), strict=True)
    )


# ---- an audited run ----------------------------------------------------------------------------


def rotated(image: Image.Image) -> Image.Image:
    """The same shapes in other colours."""
    r, g, b = image.split()
    return Image.merge("RGB", (b, r, g))


def pictures() -> list[tuple[str, bytes, str, str]]:
    """(name, bytes, split, caption) of a set with known duplicates."""
    s = {n: scene(n) for n in range(1, 9)}
    return [
        ("train1.png", encoded(s[1]), "train", "first picture"),
        ("train1copy.png", encoded(s[1], optimize=True, compress_level=1), "train", "A copy."),
        ("train2.png", encoded(s[2]), "train", "second picture"),
        ("train3.jpg", encoded(s[3], "JPEG", quality=50), "train", "third"),
        ("train4.png", encoded(s[4]), "train", "in all splits"),
        ("val4.png", encoded(s[4]), "val", "In all splits!"),
        ("test4.jpg", encoded(s[4], "JPEG", quality=60), "test", "in all  splits"),
        ("test3.png", encoded(s[3]), "test", "the third one"),
        ("test5.png", encoded(s[5]), "test", "fifth"),
        ("train6.png", encoded(s[6]), "train", "sixth"),
        ("train6mirror.png", encoded(OTHERS["mirrored"](s[6])), "train", "mirror"),
        ("train7white.png", encoded(Image.new("RGB", (30, 30), "white")), "train", "white"),
        ("test7white.png", encoded(Image.new("RGB", (40, 40), "white")), "test", "nothing"),
    ]


EXACT = {("train1copy", "train1"), ("train4", "val4")}
NEAR = {("train3", "test3"), ("train4", "test4"), ("val4", "test4")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with open(folder / "all.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for name, content, split, caption in pictures():
            (folder / name).write_bytes(content)
            writer.writerow([name, caption, split])
    return folder


def recipe_of(data: Path, **sections) -> Recipe:
    return Recipe(
        name="t",
        source={"kind": "csv", "path": str(data / "all.csv"), "images": str(data)},
        **{"shard": {"samples": 3}} | sections,
    )


def audited(recipe: Recipe, root) -> tuple[list[dict], list[dict], dict]:
    """The rows of both tables, and the shards' index."""
    index = sharded(recipe, root)
    plan = audit.plan(recipe, str(root))
    finish(plan, audit.write_hashes)
    audit.write(plan, recipe, str(root))
    files = ("duplicates.csv", "exclusions.csv")
    return *(list(csv.DictReader(open(Path(root) / "audit" / f))) for f in files), index


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return root, *audited(recipe_of(data), root)


def pairs(rows: list[dict], kind: str) -> set:
    return {(row["id"].split(".")[0], row["like"].split(".")[0]) for row in rows
            if row["kind"] == kind}  # fmt: skip


def test_copies_are_found_with_the_one_that_is_kept(run):
    _, duplicates, _, _ = run
    order = {"test": 0, "val": 1, "train": 2}
    assert pairs(duplicates, "exact copy") == EXACT
    assert pairs(duplicates, "near copy") == NEAR
    for row in duplicates:
        assert order[row["like_split"]] <= order[row["split"]]
        assert row["shard"].startswith(row["split"]) and row["evidence"]


def test_other_colours_are_no_near_copy(data, tmp_path):
    image = scene(11)
    pair = of_picture(image), of_picture(rotated(image))
    assert pair[0].colours != pair[1].colours
    hashes = np.array([p.colours for p in pair])
    off = np.abs(np.subtract(*(np.frombuffer(h, np.uint8).astype(int) for h in hashes))).mean()
    assert off > audit.COLOURS


def test_train_copies_leave_and_captions_stay_unless_asked(run):
    _, _, listed, _ = run
    gone = {(row["kind"], row["id"].split(".")[0]): row for row in listed}
    assert set(gone) == {("image", n) for n in ("train1copy", "train3", "train4", "val4")}
    row = gone["image", "train3"]
    assert row["like"] and row["split"] == "train"
    assert row["reason"].startswith("near copy of test3") and row["reason"].endswith("(test)")


def test_captions_are_reported_and_excluded_when_asked(run, data, tmp_path):
    _, duplicates, _, _ = run
    same = [row for row in duplicates if row["kind"] == "same caption"]
    assert {row["evidence"] for row in same} == {"in all splits"}
    assert {(row["split"], row["like_split"]) for row in same} == {
        ("train", "val"), ("train", "test"), ("val", "test")}  # fmt: skip
    recipe = recipe_of(data, audit={"exclude_captions": True})
    _, listed, _ = audited(recipe, tmp_path)
    assert sorted(r["split"] for r in listed if r["kind"] == "caption") == ["train", "val"]


def test_what_is_excluded_is_gone_from_the_shards_and_stays_on_the_list(run, data, tmp_path):
    root, _, listed, index = run
    uri = str(root / "audit/exclusions.csv")
    recipe = recipe_of(data, shard={"samples": 3, "exclude": uri})
    duplicates, again, less = audited(recipe, tmp_path)
    images = sum(entry["samples"] for entry in index["pieces"])
    assert sum(entry["samples"] for entry in less["pieces"]) == images - len(listed)
    assert not pairs(duplicates, "exact copy") and not pairs(duplicates, "near copy")
    keys = ("kind", "id", "split", "reason")
    told = [[{k: row[k] for k in keys} for row in rows] for rows in (listed, again)]
    assert sorted(told[0], key=str) == sorted(told[1], key=str)


def test_an_audit_reuses_hashes_and_hashes_only_new_shards(run, data, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    root = str(tmp_path / "run")
    assert not audit.plan(recipe_of(data), root).pending
    first = audit.plan(recipe_of(data), root).pieces[0]
    Path(first.output).unlink()
    assert [piece.name for piece in audit.plan(recipe_of(data), root).pending] == [first.name]
    assert not audit.plan(recipe_of(data, audit={"distance": 2}), root).complete


def test_a_smaller_distance_finds_fewer(run, data, tmp_path):
    root = run[0]
    plan = audit.plan(recipe_of(data), str(root))
    found = [len(audit.images(plan, distance).pairs) for distance in (0, 6, 10)]
    assert found == sorted(found) and found[0] < found[1]


def test_features_are_compared_by_their_bytes(tmp_path):
    rng = np.random.default_rng(0)
    for split, rows in (("train", 5), ("test", 3)):
        features = rng.normal(size=(rows, 4, 8)).astype(np.float32)
        if split == "test":
            features[1] = np.load(tmp_path / "train_ims.npy")[2]
        np.save(tmp_path / f"{split}_ims.npy", features)
        lines = [f"{split} {row} {k}" for row in range(rows) for k in range(5)]
        (tmp_path / f"{split}_caps.txt").write_text("\n".join(lines) + "\n")
    recipe = Recipe(name="t", source={"kind": "precomp", "path": str(tmp_path)})
    duplicates, listed, _ = audited(recipe, tmp_path / "run")
    (row,) = duplicates
    assert (row["kind"], row["split"], row["like_split"]) == ("exact copy", "train", "test")
    assert [r["id"] for r in listed] == [row["id"]]


def test_the_command_prints_a_table_and_says_what_to_do_next(run, data, tmp_path, ray_here, capsys):
    root = tmp_path / "run"
    shutil.copytree(run[0], root)
    shutil.rmtree(root / "audit")
    main("audit", ["--recipe", "drawn_tiny", "--root", str(root), "--distance", "0"])
    told = capsys.readouterr().out
    assert "exact copy" in told and "train and val" in told and "same caption" in told
    assert f"halftone shard --shard.exclude {root}/audit/exclusions.csv" in told
    listed = (root / "audit/exclusions.csv").read_text().splitlines()
    assert listed[0] == "kind,id,split,reason,like" and len(listed) > 2
