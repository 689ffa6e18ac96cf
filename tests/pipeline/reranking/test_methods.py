"""Pools and parameter-free re-rankers against slow loops, and what an inductive score may know."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.reranking import baselines, fitting
from pipeline.reranking.leaprr.model import LeaPRR
from pipeline.reranking.problem import SIDES, Problem, numbers, of_vectors
from pipeline.reranking.similarities import Matrices, Towers
from pipeline.retrieval.scores import Items, VectorScores
from schemas.settings import LeaPRRSettings

SMALL = LeaPRRSettings(
    candidates_i2t=5, candidates_t2i=4, pillars=6, neighbours=3, hidden=8, heads=2
)


def vectors(counts: list[int], seed: int, name: str, dim=6) -> VectorScores:
    """Random unit vectors of images with so many captions each."""
    generator = torch.Generator().manual_seed(seed)
    images = [f"{name}{n}" for n in range(len(counts))]
    owners = [i for i, count in zip(images, counts, strict=True) for _ in range(count)]
    texts = [f"{owner}#{n}" for n, owner in enumerate(owners)]
    drawn = torch.randn(len(images) + len(texts), dim, generator=generator)
    drawn = torch.nn.functional.normalize(drawn, dim=1)
    return VectorScores(Items(images, texts, owners), *drawn.split([len(images), len(texts)]))


def problem(seed=0, **pool) -> Problem:
    gallery = vectors([2, 1, 3, 2, 2, 1, 2, 3], seed, "q")
    return of_vectors(gallery, vectors([2, 1, 2, 3, 1, 2, 2], seed + 100, "b"), **pool)


METHODS = {name: baselines.GRIDS.get(name, [{"beta": 7.0}])[-1] for name in baselines.METHODS}


def scores(problem: Problem, direction: str, method: str) -> torch.Tensor:
    """Scores of all queries, in the gallery's order."""
    if method == "leaprr":
        torch.manual_seed(0)
        steps, model = [{"method": "leaprr"}], LeaPRR(SMALL).eval()
        with torch.no_grad():
            for part in model.of.values():
                part.scale[1] = 0.5
    else:
        steps, model = [{"method": method, direction: METHODS[method]}], None
        steps[0] |= {other: METHODS[method] for other in SIDES if other != direction}
    reranker = fitting.Reranker(problem, steps, model)
    return reranker.scores(direction, problem.gallery[SIDES[direction][0]])


# ---- what a score may know ---------------------------------------------------------------------


@pytest.mark.parametrize("direction", SIDES)
@pytest.mark.parametrize("method", [*METHODS, "leaprr"])
def test_inductive_scores_do_not_depend_on_the_other_queries(method, direction):
    here = problem()
    before = scores(here, direction, method)
    asking = SIDES[direction][0]
    changed = {side: v.clone() for side, v in here.sims.vectors.items()}
    others = here.gallery[asking][1:]
    changed[asking][others] = changed[asking][others.flip(0)] * -1
    there = replace(here, sims=Towers(changed["image"], changed["text"]))
    after = scores(there, direction, method)
    assert torch.allclose(before[0], after[0], atol=1e-6)
    assert not torch.allclose(before[1:], after[1:], atol=1e-3)


@pytest.mark.parametrize("direction", SIDES)
@pytest.mark.parametrize("method", [*METHODS, "leaprr"])
def test_one_query_at_a_time_has_the_scores_of_all_together(method, direction):
    here = problem()
    whole = scores(here, direction, method)
    asking = SIDES[direction][0]
    for row in range(len(whole)):
        alone = replace(here, gallery={**here.gallery, asking: here.gallery[asking][row : row + 1]})
        assert torch.allclose(scores(alone, direction, method)[0], whole[row], atol=1e-6)


@pytest.mark.parametrize("method", [*METHODS, "leaprr"])
def test_which_captions_belong_together_is_not_used_in_scores(method):
    """Owners of the gallery are for the metrics; where they do make the pools, see below."""
    here = problem()
    shuffled = here.owner["text"].clone()
    own = here.gallery["text"]
    shuffled[own] = shuffled[own].flip(0)
    there = replace(here, owner={**here.owner, "text": shuffled})
    for direction in SIDES:
        a, b = scores(here, direction, method), scores(there, direction, method)
        assert torch.equal(a, b)


