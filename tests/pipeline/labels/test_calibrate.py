"""Calibration against people's judgements: measures, folds, fits, refusals, the command."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from jobs.cli.main import main
from pipeline.errors import InputError
from pipeline.labels import agreement, calibrate, judged_pairs, label
from pipeline.labels.calibrate import Candidate
from pipeline.labels.judged_pairs import Judged
from pipeline.labels.maps import cosine_map
from schemas.settings import CalibrateSettings, LabelSettings, Recipe
from tests.helpers.relevance_lists import COUNTS, embeddings


def test_measures_are_those_of_a_sample_drawn_again():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 12, 80) / 12, rng.integers(0, 6, 80) / 5  # many ties
    images = np.array([f"i{n // 3}" for n in range(80)])
    weights = agreement.resamples(images, 20, 1)
    assert (weights[0] == 1).all()
    assert all(np.ptp(weights[r][images == i]) == 0 for r in range(21) for i in set(images))
    found = agreement.measured(x, y, weights, 0.6)
    for r, weight in enumerate(weights.astype(int)):
        a, b = np.repeat(x, weight), np.repeat(y, weight)
        assert found["spearman"][r] == pytest.approx(stats.spearmanr(a, b).statistic)
        assert found["pearson"][r] == pytest.approx(stats.pearsonr(a, b).statistic)
        assert found["auc"][r] == pytest.approx(roc_auc_score(b >= 0.6, a))
        assert found["error"][r] == pytest.approx(np.sqrt(((a - b) ** 2).mean()))
    value, low, high = agreement.interval(found["spearman"])
    assert value == found["spearman"][0] and low < high


def judged(count=600, images=120, seed=0, cross=0.2) -> Judged:
    """Pairs of captions, some across images; one link a pair."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, images, count)
    second = np.where(rng.random(count) < cross, rng.integers(0, images, count), first)
    names = np.array([f"image{n}" for n in range(images)])
    pair_L = np.arange(count)
    image_P2 = np.stack([names[first], names[second]], 1)
    return Judged(image_P2, rng.random(count), [], pair_L, np.stack([pair_L, pair_L], 1), 0)


def candidate(name: str, cosine_LE, pairs: Judged, settings: CalibrateSettings) -> Candidate:
    out = Candidate(name, cosine_LE, pairs, "max")
    weights = agreement.resamples(pairs.image_P2[:, 0], settings.resamples, 0)
    for map_, r in out.held_out(calibrate.folds(pairs, settings)).items():
        out.rows[map_] = agreement.measured(r, pairs.judgement_P, weights, 0.6)
    return out


def test_what_is_fitted_is_judged_on_images_it_has_not_seen():
    pairs, times = judged(), np.zeros(600, int)
    for train_P, test_P in calibrate.folds(pairs, CalibrateSettings()):
        times += test_P
        assert not set(pairs.image_P2[train_P].ravel()) & set(pairs.image_P2[test_P].ravel())
        assert train_P.sum() > 250
    assert (times == 1).all()
    with pytest.raises(InputError, match="judge pairs of more images"):
        calibrate.folds(judged(6, images=3), CalibrateSettings())


def test_fits_find_the_map_that_made_the_judgements():
    rng = np.random.default_rng(0)
    cosine = rng.uniform(-0.2, 1, 4000)
    truth = 1 / (1 + np.exp(-(cosine - 0.45) / 0.12))
    said = np.clip(truth + rng.normal(scale=0.05, size=4000), 0, 1)
    step, line = calibrate.fit_logistic(cosine, said), calibrate.fit_isotonic(cosine, said)
    assert step.centre == pytest.approx(0.45, abs=0.01) and step.width == pytest.approx(
        0.12, abs=0.01
    )
    for name, fitted in (("logistic", step), ("isotonic", line)):
        assert np.abs(calibrate.mapped(cosine, name, fitted) - truth).mean() < 0.02
    assert calibrate.fit_logistic(-cosine, said) is None


def test_weights_are_of_what_helps_and_the_ensemble_is_better():
    pairs, rng = judged(), np.random.default_rng(1)
    good = [pairs.judgement_P + rng.normal(scale=0.3, size=600) for _ in range(2)]
    noise = rng.normal(scale=0.3, size=600)
    cosines = np.clip(np.stack([*good, noise], 1) / 2, -1, 1)
    weights = calibrate.fit_weights(cosines, pairs.judgement_P)
    assert weights.sum() == pytest.approx(1) and weights[2] < 0.1 and (weights >= 0).all()
    assert abs(weights[0] - weights[1]) < 0.25
    settings = CalibrateSettings(resamples=200)
    singles = [candidate(f"e{n}", cosines[:, [n]], pairs, settings) for n in range(3)]
    both = candidate(calibrate.ENSEMBLE, cosines, pairs, settings)
    gain = both.rows["clip"]["spearman"] - singles[0].rows["clip"]["spearman"]
    assert agreement.interval(gain)[1] > 0


