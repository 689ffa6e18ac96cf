"""Settings of what is made of a trained model: rankings, pages, a search service."""

from pydantic import Field, field_validator

from schemas.settings.section import Section


class EvaluateSettings(Section):
    """Rankings and metrics."""

    split: str = Field("test", description="split that is ranked")
    top_k: int = Field(100, ge=1, description="candidates kept per query (count)")
    ndcg_at: int = Field(10, ge=1, description="depth of NDCG (candidates)")
    batch_size: int = Field(256, ge=1, description="samples per forward pass (count)")
    exclude: str | None = Field(
        None, description="CSV of images and captions left out, as `halftone audit` writes it (URI)"
    )
    resamples: int = Field(
        1000, ge=20, description="draws of the images that intervals come from (count)"
    )
    encoder: str | None = Field(
        None,
        description="encoder of the relevance that NDCG is measured against; empty: the first "
        "sentence model, other than embed's, whose vectors the run folder holds, or else embed's",
    )
    judgements: str | None = Field(
        None, description="people's image_id,caption_id,score, to measure agreement with (CSV, URI)"
    )
    protocols: tuple[str, ...] = Field(
        (), description="measured beside the split itself: flickr_1k, coco_5k, coco_1k, cxc, …"
    )

    @field_validator("encoder")
    @classmethod
    def _is_one(cls, encoder: str | None) -> str | None:
        if encoder and encoder.split("-")[0] == "ensemble":
            raise ValueError("graded evaluation is by one encoder; name one that is no ensemble")
        return encoder


class SearchSettings(Section):
    """The search page of a finished run."""

    queries: tuple[str, ...] = Field(
        (), description="queries of the page; empty takes captions of the split"
    )
    pages_queries: int = Field(8, ge=1, description="captions taken when queries is empty (count)")
    top: int = Field(8, ge=1, description="results shown per query (count)")
    shades: bool = Field(
        True, description="show the relevance the sentence encoder gives each result to a text"
    )


class ReportSettings(Section):
    """The page about a finished run."""

    queries: int = Field(6, ge=1, description="captions drawn at random for the gallery (count)")
    worst: int = Field(6, ge=0, description="captions whose own image came last (count)")
    results: int = Field(8, ge=1, le=100, description="images shown per query (count)")
    moved: int = Field(4, ge=0, description="captions re-ranking helped, and hurt, most (count)")
    suspects: int = Field(12, ge=0, description="likely false negatives shown (count)")
    seed: int = Field(0, ge=0, description="seed of the captions drawn")


class ServeSettings(Section):
    """The search service."""

    host: str = Field(
        "127.0.0.1", description="address it listens on; 0.0.0.0 lets in everyone who reaches it"
    )
    port: int = Field(8100, ge=1, le=65535, description="port it listens on")
    replicas: int = Field(1, ge=1, description="copies of the model that answer (count)")
    concurrent: int = Field(256, ge=1, description="requests a replica has in hand (count)")
    together: int = Field(32, ge=1, description="queries that go through the model at once (count)")
    top: int = Field(24, ge=1, le=200, description="results shown per query unless asked (count)")
    max_upload: int = Field(10_000_000, ge=1, description="a larger picture is refused (bytes)")
    names: tuple[str, ...] = Field(
        (), description="host names it answers to; empty: any, or on loopback those of this machine"
    )
