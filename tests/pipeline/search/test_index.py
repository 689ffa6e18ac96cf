"""Search: what is nearest is brute force's, filters hold, shades are those of the labels."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.cli import recipes
from jobs.cli.main import main
from pipeline.errors import InputError
from pipeline.evaluation import tower_vectors
from pipeline.labels import embed
from pipeline.labels.caption_vectors import Captions
from pipeline.models.words import terms
from pipeline.reports.pictures import Caption
from pipeline.reports.tables import SHADES
from pipeline.search import page as search_page
from pipeline.search.index import Query, SearchIndex
from pipeline.storage import parquet, store
from pipeline.storage.run_folder import RunFolder


@pytest.fixture(scope="module")
def gallery(finished_run) -> SearchIndex:
    ((name, recipe),) = recipes.saved(finished_run, {}, None)
    return SearchIndex(recipe, finished_run, name)


def captions_of(gallery: SearchIndex) -> list[Caption]:
    """All captions of the gallery, in order."""
    return gallery.pictures.captions_at(range(len(gallery.pictures.captions)))


@pytest.fixture(scope="module")
def texts(gallery) -> list[str]:
    return [caption.text for caption in captions_of(gallery)[::7]]


def test_a_caption_finds_what_brute_force_finds(gallery, texts):
    """The vectors of stage 6 and of the search are of one model, so scores agree too."""
    at = dict(zip(gallery.items.text_ids[::7], texts, strict=True))
    rows = [gallery.items.text_ids.index(id_) for id_ in at]
    all_QM = tower_vectors.read(gallery.files).block("t2i", rows)
    for text, scores_M in zip(at.values(), all_QM, strict=True):
        hits = gallery.find(Query(text, top=5))
        best = torch.topk(scores_M, 5)
        assert [h.image_id for h in hits] == [gallery.items.image_ids[i] for i in best.indices]
        assert [h.score for h in hits] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_many_queries_at_once_find_what_each_finds_alone(gallery, texts):
    queries = [Query(text, top=3 + i % 4, shades=i % 2 == 0) for i, text in enumerate(texts)]
    queries[1] = replace(queries[1], without="red")
    for query, together in zip(queries, gallery.find_all(queries), strict=True):
        alone = gallery.find(query)
        assert [h.id for h in together] == [h.id for h in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-5)
            assert one.relevance == pytest.approx(other.relevance, abs=1e-5)


def test_filters_take_out_before_the_nearest_are_chosen(gallery):
    every = len(gallery.items.image_ids)
    captions = gallery.pictures.caption_texts
    all_hits = gallery.find(Query("a red circle", top=every))
    for words, without in (("red", ""), ("", "red"), ("a", "blue"), ("", "a the in on")):
        hits = gallery.find(Query("a red circle", top=every, words=words, without=without))
        kept = [
            h.image_id
            for h in all_hits
            if any(set(words.split()) <= set(terms(c)) for c in captions(h.image_id))
            and not any(set(without.split()) & set(terms(c)) for c in captions(h.image_id))
        ]
        assert [h.image_id for h in hits] == kept
        few = gallery.find(Query("a red circle", top=2, words=words, without=without))
        assert [h.image_id for h in few] == kept[:2]
    middle = all_hits[every // 2].score
    above = gallery.find(Query("a red circle", top=every, least=middle))
    assert [h.id for h in above] == [h.id for h in all_hits if h.score >= middle]
    assert len(above) == every // 2 + 1
    assert gallery.find(Query("a red circle", words="nobodysaysthis", shades=True)) == []


CAPTIONS = [
    "一只狗在草地上",
    "一只猫，热的狗",
    "热狗",
    "หมาวิ่ง",
    "कुत्ता पार्क में",
    "الْكَلْبُ يَجْرِي",
    "an e-mail of a cafe\u0301",
    "an e of no mail",
]


@pytest.fixture(scope="module")
def of_all_scripts(finished_run, tmp_path_factory) -> SearchIndex:
    """The gallery with the first images' captions of other scripts, one each."""
    root = str(tmp_path_factory.mktemp("scripts") / "run")
    shutil.copytree(finished_run, root)
    folder, index = RunFolder(root).folder("shard"), RunFolder(root).index("shard")
    texts, pieces = iter(CAPTIONS), []
    for entry in index["pieces"]:
        if entry["split"] == "test":
            uri = f"{folder}/{entry['name']}.parquet"
            table = parquet.read_table(uri)
            lists = table["captions"].to_pylist()
            for captions in lists:
                captions[0]["text"] = next(texts, "one word")
                for other in captions[1:]:
                    other["text"] = "one word"
            at = table.schema.get_field_index("captions")
            table = table.set_column(
                at, table.schema.field(at), pa.array(lists, table.schema.field(at).type)
            )
            written = parquet.write_table(uri, table, entry["fingerprint"], {})
            entry = {**entry, "files": {**entry["files"], **written["files"]}}
        pieces.append(entry)
    store.write_json(f"{folder}/index.json", {**index, "pieces": pieces})
    ((name, recipe),) = recipes.saved(root, {}, None)
    return SearchIndex(recipe, root, name)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("狗", {0, 1, 2}),
        ("热狗", {2}),  # together, in this order
        ("热 狗", {1, 2}),
        ("หมา", {3}),
        ("कुत्ता", {4}),
        ("कुत्", set()),
        ("الْكَلْبُ", {5}),
        ("E-Mail", {6}),
        ("e mail", {6, 7}),
        ("caf\u00e9", {6}),
        ("CAFE\u0301", {6}),
    ],
)
def test_filters_find_the_words_of_every_script(of_all_scripts, words, found):
    ids = of_all_scripts.items.image_ids
    every = len(ids)
    kept = {h.image_id for h in of_all_scripts.find(Query("a", top=every, words=words))}
    left = {h.image_id for h in of_all_scripts.find(Query("a", top=every, without=words))}
    assert kept == {ids[number] for number in found}
    if " " not in words:
        assert left == set(ids) - kept
    told = of_all_scripts.told(Query("a", words=words))
    assert told == ([] if found else [f"no caption has {words!r}: nothing is left"])


