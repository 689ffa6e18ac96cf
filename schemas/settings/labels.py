"""Settings of the labels: encoders, relevance, calibration by people."""

from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.settings.section import Section


class EmbedSettings(Section):
    """The frozen encoder that embeds the captions."""

    encoder: str = Field(
        "all-MiniLM-L6-v2",
        description="sentence-transformers model, a name or a folder; tfidf, trigrams or lsa (or "
        "lsa-256, with its dimensions), fitted on the train captions; ensemble or ensemble-NAME",
    )
    members: dict[str, float] = Field(
        {}, description="ensemble: weighted mean of cosines, {encoder: weight}"
    )
    revision: str | None = Field(
        None, description="commit, tag or branch of a model that a hub sends; empty takes its main"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the model runs; auto: on a GPU if there is one"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="arithmetic of the model; auto: bf16 where the processor has it and vectors "
        "keep a cosine of 0.998 to those of fp32",
    )
    backend: Literal["torch", "onnx"] = Field(
        "torch", description="what runs the model; onnx needs the package optimum"
    )
    prompt: str | None = Field(None, description="text put before every caption")
    prompt_name: str | None = Field(None, description="a prompt of the model's own, by its name")
    batch_tokens: int | None = Field(
        None, ge=1, description="per forward pass; empty: 512 on a CPU, 65,536 on a GPU (tokens)"
    )
    fit_captions: int = Field(
        1_000_000,
        ge=1,
        description="tfidf, trigrams, lsa: fitted on the first so many train captions (count)",
    )
    max_duplicates: float = Field(
        0.5, ge=0, le=1, description="share of repeated captions above which the stage stops (0-1)"
    )
    max_mean_cosine: float = Field(
        0.98, le=1, description="mean over different captions above which the stage stops (cosine)"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        ensemble = self.encoder == "ensemble" or self.encoder.startswith("ensemble-")
        if ensemble != bool(self.members):
            raise ValueError(
                f"encoder {self.encoder!r} with {len(self.members)} members; an ensemble, and only "
                "an ensemble, has members: {encoder: weight}"
            )
        if any(weight <= 0 for weight in self.members.values()):
            raise ValueError("a member's weight is positive; leave out those that do not count")
        if self.backend == "onnx" and self.precision == "bf16":
            raise ValueError("precision bf16 needs backend torch; choose one of the two")
        return self


class LabelSettings(Section):
    """How caption similarity becomes relevance."""

    map: Literal["half", "clip", "logistic", "isotonic"] = Field(
        "clip",
        description="cosine c to relevance: (1+c)/2, max(c, 0), a logistic step, or a fitted line",
    )
    centre: float = Field(0.6, description="logistic: the cosine whose relevance is 1/2 (cosine)")
    width: float = Field(0.1, gt=0, description="logistic: how wide the step is (cosine)")
    calibration: str | None = Field(
        None, description="logistic or isotonic map fitted to people's judgements (JSON, URI)"
    )
    overrides: str | None = Field(
        None, description="pairs that people decided: image_id,caption_id,relevance (CSV, URI)"
    )
    reduce: Literal["max", "mean"] = Field("max", description="over the captions of an image")
    lists: tuple[Literal["i2t", "t2i", "i2i", "t2t"], ...] = Field(
        ("i2t", "t2i"), min_length=1, description="lists kept: from images or texts, to either"
    )
    top_k: int = Field(64, ge=1, description="neighbours kept per query (count)")
    suspects: int = Field(
        60, ge=1, description="annotated negatives of a split shown to be decided (count)"
    )
    cross_encoder: str | None = Field(
        None, description="scores the lists' pairs again: sentence-transformers name, or a folder"
    )
    approximate_above: int | None = Field(
        None,
        ge=1,
        description="captions of a split above which faiss finds neighbours, faster than the exact "
        "search from some millions on (count)",
    )

    @model_validator(mode="after")
    def _has_knots(self) -> Self:
        if self.map == "isotonic" and self.calibration is None:
            raise ValueError(
                "map isotonic needs label.calibration, the file `halftone calibrate` writes; give "
                "one or choose another map"
            )
        if self.calibration is not None and self.map not in ("logistic", "isotonic"):
            raise ValueError(
                f"label.calibration needs map logistic or isotonic, not {self.map}; set the one it "
                "holds or leave it out"
            )
        return self


class CalibrateSettings(Section):
    """Encoders, ensembles and maps against people's judgements."""

    judgements: str | None = Field(
        None, description="CSV of caption_id,caption_id,score or image_id,caption_id,score (URI)"
    )
    captions: str | None = Field(
        None, description="captions judged: CSV or .jsonl; empty: those of the run folder (URI)"
    )
    encoders: tuple[str, ...] = Field(
        (), description="compared, and joined to an ensemble; empty: embed's encoder or members"
    )
    lowest: float | None = Field(
        None, description="score that means relevance 0; empty: the lowest there is (score)"
    )
    highest: float | None = Field(
        None, description="score that means relevance 1; empty: the highest there is (score)"
    )
    match: float = Field(
        0.6, gt=0, le=1, description="AUC: judgements of at least this are matches (0-1)"
    )
    folds: int = Field(5, ge=2, description="parts of the images, each held out once (count)")
    resamples: int = Field(1000, ge=20, description="of the images, for intervals (count)")
    seed: int = Field(0, ge=0, description="seed of folds and resamples")
