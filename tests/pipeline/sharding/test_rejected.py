"""What is rejected: where it is written, when a stage stops, what is tried again or left out."""

import csv
import io
import json
import tarfile
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sharding import loading, shard, sidecar
from pipeline.storage import run_folder, store
from schemas.settings import Recipe
from tests.helpers.datasets import (
    checked,
    drawn,
    files,
    from_files,
    member,
    picture,
    piece,
    samples,
    table_of,
    with_shard,
    written,
)
from tests.helpers.stages import ingested, make_here, sharded


def break_files(folder) -> dict[str, str]:
    """Kind of the reason of each kind of bad sample."""
    good = picture(folder / "good.jpg", size=(64, 48)).read_bytes()
    (folder / "truncated.jpg").write_bytes(good[:-500])
    Image.open(folder / "truncated.jpg").verify()  # which does not see it
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404 not found</html>")
    picture(folder / "large.jpg", size=(100, 90))
    picture(folder / "blank.jpg")
    picture(folder / "nul.jpg")
    return {
        "truncated": "image does not decode",
        "empty": "empty file",
        "text": "not an image",
        "missing": "file missing",
        "large": "too many pixels",
        "blank": "empty caption",
        "nul": "caption with a NUL byte",
    }


BAD_CAPTIONS = {"blank": "   ", "nul": "a\x00dog"}
BAD = ["truncated", "empty", "text", "missing", "large", "blank", "nul"]
ROWS = [("good.jpg", "good"), *((f"{bad}.jpg", BAD_CAPTIONS.get(bad, "bad")) for bad in BAD)]


