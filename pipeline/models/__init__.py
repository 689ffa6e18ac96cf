"""Two-tower models. To add a tower: a module, and a line in `IMAGE_TOWERS` or `TEXT_TOWERS`.

An image tower maps (B, …) payloads and a text tower maps (B, L) word ids with (B,) lengths to
(B, dim); `TwoTower` gives both unit norm. Any module with `encode_image` and `encode_text` serves.
"""

from pipeline.models.convolution import ConvolutionTower
from pipeline.models.gru import GRUTower
from pipeline.models.regions import RegionTower
from pipeline.models.two_tower import TwoTower
from pipeline.models.vocabulary import Vocabulary
from schemas.settings import ModelSettings

IMAGE_TOWERS = {"pixels": ConvolutionTower, "regions": RegionTower}
TEXT_TOWERS = {"gru": GRUTower}

__all__ = ["IMAGE_TOWERS", "TEXT_TOWERS", "TwoTower", "Vocabulary", "build"]


def build(settings: ModelSettings, *, vocabulary: Vocabulary, features: int | None) -> TwoTower:
    """A new two-tower model; `features` is the width of a region vector, None for pixels."""
    for kind, towers in (("image", IMAGE_TOWERS), ("text", TEXT_TOWERS)):
        name = getattr(settings, kind)
        if name not in towers:
            raise ValueError(f"unknown model.{kind} {name!r}; known: {', '.join(towers)}")
    return TwoTower(
        IMAGE_TOWERS[settings.image].from_settings(settings, features),
        TEXT_TOWERS[settings.text].from_settings(settings, len(vocabulary)),
    )
