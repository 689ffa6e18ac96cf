"""The Triton kernels against dense definitions in float64: run by `test_fused.py`, interpreted.

Triton's interpreter has to be chosen before Triton is imported, and then every loss on a processor
goes through it; so these tests have a process of their own. Short lists would all go by pairs, and
sorted: the limits are lowered so that the grid and the histograms are seen, too.
"""

import itertools

import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from pipeline.formulas.kernels import fused
from pipeline.formulas.kernels.fused import launch
from pipeline.formulas.losses import LOSSES, both_directions, smooth_ndcg
from pipeline.formulas.streaming import both_directions_streamed

torch.set_num_threads(1)

# What a list goes through: (candidates, the longest by pairs, the longest sorted).
PATHS = {"pairs": (20, 256, 1024), "sorted": (40, 8, 64), "histograms": (70, 8, 16)}
# A matrix whose rows and columns go through it: several programs, each several times, a ragged end.
BOTH = {"pairs": (5, 13), "sorted": (9, 13), "histograms": (17, 19)}


def patched_once(patch):
    """The language stays as the interpreter has it: half its time it would be patched anew."""
    seen = set()

    def of(function):
        here = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if here not in seen:
            patch(function)
            seen.add(here)
        return interpreter._LangPatchScope()  # with nothing to restore

    return of


interpreter._patch_lang = patched_once(interpreter._patch_lang)

every_path = pytest.mark.parametrize("path", PATHS)
layouts = pytest.mark.parametrize("layout", ["rows", "columns"])


@pytest.fixture
def along(monkeypatch):
    """Sends lists along a path; gives their length."""

    def choose(path):
        n, short, by_sort = PATHS[path]
        monkeypatch.setattr(launch, "SHORT", short)
        monkeypatch.setattr(launch, "SORTED", by_sort)
        return n

    return choose