def rejected_csv(root) -> list[dict]:
    with open(Path(root) / "2-shards" / "rejected.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- the sidecar, the index, the table ---------------------------------------------------------


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_sample_is_rejected_with_its_reason_and_the_others_are_kept(tmp_path, bad):
    reason = break_files(tmp_path)[bad]
    rows = [("good.jpg", "good"), (f"{bad}.jpg", BAD_CAPTIONS.get(bad, "bad"))]
    found = from_files(tmp_path, rows, max_pixels=5000, failure_budget=0.5)
    by_id = {row["image_id"]: row for row in found}
    assert by_id["good"]["reason"] is None and by_id["good"]["key"] == "good"
    assert by_id[bad]["reason"].startswith(f"{reason}:")
    assert by_id[bad]["key"] is by_id[bad]["member"] is by_id[bad]["offset"] is None
    with tarfile.open(found[0]["tar"]) as tar:
        assert tar.getnames() == ["good.jpg", "good.txt", "good.json"]
    entry = run_folder.read_index(f"{tmp_path}/run/2-shards")["pieces"][0]
    assert entry["samples"] == 1 and entry["rejected"] == {reason: 1}
    accepted = sidecar.read_sidecar(found[0]["tar"].replace(".tar", ".parquet"), ["image_id"])
    assert accepted.to_pylist() == [{"image_id": "good"}]


def test_the_table_of_what_was_rejected_names_shard_sample_reason_and_file(tmp_path):
    break_files(tmp_path)
    rows = [("good.jpg", "good"), ("good.jpg", " "), ("missing.jpg", "bad")]
    from_files(tmp_path, rows, failure_budget=0.5)
    uri = f"{tmp_path}/missing.jpg"
    caption, image = sorted(rejected_csv(tmp_path / "run"), key=lambda row: row["image_id"])
    assert caption["caption_id"] == "good#1" and caption["reason"] == "empty caption: good#1"
    assert image == {
        "shard": "train-000000",
        "image_id": "missing",
        "caption_id": "",
        "reason": f"file missing: {uri}",
        "uri": uri,
    }


def test_a_run_that_rejects_nothing_leaves_no_table(tmp_path):
    picture(tmp_path / "a.jpg")
    from_files(tmp_path, [("a.jpg", "a"), ("a.jpg", " ")])
    assert "rejected.csv" in files(tmp_path / "run")
    from_files(tmp_path, [("a.jpg", "a")])
    assert "rejected.csv" not in files(tmp_path / "run")


def test_captions_lose_needless_blanks_and_bad_ones_are_left_out(tmp_path):
    picture(tmp_path / "a.jpg")
    texts = ["  ", " a\n dog\t", "été", "a\x00cat", "x" * 50]
    (row,) = from_files(tmp_path, [("a.jpg", text) for text in texts], max_caption_chars=20)
    assert row["captions"] == [
        {"caption_id": "a#1", "text": "a dog"},
        {"caption_id": "a#2", "text": "été"},
    ]
    reasons = [caption["reason"] for caption in row["captions_rejected"]]
    kinds = ["empty caption", "caption with a NUL byte", "caption too long"]
    assert [reason.split(":")[0] for reason in reasons] == kinds
    (sample,) = webdataset.WebDataset(row["tar"], shardshuffle=False)
    assert sample["txt"] == b"a dog" and json.loads(sample["json"])["captions"] == row["captions"]
    (entry,) = run_folder.read_index(f"{tmp_path}/run/2-shards")["pieces"]
    assert entry["captions"] == 2 and entry["captions_rejected"] == dict.fromkeys(kinds, 1)
    assert entry["rejected"] == {}


# ---- budgets -----------------------------------------------------------------------------------


def test_more_bad_samples_than_the_budget_stop_the_stage_with_counts_and_the_table(tmp_path):
    break_files(tmp_path)
    with pytest.raises(InputError) as error:
        from_files(tmp_path, ROWS, max_pixels=5000, failure_budget=0.8)
    assert "7 of 8 samples were rejected (1 × " in str(error.value)
    assert "failure_budget 0.8" in str(error.value)
    assert f"{tmp_path}/run/2-shards/rejected.csv" in str(error.value)
    assert len(rejected_csv(tmp_path / "run")) == 7 + 2  # two of them for their only caption
    found = from_files(tmp_path, ROWS, max_pixels=5000, failure_budget=0.9)
    assert len([row for row in found if row["reason"]]) == 7


def test_failures_in_a_row_stop_the_shard_and_leave_nothing(tmp_path):
    picture(tmp_path / "a.jpg")
    rows = [{"image_id": f"{n}", "uri": f"{tmp_path}/gone/{n}.jpg"} for n in range(6)]
    here = [{"image_id": f"a{n}", "uri": f"{tmp_path}/a.jpg"} for n in range(2)]
    made = piece(tmp_path / "out", [here[0], *rows[:4], here[1], *rows], failures_in_a_row=5)
    with pytest.raises(InputError) as error:
        shard.write_shard(made)
    assert "5 samples in a row were rejected" in str(error.value)
    assert f"file missing: {tmp_path}/gone/4.jpg" in str(error.value)
    assert "shard.failures_in_a_row" in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []
    rows = written(tmp_path / "out", [here[0], *rows[:4], here[1], *rows[:4]], failures_in_a_row=5)
    assert sum(row["reason"] is None for row in rows) == 2


# ---- tried again -------------------------------------------------------------------------------


def test_missing_images_that_were_supplied_are_found_by_the_next_run(tmp_path):
    picture(tmp_path / "a.jpg")
    rows = [("a.jpg", "a"), ("b.jpg", "b")]
    with pytest.raises(InputError, match="1 × file missing"):
        from_files(tmp_path, rows)
    picture(tmp_path / "b.jpg")
    assert [row["reason"] for row in from_files(tmp_path, rows)] == [None, None]


def test_a_run_that_was_stopped_tries_again_what_was_rejected_and_nothing_else(
    tmp_path, monkeypatch
):
    picture(tmp_path / "a.jpg")
    made = piece(
        tmp_path, [{"image_id": name, "uri": f"{tmp_path}/{name}.jpg"} for name in ("a", "b", "c")]
    )
    summary = shard.write_shard(made)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    loaded, load = [], sources.load
    monkeypatch.setattr(sources, "load", lambda *row: loaded.append(row[1]) or load(*row))
    assert shard.write_shard(made) == summary
    assert [Path(uri).name for uri in loaded] == ["b.jpg", "c.jpg"]
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    picture(tmp_path / "b.jpg")
    assert shard.write_shard(made)["samples"] == 2


# ---- exclusion lists ---------------------------------------------------------------------------


def excluding(recipe: Recipe, folder, *lines) -> Recipe:
    text = "\n".join(["kind,id,reason,like", *(f"{line},x" for line in lines)])
    (folder / "exclusions.csv").write_text(text)
    return with_shard(recipe, exclude=str(folder / "exclusions.csv"))


def test_excluded_images_and_captions_are_left_out_and_cost_no_budget(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.jpg")
    rows = [("a.jpg", "a"), ("a.jpg", "aa"), ("b.jpg", "b"), ("c.jpg", "c")]
    recipe = table_of(tmp_path, [(*row, "train") for row in rows])
    recipe = with_shard(recipe, failure_budget=0)
    lines = ["image,b,same as z", "caption,a#1,misspelt", "caption,c#0,", "image,nobody,-"]
    found = checked(excluding(recipe, tmp_path, *lines), tmp_path / "run")
    by_id = {row["image_id"]: row for row in found}
    assert [caption["text"] for caption in by_id["a"]["captions"]] == ["a"]
    assert by_id["a"]["captions_rejected"] == [
        {"caption_id": "a#1", "reason": "excluded: misspelt"}
    ]
    assert by_id["b"]["reason"] == "excluded: same as z"
    assert by_id["c"]["reason"] == "excluded: no reason given"
    (entry,) = run_folder.read_index(f"{tmp_path}/run/2-shards")["pieces"]
    assert entry["samples"] == 1 and entry["rejected"] == {"excluded": 2}
    assert shard.write_shard(shard.plan(recipe, f"{tmp_path}/run").pieces[0])["samples"] == 3


def test_an_exclusion_list_redoes_the_shards_it_touches_and_no_others(tmp_path, caplog):
    recipe = drawn()
    index = sharded(recipe, tmp_path)
    assert len(index["pieces"]) == 5
    victim = next(row for row in samples(tmp_path) if row["split"] == "train")
    plan = shard.plan(excluding(recipe, tmp_path, f"image,{victim['image_id']},why"), str(tmp_path))
    assert [made.name for made in plan.pending] == [Path(victim["tar"]).stem]
    some = excluding(recipe, tmp_path, f"image,{victim['image_id']},why", "caption,nobody#0,why")
    shard.plan(some, str(tmp_path))
    said = "1 of 2 listed ids are not here, the first ('caption', 'nobody#0')"
    assert said in caplog.text
    nobody = excluding(recipe, tmp_path, "image,nobody,why", "caption,nobody#0,why")
    with pytest.raises(InputError, match="2 of 2 listed ids are not here, the first .*nobody"):
        shard.plan(nobody, str(tmp_path))


def test_an_excluded_shard_is_not_written_again(tmp_path):
    recipe = excluding(drawn(), tmp_path, "image,train-000003,why")
    sharded(recipe, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "2-shards").iterdir()}
    for made in shard.plan(recipe, str(tmp_path)).pieces:
        shard.write_shard(made)
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "2-shards").iterdir()} == before


