"""The report: everything of a run on one page that loads nothing, and stays small."""

import csv
import io
import re
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from jobs.cli import main, recipes
from jobs.tracking.tracker import Tracker
from pipeline.errors import InputError
from pipeline.evaluation import evaluate, tower_vectors
from pipeline.evaluation import results as evaluation_results
from pipeline.evaluation.graded_relevance import GradedRelevance, judge_of
from pipeline.evaluation.results import Protocol, Result
from pipeline.labels import label as label_stage
from pipeline.reports import false_negatives, pictures, render, report
from pipeline.reports.pictures import Pictures
from pipeline.reports.sections import results_table, shades
from pipeline.reports.sections.examples import Examples, Thumbnails
from pipeline.storage import parquet, store
from pipeline.storage.run_folder import RunFolder
from schemas.embedding import embedding_schema, tower_schema
from schemas.settings import Recipe
from tests.helpers import browser as browsing
from tests.helpers.stages import finish, sharded

HOSTILE = '<script>alert("x")</script> & מזל'
IMAGES = 1000
FIGURES = ("loss", "val", "relevance", "recall")
HAND = "train/info_nce"


def photograph(rng) -> bytes:
    """A JPEG as rich in detail as photographs are: noise of every scale."""
    pixels = np.zeros((128, 128, 3))
    for side in (4, 16, 32, 64):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        pixels += np.asarray(noise.resize((128, 128), Image.Resampling.BICUBIC), float) / 4
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def unit(vector) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def write_stage(folder: str, table: pa.Table, images: int, captions: int) -> None:
    dim = table.schema.field("vector").type.list_size
    about = {"split": "test", "images": images, "captions": captions, "dim": dim}
    written = parquet.write_table(f"{folder}/test-000000.parquet", table, "hand", about)
    pieces = [{**written, "name": "test-000000", "fingerprint": "hand"}]
    store.write_json(f"{folder}/index.json", {"pieces": pieces, "version": "hand"})