def test_what_came_to_nothing_is_told(gallery):
    told = gallery.told
    assert told(Query("a red circle", words="red", without="blue")) == []
    assert told(Query("a red Zebra, zebra 狗")) == ["the model does not know 'zebra', '狗'"]
    assert told(Query(picture=b"", words="a")) == []
    assert told(Query("a", words="red 猫", without="猫 zebra")) == [
        "no caption has '猫': nothing is left",
        "no caption has '猫', 'zebra': it changes nothing",
    ]
    assert told(Query("a", without="!?")) == [
        "there is no word in without '!?': it changes nothing"
    ]
    every = " ".join(sorted({w for c in [c.text for c in captions_of(gallery)] for w in terms(c)}))
    (sentence,) = told(Query("a", words=every))
    assert sentence.startswith("no caption has all of 'a', ") and sentence.endswith("is left")


def test_shades_are_the_relevance_of_the_labels(gallery):
    captions = Captions.read(embed.files(gallery.recipe, gallery.root).of_split("test"))
    for row in (0, 33, 77):
        text = captions_of(gallery)[row].text
        hits = gallery.find(Query(text, top=99, shades=True))
        (labels_M,) = captions.relevance_of_texts([row], gallery.recipe.label).tolist()
        expected = dict(zip(captions.image_ids, labels_M, strict=True))
        for hit in hits:  # embeddings are stored in half precision
            assert hit.relevance == pytest.approx(expected[hit.image_id], abs=4e-3)
    assert all(h.relevance is None for h in gallery.find(Query(text)))


def test_a_picture_finds_captions_as_its_own_vector_does(gallery):
    row = 5
    image_id = gallery.items.image_ids[row]
    data = gallery.pictures.sample(image_id).read()
    hits = gallery.find(Query(picture=data, top=4))
    found = tower_vectors.read(gallery.files).block("i2t", [row])[0]
    best = torch.topk(found, 4)
    assert [h.id for h in hits] == [gallery.items.text_ids[i] for i in best.indices]
    written = {caption.id: caption.text for caption in captions_of(gallery)}
    assert [h.text for h in hits] == [written[h.id] for h in hits]
    some = gallery.find(Query(picture=data, top=4, without="a"))
    assert all("a" not in terms(h.text) for h in some)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (Query("  "), "the query is empty"),
        (Query(picture=b"nonsense"), "no picture Pillow can read: not an image"),
        (Query(picture=b"\xff\xd8\xff\xe0 torn"), "no picture Pillow can read"),
        (Query(picture=b"\x93NUMPY torn"), "features do not load"),
    ],
)
def test_bad_queries_are_refused_in_a_sentence(gallery, query, words):
    with pytest.raises(InputError, match=words):
        gallery.find(query)


