"""Settings of the labels: encoders, relevance, calibration by people."""

from typing import Literal, Self

from pydantic import model_validator

from schemas.settings.section import Section, setting


class EmbedSettings(Section):
    """The frozen encoder that embeds the captions."""

    encoder: str = setting(
        "all-MiniLM-L6-v2",
        "sentence-transformers model, a name or a folder; tfidf, trigrams or lsa (or "
        "lsa-256, with its dimensions), fitted on the train captions; ensemble or ensemble-NAME",
    )
    members: dict[str, float] = setting(
        {}, "ensemble: weighted mean of cosines, {encoder: weight}", changes="contents"
    )
    revision: str | None = setting(None, "of a model from a hub: commit, tag, branch (empty: main)")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "where the model runs; auto: on a GPU if there is one", changes="how"
    )
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto",
        "arithmetic of the model; auto: bf16 where the processor has it and vectors "
        "keep a cosine of 0.998 to those of fp32",
    )
    backend: Literal["torch", "onnx"] = setting("torch", "what runs it; onnx needs optimum")
    prompt: str | None = setting(None, "text put before every caption")
    prompt_name: str | None = setting(None, "a prompt of the model's own, by its name")
    batch_tokens: int | None = setting(
        None, "per forward pass; empty: 512 on a CPU, 65,536 on a GPU (tokens)", ge=1, changes="how"
    )
    fit_captions: int = setting(
        1_000_000,
        "tfidf, trigrams, lsa: fitted on so many first train captions (count)",
        ge=1,
        changes="fit",
    )
    max_duplicates: float = setting(
        0.5, "share of repeated captions that is too much (0-1)", ge=0, le=1, changes="how"
    )
    max_mean_cosine: float = setting(
        0.98, "mean of different captions above which the stage stops (cosine)", le=1, changes="how"
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

    map: Literal["half", "clip", "logistic", "isotonic"] = setting(
        "clip", "cosine c to relevance: (1+c)/2, max(c, 0), a logistic step, or a fitted line"
    )
    centre: float = setting(0.6, "logistic: the cosine whose relevance is 1/2 (cosine)")
    width: float = setting(0.1, "logistic: how wide the step is (cosine)", gt=0)
    calibration: str | None = setting(
        None, "logistic or isotonic map fitted to judgements (JSON, URI)", changes="contents"
    )
    overrides: str | None = setting(
        None, "people's decisions: image_id,caption_id,relevance (CSV, URI)", changes="contents"
    )
    reduce: Literal["max", "mean"] = setting("max", "over the captions of an image")
    lists: tuple[Literal["i2t", "t2i", "i2i", "t2t"], ...] = setting(
        ("i2t", "t2i"), "lists kept: from images or texts, to either", min_length=1, changes="lists"
    )
    top_k: int = setting(64, "neighbours kept per query (count)", ge=1, changes="lists")
    suspects: int = setting(60, "annotated negatives to decide on (count)", ge=1, changes="page")
    cross_encoder: str | None = setting(
        None,
        "scores the lists' pairs again: sentence-transformers name or folder",
        changes="lists",
    )
    approximate_above: int | None = setting(
        None,
        "captions of a split above which neighbours are looked for in near cells alone, their "
        "recall measured (count)",
        ge=1,
        changes="lists",
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

    judgements: str | None = setting(
        None, "CSV of caption_id,caption_id,score or image_id,caption_id,score (URI)"
    )
    captions: str | None = setting(None, "captions judged, CSV or .jsonl; empty: the run's (URI)")
    encoders: tuple[str, ...] = setting((), "compared, and joined; empty: embed's own or members")
    lowest: float | None = setting(None, "that means relevance 0; empty: the lowest (score)")
    highest: float | None = setting(None, "that means relevance 1; empty: the highest (score)")
    match: float = setting(0.6, "AUC: judgements of at least this are matches (0-1)", gt=0, le=1)
    folds: int = setting(5, "parts of the images, each held out once (count)", ge=2)
    resamples: int = setting(1000, "of the images, for intervals (count)", ge=20)
    seed: int = setting(0, "seed of folds and resamples", ge=0)
