"""Settings of re-ranking."""

from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from schemas.settings.section import Section, setting


class RerankSettings(Section):
    """Re-ranking: methods, what they may look at, and what they learn from."""

    method: tuple[str, ...] = setting(
        ("inverted_softmax",),
        "a method, a chain such as inverted_softmax+leaprr, or a list of them of which "
        "the best on val is taken; see docs/reranking.md",
        changes="contents",
    )
    pool: Literal["inductive", "transductive"] = setting(
        "inductive", "beside the gallery a query meets train items alone, or the other queries"
    )
    siblings: bool = setting(False, "transductive: a caption meets its image's others too")
    bank_images: int = setting(
        1000, "train images (and their captions) in the query bank (count)", ge=1, changes="bank"
    )
    texts: Literal["towers", "sentences"] = setting(
        "towers",
        "whose vectors say how near two captions are: the model's, or those of "
        "`embed.encoder`, which bring in what that encoder knows",
    )
    betas: tuple[float, ...] = setting(
        (5.0, 10.0, 20.0, 40.0, 80.0),
        "inverse temperatures tried on val, best rSum kept (1/score)",
        changes="fit",
    )
    weights: str | None = setting(
        None, "LeaPRR: trained weights to apply, a folder of stage 7 (URI)", changes="contents"
    )

    @field_validator("method", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


PAPER = {
    **{"candidates_i2t": 31, "candidates_t2i": 7, "pillars": 64, "neighbours": 10},
    **{"hidden": 768, "layers": 2, "heads": 24, "residual": False, "temperature": 2.0},
    **{"triplet": 1.0, "alignment": 1.0, "hinge": 1.0, "optimizer": "sgd", "lr": 0.01},
    **{"batch_size": 512, "epochs": 30},
}


class LeaPRRSettings(Section):
    """Training of LeaPRR, the learnable pillar-based re-ranker."""

    preset: Literal["default", "paper"] = setting("default", "what settings not given come from")
    lists: str = setting(
        "val",
        "what it learns to re-rank: val, train (which the towers know by heart), or a "
        "run folder whose towers have not learned its evaluated split (URI)",
    )
    gallery: int = setting(1000, "images of a training gallery; others are its bank (count)", ge=2)
    candidates_i2t: int = setting(32, "texts an image query re-ranks (count)", ge=1)
    candidates_t2i: int = setting(32, "images a text query re-ranks (count)", ge=1)
    pillars: int = setting(32, "of the gallery, and of the pool again (count)", ge=1)
    neighbours: int = setting(10, "in each list of the affinity graph (count)", ge=2)
    threshold: float = setting(0.8, "affinity is cut below this over the node count (ratio)", ge=0)
    hidden: int = setting(32, "width of the model (dimensions)", ge=1)
    layers: int = setting(1, "reasoning layers (count)", ge=1)
    heads: int = setting(4, "attention heads, which divide `hidden` (count)", ge=1)
    residual: bool = setting(True, "refinements are added to the scores that come in")
    temperature: float = setting(0.05, "contrastive loss (score)", gt=0)
    triplet: float = setting(0.0, "weight of the triplet loss", ge=0)
    margin: float = setting(0.2, "triplet loss (score)", ge=0)
    alignment: float = setting(0.0, "weight of the cross-modal alignment", ge=0)
    hinge: float = setting(0.0, "weight of staying above a query's lowest incoming score", ge=0)
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "torch.optim's")
    lr: float = setting(2e-3, "learning rate, half a cosine to 0 (per step)", gt=0)
    weight_decay: float = setting(0.01, "of all weights (per step)", ge=0)
    batch_size: int = setting(128, "pairs of an image and a caption (count)", ge=2)
    epochs: int = setting(4, "passes over the images of the lists (epochs)", ge=1)
    seed: int = setting(0, "seed of weights, galleries and order", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, values: dict) -> dict:
        return {**PAPER, **values} if values.get("preset") == "paper" else values

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden {self.hidden} does not divide into {self.heads} heads; choose a multiple"
            )
        return self
