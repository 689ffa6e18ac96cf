"""Settings of re-ranking."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from schemas.settings.section import Section


class RerankSettings(Section):
    """Re-ranking: methods, what they may look at, and what they learn from."""

    method: tuple[str, ...] = Field(
        ("inverted_softmax",),
        description="a method, a chain such as inverted_softmax+leaprr, or a list of them of which "
        "the best on val is taken; see docs/reranking.md",
    )
    pool: Literal["inductive", "transductive"] = Field(
        "inductive",
        description="beside the gallery a query meets train items alone, or the other queries",
    )
    siblings: bool = Field(
        False, description="transductive: a caption meets the other captions of its image too"
    )
    bank_images: int = Field(
        1000, ge=1, description="train images (and their captions) in the query bank (count)"
    )
    texts: Literal["towers", "sentences"] = Field(
        "towers",
        description="whose vectors say how near two captions are: the model's, or those of "
        "`embed.encoder`, which bring in what that encoder knows",
    )
    betas: tuple[float, ...] = Field(
        (5.0, 10.0, 20.0, 40.0, 80.0),
        description="inverse temperatures tried on val, best rSum kept (1/score)",
    )
    weights: str | None = Field(
        None, description="LeaPRR: trained weights to apply, a folder of stage 7 (URI)"
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

    preset: Literal["default", "paper"] = Field(
        "default", description="what the settings not given are taken from"
    )
    lists: str = Field(
        "val",
        description="what it learns to re-rank: val, train (which the towers know by heart), or a "
        "run folder whose towers have not learned its evaluated split (URI)",
    )
    gallery: int = Field(
        1000, ge=2, description="images of a training gallery; the others are its bank (count)"
    )
    candidates_i2t: int = Field(32, ge=1, description="texts an image query re-ranks (count)")
    candidates_t2i: int = Field(32, ge=1, description="images a text query re-ranks (count)")
    pillars: int = Field(32, ge=1, description="of the gallery, and of the pool again (count)")
    neighbours: int = Field(10, ge=2, description="in each list of the affinity graph (count)")
    threshold: float = Field(
        0.8, ge=0, description="affinity is cut below this over the number of nodes (ratio)"
    )
    hidden: int = Field(32, ge=1, description="width of the model (dimensions)")
    layers: int = Field(1, ge=1, description="reasoning layers (count)")
    heads: int = Field(4, ge=1, description="attention heads, which divide `hidden` (count)")
    residual: bool = Field(True, description="refinements are added to the scores that come in")
    temperature: float = Field(0.05, gt=0, description="contrastive loss (score)")
    triplet: float = Field(0.0, ge=0, description="weight of the triplet loss")
    margin: float = Field(0.2, ge=0, description="triplet loss (score)")
    alignment: float = Field(0.0, ge=0, description="weight of the cross-modal alignment")
    hinge: float = Field(
        0.0, ge=0, description="weight of staying above a query's lowest incoming score"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="torch.optim's")
    lr: float = Field(2e-3, gt=0, description="learning rate, half a cosine to 0 (per step)")
    weight_decay: float = Field(0.01, ge=0, description="of all weights (per step)")
    batch_size: int = Field(128, ge=2, description="pairs of an image and a caption (count)")
    epochs: int = Field(4, ge=1, description="passes over the images of the lists (epochs)")
    seed: int = Field(0, ge=0, description="seed of weights, galleries and order")

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
