"""The label report and the false negatives: what is on them, and how answers come back."""

import csv
import io
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from jobs.cli.main import main
from pipeline.labels import embed, label
from pipeline.labels.agreement import of_encoders
from pipeline.labels.caption_vectors import Captions
from pipeline.reports import false_negatives, labels
from pipeline.sharding.reading import Shards
from pipeline.storage import store
from schemas.settings import Recipe
from tests.helpers.stages import finish, sharded

HOSTILE = '<script>alert("x")</script> a dog'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """24 pictures of two captions, some of which say the same; two encoders; labels."""
    root = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    words = ["dog", "cat", "man", "runs", "sits", "red", "blue", "grass"]
    with open(root / "all.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "split"])
        for n in range(24):
            Image.fromarray(np.full((40, 60, 3), 9 * n, np.uint8)).save(root / f"p{n:02}.jpg")
            for k in range(2):
                said = " ".join(rng.choice(words, 3, replace=False))
                said = HOSTILE if (n, k) in ((0, 0), (1, 1), (5, 0)) else said
                table.writerow([f"p{n:02}.jpg", said, "train" if n < 16 else "test"])
    source = {"kind": "csv", "path": str(root / "all.csv"), "images": str(root)}
    how = {"name": "t", "source": source, "shard": {"samples": 6}, "label": {"suspects": 5}}
    recipe = Recipe(**how, embed={"encoder": "tfidf", "max_duplicates": 1.0})
    sharded(recipe, root)
    for encoder in ("trigrams-64", "tfidf"):
        chosen = recipe.embed.model_copy(update={"encoder": encoder})
        for step in embed.steps(chosen, str(root)):
            finish(step.plan, step.make)
    finish(label.plan(recipe, str(root)), label.write_relevance)
    return str(root), recipe


def relevance(root: str, recipe: Recipe, split: str) -> tuple[Captions, torch.Tensor]:
    """All captions of a split, and their relevance (M, N) where an image is another's, else -1."""
    captions = Captions.read(embed.files(recipe, root).of_split(split))
    r_MN = captions.relevance(captions.image_ids, recipe.label)
    return captions, r_MN.masked_fill(captions.same_image(captions.image_ids), -1)


def test_suspects_are_the_most_relevant_negatives_of_every_split(run):
    root, recipe = run
    found = false_negatives.suspects(recipe, root)
    assert [s.split for s in found] == ["train"] * 5 + ["test"] * 5
    for split in ("train", "test"):
        mine = [s for s in found if s.split == split]
        captions, r_MN = relevance(root, recipe, split)
        shown = {(s.image_id, c) for s in mine for c in s.caption_ids}
        for s in mine:
            for caption_id in s.caption_ids:
                m, n = captions.image_row[s.image_id], captions.caption_ids.index(caption_id)
                assert s.label == pytest.approx(float(r_MN[m, n]), abs=1e-3)
        hidden = [
            float(r_MN[m, n])
            for m, image_id in enumerate(captions.image_ids)
            for n, caption_id in enumerate(captions.caption_ids)
            if (image_id, caption_id) not in shown
        ]
        assert max(hidden) <= mine[-1].label + 1e-3
        assert [s.label for s in mine] == sorted((s.label for s in mine), reverse=True)


def test_captions_that_say_the_same_are_asked_once(run):
    root, recipe = run
    everything = recipe.model_copy(
        update={"label": recipe.label.model_copy(update={"suspects": 1000})}
    )
    pairs = false_negatives.suspects(everything, root)
    found = {s.image_id: s for s in pairs if s.caption == HOSTILE}
    assert {"p00", "p01", "p05"} <= set(found)
    ids = {c["caption_id"] for c in _captions(root, "p01", "p05") if c["text"] == HOSTILE}
    assert len(ids) == 2 and set(found["p00"].caption_ids) == ids


def _captions(root: str, *images: str) -> list[dict]:
    return [c for image in images for c in Shards(root).sample(image).captions]


def test_evidence_holds_the_cosine_of_every_encoder(run):
    root, recipe = run
    for s in false_negatives.suspects(recipe, root)[:4]:
        assert set(s.cosines) == {"tfidf", "trigrams-64"}
        own = [c["text"] for c in _captions(root, s.image_id)]
        assert s.captions == own
        for encoder, cosine in s.cosines.items():
            how = recipe.embed.model_copy(update={"encoder": encoder})
            vectors = embed.encode([s.caption, *own], how, root)
            assert cosine == pytest.approx(float((vectors[1:] @ vectors[0]).max()), abs=2e-3)


def test_the_page_is_escaped_and_whole(run):
    root, recipe = run
    made = false_negatives.page(recipe, root)
    page = made.render(made.version).html
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 20
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert made.version in page


def test_what_people_fill_in_comes_back_as_relevance_and_stays(run, tmp_path):
    root, recipe = run
    found = false_negatives.suspects(recipe, root)
    uri = f"{false_negatives.label_folder(recipe, root)}/{false_negatives.TABLE}"
    store.write_bytes(uri, false_negatives.table(found, recipe, root).encode())
    rows = list(csv.DictReader(io.StringIO(store.read_text(uri))))
    assert tuple(rows[0])[: len(false_negatives.COLUMNS)] == false_negatives.COLUMNS
    assert all(row["relevance"] == "" for row in rows)
    rows[0] |= {"relevance": "1", "who": "me"}
    rows[1] |= {"relevance": "0.25", "who": "me"}
    with open(uri, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0]], restval="")
        writer.writeheader()
        writer.writerows(rows)
    decided = recipe.label.model_copy(update={"overrides": uri})
    recipe = recipe.model_copy(update={"label": decided})
    before = label.plan(recipe, root).pieces
    captions, r_MN = relevance(root, recipe, "train")
    for row, value in ((rows[0], 1.0), (rows[1], 0.25)):
        n = captions.caption_ids.index(row["caption_id"])
        assert float(r_MN[captions.image_row[row["image_id"]], n]) == value
    again = false_negatives.suspects(recipe, root)
    asked = {(s.image_id, c) for s in again for c in s.caption_ids}
    assert not asked & {(row["image_id"], row["caption_id"]) for row in rows[:2]}
    store.write_bytes(uri, false_negatives.table(again, recipe, root).encode())
    kept = list(csv.DictReader(io.StringIO(store.read_text(uri))))
    assert [r for r in kept if r["relevance"]] == rows[:2]
    # Lines that wait for an answer do not make the labels anew.
    after = label.plan(recipe, root).pieces
    assert [p.fingerprint for p in before] == [p.fingerprint for p in after]
    store.remove(uri)


