"""The towers there are, and two of them built.

To add a tower: a module, and a line in `IMAGE_TOWERS` or `TEXT_TOWERS`.
"""

import importlib
from collections import Counter
from collections.abc import Callable

from pipeline.models import pretrained
from pipeline.models.convolution import ConvolutionTower
from pipeline.models.gru import GRUTower
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.regions import RegionTower
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
    preprocessing: Preprocessing | None = None,
) -> TwoTower:
    """A new two-tower model; `features` is the width of a region vector, None for pixels.

    Pretrained towers come with their weights and their own `preprocessing`, or untrained from an
    `architecture`.
    """
    image, text = _tower("image", settings), _tower("text", settings)
    asked = "pretrained" in (settings.image, settings.text)
    model = pretrained.load(settings, architecture) if asked else None
    if preprocessing is None and architecture is None and features is None:
        preprocessing = preprocessing_of(settings)
    given = TowerInputs(features, len(vocabulary), model, preprocessing)
    return TwoTower(image.from_settings(settings, given), text.from_settings(settings, given))


def preprocessing_of(settings: ModelSettings) -> Preprocessing:
    """What becomes of a picture before the image tower: the tower's own, or a square.

    A tower class that has its own gives it as `preprocessing(settings)`.
    """
    own = getattr(_tower("image", settings), "preprocessing", None)
    return own(settings) if own else Preprocessing.squash(settings.image_size)


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
