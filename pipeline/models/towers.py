"""The towers there are, and two of them built.

To add a tower: a module, and a line in `IMAGE_TOWERS` or `TEXT_TOWERS`.
"""

import importlib
from collections import Counter
from collections.abc import Callable

from pipeline.models import pretrained
from pipeline.models.convolution import ConvolutionTower
from pipeline.models.gru import GRUTower
from pipeline.models.regions import RegionTower
from pipeline.models.tuning import tune
from pipeline.models.two_tower import TowerInputs, TwoTower
from pipeline.models.vocabulary import PretrainedTokens, Vocabulary
from schemas.settings import ModelSettings

IMAGE_TOWERS = {
    "pixels": ConvolutionTower,
    "regions": RegionTower,
    "pretrained": pretrained.PretrainedImageTower,
}
TEXT_TOWERS = {"gru": GRUTower, "bigru": GRUTower, "pretrained": pretrained.PretrainedTextTower}


def build(
    settings: ModelSettings,
    *,
    vocabulary: Vocabulary | PretrainedTokens,
    features: int | None,
    architecture: dict | None = None,
) -> TwoTower:
    """A new two-tower model; `features` is the width of a region vector, None for pixels.

    Pretrained towers come with their weights, or untrained from an `architecture`. What of each is
    trained is as `model.tune_image` and `model.tune_text` say.
    """
    kinds = {side: _tower(side, settings) for side in ("image", "text")}
    asked = "pretrained" in (settings.image, settings.text)
    model = pretrained.load(settings, architecture) if asked else None
    given = TowerInputs(features, len(vocabulary), model)
    built, tuned = {}, {}
    for side, kind in kinds.items():  # one after the other: what is new in them is drawn so
        built[side] = kind.from_settings(settings, given)
        tuned[side] = tune(built[side], side, settings)
    towers = TwoTower(built["image"], built["text"], tuned)
    if settings.image == settings.text == "pretrained":  # in the space that it learned them for
        towers.came_with = pretrained.scale_and_bias(model)
    return towers


def architecture(settings: ModelSettings) -> dict | None:
    """The configuration that pretrained towers are rebuilt from; None without such towers."""
    asked = "pretrained" in (settings.image, settings.text)
    return pretrained.architecture(settings) if asked else None


def vocabulary_for(
    settings: ModelSettings, counts: Callable[[], Counter[str]]
) -> Vocabulary | PretrainedTokens:
    """The text tower's own tokens, or the words of the train captions, which `counts` counts."""
    if settings.text == "pretrained":
        return pretrained.tokens(settings)
    return Vocabulary.counted(counts(), min_count=settings.min_word_count)


def _tower(kind: str, settings: ModelSettings):
    towers = {"image": IMAGE_TOWERS, "text": TEXT_TOWERS}[kind]
    name = getattr(settings, kind)
    module, _, own = name.partition(":")
    if not own and name not in towers:
        raise ValueError(
            f"unknown model.{kind} {name!r}; known: {', '.join(towers)}, or package.module:Class"
        )
    if not own:
        return towers[name]
    try:
        return getattr(importlib.import_module(module), own)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model.{kind} {name!r} cannot be imported: {error}") from error
