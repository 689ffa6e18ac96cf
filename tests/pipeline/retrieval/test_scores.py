"""Who is compared, and any system's scores: against loops and full matrices."""

import pytest
import torch

from pipeline.errors import InputError
from pipeline.retrieval.ranks import Pairs
from pipeline.retrieval.scores import (
    DIRECTIONS,
    BlockScores,
    Items,
    MatrixScores,
    VectorScores,
    matrix_scores,
)
from pipeline.sharding.exclusions import Excluded

CAPTIONS = (2, 1, 3, 2)  # of each image


def items(counts=CAPTIONS) -> Items:
    images = [f"i{n}" for n in range(len(counts))]
    owners = [i for i, count in zip(images, counts, strict=True) for _ in range(count)]
    return Items(images, [f"t{n}" for n in range(len(owners))], owners)


def drawn(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def vector_scores() -> VectorScores:
    of = items()
    images, texts = drawn(len(of.image_ids), 6), drawn(len(of.text_ids), 6)
    return VectorScores(of, images, texts)


# ---- items -------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 0], [3], []])
def test_a_pair_is_positive_where_both_belong_to_one_image(direction, rows):
    of, owner = items(), dict(zip(items().text_ids, items().text_image_ids, strict=True))
    queries, candidates = of.ids(direction)
    expected = [
        (place, candidate)
        for place, row in enumerate(rows)
        for candidate, id_ in enumerate(candidates)
        if owner.get(queries[row], queries[row]) == owner.get(id_, id_)
    ]
    found = of.positives(direction, torch.tensor(rows, dtype=torch.long).numpy())
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected


def test_matches_are_the_positives_by_id():
    found = items((2, 0, 1)).matches()
    assert found["i2t"] == {"i0": ["t0", "t1"], "i2": ["t2"]}  # i1 has no caption: no query
    assert found["t2i"] == {"t0": ["i0"], "t1": ["i0"], "t2": ["i2"]}


@pytest.mark.parametrize("images", [[0], [0, 1], [1, 3], [3, 1]])
def test_some_images_come_with_all_their_texts(images):
    taken = items().take(*items().of_images(images))
    assert taken.image_ids == [f"i{n}" for n in images]
    texts = zip(items().text_ids, items().text_image_ids, strict=True)
    assert taken.text_ids == [text for text, owner in texts if owner in taken.image_ids]


def test_first_captions_are_those_that_come_first_wherever_they_stand():
    of = Items(["a", "b"], ["0", "1", "2", "3", "4"], ["b", "a", "b", "a", "b"])
    images, texts = of.first_captions(2)
    assert images.tolist() == [0, 1] and texts.tolist() == [0, 1, 2, 3]
    assert of.first_captions(None)[1].tolist() == [0, 1, 2, 3, 4]


def test_folds_are_disjoint_and_together_all():
    folds = [items().take(*rows) for rows in items().folds(3)]
    assert [fold.image_ids for fold in folds] == [["i0", "i1"], ["i2"], ["i3"]]
    assert [text for fold in folds for text in fold.text_ids] == items().text_ids


def test_what_is_excluded_leaves_and_nothing_else():
    images, texts = items().kept(Excluded(frozenset({"i1"}), frozenset({"t2", "t7"})))
    assert images.tolist() == [0, 2, 3] and texts.tolist() == [0, 1, 3, 4, 5, 6]


def test_a_text_whose_image_is_not_there_is_told():
    with pytest.raises(InputError, match="image 'gone', which is not among the images"):
        Items(["a"], ["0", "1"], ["a", "gone"]).matches()


# ---- scores ------------------------------------------------------------------------------------


def systems():
    vectors = vector_scores()
    whole = vectors.block("i2t", [0, 1, 2, 3])
    other = drawn(*whole.shape)
    blocks = BlockScores(vectors.items, lambda d, rows_Q: vectors.block(d, rows_Q))
    both = BlockScores(vectors.items, lambda d, r: (whole if d == "i2t" else other.T)[r])
    return {
        "vectors": (vectors, whole, whole),
        "matrix": (matrix_scores(vectors.items, whole), whole, whole),
        "two matrices": (MatrixScores(vectors.items, whole, other), whole, other),
        "blocks": (blocks, whole, whole),
        "two blocks": (both, whole, other),
    }


@pytest.mark.parametrize("kind", systems())
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 0], [1]])
def test_every_system_ranks_as_its_matrix_does(kind, rows):
    system, i2t, t2i = systems()[kind]
    rows = torch.tensor(rows).numpy()
    for direction, whole in (("i2t", i2t), ("t2i", t2i.T)):
        expected = whole[rows]
        assert torch.allclose(system.block(direction, rows), expected)
        best, places = system.top(direction, rows, 3)
        assert torch.allclose(best, expected.topk(3).values)
        assert torch.allclose(expected.gather(1, places.long()), best)
        pairs = system.items.positives(direction, rows)
        stand = system.ranks(direction, rows, pairs)
        for p, (query, candidate) in enumerate(zip(*pairs, strict=True)):
            assert stand.above_P[p] == (expected[query] > expected[query, candidate]).sum()
            assert stand.tied_P[p] == 1


@pytest.mark.parametrize("kind", ["vectors", "matrix", "two matrices"])
def test_a_part_of_a_system_keeps_the_scores_of_both_directions(kind):
    system, i2t, t2i = systems()[kind]
    part = system.take([1, 3], [2, 6, 7])
    rows = [0, 1], [0, 1, 2]
    assert torch.allclose(part.block("i2t", rows[0]), i2t[[1, 3]][:, [2, 6, 7]])
    assert torch.allclose(part.block("t2i", rows[1]), t2i[[1, 3]][:, [2, 6, 7]].T)
    assert torch.allclose(part.of_pairs([0, 1], [1, 2]), i2t[[1, 3], [6, 7]])
    assert part.items.ids("i2t") == (["i1", "i3"], ["t2", "t6", "t7"])
    i2t_pairs, t2i_pairs = (
        Pairs(*part.items.positives(d, r)) for d, r in zip(DIRECTIONS, rows, strict=True)
    )
    both = part.ranks_of_both(i2t_pairs, t2i_pairs)
    assert both[0].above_P.tolist() == part.ranks("i2t", rows[0], i2t_pairs).above_P.tolist()
    assert both[1].above_P.tolist() == part.ranks("t2i", rows[1], t2i_pairs).above_P.tolist()


def test_scores_that_were_just_made_are_not_made_again():
    made = []
    whole = drawn(4, 8)

    def make(direction, rows_Q):
        made.append((direction, rows_Q.tolist()))
        return whole[rows_Q] if direction == "i2t" else whole.T[rows_Q]

    scores = BlockScores(items(), make)
    scores.block("i2t", [3, 1, 2])
    assert torch.equal(scores.block("i2t", [2, 3]), whole[[2, 3]])
    assert made == [("i2t", [3, 1, 2])]
    scores.block("i2t", [0, 1])
    scores.block("t2i", [1])
    assert made[1:] == [("i2t", [0, 1]), ("t2i", [1])]
