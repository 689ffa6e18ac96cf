"""Lint and repair: every way a shard can be broken is found, and mended to the same bytes."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli.main import main
from pipeline.errors import InputError
from pipeline.sharding import ingest, shard
from pipeline.sharding.checks import lint, repair
from pipeline.storage import parquet, run_folder, store
from schemas.settings import Recipe
from tests.helpers.stages import SCENES, finish, sharded

RECIPE = Recipe(name="t", source=SCENES, shard={"samples": 6})
SETTINGS = [f"--source.{name}={value}" for name, value in SCENES.items()]
COMMAND = ["--recipe", "drawn_tiny", *SETTINGS, "--shard.samples", "6"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    sharded(RECIPE, root)
    return root


@pytest.fixture
def root(sound, tmp_path) -> Path:
    """A run of one's own to spoil."""
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def linted(uri, **how) -> list[lint.Finding]:
    pieces, found = lint.plan(str(uri), **how)
    checked = {piece.name: lint.check(piece) for piece in pieces}
    return [*found, *(f for done in checked.values() for f in done["findings"])] + lint.across(
        checked
    )


def changed(file: Path, change) -> None:
    data = bytearray(file.read_bytes())
    file.write_bytes(change(data) or data)


def flipped(data: bytearray, at: int) -> None:
    data[at] ^= 0xFF


def first_member(root: Path, ending: str) -> int:
    """Where the first member with an ending begins in the first train tar."""
    with tarfile.open(root / "2-shards/train-000000.tar") as tar:
        return next(m for m in tar.getmembers() if m.name.endswith(ending)).offset_data


def on_index(root: Path, change) -> None:
    file = root / "2-shards/index.json"
    index = json.loads(file.read_text())
    change(index)
    index["version"] = run_folder.version(index["pieces"])
    file.write_text(json.dumps(index))


def on_sidecar(root: Path, change) -> None:
    """Other rows in a sidecar, recorded as if they had been written so."""
    uri = str(root / "2-shards/train-000000.parquet")
    table = parquet.read_table(uri)
    rows = table.to_pylist()
    change(rows)
    metadata = table.schema.metadata
    summary = json.loads(metadata[parquet.SUMMARY])
    new = table.from_pylist(rows, schema=table.schema.remove_metadata())
    written = parquet.write_table(uri, new, metadata[parquet.FINGERPRINT].decode(), summary)
    on_index(root, lambda index: index["pieces"][0].update(files=written["files"]))


# ---- runs --------------------------------------------------------------------------------------


def test_what_was_just_written_is_clean(sound):
    for uri in (sound, sound / "2-shards", sound / "2-shards/val-000000.tar"):
        assert linted(uri) == []
        assert linted(uri, decode=False) == []