def write_vectors(root: str, caption_of: dict[str, str]) -> None:
    """Stages 3 and 6 as vectors that were drawn: a text lies near its image."""
    rng = np.random.default_rng(1)
    towers, embeddings = [], []
    for image_id, caption_id in caption_of.items():
        image = rng.normal(size=16)
        near = image + 0.7 * rng.normal(size=16)
        for id_, modality, vector in ((image_id, "image", image), (caption_id, "text", near)):
            row = {"id": id_, "image_id": image_id, "modality": modality}
            towers.append({**row, "vector": unit(vector).astype(np.float32)})
        vector = unit(rng.normal(size=8) + 1).astype(np.float16)
        embeddings.append({"caption_id": caption_id, "image_id": image_id, "vector": vector})
    count = len(caption_of)
    table = pa.Table.from_pylist(towers, schema=tower_schema(16))
    write_stage(RunFolder(root).folder("evaluate", "main", "vectors"), table, count, count)
    table = pa.Table.from_pylist(embeddings, schema=embedding_schema(8))
    write_stage(RunFolder(root).folder("embed", "hand"), table, count, count)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[str, Recipe]:
    """A run folder of 1,000 pictures with a caption each, whose model is made up."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    with open(root / "all.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "split"])
        for n in range(IMAGES):
            (root / f"{n:04}.jpg").write_bytes(photograph(rng))
            words = " ".join(rng.choice(["dog", "snow", "red", "two", "boat", "child"], 9))
            table.writerow([f"{n:04}.jpg", HOSTILE if n == 0 else f"{words} {n}", "test"])
    recipe = Recipe(
        name="t",
        source={"kind": "csv", "path": str(root / "all.csv"), "images": str(root)},
        shard={"samples": IMAGES, "decode_check": False},
        embed={"encoder": "hand", "max_duplicates": 1.0},
        evaluate={"top_k": 10},
        report={"queries": IMAGES},
    )
    sharded(recipe, root)
    sidecar = parquet.read_table(f"{root}/2-shards/test-000000.parquet").to_pylist()
    write_vectors(str(root), {r["image_id"]: r["captions"][0]["caption_id"] for r in sidecar})
    labels = label_stage.plan(recipe, str(root))
    index = finish(labels, label_stage.write_relevance)
    found = label_stage.histograms(index["pieces"])
    store.write_json(store.join(labels.folder, "histograms.json"), found)
    false_negatives.page(recipe, str(root)).make()
    plan = evaluate.plan(recipe, str(root), "main")
    finish(plan, evaluate.write_rankings)
    shutil.copytree(root / "6-rankings/main", root / "8-reranked/main")
    metrics = evaluation_results.of_ranking(plan, recipe, {}, "main").metrics
    by_hand = {"rerank": "hand", "pool": "inductive"}
    for stage, protocol in (("6-rankings", {}), ("8-reranked", by_hand)):
        intervals = {"rsum": [metrics["rsum"] - 1.25, metrics["rsum"] + 2.5]}
        found = {"metrics": metrics, "intervals": intervals, "protocol": plan.settings | protocol}
        store.write_json(f"{root}/{stage}/main/metrics.json", found)
    records = [{"step": 1, "train/loss": 2.0, HAND: 2.0}, {"step": 2, HAND: 1.0, "val/rsum": 9.0}]
    store.write_json(f"{root}/5-model/main/history.json", {"records": records})
    return str(root), recipe


@pytest.fixture(scope="module")
def page(large) -> str:
    root, recipe = large
    return page_of(root, recipe)


def page_of(root: str, recipe: Recipe) -> str:
    page = report.read(recipe, root, [], ["main"]).page
    return page.render(page.version).html


def test_with_a_thousand_queries_it_stays_below_five_megabytes(page):
    assert len(page.encode()) < 5_000_000, len(page.encode())
    assert page.count("as trained, own image at") >= IMAGES
    assert page.count('class="hit') > 2 * 8 * IMAGES  # as trained and re-ranked


def test_every_picture_is_in_it_once(page):
    uris = re.findall(r"url\((data:image/jpeg;base64,[^)]+)\)", page)
    assert 900 < len(uris) == len(set(uris)) <= IMAGES
    named = set(re.findall(r'class="pic (p\d+)"', page))
    assert named == set(re.findall(r"^\.(p\d+)\{", page, re.M))


def test_it_loads_nothing_and_runs_its_own_script_alone(page):
    own = resources.files("pipeline.reports").joinpath("templates/report.js").read_text()
    assert page.count("<script") == 1 and f"<script>{own.strip()}" in page
    page = page.replace("<script>", "", 1)
    for outside in (
        'src="http',
        'href="http',
        "<script",
        "<link",
        "fetch(",
        "url(http",
        "@import",
        "<iframe",
    ):
        assert outside not in page, outside
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; מזל" in page


def test_it_shows_every_part(page):
    for title in (
        *("Results on", "Query by query", "Kinds of caption", "Hubs", "How it got there"),
        *("What it finds", "Worst failures", "What re-ranking changed"),
        *("Likely false negatives", "What it was made of", "What they share"),
    ):
        assert title in page, title
    for name in ("Training loss", "rSum on val", "Relevance by hand", "Recall by relevance"):
        assert f"<figcaption>{name}" in page, name
    assert page.count("<svg") == 4


def test_intervals_stand_below_their_numbers(page, large):
    metrics = store.read_json(f"{large[0]}/6-rankings/main/metrics.json")["metrics"]
    rsum = metrics["rsum"]
    assert f"{rsum:.1f}<small>{rsum - 1.25:.1f}–{rsum + 2.5:.1f}</small>" in page
    assert "95 % interval" in page
    (block, _) = table_of(large).blocks
    cell = block.rows[0].cells[1]
    assert cell.text == f"{metrics['i2t_R_at_1']:.1f}" and not cell.interval


def graded_of(recipe: Recipe, root: str) -> GradedRelevance:
    items = tower_vectors.read(tower_vectors.evaluated(recipe, root, "main")).items
    return GradedRelevance(judge_of(recipe, root), items)


def table_of(large) -> results_table.Table:
    root, recipe = large
    return results_table.table(report.read(recipe, root, [], ["main"]).systems)


def test_recall_by_relevance_is_that_of_a_plain_count(large, monkeypatch):
    root, recipe = large
    monkeypatch.setattr(shades, "QUERIES", 40)
    monkeypatch.setattr(shades, "FEWEST", 1)
    graded = graded_of(recipe, root)
    systems = report.read(recipe, root, [], ["main"]).systems
    counted = shades.found_by_relevance(systems, graded)
    found, low, high = shades.shares(*counted["main"])
    assert list(counted) == ["main", "main, re-ranked"]
    asked = systems[0].measured.queries["t2i"].query_ids
    chosen = asked[pictures.spaced(len(asked), 40)].tolist()
    lists = systems[0].lists("t2i", chosen)
    there, early = [0] * 10, [0] * 10
    for query_id in chosen:
        row = graded.items.find("text", [query_id])[query_id]
        (relevance,) = graded("t2i", [row])["ndcg_label"].tolist()
        for image_id, r in zip(graded.items.image_ids, relevance, strict=True):
            there[min(int(r * 10), 9)] += 1
            early[min(int(r * 10), 9)] += image_id in lists[query_id]["candidate_id"][:10]
    expected = [e / t if t else float("nan") for e, t in zip(early, there, strict=True)]
    assert np.allclose(found, expected, equal_nan=True) and found[-1] > 3 * 10 / IMAGES
    known = np.isfinite(found)
    assert (low[known] <= found[known]).all() and (found[known] <= high[known]).all()


def examples_of(recipe: Recipe, root: str, *, again: bool = False) -> Examples:
    """Of the model main, as trained and if need be re-ranked."""
    systems = report.read(recipe, root, [], ["main"]).systems
    relevance = graded_of(recipe, root)
    thumbnails = Thumbnails(Pictures(root, recipe.evaluate.split))
    return Examples(recipe.report, systems if again else systems[:1], relevance, thumbnails)


def test_failures_and_changes_are_the_largest_there_are(large):
    root, recipe = large
    few = {"queries": 3, "worst": 4, "moved": 2, "results": 5}
    settings = recipe.model_copy(update={"report": recipe.report.model_copy(update=few)})
    shown = examples_of(settings, root, again=True)
    ids, ranks = shown.ranks[0]
    found = shown.shown()
    assert [q["rankings"][0]["rank"] for q in found["worst"]] == sorted(ranks, reverse=True)[:4]
    assert all(query["own"].own for query in found["worst"])
    best, last = ranks.argmin(), ranks.argmax()
    after = ranks.copy()
    after[best], after[last] = 500.0, 2.0
    shown.ranks[1] = ids, after
    (helped, gains), (hurt, losses) = shown.moved()
    assert helped.startswith("Helped (1 of") and hurt.startswith("Hurt (1 of")
    assert gains == [ids[last]] and losses == [ids[best]]
    (query,) = shown.shown()["moved"][0][1]
    assert query["rankings"][0]["before"] == [None] * 5
    assert query["rankings"][1]["before"] == [1, 2, 3, 4, 5]  # the lists are the same by hand
    assert len(found["drawn"]) == 3 and len(found["drawn"][0]["rankings"][0]["hits"]) == 5


def test_the_page_is_made_again_when_what_it_shows_changes(large):
    root, recipe = large
    before = report.read(recipe, root, [], ["main"]).page.version
    assert report.read(recipe, root, [], ["main"]).page.version == before
    fewer = recipe.model_copy(update={"report": recipe.report.model_copy(update={"queries": 5})})
    assert report.read(fewer, root, [], ["main"]).page.version != before


def test_figures_are_drawn_once_for_the_page_and_for_mlflow(large, tmp_path, monkeypatch):
    root, recipe = shutil.copytree(large[0], tmp_path / "run"), large[1]
    settings = yaml.safe_dump(recipe.model_dump(mode="json")).encode()
    store.write_bytes(f"{root}/settings-main.yaml", settings)
    drawn, logged, figure = [], [], render.figure
    monkeypatch.setattr(
        render, "figure", lambda *how, **more: drawn.append(1) or figure(*how, **more)
    )
    monkeypatch.setattr(Tracker, "artifact", lambda self, stage, name, data: logged.append(name))
    main.main("report", ["--root", str(root)])
    assert logged == ["report.html", *(f"figures/{n}.svg" for n in FIGURES)]
    assert len(drawn) == len(FIGURES)


def test_a_pair_that_people_decided_is_no_likely_false_negative(large, tmp_path):
    root, recipe = str(shutil.copytree(large[0], tmp_path / "run")), large[1]
    first = false_negatives.suspects(recipe, root)[0]
    before = report.read(recipe, root, [], ["main"]).page.version
    assert is_shown(first, page_of(root, recipe))
    uri = f"{false_negatives.label_folder(recipe, root)}/{false_negatives.TABLE}"
    store.write_bytes(uri, store.read_text(uri).replace(",,", ",0,", 1).encode())
    assert report.read(recipe, root, [], ["main"]).page.version != before
    assert not is_shown(first, page_of(root, recipe))


def test_a_pair_decided_in_another_file_is_none_either(large, tmp_path):
    root, recipe = large
    first = false_negatives.suspects(recipe, root)[0]
    uri = str(tmp_path / "decided.csv")
    line = f"{first.image_id},{first.caption_ids[0]},0.5\n"
    store.write_bytes(uri, f"image_id,caption_id,relevance\n{line}".encode())
    decided = recipe.label.model_copy(update={"overrides": uri})
    recipe = recipe.model_copy(update={"label": decided})
    shown = [(r["image_id"], r["caption_id"]) for r in false_negatives.undecided(recipe, root)]
    assert (first.image_id, first.caption_ids[0]) not in shown and shown


def is_shown(suspect: false_negatives.Suspect, page: str) -> bool:
    """Whether the likely false negatives of the report have this pair among them."""
    parts = page[page.index('<h2 id="suspects">') :].split("<section")
    asked, beside = f"“{suspect.caption}”", f'title="{suspect.captions[0]}"'
    return any(asked in part and beside in part for part in parts)


def test_a_finished_run_has_a_report_with_true_relevance(finished_run):
    page = (Path(finished_run) / "report.html").read_text()
    assert "captions as queries, true relevance" in page
    results = [*report.results_of(finished_run, "main").values()]
    assert [result.label for result in results] == ["main", "main, re-ranked"]
    assert f"{results[0].metrics['rsum']:.1f}" in page
    ((_, recipe),) = recipes.saved(finished_run, {}, None)
    for query in examples_of(recipe, finished_run, again=True).shown()["drawn"]:
        for ranking in query["rankings"]:
            assert sum(hit.own for hit in ranking["hits"]) == (ranking["rank"] <= 8)


@pytest.mark.parametrize("screen", browsing.SCREENS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_it_fits_the_screen_and_is_readable(page, tmp_path, screen, scheme):
    """The page with a thousand queries; words and paper differ enough, light and dark."""
    (tmp_path / "report.html").write_text(page)
    address = (tmp_path / "report.html").as_uri()
    with (
        browsing.chromium() as browser,
        browsing.tab(browser, screen, address, color_scheme=scheme) as tab,
    ):
        colour = "getComputedStyle(document.querySelector('{}')).{}"
        for words, paper in (("body", "body"), ("p.soft", "body"), ("td", ".scroll")):
            tones = (colour.format(words, "color"), colour.format(paper, "backgroundColor"))
            ink, ground = (luminance(tab.evaluate(shade)) for shade in tones)
            assert (ink < ground) == (scheme == "light")
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) > 4.5  # WCAG AA
        picture = tab.locator(".pic").first
        assert picture.evaluate("p => getComputedStyle(p).backgroundImage").startswith('url("data:')


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, from 0 to 1."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_models_measured_alike_stand_in_one_table(tmp_path, monkeypatch):
    root, protocol = str(tmp_path), Protocol(split="test", images=3, rerank="none")
    models = {
        "other": (replace(protocol, labels_trained_on=True), True),
        "val": (replace(protocol, split="val"), True),
        "outdated": (protocol, False),
        "mine": (protocol, True),
    }
    for name, (under, _) in models.items():
        uri = RunFolder(root).folder("evaluate", name, "metrics.json")
        evaluation_results.write(uri, Result(name, {}, {}, under), "hand")

    def plan(recipe, root, name):
        return SimpleNamespace(complete=models[name][1])

    monkeypatch.setattr(evaluate, "plan", plan)
    known = [(name, Recipe(name="t")) for name in (*models, "never evaluated")]
    found = report.read(Recipe(name="t"), root, known, ["mine"])
    assert list(found.models) == ["other", "mine"]
    found = report.read(Recipe(name="t"), root, known, ["other"])
    assert list(found.models) == ["other", "mine"]  # in their own order, whichever is asked for
    with pytest.raises(InputError, match="no metrics of never evaluated.*`halftone evaluate`"):
        report.read(Recipe(name="t"), root, known, ["mine", "never evaluated"])