def test_a_transductive_caption_meets_one_caption_of_each_image_and_no_sibling():
    here = problem(pool="transductive")
    owner, seen = here.owner["text"], []
    for view in here.views("t2i"):
        assert len(owner[view.pool_P].unique()) == len(view.pool_P)
        assert torch.equal(view.queries_Q, view.pool_P)
        seen += view.queries_Q.tolist()
        _, near = view.nearest_in_pool(view.queries_Q, 99)
        assert (owner[near] != owner[view.queries_Q][:, None]).all()
    assert sorted(seen) == here.gallery["text"].tolist()
    (view,) = problem(pool="transductive", siblings=True).views("t2i")
    assert len(view.pool_P) == len(here.gallery["text"])


def test_transductive_scores_do_not_depend_on_the_siblings():
    here = problem(pool="transductive")
    changed = here.sims.vectors["text"].clone()
    changed[1] *= -1  # the second caption of the first image
    there = replace(here, sims=Towers(here.sims.vectors["image"], changed))
    for method in ("inverted_softmax", "krnn", "leaprr"):
        before, after = (scores(p, "t2i", method) for p in (here, there))
        assert torch.allclose(before[0], after[0], atol=1e-6)


def test_captions_are_numbered_within_their_image():
    assert numbers(torch.tensor([3, 3, 1, 3, 1, 0])).tolist() == [0, 1, 0, 2, 1, 0]


def test_inductive_re_ranking_without_a_bank_is_refused():
    here = of_vectors(vectors([2, 1], 0, "q"), None)
    with pytest.raises(InputError, match="rerank.pool transductive"):
        list(here.views("i2t"))


# ---- methods -----------------------------------------------------------------------------------


def parts(here: Problem, direction: str):
    """Plain arrays: queries, gallery, bank of the asking side."""
    asking, ranked = SIDES[direction]
    v = {side: vectors.numpy().astype(float) for side, vectors in here.sims.vectors.items()}
    q, g = v[asking][here.gallery[asking]], v[ranked][here.gallery[ranked]]
    return q, g, v[asking][here.bank[asking]], v[ranked][here.bank[ranked]]


def slow(method: str, q, g, bank, claims, setting: dict) -> np.ndarray:
    """A query's scores by a loop over candidates."""
    s, out = g @ q, []
    tops = {int(np.argmax(g @ b)) for b in bank}
    for c, candidate in enumerate(g):
        b = bank @ candidate
        if method in ("inverted_softmax", "qb_norm"):
            beta = setting["beta"]
            h = math.log(sum(math.exp(beta * x) for x in b) / len(b)) / beta
            hub = method == "inverted_softmax" or int(np.argmax(s)) in tops
            out.append(s[c] - h if hub else s[c])
        elif method in ("dual_softmax", "dynamic_dual_softmax"):
            beta = setting["beta"]
            total = sum(math.exp(beta * x) for x in b) + math.exp(beta * s[c])
            hub = method == "dual_softmax" or int(np.argmax(s)) in tops
            out.append(s[c] * math.exp(beta * s[c]) / total if hub else s[c])
        elif method == "krnn":
            out.append(s[c] - setting["weight"] * math.log(1 + sum(x > s[c] for x in b)))
        elif method == "database_augmentation":
            near = sorted((n for n in range(len(g)) if n != c), key=lambda n: -candidate @ g[n])
            near = near[: setting["k"]]
            w = np.array([max(candidate @ g[n], 1e-6) ** setting["alpha"] for n in near])
            mean = (w / w.sum()) @ s[near]
            out.append((1 - setting["weight"]) * s[c] + setting["weight"] * mean)
    return np.array(out)


@pytest.mark.parametrize("direction", SIDES)
@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("query_expansion", "train_pairs")]
)
def test_a_method_gives_what_a_slow_loop_gives(method, direction):
    here = problem(3)
    q, g, bank, claims = parts(here, direction)
    found = scores(here, direction, method)
    for row, query in enumerate(q):
        expected = slow(method, query, g, bank, claims, METHODS[method])
        assert found[row].numpy() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("of", ["gallery", "pool"])
