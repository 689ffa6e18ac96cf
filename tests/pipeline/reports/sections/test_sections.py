"""The report's tables: what is marked, counted and compared is what a plain count gives."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.evaluation.intervals import Queries, figures
from pipeline.evaluation.results import Model, Protocol
from pipeline.reports.sections import (
    caption_kinds,
    curves,
    differences,
    hubs,
    made_of,
    results_table,
)
from pipeline.reports.sections.systems import System
from pipeline.storage import parquet
from pipeline.storage.run_folder import Files
from schemas.ranking import RANKING

QUERIES = 200


def system(
    name: str,
    rank_Q,
    *,
    number: int = 0,
    stage: str = "evaluate",
    about: dict | None = None,
    ndcg_Q=None,
    used: bool | None = None,
    encoder: str = "e",
) -> System:
    """A model whose queries, one an image each way, have these ranks."""
    rank_Q = np.asarray(rank_Q, float)
    values = {"rank": rank_Q}
    values |= {f"R_at_{k}": (rank_Q <= k).astype(float) for k in (1, 5, 10)}
    if ndcg_Q is not None:
        values["ndcg_label"] = np.asarray(ndcg_Q, float)
    ids = np.array([f"q{n:03}" for n in range(len(rank_Q))])
    queries = dict.fromkeys(("i2t", "t2i"), Queries(ids, ids, values))
    protocol = Protocol(
        split="test", images=4, captions=4, rerank="none" if stage == "evaluate" else "krnn",
        pool="inductive", labels_trained_on=used, gain="g", ndcg_at=10, label_encoder=encoder,
    )  # fmt: skip
    model = Model(
        label=name, metrics=figures(queries), intervals={"rsum": [1.0, 2.0]}, protocol=protocol,
        about=about or {}, queries=queries,
    )  # fmt: skip
    return System(name, number, stage, model, Files.of("", []))


def marks(systems: list[System]) -> dict[str, list[str]]:
    """Of every row, its marks of rSum, R@1, …, by block."""
    found = results_table.table(systems)
    return {
        f"{block.title}/{row.system.model}": [cell.mark for cell in row.cells]
        for block in found.blocks
        for row in block.rows
    }


def test_the_best_is_marked_where_it_is_told_apart_and_else_all_that_are_not():
    rng = np.random.default_rng(0)
    good = rng.integers(1, 4, QUERIES)
    alike = np.where(np.arange(QUERIES) < 2, good % 3 + 1, good)  # two queries differ
    bad = good + 20
    found = marks([system("good", good), system("bad", bad)])
    assert found["as trained/good"][0] == "best" and found["as trained/bad"][0] == ""
    found = marks([system("good", good), system("alike", alike), system("bad", bad)])
    assert found["as trained/good"][0] == found["as trained/alike"][0] == "tied"
    assert not any(found["as trained/bad"])


def test_medians_and_other_protocols_are_not_marked():
    good, bad = np.ones(QUERIES), np.full(QUERIES, 30)
    table = results_table.table([system("good", good), system("bad", bad)])
    assert [title for _, title in table.columns] == ["rSum", *["R@1", "R@5", "R@10", "MedR"] * 2]
    assert table.groups == [("", 1), ("image to text", 4), ("text to image", 4)]
    assert [c.mark for c in table.blocks[0].rows[0].cells][4] == ""
    one = system("good", good, ndcg_Q=np.ones(QUERIES))
    other = system("bad", bad, ndcg_Q=np.zeros(QUERIES), encoder="another")
    found = marks([one, other])["as trained/good"]
    assert found[0] == "best" and found[5] == ""  # NDCG against another encoder's labels


def test_re_ranked_rows_compete_among_themselves_and_labels_used_are_told():
    good, bad = np.ones(QUERIES), np.full(QUERIES, 30)
    systems = [
        system("a", bad, used=True),
        system("a", good, stage="reranked"),
        system("b", bad, number=1, used=False),
    ]
    table = results_table.table(systems)
    assert [block.title for block in table.blocks] == ["as trained", "re-ranked: krnn, inductive"]
    assert [row.used for row in table.blocks[0].rows] == [True, False]
    assert table.any_used and not results_table.table(systems[2:]).any_used
    assert not any(cell.mark == "best" for row in table.blocks[1].rows for cell in row.cells)
    cells = table.blocks[0].rows[0].cells
    assert cells[0].interval == "1.0–2.0"
    assert systems[0].colour != systems[2].colour == system("c", good, number=1).colour
    assert systems[0].line["gid"] == systems[1].line["gid"] != systems[2].line["gid"]


def test_query_by_query_counts_what_is_higher_alike_and_lower():
    base, other = system("a", [1, 2, 3, 4]), system("b", [1, 1, 5, 2])
    columns, rows = differences.table(base, [base, other])
    assert columns[0] == "against a" and columns[1:4] == [
        "images higher", "images alike", "images lower",
    ]  # fmt: skip
    assert rows == [["b", *["50.0 %", "25.0 %", "25.0 %"] * 2]]
    none = system("c", [1])
    renamed = Queries(np.array(["x"]), np.array(["x"]), none.measured.queries["t2i"].values)
    none.measured.queries["t2i"] = none.measured.queries["i2t"] = renamed
    assert differences.table(base, [none])[1] == [["c", *["–"] * 6]]


def test_kinds_of_captions_are_what_is_in_them():
    texts = ["Two dogs.", "a RED house, left of it 3 trees", "nothing at all", "狗", ""]
    kinds = caption_kinds.kinds_of(texts)
    assert kinds["with a number"].tolist() == [True, True, False, False, False]
    assert kinds["with a colour"].tolist() == [False, True, False, False, False]
    assert kinds["with a relation"].tolist() == [False, True, False, False, False]
    assert kinds["with none of these"].tolist() == [False, False, True, True, True]
    lengths = [kind for kind in kinds if "words" in kind]
    assert np.array([kinds[kind] for kind in lengths]).sum(0).tolist() == [1] * 5
    assert "with none of these" not in caption_kinds.kinds_of(["狗", "eine Katze"])
    assert caption_kinds.kinds_of([])["with a colour"].tolist() == []


def test_recall_by_kind_is_that_of_its_captions():
    rank_Q = np.where(np.arange(QUERIES) % 2, 1, 50)
    texts = {f"q{n:03}": "a red dog" if n % 2 else "a small dog runs" for n in range(QUERIES)}
    systems = [system("a", rank_Q), system("b", rank_Q + 60)]
    columns, rows = caption_kinds.table(systems, lambda ids: (texts[id_] for id_ in ids))
    found = {row[0]: row[1:] for row in rows}
    assert columns == ["captions", "of them", "a", "b"]
    assert found["with a colour"][0] == "100"
    assert found["with a colour"][1] == ("100.0", "100.0–100.0")
    assert found["with none of these"][1][0] == "0.0" and found["with a colour"][2][0] == "0.0"
    assert "with a number" not in found  # fewer than FEWEST


@pytest.fixture
def ranked(tmp_path) -> System:
    """Three captions and images of four, of which i0 is found by all and i3 by nobody."""
    lists = {"q0": ["i0", "i1"], "q1": ["i0", "i2"], "q2": ["i0"]}
    rows = [
        {"query_id": q, "image_id": "i0", "direction": "t2i", "candidate_id": found}
        | dict.fromkeys(("rank", "R_at_1", "R_at_5", "R_at_10"), 1.0)
        | {"score": [1.0] * len(found)}
        for q, found in lists.items()
    ]
    table = pa.Table.from_pylist(rows, schema=RANKING)
    written = parquet.write_table(f"{tmp_path}/test-000000.parquet", table, "hand", {})
    made = system("a", [1, 2, 3])
    files = Files.of(str(tmp_path), [{"name": "test-000000", **written}])
    return System("a", 0, "evaluate", made.measured, files)


def test_hubs_are_what_many_queries_find(ranked):
    found = hubs.hubness(ranked, "t2i")
    assert found.top == [("i0", 3), ("i1", 1), ("i2", 1)]
    counts = np.array([3, 1, 1, 0])
    skewness = ((counts - counts.mean()) ** 3).mean() / counts.std() ** 3
    assert found.skewness == pytest.approx(skewness)
    assert (found.never, found.expected) == (0.25, 1.25)
    assert hubs.hubness(ranked, "i2t").top == []
    assert list(ranked.lists("t2i", ["q1", "unknown"])) == ["q1"]


def test_settings_that_differ_come_first():
    systems = [
        system("a", [1], about={"train.lr": 0.1, "train.seed": 0, "name": "x", "serve.port": 1}),
        system("b", [1], about={"train.lr": 0.2, "train.seed": 0, "name": "y", "model.dim": 8}),
    ]
    columns, different, alike = made_of.settings(systems)
    assert columns == ["", "a", "b"]
    assert different == [["train.lr", "0.1", "0.2"], ["model.dim", "–", "8"]]
    assert alike == [("train.seed", "0")]


def test_each_term_of_the_losses_has_an_axis_of_its_own():
    histories = {
        "a": {"records": [{"step": 1, "train/info_nce": 4.0}, {"step": 2, "train/info_nce": 2.0}]},
        "b": {"records": [{"step": 1, "train/triplet": 0.5, "val/rsum": 3.0, "epoch": 1}]},
    }
    about = [{f"train.losses.{name}.weight": 1.0} for name in ("info_nce", "triplet")]
    systems = [system("a", [1], about=about[0]), system("b", [1], number=1, about=about[1])]
    loss, val = curves.figures(systems, histories)
    assert loss.numbers[1] == [
        ["a", "info_nce", "4", "2", "4", "2"],
        ["b", "triplet", "0.5", "0.5", "0.5", "0.5"],
    ]
    assert 'class="model-0"' in loss.svg and 'class="model-1"' in loss.svg
    assert 'class="model-0"' not in val.svg and 'class="model-1"' in val.svg
    assert curves.costs(systems, histories)[1] == [
        ["a", "–", "0", "–", "–", "–"],
        ["b", "–", "1", "–", "–", "–"],
    ]
