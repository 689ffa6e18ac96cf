"""Relevance from captions."""

import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from pipeline.formulas.relevance import MAPS, fit_isotonic, from_captions
from tests import reference
from tests.helpers import live_bytes


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_any_number_of_captions(reduce):
    images, captions = vectors(4, 5, 3), vectors(7, 3, seed=1)
    counts = [5, 1, 3, 2]
    mask = torch.arange(5) < torch.tensor(counts)[:, None]
    images[~mask] = torch.nan
    found = from_captions(images, captions, reduce=reduce, mask_MC=mask)
    for row, image, count in zip(found.tolist(), images, counts, strict=True):
        expected = reference.from_captions(image[:count].tolist(), captions.tolist(), reduce)
        assert row == pytest.approx(expected, abs=1e-12)


def test_an_image_without_captions_has_no_relevance():
    found = from_captions(
        vectors(2, 2, 3), vectors(3, 3), mask_MC=torch.tensor([[True, True], [False, False]])
    )
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_same_image_is_one_whatever_the_captions_say():
    same = torch.tensor([[True, False, False], [False, True, True]])
    found = from_captions(vectors(2, 2, 3), vectors(3, 3, seed=1), same_image_MN=same)
    assert (found[same] == 1).all() and (found[~same] < 1).all()


def test_maps_keep_order_and_range():
    cosine = torch.linspace(-1, 1, 41)
    given = {
        "logistic": {"centre": 0.4, "width": 0.1},
        "isotonic": {"knots_K": [-0.2, 0.3, 0.9], "values_K": [0.0, 0.1, 1.0]},
    }
    for name, function in MAPS.items():
        value = function(cosine, **given.get(name, {}))
        assert value.min() >= 0 and value.max() <= 1 and (value.diff() >= 0).all(), name
    assert MAPS["isotonic"](
        torch.tensor([0.3, 0.6]), **given["isotonic"]
    ).tolist() == pytest.approx([0.1, 0.55])


@pytest.mark.parametrize("seed", range(4))
def test_fitted_map_is_that_of_scikit_learn(seed):
    generator = torch.Generator().manual_seed(seed)
    cosine = (torch.rand(60, generator=generator, dtype=torch.float64) * 20).round() / 20
    judged = (cosine + torch.randn(60, generator=generator, dtype=torch.float64) / 3).clamp(0, 1)
    expected = IsotonicRegression(out_of_bounds="clip").fit(cosine.numpy(), judged.numpy())
    places = torch.linspace(-0.2, 1.2, 99, dtype=torch.float64)
    found = MAPS["isotonic"](places, **fit_isotonic(cosine, judged))
    torch.testing.assert_close(found, torch.from_numpy(expected.predict(places.numpy())))


def test_map_of_a_single_knot_is_flat():
    fitted = fit_isotonic([0.5], [0.3])
    found = MAPS["isotonic"](torch.tensor([0.0, 0.5, 1.0]), **fitted)
    assert found.tolist() == pytest.approx([0.3] * 3)
    with pytest.raises(ValueError, match="no judged pairs"):
        fit_isotonic([], [])


def test_map_may_be_a_function_and_takes_its_settings():
    images, captions = vectors(2, 2, 3), vectors(3, 3, seed=1)
    cosine = from_captions(images, captions, map=lambda c: c)
    found = from_captions(images, captions, map="logistic", centre=0.1, width=0.2)
    torch.testing.assert_close(found, torch.sigmoid((cosine - 0.1) / 0.2))


def test_length_of_vectors_does_not_matter_and_halves_are_worked_on_in_float32():
    images, captions = vectors(2, 2, 8), vectors(3, 8, seed=1)
    expected = from_captions(images, captions)
    torch.testing.assert_close(from_captions(images * 7, captions / 9), expected)
    found = from_captions(images.half(), captions.half())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(from_captions(images, captions), expected)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)


def test_unit_vectors_are_taken_as_they_are():
    images, captions = vectors(2, 2, 1000), vectors(3, 1000, seed=1)
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (images, captions)]
    kept = [x.clone() for x in unit]
    with live_bytes.Peak() as peak:
        found = from_captions(*unit, unit=True)
    torch.testing.assert_close(found, from_captions(images, captions))
    assert peak.most < sum(x.nbytes for x in unit) + 2000  # no vector was copied
    assert all(torch.equal(a, b) for a, b in zip(unit, kept, strict=True))
    empty = from_captions(images[:, :0], captions, unit=True)
    assert empty.isnan().all() and empty.shape == (2, 3)


def test_wrong_names_are_refused():
    for wrong in ({"map": "square"}, {"reduce": "median"}):
        with pytest.raises(ValueError):
            from_captions(vectors(2, 2, 3), vectors(3, 3), **wrong)
