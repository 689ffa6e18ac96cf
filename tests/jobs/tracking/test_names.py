"""Names become names that MLflow takes, whatever they were."""

import pytest
from mlflow.utils import validation
from mlflow.utils.validation import _validate_model_alias_name, _validate_model_alias_name_reserved

from jobs.tracking import names

ODD = ["a/b", "a:b", "a'b", 'say "x"', "..", ".hidden", "", " ", "x" * 900, "été", "a\\b", "a//b"]
ODD += ["/etc/x", "../up", "a[0]", "R@1", "q=1&r", "new\nline", "latest", "LATEST", "v2", "V2", "-"]


@pytest.mark.parametrize("name", ODD)
def test_any_name_is_taken(name):
    validation._validate_model_name(names.registered(name))
    validation._validate_experiment_name(names.experiment(name))
    _validate_model_alias_name(names.alias(name))
    _validate_model_alias_name_reserved(names.alias(name))
    for check in (validation._validate_metric_name, validation._validate_param_name):
        check(names.key(name))
    assert len(names.key(name)) <= validation.MAX_ENTITY_KEY_LENGTH
    assert "'" not in names.registered(name)  # which would end a filter


@pytest.mark.parametrize("name", ["drawn_tiny", "train.losses", "val/i2t_R_at_1", "system: x-1"])
def test_a_legal_key_stays_as_it_is(name):
    assert names.key(name) == name


@pytest.mark.parametrize(
    ("name", "alias"),
    [("info_nce+smooth_ndcg", "info_nce-smooth_ndcg"), ("v2", "model-v2"), ("best", "model-best")],
)
def test_any_models_name_makes_an_alias(name, alias):
    assert names.alias(name) == alias


def test_two_names_that_become_one_stay_two():
    assert names.keys({"a[0]": 1, "a(0)": 2, "b": 3}) == {"a_0_": 1, "a_0__2": 2, "b": 3}


def test_a_text_that_is_cut_says_so():
    assert names.cut("x" * 10, 10) == "x" * 10
    assert names.cut("x" * 7000, 6000).endswith("… (7,000 characters)")
    assert len(names.cut("x" * 7000, 6000)) == 6000