PAIRS = st.tuples(st.integers(0, 5), st.integers(0, 5))
VALUES = st.dictionaries(PAIRS, st.integers(0, 3), max_size=25)


@settings(deadline=None, max_examples=60)
@given(VALUES, st.lists(st.sets(PAIRS), min_size=2, max_size=2), st.integers(1, 8))
def test_the_best_pairs_are_those_of_a_sort(values, seen, keep):
    lots = []
    for pairs in seen:  # a pair may be in both: it is in lists of either direction
        rows = [(values[pair], *pair) for pair in pairs if pair in values]
        columns = np.array(rows, np.int64).reshape(-1, 3).T
        lots.append([columns[0].astype(np.float32), *columns[1:]])
    value, image, caption = false_negatives._merged(*lots, keep)
    met = {pair: values[pair] for pair in set.union(*seen) if pair in values}
    expected = sorted(met.items(), key=lambda item: (-item[1], item[0]))[:keep]
    found = zip(zip(image.tolist(), caption.tolist(), strict=True), value.tolist(), strict=True)
    assert [*found] == expected


# ---- the label report --------------------------------------------------------------------------


def test_entropy_and_best_of_lists():
    lists = [[0.5, 0.5], [], [1.0, 0.0, 0.0], [0.3], [0.0, 0.0], [0.2, 0.6, 0.1, 0.1]]
    entropy, best = labels.of_lists(pa.array(lists, pa.list_(pa.float16())))
    p = np.array([0.2, 0.6, 0.1, 0.1])
    assert entropy == pytest.approx([1, 0, 1, 1, -(p * np.log(p)).sum() / np.log(4)], abs=1e-3)
    assert best == pytest.approx([0.5, 1, 0.3, 0, 0.6], abs=1e-3)
    assert labels.of_lists(pa.array([[]], pa.list_(pa.float16())))[0].size == 0