def test_query_expansion_scores_the_query_mixed_with_its_neighbours(of):
    here = problem(4)
    q, g, bank, _ = parts(here, "i2t")
    (view,) = here.views("i2t")
    setting = {"k": 3, "alpha": 2.0, "weight": 0.5, "of": of}
    found = baselines.query_expansion(view, view.queries_Q, **setting)
    for row, query in enumerate(q):
        among = g if of == "gallery" else bank
        near = sorted(range(len(among)), key=lambda n: -among[n] @ query)[:3]
        w = np.array([max(among[n] @ query, 1e-6) ** 2.0 for n in near])
        mixed = query + 0.5 * (w / w.sum()) @ among[near]
        assert found[row].numpy() == pytest.approx(g @ mixed, abs=2e-6)


@pytest.mark.parametrize("direction", SIDES)
def test_train_pairs_score_a_candidate_by_the_partners_of_the_query_s_nearest(direction):
    here = problem(5)
    asking, ranked = SIDES[direction]
    q, g, bank, partners = parts(here, direction)
    owners = [here.owner[side][here.bank[side]].tolist() for side in (asking, ranked)]
    (view,) = here.views(direction)
    setting = {"k": 4, "temperature": 0.1, "weight": 0.3}
    found = baselines.train_pairs(view, view.queries_Q, **setting)
    for row, query in enumerate(q):
        near = sorted(range(len(bank)), key=lambda n: -bank[n] @ query)[:4]
        w = np.exp(np.array([bank[n] @ query for n in near]) / 0.1)
        mixed = np.zeros_like(query)
        for n, weight in zip(near, w / w.sum(), strict=True):
            mine = [partners[k] for k, o in enumerate(owners[1]) if o == owners[0][n]]
            mixed += weight * np.mean(mine, axis=0)
        assert found[row].numpy() == pytest.approx(g @ query + 0.3 * g @ mixed, abs=2e-6)


def test_a_chain_takes_the_scores_of_the_step_before_for_queries_and_pool():
    here = problem(6)
    (view,) = here.views("t2i")
    first = view.after(baselines.inverted_softmax, beta=5.0)
    assert torch.equal(first.claims(3)[0], torch.topk(first.scores(view.pool_P).T, 3).values)
    found = first.after(baselines.krnn, weight=0.1).scores(view.queries_Q)
    s, pool = first.scores(view.queries_Q), first.scores(view.pool_P)
    above = (pool[None, :, :] > s[:, None, :]).sum(1)
    assert torch.allclose(found, s - 0.1 * torch.log1p(above.float()), atol=1e-6)


# ---- similarities ------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", SIDES)
@pytest.mark.parametrize("method", [*METHODS, "leaprr"])
def test_matrices_give_what_the_vectors_they_are_made_of_give(method, direction):
    here = problem(7)
    image, text = here.sims.vectors["image"], here.sims.vectors["text"]
    there = replace(here, sims=Matrices(image @ text.T, image @ image.T, text @ text.T))
    found = scores(there, direction, method)
    assert torch.allclose(found, scores(here, direction, method), atol=1e-5)


def test_without_intra_modal_matrices_profiles_of_scores_are_compared():
    i2t = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 2.0, 1.0]])
    sims, rows = Matrices(i2t), torch.arange(3)
    expected = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]])
    assert torch.allclose(sims.between("image", rows, "image", rows), expected)


def test_matrices_of_wrong_shapes_are_refused():
    with pytest.raises(InputError, match="3 × 3"):
        Matrices(torch.zeros(3, 2), torch.zeros(2, 2))
    with pytest.raises(InputError, match="two axes"):
        Matrices(torch.zeros(3))


def test_sentence_vectors_compare_captions_and_nothing_else():
    here = problem(8)
    n = here.sims.sizes["text"]
    sentences = torch.eye(n)
    sims = Towers(here.sims.vectors["image"], here.sims.vectors["text"], sentences)
    rows = torch.arange(n)
    assert torch.equal(sims.between("text", rows, "text", rows), torch.eye(n))
    image = torch.arange(3)
    for side, a, other, b in (("text", rows, "image", image), ("image", image, "image", image)):
        assert torch.equal(sims.between(side, a, other, b), here.sims.between(side, a, other, b))
