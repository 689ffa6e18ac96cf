"""LeaPRR: affinity graphs against golden files and loops, what it learns, and how it is trained."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.errors import InputError
from pipeline.reranking import fitting
from pipeline.reranking.leaprr import losses
from pipeline.reranking.leaprr.graph import affinity, shared
from pipeline.reranking.leaprr.model import LeaPRR, candidate_lists, spliced
from pipeline.reranking.leaprr.pairs import galleries
from pipeline.reranking.leaprr.training import LeaPRRTrainer
from pipeline.reranking.problem import SIDES, Problem
from pipeline.reranking.similarities import Towers
from pipeline.storage import store
from pipeline.storage.plan import Piece
from pipeline.training import checkpoint
from pipeline.training.loop import Loop
from schemas.settings import LeaPRRSettings
from tests.helpers import gloo
from tests.helpers.paths import GOLDEN
from tests.pipeline.reranking.test_methods import SMALL, problem

# ---- the graph ---------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
@pytest.mark.parametrize("name", ["k20_k7", "k6_k4_nb5"])
def test_affinity_is_that_of_the_golden_file(name, direction):
    """Made by the authors' code, whose threshold has 32 and 8 nodes whatever the lists hold."""
    with np.load(GOLDEN / f"leaprr_adj_{name}.npz") as file:
        values = {key: torch.from_numpy(file[key]) for key in file}
    queries = values["image_queries" if direction == "i2t" else "text_queries"]
    candidates = values[direction][queries][:, : int(values[f"k_{direction}"])]
    c, (mine, theirs) = int(values["neighbors"]), ("i", "t") if direction == "i2t" else ("t", "i")

    def lists_of(kind: str) -> torch.Tensor:
        own = values[f"{mine}2{kind}"][queries][:, None, :c]
        return torch.cat([own, values[f"{theirs}2{kind}"][candidates][:, :, :c]], 1)

    nodes = {"i2t": 32, "t2i": 8}[direction]
    found = affinity(lists_of("i"), lists_of("t"), threshold=float(values["coef"]) / nodes)
    assert torch.allclose(found.double(), values[f"A_{direction}"], atol=1e-6)


def test_shared_neighbours_are_those_of_sets():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(3 * 7, 30, generator=generator).topk(5, dim=1).indices.view(3, 7, 5)
    rows[0, 2, 3:] = torch.tensor([-1, -2])  # nobody
    found = shared(rows)
    for b in range(3):
        sets = [{r for r in node if r >= 0} for node in rows[b].tolist()]
        assert found[b].tolist() == [[len(x & y) for y in sets] for x in sets]


def test_rows_of_affinity_sum_to_one_and_a_lonely_node_keeps_itself():
    rows = torch.tensor([[[0, 1], [1, 2], [8, 9]]])
    found = affinity(rows, torch.full_like(rows, -1), threshold=0.1)
    assert torch.allclose(found.sum(2), torch.ones(1, 3)) and found[0, 2].tolist() == [0, 0, 1]
    nothing = affinity(torch.full_like(rows, -1), torch.full_like(rows, -1), threshold=0.1)
    assert torch.equal(nothing, torch.eye(3)[None])


# ---- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["inductive", "transductive"])
@pytest.mark.parametrize("direction", SIDES)
def test_lists_hold_similarities_to_the_pillars(direction, pool):
    here = problem(pool=pool)
    model = LeaPRR(SMALL)
    for view in here.views(direction):
        some = candidate_lists(view, view.queries_Q, model.settings)
        scores = view.scores(view.queries_Q)
        k = min(getattr(SMALL, f"candidates_{direction}"), scores.shape[1])
        assert torch.equal(some.score_BK, scores.topk(k).values)
        x, y = (here.sims.vectors[side] for side in SIDES[direction])
        pillars = view.gallery_N[scores.topk(min(6, scores.shape[1])).indices]
        _, near = view.nearest_in_pool(view.queries_Q, 6)
        for b, row in enumerate(view.queries_Q.tolist()):
            nodes = [x[row], *y[view.gallery_N[some.place_BK[b]]]]
            for v, node in enumerate(nodes):
                assert torch.allclose(some.features[0][b, v], y[pillars[b]] @ node, atol=1e-6)
                assert torch.allclose(some.features[1][b, v], x[near[b]] @ node, atol=1e-6)