def test_a_features_file_is_refused_by_a_model_of_pictures(gallery):
    buffer = io.BytesIO()
    np.save(buffer, np.ones((3, 8), np.float32))
    with pytest.raises(InputError, match="holds features of shape.*takes images"):
        gallery.find(Query(picture=buffer.getvalue()))


def test_the_terminal_shows_shades_and_the_page_has_everything_in_it(finished_run, capsys):
    hostile = '<script>alert("a")</script> red'
    main("search", [hostile, "--root", finished_run, "--json", "--without", "blue"])
    out, said = capsys.readouterr()
    hits = json.loads(out)["models"]["main"]["hits"]
    assert 0 < len(hits) <= 8 and all(0 <= hit["relevance"] <= 1 for hit in hits)
    assert any(shade in said for shade in SHADES)
    page = Path(finished_run, "search.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "data:image/jpeg" in page
    told = json.loads(out)["models"]["main"]["told"]
    assert told == ["the model does not know 'script', 'alert'"] and told[0] in said
    assert "the model does not know &#39;script&#39;" in page


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--words", "red"], "are of a query's results"),
        (["a dog", "--image", "dog.jpg"], "not allowed with argument"),
    ],
)
def test_words_that_nothing_would_look_at_are_refused(finished_run, capsys, argv, said):
    with pytest.raises(SystemExit) as ended:
        main("search", [*argv, "--root", finished_run])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_page_is_made_again_with_another_layout_or_other_shades(finished_run, monkeypatch):
    ((name, recipe),) = recipes.saved(finished_run, {}, None)

    def version(**label) -> str:
        changed = recipe.label.model_copy(update=label)
        other = recipe.model_copy(update={"label": changed})
        return search_page.page(other, finished_run, name).version

    before = version()
    assert version() == before != version(map="half")
    monkeypatch.setattr(search_page, "LAYOUT", 99)
    assert version() != before


def test_an_approximate_search_says_so_and_filters_make_it_exact(finished_run):
    ((name, recipe),) = recipes.saved(finished_run, {"search": {"approximate_above": 20}}, None)
    near = SearchIndex(recipe, finished_run, name)
    assert len(near.images.cells) == 6 and 1 <= near.probes(near.images) <= 6
    about = near.about_query(Query("a red circle"))
    assert about["search"] == "approximate" and 0 < about["recall"] <= 1
    assert near.about_query(Query("a red circle", words="red")) == {"search": "exact"}
    exact = SearchIndex(recipes.saved(finished_run, {}, None)[0][1], finished_run, name)
    assert exact.about_query(Query("a red circle")) == {"search": "exact"}
    filtered = Query("a red circle", words="red", top=9)
    assert near.find(filtered) == exact.find(filtered)
    every = {hit.id: hit.score for hit in exact.find(Query("a red circle", top=32))}
    found = near.find(Query("a red circle", top=5))
    assert [every[hit.id] for hit in found] == [hit.score for hit in found]
    page = search_page.html(near, [Query("a red circle")], [found], "1")
    assert f"approximate, recall {about['recall']:.2f} of the ten nearest" in page
    assert "approximate" not in search_page.html(exact, [Query("a red circle")], [found], "1")


def test_shards_of_other_samples_than_the_vectors_are_refused(of_all_scripts, tmp_path):
    root = str(tmp_path / "run")
    shutil.copytree(of_all_scripts.root, root)
    folder, index = RunFolder(root).folder("shard"), RunFolder(root).index("shard")
    for entry in index["pieces"]:
        if entry["split"] == "test":
            uri = f"{folder}/{entry['name']}.parquet"
            table = parquet.read_table(uri)
            table = table.take(list(range(len(table)))[::-1])
            entry["files"] |= parquet.write_table(uri, table, entry["fingerprint"], {})["files"]
    store.write_json(f"{folder}/index.json", index)
    other = SearchIndex(of_all_scripts.recipe, root, of_all_scripts.name)
    with pytest.raises(InputError, match="vectors of other samples than .*2-shards"):
        other.find(Query("a red circle"))
