"""TREC runs: read as others write them, refused with the line, and read as they were written."""

import gzip

import pytest
import torch

from pipeline.errors import InputError
from pipeline.evaluation import protocols, trec
from pipeline.evaluation.external import positives
from pipeline.retrieval.scores import Items, matrix_scores

LISTS = {"q": {"a": 0.5, "b": -1e-3}, "r": {"a": 2.0}}


def read(path, text: str) -> dict:
    path.write_text(text)
    return trec.read(None, str(path)).items.lists["t2i"]


@pytest.mark.parametrize("gap", [" ", "   ", "\t", " \t ", ",", " , ", ";"])
@pytest.mark.parametrize("tag", ["", "{}mine"])
def test_fields_are_separated_by_blanks_tabs_commas_or_semicolons(tmp_path, gap, tag):
    rows = [("q", "Q0", "a", "1", "0.5"), ("q", "q0", "b", "2", "-1e-3"), ("r", "0", "a", "0", "2")]
    text = "\n".join(gap.join(row) + tag.format(gap) for row in rows)
    assert read(tmp_path / "a.run", text) == LISTS
    (tmp_path / "b").write_bytes(
        gzip.compress(b"\xef\xbb\xbf" + text.replace("\n", "\r").encode(), mtime=0)
    )
    assert trec.read(str(tmp_path / "b"), None).items.lists["i2t"] == LISTS


@pytest.mark.parametrize("gap", ["\t", ",", ";"])
def test_between_other_separators_ids_may_hold_blanks(tmp_path, gap):
    text = gap.join(["my photo", "Q0", "a\u00a0b c", "1", "0.5", "x"])
    assert read(tmp_path / "a.run", text) == {"my photo": {"a\u00a0b c": 0.5}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("q Q0 a 1 nan x\n", "line 1 is 'q Q0 a 1 nan x': the score 'nan' orders nothing"),
        ("q Q0 a 1 0.5 x\n\nq Q0 b 2 NaN x\n", "line 3 .*the score 'NaN' orders"),
        ("q Q0 a 1 inf x\n", "the score 'inf' orders nothing; give a number"),
        ("q Q0 a 1 0,5 x\n", "the score '0,5' orders nothing"),
        ("q Q0 a 1 0.5 x\nq Q0 b 2 0.4 x\nq Q0 a 3 0.3 x\n", "line 3 lists 'a' for 'q' again"),
        ("my photo Q0 a 1 0.5 x\n", "line 1 is .*; write query Q0 candidate rank score tag"),
        ("q Q0 my photo 1 0.5 x\n", "ids have none but between tabs"),
        ("q Q0 a 1 0.5 two words\n", "a tag has no blanks"),
        ("q Q0 a 1 0.5 x\nq Q0 b 1 1 0.5 x\n", "line 2"),
        ("q Q0 a 1 0.5 x\nq Q0 b 2 0.4 y\n", "line 2 .*of another run than the line before"),
        ("q 0.5 a\n", "line 1"),
        ("t0 0 i0 1\n", "line 1 is 't0 0 i0 1'"),
        ("image_id,caption_id\n", "line 1"),
        ("q,Q0,,1,0.5,x\n", "line 1"),
        ("", "holds no line"),
        ("\n \n", "holds no line"),
    ],
)
def test_lines_that_say_something_else_are_refused(tmp_path, text, sentence):
    with pytest.raises(InputError, match=sentence):
        read(tmp_path / "a.run", text)


def test_a_missing_run_is_told(tmp_path):
    with pytest.raises(InputError, match="there is no file .*gone.run; give a TREC run"):
        trec.read(str(tmp_path / "gone.run"), None)


def test_minus_infinity_is_on_no_list(tmp_path):
    found = read(tmp_path / "a.run", "q Q0 a 1 0.5 x\nq Q0 b 2 -inf x\nr Q0 a 1 -inf x\n")
    assert found == {"q": {"a": 0.5}, "r": {}}


def test_of_many_positives_that_no_list_holds_none_is_found(tmp_path):
    (tmp_path / "a.run").write_text("i Q0 x 1 0.5 a\nj Q0 t2 1 0.5 a\n")
    runs = trec.read(str(tmp_path / "a.run"), None)
    given = {"i2t": {"i": ["t0", "t1"], "j": ["t2"], "k": ["t3", "t4"]}, "t2i": {}}
    table = protocols.measure(runs, ["given"], given, 20)["given"].metrics
    assert table["i2t_R_at_1"] == table["i2t_R_at_10"] == pytest.approx(100 / 3)


IDS = ["a", "b"], ["a photo.jpg#0", "x\u2028y", "z"]


def test_ids_with_blanks_are_written_so_that_they_are_read(tmp_path):
    items = Items(IDS[0], IDS[1], ["a", "b", "b"])
    system = matrix_scores(items, torch.tensor([[0.9, 0.1, -torch.inf], [0.2, 0.1, -torch.inf]]))
    uris = trec.write(str(tmp_path), system)
    runs = trec.read(f"{tmp_path}/i2t.run", f"{tmp_path}/t2i.run")
    assert runs.items.lists["i2t"]["a"] == pytest.approx({"a photo.jpg#0": 0.9, "x\u2028y": 0.1})
    given = positives.matches(f"{tmp_path}/i2t.qrels,{tmp_path}/t2i.qrels", runs.items)
    assert given == items.matches()
    tables = (protocols.measure(s, ["given"], given, 20)["given"] for s in (system, runs))
    first, second = (table.metrics for table in tables)
    assert first == second and first["t2i_R_at_10"] == pytest.approx(200 / 3)
    assert [uri.rpartition("/")[2] for uri in uris] == [
        *("i2t.run", "i2t.qrels", "t2i.run", "t2i.qrels")
    ]


@pytest.mark.parametrize("bad", ["a\tb", "a\nb", " a", "", "a\r", "a\0b", "a\ud83d"])
def test_ids_that_no_line_can_hold_are_refused(tmp_path, bad):
    system = matrix_scores(Items(["i"], [bad], ["i"]), torch.ones(1, 1))
    with pytest.raises(InputError, match="a TREC run cannot hold the id"):
        trec.write(str(tmp_path), system)
    assert not list(tmp_path.iterdir())
