"""Shards of drawn scenes, and their train split."""

import pytest

from pipeline.models.preprocessing import Preprocessing
from pipeline.training.data import Split
from tests.helpers.datasets import SIZE, shards


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return shards(tmp_path_factory.mktemp("batches"), samples=8)


@pytest.fixture
def split(root) -> Split:
    return Split(root, "train", preprocessing=Preprocessing.squash(SIZE))
