"""Protocols on any model's scores, against `eccv_caption` and against slow loops."""

import json

import eccv_caption
import numpy as np
import pytest
import torch

from jobs.cli import main
from pipeline.evaluation import protocols
from pipeline.evaluation.external import positives
from pipeline.evaluation.results import sentence
from pipeline.retrieval.scores import Items, VectorScores, matrix_scores

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def theirs():
    return eccv_caption.Metrics()


@pytest.fixture(scope="module")
def coco(theirs) -> VectorScores:
    """COCO's 5,000 test images and 25,000 captions, with vectors that know them a little."""
    generator = torch.Generator().manual_seed(0)
    owners = (theirs.coco_gts["t2i"][int(caption)][0] for caption in theirs.coco_ids)
    image_ids = list(dict.fromkeys(owners))  # in the order that folds are cut in
    texts = [(t, i) for i in image_ids for t in theirs.coco_gts["i2t"][i]]
    images = torch.randn(5000, 24, generator=generator)
    row = {image_id: n for n, image_id in enumerate(image_ids)}
    noise = torch.randn(25000, 24, generator=generator)
    vectors = images, images[[row[i] for _, i in texts]] + 0.7 * noise
    name = "COCO_val2014_{:012}".format
    ids = [name(i) for i in image_ids], [str(t) for t, _ in texts], [name(i) for _, i in texts]
    return VectorScores(Items(*ids), *vectors)


@pytest.fixture(scope="module")
def tables(coco):
    return protocols.measure(coco, ["coco_5k", "cxc", "eccv_caption", "coco_1k"], resamples=20)


@pytest.fixture(scope="module")
def rankings(coco):
    """What `eccv_caption` reads: the best of every query, by COCO's numbers."""
    images, texts = coco.items.ids("i2t")
    numbers = {"i2t": list(map(protocols.coco_number, images)), "t2i": texts}
    out = {}
    for way, other in (("i2t", "t2i"), ("t2i", "i2t")):
        asked = np.arange(len(numbers[way]))
        rows = coco.top(way, asked, 1000 if way == "i2t" else 300)[1].tolist()
        names = [int(n) for n in numbers[other]]
        queries = [int(n) for n in numbers[way]]
        out[way] = {q: [names[r] for r in of] for q, of in zip(queries, rows, strict=True)}
    return out


@pytest.mark.parametrize("name", ["coco_5k", "cxc", "eccv_caption"])
def test_recalls_are_those_of_eccv_caption(tables, theirs, rankings, name):
    short = {"eccv_caption": "eccv"}.get(name, name)
    for k in (1, 5, 10):
        expected = getattr(theirs, f"{short}_recalls")(rankings, "all", K=k)
        for way in ("i2t", "t2i"):
            assert tables[name].metrics[f"{way}_R_at_{k}"] == pytest.approx(100 * expected[way])


def test_map_at_r_and_r_precision_are_those_of_eccv_caption(tables, theirs, rankings):
    expected = theirs.eccv_metrics(rankings, "all")
    for way in ("i2t", "t2i"):
        found = tables["eccv_caption"].metrics
        assert found[f"{way}_map_at_r"] == pytest.approx(expected["eccv_map_at_r"][way])
        assert found[f"{way}_r_precision"] == pytest.approx(expected["eccv_rprecision"][way])


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recalls_of_five_folds_are_those_of_eccv_caption(tables, theirs, rankings, k):
    expected = theirs.coco_1k_recalls(rankings, "all", K=k)
    for way in ("i2t", "t2i"):
        assert tables["coco_1k"].metrics[f"{way}_R_at_{k}"] == pytest.approx(100 * expected[way])


def test_pmrp_is_r_precision_on_the_pairs_of_its_files(coco, theirs, rankings, tmp_path):
    """Plausible matches are many and not in the package: a few are made up, some of them twice."""
    rng = np.random.default_rng(0)
    files, planted = [], {}
    for way, of_query in rankings.items():
        planted[way] = {}
        for query in list(of_query)[::40]:
            near, far = of_query[query][:40], of_query[query][40:]
            count = rng.integers(2, 20, 2)
            found = [*rng.choice(near, count[0], False), *rng.choice(far, count[1], False)]
            planted[way][query] = [int(match) for match in [*found, found[0]]]
        files.append(tmp_path / f"{way}.json")
        files[-1].write_text(json.dumps(planted[way]))
    theirs.set_pm_gts(*files)
    expected = theirs.pmrp(rankings, "all")
    name = "COCO_val2014_{:012}".format
    given = {
        "i2t": {name(q): list(map(str, of)) for q, of in planted["i2t"].items()},
        "t2i": {str(q): list(map(name, of)) for q, of in planted["t2i"].items()},
    }
    (tmp_path / "pm.json").write_text(json.dumps(given))
    matches = positives.matches(str(tmp_path / "pm.json"), coco.items)
    found = protocols.measure(coco, ["given"], matches, 20)["given"].metrics
    for way in ("i2t", "t2i"):
        assert 0.1 < expected[way] < 0.9
        assert found[f"{way}_r_precision"] == pytest.approx(expected[way])


def test_five_folds_are_the_mean_of_five_galleries(tables, coco):
    total = []
    for fold in (coco.take(*rows) for rows in coco.items.folds(5)):
        assert fold.images.shape[0] == 1000 and fold.texts.shape[0] == 5000
        scores = fold.texts @ fold.images.T
        row = {i: n for n, i in enumerate(fold.items.image_ids)}
        own = torch.tensor([row[i] for i in fold.items.text_image_ids])
        total.append((scores.argmax(1) == own).double().mean().item())
    found = tables["coco_1k"]
    assert found.metrics["t2i_R_at_1"] == pytest.approx(100 * np.mean(total))
    assert "t2i_MedR" not in found.metrics and "folds: 5" in sentence(found.protocol)


