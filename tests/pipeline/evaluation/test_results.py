"""What metrics.json holds, and the protocol as a dictionary and in words."""

import pytest

from pipeline.evaluation import results
from pipeline.evaluation.results import Protocol, Result, sentence

BASE = {"data": "t", "split": "test", "images": 1000, "captions": 5000, "captions_per_image": 5.0}
JUDGE = {"gain": "2^r - 1", "ndcg_at": 10, "label_encoder": "tiny", "label_map": "clip"}
RERANKED = Protocol(
    **BASE,
    **JUDGE,
    labels_trained_on=True,
    excluded={"images": 2, "captions": 3},
    rerank="krnn",
    pool="inductive",
    bank_images=1200,
    chosen={"beta_i2t": 7.0},
)
FIELD = Protocol(
    images=5000,
    captions=25000,
    captions_per_image=5,
    protocol="coco_1k",
    about="COCO Karpathy test",
    positives="own",
    folds=5,
    queries={"i2t": 5000, "t2i": 25000},
    captions_dropped=10,
)
PEOPLE = Protocol(
    images=3,
    captions=5,
    file="p.csv",
    pairs=6,
    pairs_left_out=1,
    scale=[1.0, 5.0],
    queries={"i2t": 3, "t2i": 2},
    gain="2^r - 1",
)


def test_the_dictionary_that_rankings_hold_is_flat_and_in_its_order():
    """It is written into their files as text: another order would be other bytes."""
    assert list(RERANKED.settings.items()) == [
        *BASE.items(),
        ("ties", "expected rank"),
        *JUDGE.items(),
        ("labels_trained_on", True),
        ("excluded", {"images": 2, "captions": 3}),
        *(("rerank", "krnn"), ("pool", "inductive"), ("bank_images", 1200), ("beta_i2t", 7.0)),
    ]


@pytest.mark.parametrize("protocol", [RERANKED, FIELD, PEOPLE])
def test_a_result_comes_back_as_it_was_written(tmp_path, protocol):
    table = Result("people", {"judged_kendall": 0.5}, {}, PEOPLE)
    result = Result("a", {"rsum": 1.5}, {"rsum": [1.0, 2.0]}, protocol, {"ms_per_query": 0.1})
    result.tables["people"] = table
    uri = str(tmp_path / "metrics.json")
    assert results.read(uri, "a") is None
    results.write(uri, result, "one")
    assert results.read(uri, "a") == results.read(uri, "a", "one") == result
    assert results.read(uri, "a", "two") is None


def test_a_protocol_is_told_in_words_of_the_parts_it_has():
    assert sentence(RERANKED) == (
        "t test: without 2 images, 3 captions excluded; 1,000 images, 5,000 captions (5 an image). "
        "R@K in percent; ties: expected rank. NDCG@10, gain 2^r - 1; label relevance by tiny "
        "(training used it too), map clip. Re-ranking: krnn, inductive (bank of 1,200 train "
        "images)."
    )
    assert sentence(FIELD).startswith(
        "coco_1k (COCO Karpathy test): 5,000 images, 25,000 captions (10 more dropped), captions "
        "an image: 5, folds: 5, queries: 5,000 i2t, 25,000 t2i, positives: own. R@K in percent; "
        "ties: expected rank; R of mAP@R"
    )
    assert "6 pairs of 3 images and 5 captions (1 more are not of this gallery)" in sentence(PEOPLE)
    assert "scores 1 to 5 as relevance 0 to 1" in sentence(PEOPLE)
    assert all("ties: expected rank" in sentence(p) for p in (RERANKED, FIELD, PEOPLE))


def test_percents_and_ranks_have_one_digit_and_shares_three():
    digits = {name: results.digits(name) for name in ("i2t_R_at_1", "rsum", "t2i_MedR")}
    assert set(digits.values()) == {1}
    assert results.digits("i2t_ndcg_label") == results.digits("judged_kendall") == 3