# ---- remote payloads ---------------------------------------------------------------------------


@pytest.fixture
def slow_store(tmp_path, monkeypatch):
    """Pictures at memory://, the earlier ones slower; how many are fetched at once, and ahead."""
    data = picture(tmp_path / "a.jpg").read_bytes()
    seen = {"running": 0, "most": 0, "fetched": 0}
    lock, load = threading.Lock(), sources.load

    def slow(kind, uri, settings):
        with lock:
            seen["running"] += 1
            seen["fetched"] += 1
            seen["most"] = max(seen["most"], seen["running"])
        time.sleep(0.03 if uri.endswith(("0.jpg", "1.jpg")) else 0.005)
        with lock:
            seen["running"] -= 1
        return load(kind, uri, settings)

    monkeypatch.setattr(sources, "load", slow)
    rows = []
    for n in range(40):
        uri = f"memory://{tmp_path.name}/{n}.jpg"
        if n % 10 != 7:
            store.write_bytes(uri, data)
        rows.append({"image_id": f"{n}", "uri": uri})
    return rows, seen


def test_remote_pictures_are_fetched_by_threads_and_packed_in_order(tmp_path, slow_store):
    rows, seen = slow_store
    found = written(tmp_path / "1", rows, source={"fetch_threads": 4})
    assert seen["most"] == 4
    assert [row["image_id"] for row in found] == [row["image_id"] for row in rows]
    assert [row["image_id"] for row in found if row["reason"]] == ["7", "17", "27", "37"]
    written(tmp_path / "2", rows, source={"fetch_threads": 1})
    assert files(tmp_path, "1") == files(tmp_path, "2")


def test_no_more_is_fetched_ahead_than_the_threads_need(slow_store):
    rows, seen = slow_store
    rows = [row | {"source": "csv"} for row in rows]
    settings = piece("", rows, source={"fetch_threads": 2}).inputs["source"]
    ahead = []
    for taken, (_, load) in enumerate(loading.in_order(rows, settings, 10**6)):
        ahead.append(seen["fetched"] - taken)
        if taken % 10 != 7:
            load()
    assert max(ahead) <= 2 * loading.AHEAD + 1


def test_a_shard_that_stops_fetches_no_more(tmp_path, slow_store):
    rows, seen = slow_store
    gone = [row | {"uri": f"memory://{tmp_path.name}/gone/{row['image_id']}"} for row in rows]
    with pytest.raises(InputError, match="3 samples in a row"):
        written(tmp_path, gone, source={"fetch_threads": 2}, failures_in_a_row=3)
    assert seen["fetched"] < 15


