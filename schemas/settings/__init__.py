"""Every setting of every stage, with its default and unit. A recipe is one `Recipe`."""

from typing import Any

from schemas.settings.cluster import ClusterSettings
from schemas.settings.data import AuditSettings, ShardSettings, SourceSettings
from schemas.settings.labels import CalibrateSettings, EmbedSettings, LabelSettings
from schemas.settings.reranking import LeaPRRSettings, RerankSettings
from schemas.settings.results import EvaluateSettings, ReportSettings, SearchSettings, ServeSettings
from schemas.settings.section import Section, setting
from schemas.settings.training import ModelSettings, TrainSettings, TuneSettings, of_before

__all__ = [
    "SECTIONS", "AuditSettings", "CalibrateSettings", "ClusterSettings", "EmbedSettings",
    "EvaluateSettings", "LabelSettings", "LeaPRRSettings", "ModelSettings", "Recipe",
    "ReportSettings", "RerankSettings", "SearchSettings", "Section", "ServeSettings",
    "ShardSettings", "SourceSettings", "TrainSettings", "TuneSettings", "of_before",
]  # fmt: skip


class Recipe(Section):
    """The resolved settings of a run: a recipe file with the command line's overrides."""

    name: str = setting(..., "what run folders and experiments are called after")
    about: str = setting("", "one line for `halftone recipes`")
    place: int = setting(0, "of a model among those of its recipe (count)", ge=0)
    source: SourceSettings = SourceSettings()
    shard: ShardSettings = ShardSettings()
    embed: EmbedSettings = EmbedSettings()
    label: LabelSettings = LabelSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    rerank: RerankSettings = RerankSettings()
    leaprr: LeaPRRSettings = LeaPRRSettings()
    search: SearchSettings = SearchSettings()
    report: ReportSettings = ReportSettings()
    serve: ServeSettings = ServeSettings()
    audit: AuditSettings = AuditSettings()
    calibrate: CalibrateSettings = CalibrateSettings()
    cluster: ClusterSettings = ClusterSettings()
    variants: dict[str, dict[str, Any]] = setting(
        {}, "models trained side by side on the same data: {name: {section: {...}}}"
    )


SECTIONS = tuple(
    name for name, field in Recipe.model_fields.items() if isinstance(field.default, Section)
)
