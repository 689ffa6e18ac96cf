"""Pairs that match, as people and programs write them: read alike, or refused with the place."""

import json

import pytest
import torch

from pipeline.errors import InputError
from pipeline.evaluation import protocols, trec
from pipeline.evaluation.external import positives
from pipeline.retrieval.scores import Items, matrix_scores

ITEMS = Items(["i0", "i 1"], ["t0", "t1", "t2"], ["i0", "i0", "i 1"])
EXPECTED = {
    "i2t": {"i0": ["t0", "t1"], "i 1": ["t2"]},
    "t2i": {"t0": ["i0"], "t1": ["i0"], "t2": ["i 1"]},
}


def read(path, text: str, items=ITEMS):
    path.write_text(text)
    return positives.matches(str(path), items)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "image_id,caption_id\ni0,t0\ni0,t1\ni 1,t2\ni0,t0\n"),
        ("p.tsv", "caption_id\tnote\timage_id\nt0\t\ti0\nt1\tx\ti0\nt2\t\ti 1\n"),
        ("p.txt", "Image_ID ; Caption_ID\ni0;t0\n i0 ; t1\n\ni 1;t2;\n"),
        ("p.json", json.dumps(EXPECTED)),
        ("p.json", json.dumps(EXPECTED | {"t2i": {"t0": "i0", "t1": "i0", "t2": "i 1"}})),
        ("captions", '{"t0": "i0", "t1": ["i0"], "t2": ["i 1", "i 1"]}'),
        ("images", '{"i0": ["t0", "t1"], "i 1": "t2"}'),
        ("p.qrels", "t0\t0\ti0\t1\nt1\t0\ti0\t3\nt2\t0\ti 1\t1\nt2\t0\ti0\t0\nt0\t0\ti 1\t-1\n"),
        ("p.qrels", "i0\tQ0\tt0\t1\ni0\t0\tt1\t1\ni 1\t0\tt2\t1\n"),
    ],
)
def test_pairs_are_read_in_every_form(tmp_path, name, text):
    assert read(tmp_path / name, text) == EXPECTED


def test_json_says_only_the_directions_it_names_and_numbers_are_ids(tmp_path):
    items = Items(["7"], ["1", "2"], ["7", "7"])
    assert read(tmp_path / "p.json", '{"t2i": {"1": 7, "2": [7]}}', items) == {
        "i2t": {},
        "t2i": {"1": ["7"], "2": ["7"]},
    }


def test_qrels_of_both_directions_say_what_each_says(tmp_path):
    (tmp_path / "a").write_text("i0 0 t0 1\n")
    (tmp_path / "b").write_text("t1 0 i0 1\n")
    found = positives.matches(f"{tmp_path}/a,{tmp_path}/b", ITEMS)
    assert found == {"i2t": {"i0": ["t0"]}, "t2i": {"t1": ["i0"]}}


def test_a_name_says_whose_qrels_they_are_where_ids_do_not(tmp_path):
    same = Items(["0", "1"], ["0", "1"], ["0", "1"])
    with pytest.raises(InputError, match="does not say whether its queries are images.*call the"):
        read(tmp_path / "some.qrels", "0 0 1 1\n", same)
    assert read(tmp_path / "t2i.qrels", "0 0 1 1\n", same)["t2i"] == {"0": ["1"]}
    assert read(tmp_path / "i2t.qrels", "0 0 1 1\n", same)["i2t"] == {"0": ["1"]}


def test_who_is_not_here_is_counted_aloud_and_a_side_of_strangers_is_refused(tmp_path, caplog):
    read(tmp_path / "p.csv", "image_id,caption_id\ni0,t0\nx,t9\n")
    said = [message.partition(" images: ")[2] for message in caplog.messages]
    assert "1 of 2 listed ids are not here, the first 'x'; as queries they are left" in said[0]
    assert "texts: 1 of 2 listed ids are not here, the first 't9'" in caplog.messages[1]
    with pytest.raises(
        InputError, match="images: 2 of 2 .* first 'i0.jpg'; ids here are such as 'i0"
    ):
        read(tmp_path / "q.csv", "image_id,caption_id\ni0.jpg,t0\ni1.jpg,t2\n")


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("p.json", '{"i2t": ["t1"]}', "i2t must be a query's id with a list of ids"),
        ("p.json", '{"i2c": {}}', "i2c must be a query's id with a list"),
        ("p.json", '{"i2t": {}, "i2c": {}}', "holds 'i2c' beside i2t or t2i"),
        ("p.json", '{"t2i": {"t0": null}}', "t2i.t0 must be"),
        ("p.json", '{"t2i": {"t0": [true]}}', "t2i.t0 must be"),
        ("p.json", '{"t2i": {"t0": ["i0"], "t0": ["i 1"]}}', "holds 't0' twice in one object"),
        ("p.json", '[["t0", "i0"]]', "is JSON, but no object"),
        ("p.json", '{"t2i": ', "is not valid JSON .line 1"),
        ("p.csv", "image,caption\ni0,t0\n", "has no column 'image_id'; .*image_id,caption_id"),
        ("p.csv", "", "has no column 'image_id'"),
        ("p.csv", "image_id,caption_id\ni0\n", "line 2 ends before its caption_id"),
        ("p.qrels", "t0 0 i0 1\nt1 0 i0\n", "line 2 is 't1 0 i0'; write query 0 candidate relev"),
        ("p.qrels", "t0 0 i0 1\nt2 0 i 1 1\n", "line 2 is 't2 0 i 1 1'"),
    ],
)
def test_what_says_no_pairs_is_refused_with_its_place(tmp_path, name, text, place):
    with pytest.raises(InputError, match=place):
        read(tmp_path / name, text)


def test_of_runs_the_queries_without_a_list_are_told_and_count(tmp_path, caplog):
    (tmp_path / "t2i.run").write_text("t0 Q0 i0 1 0.5 a\nt9 Q0 i0 1 0.5 a\n")
    runs = trec.read(None, str(tmp_path / "t2i.run"))
    given = read(tmp_path / "p.csv", "image_id,caption_id\ni0,t0\ni0,t1\n", runs.items)
    assert "queries of t2i: 1 of 2 listed ids are not here, the first 't1'; they count" in (
        caplog.text
    )
    assert "the run t2i: 1 of 2 listed ids are not here, the first 't9'; without pos" in caplog.text
    table = protocols.measure(runs, ["given"], given, 20)["given"]
    assert table.metrics["t2i_R_at_10"] == 50 and table.protocol.queries == {"t2i": 2}
    with pytest.raises(InputError, match="queries of t2i: 1 of 1 listed ids are not here"):
        read(tmp_path / "q.csv", "image_id,caption_id\ni0,other\n", runs.items)


def test_matches_may_differ_between_directions_and_missing_ones_count(tmp_path):
    items = Items(["i0"], ["t0", "t1"], ["i0"] * 2)
    given = read(tmp_path / "p.json", '{"i2t": {"i0": ["t1", "gone"]}}', items)
    gallery = matrix_scores(items, torch.tensor([[0.1, 0.9]]))
    table = protocols.measure(gallery, ["given"], given, 20)["given"]
    assert table.metrics["i2t_map_at_r"] == 0.5  # of two, the one that is in no gallery is missed
