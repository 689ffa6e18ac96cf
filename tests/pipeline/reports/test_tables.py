"""Tables of results: what stands in a row, and how a figure is written."""

from pipeline.evaluation.results import Protocol, Result
from pipeline.reports import tables

RECALLS = {f"{d}_R_at_{k}": 5.0 * k for d in ("i2t", "t2i") for k in (1, 5, 10)}


def result(label: str, method: str = "none", **figures: float) -> Result:
    return Result(label, {"rsum": 160.0} | figures, {}, Protocol(rerank=method))


def test_seeds_are_told_by_their_mean_and_deviation():
    ndcg = {"i2t_ndcg_label": 0.5, "t2i_ndcg_label": 0.25}
    results = [
        result(f"{name}{more}", rsum=rsum * factor, **ndcg)
        for more, factor in (("", 1), (", re-ranked", 2))
        for name, rsum in (("a.seed0", 100.0), ("a.seed1", 104.0), ("b.seed0", 90.0), ("c", 1.0))
    ]
    columns, rows = tables.seeds(results)
    assert columns == ["", "seeds", "rSum", "label NDCG i2t", "label NDCG t2i"]
    assert rows == [
        ["a", "2", "102.0 ± 2.8", "0.500 ± 0.000", "0.250 ± 0.000"],
        ["a, re-ranked", "2", "204.0 ± 5.7", "0.500 ± 0.000", "0.250 ± 0.000"],
    ]
    assert tables.seeds([r for r in results if "seed1" not in r.label])[1] == []


def test_rows_name_the_method_where_several_re_rank():
    base, one = result("a"), result("a, re-ranked", "inverted softmax")
    two = result("b, re-ranked", "krnn")
    assert tables._labels([base, one]) == ["a", "a, re-ranked"]
    assert tables._labels([base, one, two])[:2] == ["a", "a, re-ranked: inverted softmax"]


def test_methods_are_told_with_a_star_and_by_what_it_was_given():
    found = [
        Result(method, {**RECALLS, "rsum": 160.0}, {"rsum": [1, 2.25]}, Protocol(), cost)
        for method, cost in (("none", {}), ("krnn", {"ms_per_query": 0.1234, "peak_mb": 644.12}))
    ]
    columns, rows = tables.methods(found, "inductive", "krnn", 200.5)
    assert columns[0] == "inductive; * best on val" and columns[-3:] == ["95 %", "ms a query", "MB"]
    assert rows[0] == ["none", " 5.0 25.0 50.0", " 5.0 25.0 50.0", "160.0", "[1.0, 2.2]", "-", "-"]
    assert rows[1][0] == "krnn *" and rows[1][-2:] == ["0.12", "644.1"]
    heading = tables.methods(found, "inductive", "krnn", -1.0)[0][0]
    assert heading == "inductive; * the first: none has a figure on val"