@pytest.mark.parametrize("pool", ["inductive", "transductive"])
@pytest.mark.parametrize("direction", SIDES)
def test_lists_hold_the_highest_scores_of_query_and_candidates(direction, pool):
    """Of the query in the gallery, of a candidate in the pool; 0 where there are no more."""
    here = problem(pool=pool)
    deep = SMALL.model_copy(update={"pillars": 40})
    for view in here.views(direction):
        some = candidate_lists(view, view.queries_Q, deep)
        of_query, of_pool = view.scores(view.queries_Q), view.scores(view.pool_P)
        for b in range(len(view.queries_Q)):
            nodes = [of_query[b], *of_pool.T[some.place_BK[b]]]
            for v, node in enumerate(nodes):
                highest = node.sort(descending=True).values
                expected = torch.nn.functional.pad(highest, (0, 40 - len(highest)))
                assert torch.equal(some.claims_BVL[b, v], expected)


def test_spliced_scores_keep_their_set_and_take_the_refined_order():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.7, 0.3]])
    found = spliced(scores, torch.tensor([[0, 3, 2]]), torch.tensor([[0.0, 1.0, 2.0]]))
    assert found[0] == pytest.approx([0.5, 0.1, 0.9, 0.7, 0.3])


def test_the_paper_s_preset_is_the_paper_s_and_can_be_changed():
    paper = LeaPRRSettings(preset="paper", epochs=2)
    assert (paper.candidates_i2t, paper.candidates_t2i, paper.pillars) == (31, 7, 64)
    assert (paper.hidden, paper.heads, paper.temperature, paper.epochs) == (768, 24, 2.0, 2)
    small = paper.model_copy(update={"hidden": 48, "pillars": 6})
    here = problem()
    (view,) = here.views("i2t")
    some = candidate_lists(view, view.queries_Q, small)
    refined = LeaPRR(small).of["i2t"](some)
    assert refined.shape == some.score_BK.shape and refined.abs().max() <= 1 + 1e-6


def test_losses_are_those_of_a_loop_over_queries():
    generator = torch.Generator().manual_seed(0)
    refined, initial = torch.randn(2, 6, 5, generator=generator)
    positive = torch.rand(6, 5, generator=generator) < 0.3
    positive[0], positive[1] = False, True
    s = LeaPRRSettings(preset="paper", triplet=0.7, hinge=0.4)
    found = losses.refinement(refined, initial, positive, s)
    for b in range(6):
        x, p = refined[b], positive[b]
        if not p.any() or p.all():
            assert found[b] == 0
            continue
        contrastive = -torch.log((x[p] / 2).exp().sum() / (x / 2).exp().sum())
        triplet = (0.2 + x[~p].max() - x[p].min()).clamp(min=0)
        hinge = (initial[b].min() - x).clamp(min=0).mean()
        assert found[b] == pytest.approx(float(contrastive + 0.7 * triplet + 0.4 * hinge), abs=1e-5)


def test_alignment_is_the_divergence_of_two_distributions():
    mine, theirs = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p, q = (np.exp(s[0].numpy() / 0.5) for s in (mine, theirs))
    p, q = p / p.sum(), q / q.sum()
    found = losses.alignment(mine, theirs, 0.5)
    assert float(found) == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-6)
    assert float(losses.alignment(mine, mine, 0.5)) == pytest.approx(0, abs=1e-7)


# ---- training ----------------------------------------------------------------------------------