def make(queries, n, seed=0):
    """Scores like a half-trained model's, relevance with a match a row, and a ragged mask."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, n, generator=generator) * 0.2
    relevance = torch.empty(queries, n).normal_(0.05, 0.2, generator=generator).clamp_(0, 1)
    relevance[:, 0] = 1
    lengths = torch.randint(1, n + 1, (queries, 1), generator=generator)
    return scores, relevance, torch.arange(n) < lengths


def laid(x, layout):
    return x if x is None or layout == "rows" else x.T.contiguous().T


def dense_ndcg(scores, relevance, tau=0.01, mask=None):
    """S-NDCG as it is defined, a query at a time."""
    values = []
    for row in range(len(scores)):
        inside = scores[row] != -torch.inf
        if mask is not None:
            inside = inside & mask[row]
        s, gain = scores[row][inside], torch.exp2(relevance[row][inside].double()) - 1
        rank = 0.5 + torch.sigmoid((s[None, :] - s[:, None]) / tau).sum(-1)
        place = torch.arange(2, len(s) + 2, dtype=torch.float64)
        ideal = (gain.sort(descending=True).values / place.log()).sum()
        value = 1 - (gain / (1 + rank).log()).sum() / ideal if ideal != 0 else 0 * s.sum()
        values.append(value)
    return torch.stack(values)


def of(name):
    if name == "smooth_ndcg":
        return dense_ndcg
    return lambda scores, target, mask=None, **given: LOSSES[name](
        scores, target, mask_QN=mask, **given
    )


def check(name, scores, target, mask=None, layout="rows", weight=None, **given):
    """Value to 1e-6, gradient to 1e-4 of its norm, against the definition in float64."""
    own = laid(scores, layout).detach().requires_grad_()
    assert fused.takes(own, target)
    loss = LOSSES[name](own, laid(target, layout), mask_QN=laid(mask, layout), **given)
    precise = scores.double().requires_grad_()
    expected = of(name)(precise, target, mask=mask, **given)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    weight = torch.ones(len(scores)) if weight is None else weight
    (loss * weight).sum().backward()
    (expected * weight).sum().backward()
    error = (own.grad.double() - precise.grad).norm()
    assert error <= 1e-4 * precise.grad.norm() + 1e-7, error / precise.grad.norm()
    return own.grad


@every_path
@layouts
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_ndcg_is_the_definition(path, layout, masked, along):
    n = along(path)
    scores, relevance, mask = make(5, n)
    weight = torch.rand(5, generator=torch.manual_seed(1))
    check("smooth_ndcg", scores, relevance, mask if masked else None, layout, weight)


@every_path
def test_ndcg_of_ties(path, along):
    n = along(path)
    scores, relevance, mask = make(4, n)
    scores, relevance = (scores * 5).round() / 5, (relevance * 4).round() / 4
    check("smooth_ndcg", scores, relevance, mask)
    scores[0], relevance[1], relevance[2] = 0.3, 1.0, 0.0
    gradient = check("smooth_ndcg", scores, relevance)
    assert (gradient[2] == 0).all()


@every_path
@pytest.mark.parametrize("tau", [1e-3, 0.1, 50.0])
def test_ndcg_of_sharp_and_flat_steps(path, tau, along):
    scores, relevance, _ = make(3, along(path))
    check("smooth_ndcg", scores, relevance, tau=tau)


def test_ndcg_of_lists_wider_than_the_grid(along):
    """They go by pairs, the others of their program do not."""
    n = along("histograms")
    scores, relevance, mask = make(6, n)
    scores[[1, 5]] *= 1e4
    for layout, some in itertools.product(("rows", "columns"), (None, mask)):
        check("smooth_ndcg", scores, relevance, some, layout)


@every_path
def test_ndcg_of_gains_below_zero(path, along):
    """They mean nothing, and they overflow nothing."""
    scores, relevance, _ = make(4, along(path))
    check("smooth_ndcg", scores, relevance - 0.1)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2), (2, 17)], ids=str)
@layouts
@pytest.mark.parametrize("name", ["smooth_ndcg", "info_nce", "kendall_rank"])
def test_small_lists(shape, layout, name):
    scores, relevance, mask = make(*shape)
    target = relevance > 0.3 if name == "info_nce" else relevance
    check(name, scores, target, None, layout)
    check(name, scores, target, mask, layout)


def test_ideal_dcg_by_histograms_is_that_of_sorting(along):
    """For lists of all kinds, those among them whose gains are nearly all in one bin."""
    along("histograms")
    generator = torch.Generator().manual_seed(0)
    uniform, normal = torch.rand(1100, generator=generator), torch.randn(1100, generator=generator)
    kinds = [
        uniform, uniform**3, uniform * 0.01, uniform * 5e-4, 0.5 + normal.abs().clamp(max=4) / 8,
        (0.05 + 0.15 * normal).clamp(0, 1), torch.exp(2 * normal - 5).clamp(max=1),
        torch.where(normal > 0, 0.9, 0.01) + uniform / 1000, (uniform * 3).round() / 3,
    ]  # fmt: skip
    relevance = torch.stack(kinds)
    relevance[:, 5] = 1
    scores = torch.randn(relevance.shape, generator=generator) / 5
    found = smooth_ndcg(scores, relevance)
    torch.testing.assert_close(
        found.double(), dense_ndcg(scores.double(), relevance), rtol=0, atol=2e-6
    )


@every_path
def test_the_order_of_candidates_changes_no_bit_of_the_gradient(path, along):
    """Sums of whole numbers, as they are made in any order on a device."""
    n = along(path)
    scores, relevance, mask = make(4, n)
    order = torch.randperm(n, generator=torch.manual_seed(3))
    gradients = []
    for turned in (torch.arange(n), order, torch.arange(n)):
        own = scores[:, turned].requires_grad_()
        smooth_ndcg(own, relevance[:, turned], mask_QN=mask[:, turned]).sum().backward()
        gradients.append(torch.empty_like(scores).index_copy_(1, turned, own.grad))
    assert torch.equal(gradients[0], gradients[2])
    if path == "pairs":  # whose sums go along the list
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)
    else:
        assert torch.equal(gradients[0], gradients[1])


def test_long_lists_sum_in_64_bits(along, monkeypatch):
    n = along("sorted")
    scores, relevance, mask = make(3, n)
    monkeypatch.setattr(launch, "IN_32_BITS", 8)
    check("smooth_ndcg", scores, relevance, mask)


@layouts
@pytest.mark.parametrize("positives", ["any", "each"])
def test_info_nce_is_that_of_torch(layout, positives):
    scores, relevance, mask = make(11, 70)
    positive = relevance > 0.3
    positive[3], positive[4] = False, True
    for some in (None, mask):
        check("info_nce", scores, positive, some, layout, positives=positives, temperature=0.07)
        for name in ("masked_info_nce", "adaptive_info_nce"):
            check(name, scores, relevance, some, layout, positives=positives)


@layouts
def test_kendall_is_that_of_torch(layout):
    scores, relevance, mask = make(5, 70)
    scores, relevance = (scores * 20).round() / 20, (relevance * 10).round() / 10
    relevance[2] = 0.5
    for some, given in itertools.product(
        (None, mask), ({"gap": 0.25}, {"gap": 0.0, "margin": 0.12})
    ):
        check("kendall_rank", scores, relevance, some, layout, **given)


FUSED = ["smooth_ndcg", "info_nce", "kendall_rank"]
every_kernel = pytest.mark.parametrize(
    ("name", "path"),
    [*(("smooth_ndcg", path) for path in PATHS), *((name, "sorted") for name in FUSED[1:])],
)


def target_of(name, relevance):
    return relevance > 0.3 if name == "info_nce" else relevance


@every_kernel
def test_what_is_outside_the_list_and_what_is_not_finite(name, path, along):
    n = along(path)
    scores, relevance, mask = make(6, n)
    mask[:] = True
    mask[:, 3] = False
    mask[5] = False
    target = target_of(name, relevance)
    clean = scores.clone().requires_grad_()
    expected = LOSSES[name](clean, target, mask_QN=mask)
    expected.sum().backward()
    filled = scores.clone()
    filled[:, 3], filled[5], filled[0, 3] = -torch.inf, -torch.inf, torch.nan
    wrong = filled.clone()
    filled.requires_grad_()
    alone = mask.clone()
    alone[1:] = True  # of the first query the mask says it, of the others the score
    found = LOSSES[name](filled, target, mask_QN=alone)
    found.sum().backward()
    assert torch.equal(found, expected) and torch.equal(filled.grad, clean.grad)
    assert found[5] == 0 and (filled.grad[5] == 0).all()
    wrong[1, 7], wrong[2, 8] = torch.nan, torch.inf
    label = target.clone()
    bad = {1, 2}
    if name != "info_nce":
        label[4, 6] = torch.inf
        bad |= {4}
    wrong.requires_grad_()
    loss = LOSSES[name](wrong, label, mask_QN=alone)
    loss.sum().backward()
    assert set(loss.isnan().nonzero().flatten().tolist()) == bad
    assert set(wrong.grad.isnan().any(-1).nonzero().flatten().tolist()) == bad
    good = [row for row in range(6) if row not in bad]
    assert torch.equal(wrong.grad[good], clean.grad[good])


@every_kernel
def test_both_directions_read_one_matrix(name, path, along):
    along(path)
    scores, relevance, mask = make(*BOTH[path])
    target = target_of(name, relevance)
    for some, layout in ((None, "rows"), (mask, "columns"))[path == "histograms" :]:
        precise = scores.double().requires_grad_()
        whole = of(name)(precise, target, mask=some).mean()
        other = of(name)(precise.T, target.T, mask=None if some is None else some.T).mean()
        ((whole + other) / 2).backward()
        own = laid(scores, layout).detach().requires_grad_()
        both = both_directions(name, own, laid(target, layout), mask_QN=laid(some, layout))
        torch.testing.assert_close(both.double(), (whole + other) / 2, rtol=1e-6, atol=1e-6)
        (first,) = torch.autograd.grad(both, own, retain_graph=True)
        (second,) = torch.autograd.grad(both, own)
        assert torch.equal(first, second)
        assert (first - precise.grad).norm() < 1e-4 * precise.grad.norm()


@pytest.mark.parametrize("name", FUSED)
def test_half_precision_is_widened_and_its_gradient_scaled_before_it_is_rounded(name):
    scores, relevance, _ = make(4, 20)
    target = target_of(name, relevance)
    for kind in (torch.float16, torch.bfloat16):
        half = scores.to(kind).requires_grad_()
        wide = half.detach().float().requires_grad_()
        for own in (half, wide):
            loss = LOSSES[name](own, target)
            (loss.sum() * 2.0**12 / 2**20).backward()
        assert loss.dtype == torch.float32
        assert torch.equal(half.grad, wide.grad.to(kind))


@pytest.mark.parametrize("name", FUSED)
def test_backward_twice_and_second_derivatives(name):
    scores, relevance, _ = make(3, 12)
    target = target_of(name, relevance)
    scores.requires_grad_()
    loss = LOSSES[name](scores, target).sum()
    (first,) = torch.autograd.grad(loss, scores, retain_graph=True)
    (second,) = torch.autograd.grad(loss, scores, retain_graph=True)
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    torch.testing.assert_close(gradient.detach(), first, rtol=1e-3, atol=1e-5)
    if name == "info_nce":
        (found,) = torch.autograd.grad(gradient.square().sum(), scores)
        precise = scores.detach().double().requires_grad_()
        (plain,) = torch.autograd.grad(
            LOSSES[name](precise, target).sum(), precise, create_graph=True
        )
        (expected,) = torch.autograd.grad(plain.square().sum(), precise)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    else:
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            gradient.square().sum().backward()


def test_a_learned_temperature_gets_its_gradient():
    scores, relevance, _ = make(3, 20)
    for name, setting in (("smooth_ndcg", "tau"), ("info_nce", "temperature")):
        target, gradients = target_of(name, relevance), []
        for kind in (torch.float32, torch.float64):
            learned = torch.tensor(0.05, dtype=kind, requires_grad=True)
            own = scores.to(kind)
            for loss in (
                LOSSES[name](own, target, **{setting: learned}).sum(),
                both_directions(name, own, target, **{setting: learned}),
            ):
                loss.backward()
            gradients.append(learned.grad.double())
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_matrices_that_lie_otherwise(name):
    scores, relevance, mask = make(4, 20)
    target = target_of(name, relevance)
    few = LOSSES[name](
        scores[1::2, 3::2], target.T.contiguous().T[1::2, 3::2], mask_QN=mask[1::2, 3::2]
    )
    whole = [x[1::2, 3::2].clone() for x in (scores, target, mask)]
    assert torch.equal(few, LOSSES[name](*whole[:2], mask_QN=whole[2]))
    one = relevance[:1].expand(4, -1)
    expected = LOSSES[name](scores, target_of(name, one.clone()))
    assert torch.equal(LOSSES[name](scores, target_of(name, one)), expected)
    own = scores[:, ::2].requires_grad_()
    both_directions(name, own, target[:, ::2]).backward()
    dense = scores[:, ::2].detach().clone().requires_grad_()
    both_directions(name, dense, target[:, ::2].clone()).backward()
    assert torch.equal(own.grad, dense.grad)


def test_streamed_losses_take_the_kernels():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(2, 10, 8, generator=generator), dim=-1)
    images, texts = (x.clone().requires_grad_() for x in vectors)
    relevance = torch.rand(10, 10, generator=generator)
    total = both_directions_streamed("smooth_ndcg", images, texts, relevance, rows=4)
    total.backward()
    own = [x.clone().requires_grad_() for x in vectors]
    whole = both_directions("smooth_ndcg", own[0] @ own[1].T, relevance)
    whole.backward()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(images.grad, own[0].grad, rtol=1e-4, atol=1e-7)


class Allocated(TorchDispatchMode):
    """Adds up the bytes of every tensor that is made; none is taken off when it goes."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if torch.is_tensor(x)}
        if torch.is_tensor(found) and found.untyped_storage().data_ptr() not in known:
            self.total += found.untyped_storage().nbytes()
        return found


def test_memory_is_one_more_matrix_and_scratch(monkeypatch):
    """At B = 4,096 both ways, as a device of 132 processors is given it; no kernel runs."""

    class Nothing:
        def __getitem__(self, grid):
            return lambda *given, **settings: None

    for module in (launch.binned, launch.pairs):
        monkeypatch.setattr(module, "smooth_ndcg", Nothing())
    monkeypatch.setattr(launch, "_programs", lambda blocks, like, each: min(blocks, 132 * each))
    scores, relevance = torch.zeros(2, 4096, 4096).unbind()
    scores.requires_grad_()
    with Allocated() as allocated:
        both_directions("smooth_ndcg", scores, relevance).backward()
    assert 64 * 2**20 < allocated.total < 2 * 64 * 2**20
