"""Candidates block by block, against all of them at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.retrieval import nearest, streamed
from pipeline.retrieval.streamed import Streamed


def directions(count: int, width: int, seed: int) -> torch.Tensor:
    """Unit vectors, the second half of them the first again."""
    v = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    v[count - count // 2 :] = v[: count // 2].clone()
    return torch.nn.functional.normalize(v, dim=1)


@pytest.mark.parametrize("grouped", ["none", "queries", "candidates"])
@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    width=st.integers(1, 12),
    k=st.integers(1, 30),
    together=st.sampled_from([1, 7, 1024]),
)
def test_blocks_give_what_all_candidates_give_at_once(grouped, cuts, width, k, together):
    """Blocks of any size, empty ones among them; ties, own candidates left out."""
    count = sum(cuts) + 1
    candidates, queries = directions(count, width, 0), directions(9, width, 1)
    group = torch.arange(count) // 2 if grouped == "candidates" else torch.arange(count)
    query_group = torch.arange(9) // 3 if grouped == "queries" else None
    query_owner, owner = torch.arange(9) % 4, torch.arange(count) % 4
    how = {"query_group": query_group, "query_owner": query_owner}
    of_all = {"candidate_group": group if grouped == "candidates" else None}
    expected = nearest.top_k(queries, candidates, k, candidate_owner=owner, **how, **of_all)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "ROWS", together)
        found = Streamed(queries, k, grouped=grouped != "none", **how)
        for part in torch.arange(count).split([*cuts, 1]):
            found.add(candidates[part], group[part], owner[part])
        value, row = found.result()
    assert torch.equal(row, expected[1]) and torch.equal(value, expected[0])


@pytest.mark.parametrize("grouped", [False, True])
def test_large_blocks_are_compiled_and_guessed_at_and_the_same(grouped):
    """Enough for numba and int8, and for the guess of the first block."""
    candidates, queries = directions(12_000, 24, 0), directions(600, 24, 1)
    group = torch.arange(12_000) // 3 if grouped else torch.arange(12_000)
    owner = torch.full((12_000,), -1)
    of_all = {"candidate_group": group if grouped else None}
    expected = nearest.top_k(queries, candidates, 20, **of_all)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "ROWS", 4000)
        found = Streamed(queries, 20, grouped=grouped)
        for part in torch.arange(12_000).split(3000):
            found.add(candidates[part], group[part], owner[part])
        value, row = found.result()
    assert torch.equal(row, expected[1]) and torch.equal(value, expected[0])


def test_a_longer_vector_than_all_before_is_no_reason_to_miss_it():
    queries = directions(5, 8, 1)
    blocks = [directions(50, 8, 0), 100 * directions(50, 8, 2), directions(50, 8, 3)]
    expected = nearest.top_k(queries, torch.cat(blocks), 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "ROWS", 1)
        found = Streamed(queries, 7)
        for n, block in enumerate(blocks):
            found.add(block, torch.arange(50) + 50 * n, torch.full((50,), -1))
        value, row = found.result()
    assert torch.equal(row, expected[1]) and torch.equal(value, expected[0])