# ---- features and names ------------------------------------------------------------------------


def test_features_are_kept_as_they_are_and_those_that_are_not_finite_are_rejected(tmp_path):
    features = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    features[2, 1, 1] = np.nan
    np.save(tmp_path / "train_ims.npy", features)
    (tmp_path / "train_caps.txt").write_text("".join(f"caption {n}\n" for n in range(8)))
    source = {"kind": "precomp", "path": str(tmp_path)}
    index = sharded(Recipe(name="t", source=source), tmp_path)
    assert index["pieces"][0]["holds"] == {"features of shape [3, 5]": 3}
    for row in samples(tmp_path):
        if row["uri"].endswith("#2"):
            assert row["reason"] == "features are not finite: 93.3% of them are"
            continue
        number = int(row["uri"].rsplit("#", 1)[1])
        assert np.array_equal(np.load(io.BytesIO(member(row))), features[number])
        assert row["member"].endswith(".npy") and len(row["captions"]) == 2


def test_pictures_and_features_or_features_of_two_shapes_are_refused_together(tmp_path):
    picture(tmp_path / "a.jpg")
    np.save(tmp_path / "b.npy", np.zeros((2, 4), np.float32))
    np.save(tmp_path / "c.npy", np.zeros((3, 4), np.float32))
    for pair in ("ab", "bc"):
        endings = {"a": "jpg", "b": "npy", "c": "npy"}
        rows = [(f"{name}.{endings[name]}", "x") for name in pair]
        with pytest.raises(InputError, match=r"different things \(1 × .*, 1 × features of shape"):
            from_files(tmp_path, rows)


ODD = [
    *("a.b", "a_b", "a/b", "a\\b", "a b", "ab.", ".hidden", "été", "ete", "日本", "日木", "a-b"),
    *("x" * 81, "x" * 80, "y" * 300 + "1", "y" * 300 + "2", "../up", "-rf", "%2e", "a:b", "A_B"),
    *("line\nbreak", "tab\t", "\u202eright to left", "🐕", "~", "con", "CON"),
]


def test_odd_image_ids_become_distinct_keys_without_dot_and_slash():
    keys = [shard._key(image_id) for image_id in ODD]
    assert len(set(keys)) == len(ODD)
    for key in keys:
        assert key and not set(key) & set("./\\: \n") and key.isascii() and len(key) <= 80


def test_no_id_can_be_chosen_that_has_another_ids_key():
    keys = [shard._key(image_id) for image_id in ODD]
    assert not set(map(shard._key, keys)) & {key for key in keys if "~" in key}


def test_odd_image_ids_come_back_from_the_tar(tmp_path):
    rows = []
    for number, image_id in enumerate(ODD):
        captions = [{"caption_id": f"{number}#0", "text": image_id}]
        uri = picture(tmp_path / f"{number}.jpg")
        rows.append({"image_id": image_id, "uri": str(uri), "captions": captions})
    (tar, *_) = [row["tar"] for row in written(tmp_path, rows)]
    read = list(webdataset.WebDataset(tar, shardshuffle=False))
    assert [json.loads(sample["json"])["image_id"] for sample in read] == ODD
    assert [sample["txt"].decode() for sample in read] == [" ".join(i.split()) for i in ODD]


def test_the_job_says_where_to_look(tmp_path, capsys, monkeypatch):
    from jobs.cli import main

    make_here(monkeypatch)
    monkeypatch.setattr("jobs.cli.run.Tracker", MagicMock())
    picture(tmp_path / "a.jpg")
    recipe = table_of(tmp_path, [("a.jpg", "a", "train"), ("gone.jpg", "b", "train")])
    root = ingested(recipe, tmp_path / "run")
    flags = ["--source.kind", "csv", "--source.path", recipe.source.path]
    main.main("shard", [*flags, "--root", root, "--shard.failure_budget", "0.5"])
    printed = capsys.readouterr()
    assert f"{root}/2-shards/rejected.csv" in printed.err
    assert "rejected: file missing 1" in printed.err


def test_the_counts_are_names_that_mlflow_takes():
    from mlflow.utils.validation import _validate_metric_name

    entry = {"name": "train-000000", "samples": 1, "captions_rejected": {"empty caption": 1}}
    entry["files"] = {"train-000000.tar": {"bytes": 1}}
    entry["rejected"] = {"unreadable (Is a directory)": 1, "fetch failed (404)": 2, "excluded": 1}
    totals = shard.totals({"pieces": [entry]})
    assert totals["rejected: fetch failed 404"] == 2
    for name in totals:
        _validate_metric_name(name)