TAR, SIDECAR, INDEX = "train-000000.tar", "train-000000.parquet", "index.json"
SPOILT = {
    "a tar cut inside a member": (
        lambda r: changed(r / f"2-shards/{TAR}", lambda d: d[: len(d) // 2]), TAR, "torn tar"),
    "a tar cut between members": (
        lambda r: changed(r / f"2-shards/{TAR}", lambda d: d[: first_member(r, "json") - 512]),
        TAR, "without the blocks that close a tar"),
    "an empty tar": (lambda r: (r / f"2-shards/{TAR}").write_bytes(b""), TAR, "torn tar"),
    "a header hit by a bit": (
        lambda r: changed(r / f"2-shards/{TAR}", lambda d: flipped(d, first_member(r, "txt") - 9)),
        TAR, "no member's header"),
    "a picture hit by a bit": (
        lambda r: changed(r / f"2-shards/{TAR}", lambda d: flipped(d, first_member(r, "g") + 99)),
        SIDECAR, "another sha256"),
    "a caption hit by a bit": (
        lambda r: changed(r / f"2-shards/{TAR}", lambda d: flipped(d, first_member(r, "txt"))),
        TAR, "cannot be used"),
    "another caption": (
        lambda r: changed(r / f"2-shards/{TAR}",
                          lambda d: d.__setitem__(first_member(r, "txt"), ord("X"))),
        SIDECAR, "described otherwise"),
    "a torn sidecar": (
        lambda r: changed(r / f"2-shards/{SIDECAR}", lambda d: d[:-50]), SIDECAR, "torn sidecar"),
    "no sidecar": (lambda r: (r / f"2-shards/{SIDECAR}").unlink(), SIDECAR, "missing sidecar"),
    "no tar": (lambda r: (r / f"2-shards/{TAR}").unlink(), TAR, "missing tar"),
    "neither": (lambda r: [(r / f"2-shards/{n}").unlink() for n in (TAR, SIDECAR)],
                TAR, "missing tar"),
    "a shard of another run": (
        lambda r: shutil.copy(r / f"2-shards/{TAR}", r / "2-shards/dev-000009.tar"),
        "dev-000009.tar", "does not name"),
    "no index": (lambda r: (r / f"2-shards/{INDEX}").unlink(), INDEX, "not finished"),
    "a torn index": (
        lambda r: changed(r / f"2-shards/{INDEX}", lambda d: d[:-50]), INDEX, "torn index"),
    "another version": (
        lambda r: changed(
            r / f"2-shards/{INDEX}", lambda d: d.replace(b'"contents": [', b'"contents": [0,')),
        INDEX, "its version"),
    "a wrong hash in the index": (
        lambda r: on_index(r, lambda i: i["pieces"][0]["files"][TAR].update(sha256="0" * 64)),
        TAR, "other bytes"),
    "a wrong count in the index": (
        lambda r: on_index(r, lambda i: i["pieces"][0].update(samples=5)), TAR,
        "6 samples in it, 5 recorded"),
    "a sample the sidecar does not know": (
        lambda r: on_sidecar(r, lambda rows: rows.pop()), SIDECAR, "not in the sidecar"),
    "a sample the tar does not have": (
        lambda r: on_sidecar(r, lambda rows: rows.append({**rows[0], "key": "new"})),
        TAR, "not in the tar"),
    "a wrong offset": (
        lambda r: on_sidecar(r, lambda rows: rows[2].update(offset=0)), SIDECAR, "another place"),
    "a sample of another split": (
        lambda r: on_sidecar(r, lambda rows: rows[0].update(split="val")), SIDECAR,
        "another split than train"),
    "another manifest": (
        lambda r: changed(r / "1-manifest/part-00000.parquet", lambda d: flipped(d, 30)),
        "part-00000.parquet", "other bytes"),
    "no index of the manifest": (
        lambda r: (r / "1-manifest/index.json").unlink(), "1-manifest/index.json", "not finished"),
    "a lost manifest": (
        lambda r: (r / "1-manifest/part-00000.parquet").unlink(), "part-00000.parquet", "missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_broken_is_found_in_its_file_with_what_to_do(root, name):
    spoil, file, what = SPOILT[name]
    spoil(root)
    mine = [f for f in linted(root) if f.file.endswith(f"/{file}") and what in f.what]
    assert mine, linted(root)
    assert all(f.do for f in mine)


def test_without_decoding_the_hash_still_tells(root):
    SPOILT["a picture hit by a bit"][0](root)
    assert any("another sha256" in f.what for f in linted(root, decode=False))


def test_one_spoilt_shard_is_the_only_one_named(root):
    SPOILT["a tar cut inside a member"][0](root)
    assert {f.shard for f in linted(root)} == {"train-000000"}
    assert [f.what.split(":")[0] for f in linted(root)] == ["other bytes", "torn tar"]


def test_ids_that_are_there_twice_and_pictures_of_two_splits_are_found(root):
    """A test picture, packed into train too, under its own id and under another one."""
    folder = root / "2-shards"
    for file in ("index.json", *(f.name for f in folder.glob("*.parquet"))):
        (folder / file).unlink()
    folder = folder.rename(root / "plain")
    shutil.copy(folder / "test-000000.tar", folder / "train-000007.tar")
    found = linted(folder)
    assert [f for f in found if "caption id that is there more than once" in f.what]
    data = (folder / "test-000000.tar").read_bytes()
    moved = data.replace(b'"split": "test"', b'"split": "tram"')
    (folder / "train-000007.tar").write_bytes(moved)
    assert [f for f in linted(folder) if "image id that is there more than once" in f.what]
    other = moved.replace(b'"test-', b'"copy-')
    with tarfile.open(fileobj=io.BytesIO(other)) as old:
        members = [(m.name, old.extractfile(m).read()) for m in old]
    packed(folder / "train-000007.tar", members)
    found = linted(folder)
    assert len(found) == 1 and "the same picture in test and tram" in found[0].what
    assert "(and 3 more)" in found[0].what


# ---- any tars ----------------------------------------------------------------------------------


def picture(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def packed(file: Path, members: list) -> Path:
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/hosts"
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file


GOOD = [("a.jpg", picture(0)), ("a.txt", b"a dog"), ("b.jpg", picture(1)), ("b.txt", b"a cat")]
FOREIGN = {
    "dot in the key": ([("c.1.jpg", picture(2)), ("c.1.txt", b"cow")], "'c' has .1.jpg, .1.txt"),
    "link": ([("c.jpg", None), ("c.txt", b"cow")], "no plain file"),
    "twice": ([("c.jpg", picture(2)), ("c.jpg", picture(3)), ("c.txt", b"cow")], "there twice"),
    "scattered": ([("a.json", b'{"caption": "dog"}')], "not adjacent"),
    "no picture": ([("c.txt", b"cow")], "without picture or features"),
    "no caption": ([("c.jpg", picture(2))], "a sample without caption"),
    "torn JPEG": ([("c.jpg", picture(2)[:-200]), ("c.txt", b"cow")], "cannot be used: 'c.jpg'"),
    "HTML": ([("c.jpg", b"<html>404</html>"), ("c.txt", b"cow")], "cannot be used: 'c.jpg'"),
    "empty picture": ([("c.jpg", b""), ("c.txt", b"cow")], "cannot be used: 'c.jpg'"),
    "pickled array": ([("c.npy", b"\x93NUMPY\x01\x00"), ("c.txt", b"cow")], "cannot be used"),
    "not UTF-8": ([("c.jpg", picture(2)), ("c.txt", b"\xff\xfe")], "cannot be used: 'c.txt'"),
    "empty caption": ([("c.jpg", picture(2)), ("c.txt", b" ")], "a sample without caption"),
    "torn JSON": ([("c.jpg", picture(2)), ("c.txt", b"cow"), ("c.json", b"{")], "'c.json'"),
    "JSON list": ([("c.jpg", picture(2)), ("c.txt", b"cow"), ("c.json", b"[]")], "no object"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_any_tar_is_checked(tmp_path, name):
    members, what = FOREIGN[name]
    file = packed(tmp_path / "00000.tar", GOOD + members)
    found = linted(file)
    assert any(what in f.what for f in found), found
    assert all(f.file == str(file) and f.do and "repair" not in f.do for f in found)


def test_good_tars_of_others_are_clean_alone_in_a_folder_and_in_folders(tmp_path):
    caption = json.dumps({"caption": "a cow", "key": "c"}).encode()
    members = [*GOOD, ("c.webp", webp()), ("c.json", caption)]
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    packed(tmp_path / "train/00000.tar", members[:2])
    packed(tmp_path / "val/00000.tar", members[2:])
    (tmp_path / "train/00000.parquet").write_bytes(b"some other tool's")
    assert (
        linted(tmp_path) == linted(tmp_path / "train") == linted(tmp_path / "val/00000.tar") == []
    )
    packed(tmp_path / "val/00001.tar", [("z.jpg", picture(0)), ("z.txt", b"a dog")])
    (overlap,) = linted(tmp_path)
    assert "the same picture in train and val: 'train/00000-a' is 'val/00001-z'" in overlap.what


def webp() -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(5))).save(buffer, "WEBP")
    return buffer.getvalue()


def test_findings_of_one_kind_are_counted_together(tmp_path):
    members = [m for k in "cdef" for m in ((f"{k}.jpg", b"x"), (f"{k}.txt", b"cow"))]
    (finding,) = linted(packed(tmp_path / "0.tar", members))
    assert "'c.jpg'" in finding.what and "(and 3 more)" in finding.what


@pytest.mark.parametrize("name", ["none", "none.tar"])
def test_nothing_to_look_at_is_a_sentence(tmp_path, name):
    with pytest.raises(InputError, match="no tar"):
        lint.plan(str(tmp_path / name))


# ---- the commands ------------------------------------------------------------------------------


def ended(command: str, argv: list[str]) -> int:
    try:
        main(command, argv)
    except SystemExit as end:
        return end.code or 0
    return 0


def test_lint_ends_with_0_when_clean_and_1_with_findings(root, ray_here, capsys):
    assert ended("lint", [str(root)]) == 0
    assert capsys.readouterr().out.strip() == "clean: 4 shards, 19 samples"
    (root / "2-shards/val-000000.tar").unlink()
    assert ended("lint", ["--root", str(root), "--recipe", "drawn_tiny", "--fast"]) == 1
    out = capsys.readouterr().out.strip().splitlines()
    assert "val-000000.tar: missing tar" in out[0] and out[-1].startswith("1 finding in")
    assert ended("lint", [str(root), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [set(f) for f in told["findings"]] == [{"file", "what", "do"}]


def sums(root: Path) -> dict[str, str]:
    folders = (root / "1-manifest", root / "2-shards")
    return {str(f.relative_to(root)): store.sha256(f.read_bytes())
            for folder in folders for f in folder.iterdir()}  # fmt: skip


BROKEN = [name for name in SPOILT if name not in (
    # Changed together with what is recorded of them, or not Halftone's to remove.
    "a shard of another run", "another version", "a wrong hash in the index",
    "a wrong count in the index", "a sample the sidecar does not know", "a wrong offset",
    "a sample the tar does not have", "a sample of another split", "another manifest",
)]  # fmt: skip


WRITE = {"ingest": ingest.write_part, "shard": shard.write_shard}


@pytest.mark.parametrize("name", BROKEN)
def test_repair_brings_back_the_same_bytes_and_touches_nothing_else(sound, root, name):
    SPOILT[name][0](root)
    before = {f: f.stat().st_mtime_ns for f in (root / "2-shards").glob("[tv]*")}
    broken = {f.shard for f in linted(root)}
    for stage, names in repair.broken(str(root), linted(root)).items():
        if names:
            recorded = repair.clear(RECIPE, str(root), stage, names)
            finish(repair.PLANS[stage](RECIPE, str(root)), WRITE[stage])
            verdicts = repair.verdicts(str(root), stage, recorded)
            assert set(verdicts.values()) <= {"as before"} and verdicts.keys() == recorded.keys()
    assert sums(root) == sums(sound)
    for file, modified in before.items():
        assert (file.stat().st_mtime_ns == modified) == (file.stem not in broken), file


def test_repair_refuses_other_settings_and_changes_nothing(root, ray_here, capsys):
    SPOILT["no tar"][0](root)
    before = sums(root)
    assert ended("repair", [*COMMAND, "--root", str(root), "--shard.seed", "5"]) == 2
    assert "made with other settings" in capsys.readouterr().err
    assert ended("repair", [*COMMAND, "--root", str(root), "--dry-run"]) == 0
    assert "would make again: train-000000" in capsys.readouterr().err
    assert sums(root) == before


def test_the_command_repairs_what_it_can_and_says_what_it_cannot(sound, root, ray_here, capsys):
    for name in ("a tar cut inside a member", "a lost manifest", "a shard of another run"):
        SPOILT[name][0](root)
    (root / "2-shards/val-000000.parquet").unlink()
    assert ended("repair", [*COMMAND, "--root", str(root)]) == 1
    told = capsys.readouterr()
    pieces = ("part-00000", "train-000000", "val-000000")
    assert told.out.splitlines() == [f"{piece}: made again, as before" for piece in pieces]
    assert "dev-000009.tar: a shard that the index does not name; remove it" in told.err
    (root / "2-shards/dev-000009.tar").unlink()
    assert sums(root) == sums(sound)
    assert ended("repair", [*COMMAND, "--root", str(root)]) == 0
    assert "clean: 4 shards, 19 samples; nothing to repair" in capsys.readouterr().err


def test_a_source_that_changed_is_told(root):
    recorded = repair.clear(RECIPE, str(root), "shard", {"train-000000"})
    finish(shard.plan(RECIPE, str(root)), shard.write_shard)
    recorded["train-000000"]["train-000000.tar"]["sha256"] = "0" * 64
    assert repair.verdicts(str(root), "shard", recorded) == {"train-000000": "other bytes"}