def test_encoders_agree_with_themselves_and_with_a_slow_loop():
    rng = np.random.default_rng(0)
    one, other = (torch.from_numpy(rng.random((4, 30))) for _ in range(2))
    negative = torch.from_numpy(rng.random((4, 30)) < 0.8)
    assert of_encoders(one, one, negative, labels.TOP) == (pytest.approx(1), 1)
    spearman, overlap = of_encoders(one, other, negative, labels.TOP)
    values = []
    shared = []
    for a, b, keep in zip(one.numpy(), other.numpy(), negative.numpy(), strict=True):
        values.append(stats.spearmanr(a[keep], b[keep]).statistic)
        tops = [set(np.argsort(-c[keep])[:10]) for c in (a, b)]
        shared.append(len(tops[0] & tops[1]) / 10)
    assert spearman == pytest.approx(np.mean(values)) and overlap == pytest.approx(np.mean(shared))


def test_the_report_counts_what_there_is(run):
    root, recipe = run
    report = labels.Report(recipe, root)
    captions, r_MN = relevance(root, recipe, "test")
    (i2t, t2i) = report.lists["test"]
    assert (i2t["queries"], t2i["queries"]) == (8, 16)
    assert i2t["median"] == pytest.approx(float(np.median(r_MN.amax(1))), abs=1e-3)
    assert t2i["near"] == pytest.approx(float((r_MN.amax(0) >= 0.95).double().mean()))
    ((pair, agreement),) = report.agreement.items()
    assert set(pair) == {"tfidf", "trigrams-64"} and 0 < agreement["test"]["spearman"] < 1
    tenths = report._tenths("train")
    assert sum(tenth["share"] for tenth in tenths) == pytest.approx(1)
    for tenth in tenths:
        assert bool(tenth["pairs"]) == (tenth["share"] > 0)  # all pairs were looked at
        for shown in tenth["pairs"]:
            assert tenth["low"] <= shown["relevance"] <= tenth["high"]
    made = labels.page(recipe, root)
    page = made.render(made.version).html
    assert "<script" not in page and not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert made.version in page and "tfidf, trigrams-64" in page
    metrics = report.metrics()
    assert metrics["test/i2t/entropy"] == i2t["entropy"] and np.isfinite([*metrics.values()]).all()


def test_the_command_leaves_pages_and_table_in_the_folder_and_in_mlflow(run, ray_here):
    from mlflow import MlflowClient

    root, _ = run
    folder = f"{root}/4-relevance/tfidf"
    source = ("--source.kind", "csv", "--source.path", f"{root}/all.csv")
    argv = ["--recipe", "drawn_tiny", "--root", root, "--encoder", "tfidf", *source]
    names = {"labels.html", "false-negatives.html", "false-negatives.csv"}
    main("label", argv)
    assert names <= set(store.list_files(folder))
    before = {name: store.stamp(f"{folder}/{name}") for name in names}
    main("label", argv)
    assert before == {name: store.stamp(f"{folder}/{name}") for name in names}
    ids = store.read_json(f"{root}/tracking.json")
    ((uri, known),) = ids.items()
    client = MlflowClient(uri)
    assert names <= {file.path for file in client.list_artifacts(known["main/label"])}
    assert "train/i2t/entropy" in client.get_run(known["main/label"]).data.metrics