def test_the_weight_of_a_mean_of_links_is_that_of_each():
    pairs = judged(4)
    links = Judged(pairs.image_P2, pairs.judgement_P, [], np.array([0, 0, 0, 1, 2, 2, 3]), None, 0)
    cosine_L = np.array([0.1, 0.7, 0.4, -0.2, 0.5, 0.3, 0.0])
    assert links.reduced(cosine_L, "max").tolist() == [0.7, -0.2, 0.5, 0.0]
    assert links.reduced(cosine_L, "mean") == pytest.approx([0.4, -0.2, 0.4, 0.0])


def test_a_map_that_is_no_better_than_none_is_refused():
    pairs, rng = judged(), np.random.default_rng(2)
    settings = CalibrateSettings(resamples=200)
    noise = candidate("noise", rng.uniform(0, 1, (600, 1)), pairs, settings)
    assert noise.best is None
    assert "does not follow the judgements" in noise.refused("isotonic")
    exact = candidate("exact", pairs.judgement_P[:, None], pairs, settings)
    assert exact.best is None and "not lower than that of clip" in exact.refused("logistic")
    bent = candidate("bent", (pairs.judgement_P / 2 + 0.5)[:, None], pairs, settings)
    assert bent.best == "isotonic" and bent.refused("isotonic") is None


# ---- files and the command ---------------------------------------------------------------------

