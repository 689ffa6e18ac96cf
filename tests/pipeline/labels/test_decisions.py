"""A fitted map and single pairs that people decided: in lists, in training, in evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.labels import decisions, label
from pipeline.labels.caption_vectors import Captions, relevance_of
from pipeline.storage import parquet
from pipeline.storage.run_folder import RunFolder
from pipeline.training.distributed import ProcessGroup
from pipeline.training.objective import Relevance
from schemas.settings import LabelSettings, Recipe
from tests.helpers.relevance_lists import COUNTS, cosine, embeddings, labelled
from tests.helpers.stages import finish


def written(folder, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_calibrated_map_is_the_fitted_one(tmp_path):
    captions = embeddings(str(tmp_path), COUNTS)
    line = written(tmp_path, "line.json", json.dumps(
        {"map": "isotonic", "knots": [-0.5, 0, 1], "values": [0, 0.2, 0.9], "spearman": 0.8}
    ))  # fmt: skip
    step = written(
        tmp_path, "step.json", json.dumps({"map": "logistic", "centre": 0.2, "width": 0.3})
    )
    by_map = {
        "isotonic": (line, lambda c: np.interp(c, [-0.5, 0, 1], [0, 0.2, 0.9])),
        "logistic": (step, lambda c: 1 / (1 + np.exp(-(c - 0.2) / 0.3))),
    }
    ids = list(captions)
    for map, (uri, expected) in by_map.items():
        for row in labelled(str(tmp_path), map=map, calibration=uri, lists=["t2t"]):
            for n, value in zip(row["candidate"], row["relevance"], strict=True):
                c = cosine(captions[row["query_id"]][1], captions[ids[n]][1])
                assert abs(value - expected(c)) < 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no fitted map"),
        ('{"map": "isotonic", "knots": [0, 1], "values": [0.5, 0.1]}', "both rising"),
        ('{"map": "isotonic", "knots": [], "values": []}', "as many knots as values"),
        ('{"map": "isotonic", "knots": [0], "values": [2]}', "values in 0..1"),
        ('{"map": "logistic", "centre": 0.5}', "a centre and a width above 0"),
        ('{"map": "half"}', "map: Input should be 'logistic' or 'isotonic'"),
        ('{"map": "logistic", "centre": 0.5, "width": 1}', "make them the same"),
    ],
)
def test_a_calibration_that_is_none_is_refused(tmp_path, text, message):
    uri = written(tmp_path, "map.json", text)
    with pytest.raises(InputError, match=message):
        relevance_of(
            torch.eye(2)[None], torch.eye(2), LabelSettings(map="isotonic", calibration=uri)
        )


def test_settings_that_do_not_fit_a_calibration_are_refused(tmp_path):
    with pytest.raises(ValueError, match="map isotonic needs label.calibration"):
        LabelSettings(map="isotonic")
    with pytest.raises(ValueError, match="needs map logistic or isotonic, not clip"):
        LabelSettings(calibration="map.json")
    how = LabelSettings(overrides=str(tmp_path / "gone.csv"))
    embeddings(str(tmp_path), COUNTS)
    with pytest.raises(
        InputError, match="there is no file .*gone.csv; give a list of decided pairs"
    ):
        label.plan(Recipe(name="t", embed={"encoder": "hand"}, label=how), str(tmp_path))


@pytest.mark.parametrize("top_k", [2, 64])
def test_what_people_decided_stands_in_the_lists(tmp_path, top_k):
    embeddings(str(tmp_path), COUNTS, twins=False)
    plain = {(r["query_id"], r["direction"]): r for r in labelled(str(tmp_path), top_k=64)}
    best = plain["train-000000/1", "i2t"]
    ids = [f"{name}/{n}#{k}" for name, of in COUNTS.items() for n, c in enumerate(of)
           for k in range(c)]  # fmt: skip
    order = np.argsort(best["relevance"])[::-1]
    first, last = (ids[best["candidate"][n]] for n in (order[0], order[-1]))
    uri = written(
        tmp_path,
        "decided.csv",
        "image_id,caption_id,relevance,who\n"
        f"train-000000/1,{first},0.9,a\n"
        f"train-000000/1,{first},0.01,b\n"  # the last line counts
        f"train-000000/1,{last},0.95,a\n"
        "train-000000/1,train-000000/1#0,0.5,a\n"  # its own caption: in no list
        "elsewhere,x,0.5,a\n",
    )
    rows = labelled(str(tmp_path), overrides=uri, top_k=top_k)
    lists = {
        (r["query_id"], r["direction"]): dict(zip(r["candidate"], r["relevance"], strict=True))
        for r in rows
    }
    mine = lists["train-000000/1", "i2t"]
    assert len(mine) == min(top_k, len(best["candidate"]))
    assert mine[ids.index(last)] == np.float16(0.95)
    assert mine.get(ids.index(first), np.float16(0.01)) == np.float16(0.01)
    assert (ids.index(first) in mine) == (top_k == 64)  # put down, it left the short list
    assert lists[last, "t2i"][1] == np.float16(0.95)
    for key, before in plain.items():
        if key[0] not in ("train-000000/1", first, last):
            order = np.argsort(before["relevance"])[::-1][:top_k]
            assert set(lists[key]) >= {before["candidate"][n] for n in order}
    index = label.plan(
        Recipe(name="t", embed={"encoder": "hand"}, label={"overrides": uri, "top_k": top_k}),
        str(tmp_path),
    ).index
    assert [entry["decided"] for entry in index["pieces"]] == [3, 0, 0]


def test_what_people_decided_stands_in_training_and_evaluation(tmp_path):
    embeddings(str(tmp_path), COUNTS)
    captions = Captions.read(RunFolder(str(tmp_path)).files("embed", "hand"))
    uri = written(
        tmp_path,
        "decided.csv",
        "image_id,caption_id,relevance\n"
        "train-000000/0,train-000001/0#2,0.25\ntrain-000002/0,train-000002/0#1,0.75\n",
    )
    plain, how = LabelSettings(), LabelSettings(overrides=uri)
    n, own = captions.caption_ids.index("train-000001/0#2"), captions.caption_ids.index(
        "train-000002/0#1"
    )  # fmt: skip
    r_MN = captions.relevance(captions.image_ids, plain)
    assert (r_MN[captions.same_image(captions.image_ids)] == 1).all()
    expected = r_MN.clone()
    expected[0, n], expected[-1, own] = 0.25, 0.75
    assert torch.equal(captions.relevance(captions.image_ids, how), expected)
    rows = [*range(len(captions.caption_ids))]
    assert torch.allclose(captions.relevance_of_texts(rows, how), expected.T, atol=1e-6)
    assert torch.allclose(
        captions.relevance_of_texts([own, n], how), expected.T[[own, n]], atol=1e-6
    )

    class Rows:  # a batch in which an image and a caption come twice
        caption_rows = torch.tensor([0, own, 0, n])
        image_rows = torch.from_numpy(captions.image_of)[caption_rows]

    everything = slice(0, 4)

    def both(how: LabelSettings, rows: slice):
        batch = Relevance(captions, how, ProcessGroup()).of_batch(Rows, Rows.image_rows)
        same = torch.zeros(4, 4, dtype=torch.bool)[rows]
        return [of(rows, same) for of in (batch.of_images, batch.of_texts)]

    i2t, t2i = both(how, everything)
    assert i2t[[0, 2], [3, 3]].tolist() == [0.25] * 2 and i2t[1, 1] == 0.75
    assert torch.equal(t2i, i2t.T)
    for rows in (slice(0, 3), slice(3, 4)):
        for part, whole in zip(both(how, rows), (i2t, i2t.T), strict=True):
            torch.testing.assert_close(part, whole[rows], atol=1e-6, rtol=0)
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[[0, 2, 1], [3, 3, 1]] = False
    assert torch.equal(both(plain, everything)[0][kept], i2t[kept])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,caption,relevance\n", "has no column 'caption_id'; the first line of"),
        ("image_id,caption_id,relevance\na,b,1.5\n", "line 2: relevance '1.5'; write a number"),
        ("image_id,caption_id,relevance\na,b,1\na,c\n", "line 3 ends before its relevance: a,c"),
    ],
)
def test_a_table_of_decisions_that_is_none_is_refused(tmp_path, text, message):
    uri = written(tmp_path, "decided.csv", text)
    with pytest.raises(InputError, match=message):
        decisions.overrides(uri)


def test_decided_pairs_of_nobody_here_are_told_and_refused_where_all_are(tmp_path, caplog):
    embeddings(str(tmp_path), COUNTS)
    head, known = "image_id;caption_id;relevance\n", "train-000000/0;train-000001/0#2;0.25\n"
    uri = written(tmp_path, "decided.csv", f"{head}{known}gone;train-000001/0#2;0.5\n")
    recipe = Recipe(name="t", embed={"encoder": "hand"}, label={"overrides": uri})
    label.check_decided(recipe, str(tmp_path))
    assert "decided.csv: 1 of 2 listed ids are not here, the first ('gone', " in caplog.text
    written(tmp_path, "decided.csv", f"{head}train-000000/0.jpg;train-000001/0#2;0.25\n")
    with pytest.raises(InputError, match="label.overrides .*1 of 1 listed ids are not here"):
        label.check_decided(recipe, str(tmp_path))


def test_files_count_by_their_contents(tmp_path):
    root = str(tmp_path)
    embeddings(root, COUNTS)
    head = "image_id,caption_id,relevance\n"
    uri = written(tmp_path, "decided.csv", head + "train-000000/0,train-000001/0#2,0.25\n")
    recipe = Recipe(name="t", embed={"encoder": "hand"}, label={"overrides": uri})
    finish(label.plan(recipe, root), label.write_relevance)
    moved = written(tmp_path, "moved.csv", Path(uri).read_text())
    other = Recipe(name="t", embed={"encoder": "hand"}, label={"overrides": moved})
    assert label.plan(other, root).complete
    before = label.depends_on(recipe.label)
    written(tmp_path, "decided.csv", head + "train-000000/0,train-000001/0#2,0.5\n")
    assert len(label.plan(recipe, root).pending) == len(COUNTS)
    assert label.depends_on(recipe.label) != before
    finish(label.plan(recipe, root), label.write_relevance)
    lists = parquet.read_table(label.plan(recipe, root).pieces[0].output).to_pylist()
    assert np.float16(0.5) in lists[0]["relevance"]