def planted(seed: int, images=150, bank=150, dim=24) -> Problem:
    """Galleries full of hubs: what is right is told by neighbours, not by a query's own scores.

    All share a direction, gallery items to very different degrees, so that many are near to every
    query. How near they are to the bank's items shows to what degree.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    size = images + bank
    meaning = torch.nn.functional.normalize(drawn(size, dim), dim=1)
    popular = torch.rand(2, size, generator=generator)
    sides = {}
    for side, share in zip(("image", "text"), popular, strict=True):
        own = torch.nn.functional.normalize(meaning + 0.15 * drawn(size, dim), dim=1)
        # Asking brings 1, answering the item's own share; neither changes the other's product.
        sides[side] = torch.cat([own, torch.ones(size, 1), 0.5 * share[:, None]], 1)
    flipped = sides["text"][:, [*range(dim), dim + 1, dim]]
    everyone = torch.arange(size)
    return Problem(
        Towers(sides["image"], flipped),
        gallery=dict.fromkeys(sides, everyone[:images]),
        bank=dict.fromkeys(sides, everyone[images:]),
        owner=dict.fromkeys(sides, everyone),
    )


def trained(folder, train: Problem, val: Problem | None, settings, stop=None, report=None):
    inputs = {"leaprr": settings, "steps": [], "version": "hand"}
    piece = Piece("leaprr", f"{folder}/history.json", "print", inputs)
    build = partial(LeaPRRTrainer, train=train, val=val)
    training = Loop(build, piece, report or (lambda records: None))
    while training.epoch < (settings.epochs if stop is None else stop):
        training.run_epoch()
    training.settle()
    return training


PLANTED = LeaPRRSettings(
    **{"candidates_i2t": 32, "candidates_t2i": 32, "pillars": 16, "neighbours": 5, "gallery": 150},
    **{"hidden": 16, "heads": 2, "epochs": 8, "batch_size": 30, "lr": 5e-3},
)


def test_leaprr_finds_what_is_planted_in_the_neighbours(tmp_path):
    test = planted(7)
    training = trained(tmp_path, planted(1), planted(2), PLANTED)
    training.trainer.model.eval()
    for direction in SIDES:
        before = fitting.recalls(list(test.views(direction)))
        with torch.no_grad():
            steps = [{"method": "leaprr"}]
            after = fitting.recalls(fitting.views(test, direction, steps, training.trainer.model))
        assert after > before + 25, (direction, before, after)


def test_training_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path):
    settings = PLANTED.model_copy(update={"epochs": 3, "alignment": 0.5})
    whole = trained(tmp_path / "whole", planted(1), planted(2), settings)
    trained(tmp_path / "stopped", planted(1), planted(2), settings, stop=2)
    again = trained(tmp_path / "stopped", planted(1), planted(2), settings)
    assert (again.step, again.best) == (whole.step, whole.best)
    one, two = (training.trainer.model.state_dict() for training in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [r["step"] for r in again.records] == [r["step"] for r in whole.records]
    assert [r["train/loss"] for r in again.records] == [r["train/loss"] for r in whole.records]


def test_a_torn_checkpoint_is_not_published(tmp_path):
    settings = PLANTED.model_copy(update={"epochs": 1})
    training = trained(tmp_path, planted(1), planted(2), settings)
    (weights,) = tmp_path.glob("checkpoints/step-*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="step-00000005 is torn; delete it and train again"):
        training.publish()
    assert not (tmp_path / "model.safetensors").exists()


def test_records_beside_a_checkpoint_may_be_another_try_s(tmp_path):
    settings = PLANTED.model_copy(update={"epochs": 2})
    trained(tmp_path, planted(1), planted(2), settings, stop=1)
    store.write_json(f"{tmp_path}/checkpoints/records.json", [{"step": 1, "train/loss": -1.0}])
    again = trained(tmp_path, planted(1), planted(2), settings)
    assert [record["step"] for record in again.records] == [5, 10]


def stopping(rank: int, size: int, folder: str, stop: int) -> None:
    settings = PLANTED.model_copy(update={"epochs": 2, "batch_size": 29})
    gloo.meet(rank, size, folder, lambda: trained(folder, planted(1), None, settings, stop))


def test_four_workers_that_go_on_end_bit_for_bit_as_four_undisturbed_ones(tmp_path):
    found = {}
    for name, stops in {"straight": (2,), "halted": (1, 2)}.items():
        (tmp_path / name).mkdir()
        for stop in stops:
            gloo.together(4, stopping, str(tmp_path / name), stop)
            (tmp_path / name / "meet-4").unlink(missing_ok=True)
        found[name] = checkpoint.latest(f"{tmp_path}/{name}/checkpoints")[0][1]["model"]
    one, two = found["straight"], found["halted"]
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def many(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    settings = PLANTED.model_copy(update={"epochs": 1, "alignment": 0.5, "batch_size": 29})
    trained(folder, planted(1), planted(2), settings)
    dist.destroy_process_group()


def test_two_workers_train_what_one_trains(tmp_path):
    settings = PLANTED.model_copy(update={"epochs": 1, "alignment": 0.5, "batch_size": 29})
    alone = trained(tmp_path / "one", planted(1), planted(2), settings)
    gloo.together(2, many, str(tmp_path))
    found, _ = checkpoint.latest(str(tmp_path / "checkpoints"))
    weights = found[1]["model"]
    for name, value in alone.trainer.model.state_dict().items():
        assert torch.allclose(weights[name], value, atol=2e-4), name


def test_galleries_are_a_partition_and_the_rest_is_their_bank():
    here = problem()
    everything = replace(
        here,
        gallery={side: torch.arange(size) for side, size in here.sims.sizes.items()},
        bank={side: torch.arange(0) for side in here.sims.sizes},
    )
    found = galleries(everything, 5, seed=0)
    assert len(found) == 2  # 15 images: galleries of fewer than 32 only where there are no others
    for part in found:
        for side, size in here.sims.sizes.items():
            both = torch.cat([part.gallery[side], part.bank[side]])
            assert sorted(both.tolist()) == list(range(size))
        owners = here.owner["text"][part.gallery["text"]].unique().tolist()
        assert owners == sorted(part.gallery["image"].tolist())