def test_intervals_hold_their_figures_and_lines_their_protocol(tables):
    for table in tables.values():
        for name, (low, high) in table.intervals.items():
            assert low <= table.metrics[name] + 1e-9 and table.metrics[name] <= high + 1e-9, name
    assert "1,261 i2t, 1,332 t2i" in sentence(tables["eccv_caption"].protocol)


# ---- any model's files --------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Vectors of eight images and two captions each, as arrays and as their matrix."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 6)).astype(np.float32)
    texts = np.repeat(images, 2, 0) + rng.normal(size=(16, 6)).astype(np.float32)
    images, texts = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (images, texts))
    np.save("images.npy", images)
    np.save("texts.npy", texts)
    np.save("matrix.npy", images @ texts.T)
    (tmp_path / "image.ids").write_text("".join(f"i{n}\n" for n in range(8)))
    (tmp_path / "text.ids").write_text("".join(f"t{n}\n" for n in range(16)))
    pairs = "".join(f"i{n // 2},t{n}\n" for n in range(16))
    (tmp_path / "pairs.csv").write_text("image_id,caption_id\n" + pairs)
    return tmp_path


IDS = ["--image-ids", "image.ids", "--text-ids", "text.ids"]
ARRAYS = ["--images", "images.npy", "--texts", "texts.npy", *IDS]


def score(capsys, *argv) -> dict:
    main.main("score", [*argv, "--json"])
    (table,) = json.loads(capsys.readouterr().out).values()
    return table


def test_arrays_a_matrix_and_trec_runs_of_one_model_score_the_same(files, capsys):
    first = score(capsys, *ARRAYS, "--write-trec", "trec")
    images, texts = np.load("images.npy"), np.load("texts.npy")
    best = (texts @ images.T).argmax(1) == np.arange(16) // 2
    assert first["metrics"]["t2i_R_at_1"] == pytest.approx(100 * best.mean())
    runs = ["--run-i2t", "trec/i2t.run", "--run-t2i", "trec/t2i.run", "--positives", "pairs.csv"]
    for argv in (["--matrix", "matrix.npy", *IDS], [*ARRAYS, "--positives", "pairs.csv"], runs):
        assert score(capsys, *argv)["metrics"] == pytest.approx(first["metrics"])
    assert (files / "trec/t2i.qrels").read_text().splitlines()[3] == "t3 0 i1 1"
    one_way = score(capsys, *runs[:2], *runs[4:])["metrics"]
    assert one_way["i2t_R_at_1"] == first["metrics"]["i2t_R_at_1"] and "rsum" not in one_way


def test_who_is_on_no_list_is_not_found(files, capsys):
    (files / "a.run").write_text("t0 Q0 i0 1 0.9 x\nt1 Q0 i1 1 0.9 x\n")
    argv = ["--run-t2i", "a.run", "--positives", "pairs.csv"]
    table = score(capsys, *argv)["metrics"]
    assert table["t2i_R_at_1"] == table["t2i_R_at_10"] == 100 / 16  # fourteen are on no list


def test_constant_scores_give_chance(files, capsys):
    np.save("matrix.npy", np.zeros((8, 16)))
    table = score(capsys, "--matrix", "matrix.npy")["metrics"]
    assert table["t2i_R_at_1"] == pytest.approx(100 / 8)
    assert table["i2t_R_at_1"] == pytest.approx(100 * 2 / 16)


def test_a_sixth_caption_is_dropped_where_the_protocol_has_five():
    ids = [f"i{n}" for n in range(3)]
    owners = [i for i, count in zip(ids, (6, 5, 7), strict=True) for _ in range(count)]
    texts = [f"t{n}" for n in range(18)]
    system = matrix_scores(Items(ids, texts, owners), torch.rand(3, 18))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(protocols.PROTOCOLS, "five", protocols.Definition("", captions_per_image=5))
        about = protocols.measure(system, ["five"], resamples=20)["five"].protocol
    assert about.captions_dropped == 3 and about.captions == 15
    assert about.queries == {"i2t": 3, "t2i": 15}


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ([*ARRAYS, "--protocol", "flickr_1k"], "1,000 images"),
        ([*ARRAYS, "--protocol", "flikr_1k"], "flickr_1k"),
        ([*ARRAYS, "--protocol", "eccv_caption"], "ids must be theirs"),
        (["--matrix", "nothing.npy"], "there is no file nothing.npy"),
        (["--run-i2t", "pairs.csv"], "write query Q0"),
        ([*ARRAYS, "--protocol", "given"], "--positives"),
        (["--run-i2t", "a.run"], "--positives"),
        (["--images", "images.npy"], "give both"),
        (["--image-ids", "image.ids"], "--image-ids says more of --images, --matrix"),
        (["--run-i2t", "a.run", "--matrix", "matrix.npy"], "are two systems"),
        ([*ARRAYS, "--positives", "pairs.csv", "--protocol", "own"], "--positives are the pairs"),
        ([], "--name"),
    ],
)
def test_what_cannot_be_scored_is_said_in_a_sentence(files, capsys, argv, sentence):
    (files / "a.run").write_text("i0 Q0 t0 1 0.9 x\n")
    with pytest.raises(SystemExit) as stop:
        main.main("score", argv)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