WORDS = ["dog", "cat", "man", "woman", "child", "runs", "sits", "eats", "red", "blue", "street"]
WORDS += ["green", "beach", "field", "old", "jumps"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Captions of 60 images, and judgements: the share of words two captions have in common."""
    folder, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    captions, texts = [], {}
    for image in range(60):
        said = rng.choice(WORDS, 5, replace=False)
        for k in range(3):
            keep = [w if rng.random() < 0.6 else rng.choice(WORDS) for w in said]
            texts[f"c{image}-{k}"] = " ".join(keep)
            captions.append((f"i{image}", f"c{image}-{k}", texts[f"c{image}-{k}"]))
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image_id", "caption_id", "caption"), *captions])
    with gzip.open(folder / "captions.jsonl.gz", "wt") as file:
        for image in range(60):
            ids = [f"c{image}-{k}" for k in range(3)]
            row = {"image_id": f"i{image}", "caption_ids": ids, "captions": [texts[i] for i in ids]}
            file.write(json.dumps(row) + "\n")
    with open(folder / "judged.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["caption_id1", "caption_id2", "score", "method"])
        for image in range(60):
            for a, b, other in ((0, 1, image), (1, 2, image), (0, 0, (image + 1) % 60)):
                ids = f"c{image}-{a}", f"c{other}-{b}"
                one, two = (set(texts[i].split()) for i in ids)
                table.writerow([*ids, 5 * len(one & two) / len(one | two), "made"])
        table.writerow(["c0-0", "nobody", 3, "made"])
    return folder


def test_pairs_are_read_with_captions_from_either_file(data, tmp_path):
    judgements = str(data / "judged.csv")
    read = [
        judged_pairs.read(CalibrateSettings(judgements=judgements, captions=str(data / name)), "")
        for name in ("captions.csv", "captions.jsonl.gz")
    ]
    for found in read:
        assert len(found.judgement_P) == 180 and found.left_out == 1
        assert found.judgement_P.min() == 0 and found.judgement_P.max() == 1
        assert found.image_P2[2].tolist() == ["i0", "i1"]
    assert read[0].texts == read[1].texts and (read[0].text_L2 == read[1].text_L2).all()


def test_an_image_is_compared_by_its_other_captions(data, tmp_path):
    judgements = tmp_path / "judged.csv"
    judgements.write_text("image_id,caption_id,score\ni0,c0-1,5\ni0,c7-2,1\ni9,c8-0,0\n")
    captions = str(data / "captions.csv")
    found = judged_pairs.read(
        CalibrateSettings(judgements=str(judgements), captions=captions, highest=5), ""
    )
    text = {row[1]: row[2] for row in csv.reader(Path(captions).read_text().splitlines())}
    links = [
        (pair, *(found.texts[t] for t in rows))
        for pair, rows in zip(found.pair_L, found.text_L2, strict=True)
    ]
    assert links[:2] == [(0, text["c0-0"], text["c0-1"]), (0, text["c0-2"], text["c0-1"])]
    assert found.pair_L.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert found.judgement_P.tolist() == [1, 0.2, 0]


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("image_id,image_id,score\na,b,1\n", {}, "expected caption_id,caption_id,score or"),
        ("caption_id,caption_id,score\nc0-0,c0-1,good\n", {}, "line 2 has no score"),
        ("score,caption_id,caption_id\n1,c0-0\n", {}, "line 2 ends before its caption_id"),
        ("caption_id,caption_id,score\n", {}, "holds no judged pairs"),
        ("caption_id,caption_id,score\nx,y,1\n", {}, "none of the 1 judged pairs"),
        ("caption_id,caption_id,score\nc0-0,c0-1,3\n", {}, "order nothing"),
        (
            "caption_id,caption_id,score\nc0-0,c0-1,3\nc0-0,c0-2,6\n",
            {"highest": 5},
            "leave the scale",
        ),
    ],
)
def test_judgements_that_are_none_are_told(data, tmp_path, text, more, message):
    (tmp_path / "judged.csv").write_text(text)
    settings = CalibrateSettings(
        judgements=str(tmp_path / "judged.csv"), captions=str(data / "captions.csv"), **more
    )
    with pytest.raises(InputError, match=message):
        judged_pairs.read(settings, "")


def test_files_that_are_not_there_are_told(data, tmp_path):
    with pytest.raises(InputError, match="give --judgements FILE"):
        judged_pairs.read(CalibrateSettings(), "")
    with pytest.raises(InputError, match="there is no file .*gone.csv"):
        judged_pairs.read(CalibrateSettings(judgements=str(tmp_path / "gone.csv")), "")
    settings = {"judgements": str(data / "judged.csv"), "captions": str(data / "judged.csv")}
    with pytest.raises(
        InputError, match="no column 'image_id'; the first line of a list of captions"
    ):
        judged_pairs.read(CalibrateSettings(**settings), "")
    with pytest.raises(InputError, match="run `halftone shard` first"):
        judged_pairs.read(CalibrateSettings(judgements=str(data / "judged.csv")), str(tmp_path))


def test_the_command_writes_maps_that_label_reads(data, tmp_path, tiny_encoder, ray_here, capsys):
    root = str(tmp_path / "run")
    argv = [
        *("--recipe", "drawn_tiny", "--root", root, "--encoder", tiny_encoder, "--json"),
        *("--judgements", str(data / "judged.csv"), "--captions", str(data / "captions.jsonl.gz")),
    ]
    results = []
    for _ in range(2):
        main("calibrate", argv)
        out, said = capsys.readouterr()
        results.append(json.loads(out)["models"]["main"]["calibrate"])
    first, again = results
    assert (first["made"], again["made"]) == (1, 0) and first["agreement"] == again["agreement"]
    measures = first["agreement"][tiny_encoder]
    assert measures["clip"]["spearman"][0] > 0.6 and set(measures) == {
        *("clip", "half", "logistic", "isotonic")
    }
    uri = first["maps"][tiny_encoder]
    kept = json.loads(Path(uri).read_text())
    assert kept["encoder"] == tiny_encoder and kept["pairs"] == 180
    how = LabelSettings(map=kept["map"], calibration=uri)
    r = cosine_map(how)(torch.tensor([0.0, 0.5, 1.0]))
    assert r[0] < r[1] < r[2]
    assert "halftone label" in said and uri in said
    other = {"name": "t", "embed": {"encoder": "hand"}, "label": how}
    embeddings(root, COUNTS)
    with pytest.raises(InputError, match="was fitted to .*tiny, embed.encoder is hand"):
        label.plan(Recipe(**other), root)
    # Judgements that say nothing: the map of the last time goes.
    rows = list(csv.reader((data / "judged.csv").read_text().splitlines()))
    rng = np.random.default_rng(0)
    with open(tmp_path / "noise.csv", "w", newline="") as file:
        csv.writer(file).writerows([rows[0], *([a, b, rng.random()] for a, b, *_ in rows[1:])])
    main("calibrate", [*argv, "--judgements", str(tmp_path / "noise.csv")])
    assert "is refused" in capsys.readouterr().err
    assert not Path(uri).exists()
