"""MLflow at its worst, for a short while; `python -m tests.chaos.tracking --rounds 20` is long."""

import pytest

from tests.chaos import tracking


@pytest.mark.own_cluster
@pytest.mark.chaos
def test_nothing_is_lost_unsaid_whatever_happens_to_mlflow(tmp_path):
    said = tracking.run(tmp_path, starts=1, rounds=2, seed=7).splitlines()
    assert [line.split()[0] for line in said[:-1]] == ["first", "round", "round"]
