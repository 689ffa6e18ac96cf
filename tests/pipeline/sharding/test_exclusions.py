"""Exclusion lists, and evaluation without what is on them."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import InputError
from pipeline.evaluation import evaluate
from pipeline.evaluation.results import Protocol, sentence
from pipeline.reranking import rerank
from pipeline.sharding import exclusions
from pipeline.storage import parquet
from pipeline.storage.run_folder import Files, RunFolder
from schemas.settings import EvaluateSettings, Recipe, RerankSettings
from tests.helpers.stages import SCENES, sharded
from tests.pipeline.evaluation.test_ranking import (
    candidates_of,
    image_of,
    ranked,
    recipe_of,
    write_run,
)

# ---- exclusion lists ---------------------------------------------------------------------------


def listed(tmp_path, text: str | bytes) -> str:
    file = tmp_path / "list.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def test_a_list_is_read_with_its_reasons(tmp_path):
    uri = listed(
        tmp_path,
        '\ufeffkind,id,split,reason\r\nimage,"a,b",train,twice\r\ncaption,a#1,train,\r\n'
        "image,🐕,x,first\r\nimage,🐕,x,second\r\n",
    )
    assert exclusions.read(uri) == {
        ("image", "a,b"): "twice",
        ("caption", "a#1"): "",
        ("image", "🐕"): "first",
    }


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, "there is no file .*halftone audit"),
        ("", "no column 'kind'"),
        ("id,reason\n", "no column 'kind'"),
        ("kind,id\nimage,a\n", "no column 'reason'"),
        ("kind,id,reason\npicture,a,x\n", "line 2: found kind 'picture'.*write image or caption"),
        ("kind,id,reason\nimage,,x\n", "line 2: found kind 'image' and id ''"),
        ('kind,id,reason\nimage,"a,x\n', "is not CSV"),
        (b"kind,id,reason\nimage,\xff,x\n", "not UTF-8"),
    ],
)
def test_a_bad_list_is_a_sentence_with_the_line(tmp_path, text, sentence):
    uri = str(tmp_path / "none.csv") if text is None else listed(tmp_path, text)
    with pytest.raises(InputError, match=sentence):
        exclusions.read(uri)


def test_images_leave_with_their_captions_and_without_any(tmp_path):
    uri = listed(
        tmp_path,
        "kind,id,reason\nimage,a,x\ncaption,b#0,x\ncaption,c#0,x\ncaption,c#1,x\nimage,z,x\n",
    )
    ids = {"a": ["a#0", "a#1"], "b": ["b#0", "b#1"], "c": ["c#0", "c#1"], "d": ["d#0"]}
    rows = [{"id": i, "image_id": i, "modality": "image"} for i in ids]
    rows += [{"id": t, "image_id": i, "modality": "text"} for i, own in ids.items() for t in own]
    table = pa.Table.from_pylist(rows)
    entry = parquet.write_table(f"{tmp_path}/v.parquet", table, "f", {"name": "v"})
    vectors = Files.of(str(tmp_path), [entry])
    out = exclusions.of_evaluation(EvaluateSettings(exclude=uri), vectors)
    assert out.images == {"a", "c"}
    assert out.captions == {"a#0", "a#1", "b#0", "c#0", "c#1"}


# ---- evaluation --------------------------------------------------------------------------------

GONE = "test-000000/1"  # an image with one caption
CAPTION = "test-000001/0#3"  # one of five of its image
LAST = "test-000001/2#0"  # the only one of its image


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run of drawn vectors: its folder, vectors, and rankings with and without the list."""
    root = tmp_path_factory.mktemp("evaluated")
    vectors = write_run(root)
    uri = listed(
        root,
        f"kind,id,reason\nimage,{GONE},x\ncaption,{CAPTION},x\ncaption,{LAST},x\n"
        "image,train-000000/0,elsewhere\n",
    )
    whole = ranked(root, recipe_of())
    return root, vectors, uri, whole, ranked(root, excluding(uri))


def excluding(uri: str, **more):
    return recipe_of(evaluate={"exclude": uri, **more})


def leaves(id_: str) -> bool:
    return image_of(id_) in (GONE, image_of(LAST)) or id_ == CAPTION


def test_excluded_images_and_captions_are_neither_queries_nor_candidates(evaluated):
    _, vectors, _, (whole, _), (rows, _) = evaluated
    assert [r["query_id"] for r in rows] == [
        r["query_id"] for r in whole if not leaves(r["query_id"])
    ]
    for row in rows:
        ids = [i for i in candidates_of(vectors, row["query_id"]) if not leaves(i)]
        scores = np.array([vectors[i].astype(float) @ vectors[row["query_id"]] for i in ids])
        assert row["candidate_id"] == [ids[n] for n in np.argsort(-scores)]
        own = [image_of(i) == image_of(row["query_id"]) for i in row["candidate_id"]]
        assert row["rank"] == own.index(True) + 1


