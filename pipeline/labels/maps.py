"""Cosine to relevance: maps by name, or fitted."""

import functools
from collections.abc import Callable

import torch

from pipeline.errors import InputError
from pipeline.formulas import relevance
from pipeline.labels import decisions
from schemas.relevance import Calibration
from schemas.settings import LabelSettings


def cosine_map(settings: LabelSettings) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map from cosine to relevance that the settings, or their calibration, ask for."""
    fitted: LabelSettings | Calibration = settings
    if settings.calibration is not None:
        fitted = decisions.calibration(settings.calibration)
        if fitted.map != settings.map:
            raise InputError(
                f"label.calibration {settings.calibration} holds the map {fitted.map}, label.map "
                f"is {settings.map}; make them the same"
            )
    return map_of(settings.map, fitted)


def map_of(
    name: str, fitted: LabelSettings | Calibration
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A map by its name, with the numbers it was fitted or set to."""
    function = relevance.MAPS[name]
    if name == "logistic":
        return functools.partial(function, centre=fitted.centre, width=fitted.width)
    if name == "isotonic":
        assert isinstance(fitted, Calibration)  # a map that is set has no knots
        return functools.partial(function, knots_K=fitted.knots, values_K=fitted.values)
    return function