def test_label_ndcg_is_over_the_candidates_that_stay(evaluated):
    root, vectors, _, _, (rows, _) = evaluated
    encoded = {}
    for name in ("test-000000", "test-000001"):
        table = parquet.read_table(RunFolder(str(root)).folder("embed", "hand", f"{name}.parquet"))
        for row in table.to_pylist():
            vector = np.array(row["vector"], np.float64)
            encoded[row["caption_id"]] = vector / np.linalg.norm(vector)

    def relevance(image: str, text: str) -> float:
        """Of all its captions: an excluded one was still written for its image."""
        if image_of(text) == image:
            return 1.0
        return max(0.0, *(v @ encoded[text] for t, v in encoded.items() if image_of(t) == image))

    def dcg(gains) -> float:
        return sum((2**r - 1) / math.log2(2 + n) for n, r in enumerate(gains[:10]))

    for row in rows:
        query, ids = row["query_id"], row["candidate_id"]
        pairs = [(query, i) if row["direction"] == "i2t" else (i, query) for i in ids]
        r = [relevance(*pair) for pair in pairs]
        expected = dcg(r) / dcg(sorted(r, reverse=True))
        assert row["ndcg_label"] == pytest.approx(expected, abs=1e-6)


def test_the_protocol_counts_what_was_left_out(evaluated):
    root, _, uri, _, _ = evaluated
    protocol = evaluate.plan(excluding(uri), str(root), "main").settings
    whole = evaluate.plan(recipe_of(), str(root), "main").settings
    assert protocol["excluded"] == {"images": 2, "captions": 3}
    assert protocol["images"] == whole["images"] - 2
    assert protocol["captions"] == whole["captions"] - 3 and "excluded" not in whole
    assert "2 images, 3 captions excluded" in sentence(Protocol.of(protocol))


def test_a_list_is_part_of_the_fingerprint_by_what_it_takes_out_of_the_split(evaluated, tmp_path):
    root, _, uri, _, _ = evaluated

    def fingerprint(uri: str | None) -> str:
        return evaluate.plan(recipe_of(evaluate={"exclude": uri}), str(root), "main").fingerprint

    text = Path(uri).read_text()
    same = listed(tmp_path, text.replace(",x", ",another reason") + "image,val-000000/0,y\n")
    assert fingerprint(uri) == fingerprint(same) != fingerprint(None)
    nothing = listed(tmp_path, "kind,id,reason\nimage,train-000000/0,x\n")
    assert fingerprint(nothing) == fingerprint(None)


def test_re_ranking_ranks_what_stays_with_each_candidates_own_bias(evaluated):
    root, vectors, uri, _, (rows, _) = evaluated
    recipe = excluding(uri).model_copy(update={"rerank": RerankSettings(betas=(7.0,))})
    for plan_of, write in (
        (rerank.plan, rerank.write_reranker),
        (rerank.plan_reranked, rerank.write_rankings),
    ):
        plan = plan_of(recipe, str(root), "main")
        plan.finish({piece.name: write(piece) for piece in plan.pending})
    again = [r for piece in plan.pieces for r in parquet.read_table(piece.output).to_pylist()]
    assert len(again) == len(rows)
    for before, row in zip(rows, again, strict=True):
        asking = "#" in row["query_id"]
        bank = [v for i, v in vectors.items() if i.startswith("train") and ("#" in i) == asking]
        for candidate, score in zip(row["candidate_id"], row["score"], strict=True):
            bias = np.log(np.mean(np.exp(7 * (np.array(bank) @ vectors[candidate])))) / 7
            place = before["candidate_id"].index(candidate)
            assert score == pytest.approx(before["score"][place] - bias, abs=1e-5)


def test_a_list_that_leaves_nothing_is_refused(evaluated, tmp_path):
    root, vectors, _, _, _ = evaluated
    images = [i for i in vectors if i.startswith("test") and "#" not in i]
    uri = listed(tmp_path, "kind,id,reason\n" + "".join(f"image,{i},x\n" for i in images))
    with pytest.raises(InputError, match="takes all 7 images of test out"):
        evaluate.plan(excluding(uri), str(root), "main")


def test_who_is_listed_and_not_here_is_told(evaluated, tmp_path, caplog):
    uri = listed(tmp_path, "kind,id,reason\nimage,test-000000/0,x\nimage,gone,x\ncaption,a#1,x\n")
    evaluate.plan(recipe_of(evaluate={"exclude": uri}), str(evaluated[0]), "main")
    assert f"{uri}, of test: 2 of 3 listed ids are not here, the first ('image', 'gone')" in (
        caplog.text
    )
    shards = Recipe(name="t", source=SCENES, shard={"exclude": uri})
    with pytest.raises(InputError, match="of this collection: 3 of 3 listed ids are not here"):
        sharded(shards, tmp_path / "run")
