"""Settings of what is made of a trained model: rankings, pages, a search service."""

from pydantic import field_validator

from schemas.settings.section import Section, setting


class EvaluateSettings(Section):
    """Rankings and metrics."""

    split: str = setting("test", "split that is ranked")
    top_k: int = setting(100, "candidates kept per query (count)", ge=1)
    ndcg_at: int = setting(10, "depth of NDCG (candidates)", ge=1)
    batch_size: int = setting(256, "samples per forward pass (count)", ge=1, changes="how")
    exclude: str | None = setting(
        None, "images and captions left out, of `halftone audit` (CSV, URI)", changes="contents"
    )
    resamples: int = setting(1000, "image draws, for intervals (count)", ge=20, changes="results")
    encoder: str | None = setting(
        None,
        "encoder of the relevance that NDCG is measured against; empty: the first "
        "sentence model, other than embed's, whose vectors the run folder holds, or else embed's",
        changes="contents",
    )
    judgements: str | None = setting(
        None, "people's image_id,caption_id,score, to agree with (CSV, URI)", changes="contents"
    )
    protocols: tuple[str, ...] = setting(
        (), "measured beside the split: flickr_1k, coco_5k, coco_1k, cxc, …", changes="results"
    )

    prompts: tuple[str, ...] = setting(
        (),
        "texts are read as these say, `a photo of {}`, here and in search; of several the mean "
        "vector; empty: as they are",
        changes="contents",
        later=True,
    )
    before_training: bool = setting(
        True,
        "pretrained: a row of the model as it was before training, in all tables",
        changes="how",
        later=True,
    )

    @field_validator("prompts")
    @classmethod
    def _have_a_place(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            if prompt.count("{}") != 1:
                raise ValueError(f"prompt {prompt!r} needs one {{}}, where the text goes")
        if len(set(prompts)) < len(prompts):
            raise ValueError("prompts names one twice; name each once")
        return prompts

    @field_validator("encoder")
    @classmethod
    def _is_one(cls, encoder: str | None) -> str | None:
        if encoder and encoder.split("-")[0] == "ensemble":
            raise ValueError("graded evaluation is by one encoder; name one that is no ensemble")
        return encoder


class SearchSettings(Section):
    """The search page of a finished run."""

    queries: tuple[str, ...] = setting((), "queries of the page; empty takes captions of the split")
    pages_queries: int = setting(8, "captions taken when queries is empty (count)", ge=1)
    top: int = setting(8, "results shown per query (count)", ge=1)
    shades: bool = setting(True, "show the relevance the encoder gives each result to a text")
    approximate_above: int = setting(
        3_000_000,
        "images, or captions, above which they are looked for in near cells alone, the recall of "
        "which is told (count)",
        ge=1,
    )
    recall: float = setting(
        0.95, "share of the exact ten nearest that near cells are to hold", gt=0, le=1
    )


class ReportSettings(Section):
    """The page about a finished run."""

    queries: int = setting(6, "captions drawn at random for the gallery (count)", ge=1)
    worst: int = setting(6, "captions whose own image came last (count)", ge=0)
    results: int = setting(8, "images shown per query (count)", ge=1, le=100)
    moved: int = setting(4, "captions re-ranking helped, and hurt, most (count)", ge=0)
    suspects: int = setting(12, "likely false negatives shown (count)", ge=0)
    seed: int = setting(0, "seed of the captions drawn", ge=0)


class ServeSettings(Section):
    """The search service."""

    host: str = setting("127.0.0.1", "address it listens on; 0.0.0.0 lets in all who reach it")
    port: int = setting(8100, "port it listens on", ge=1, le=65535)
    application: str = setting(
        "halftone",
        "its name among the cluster's services; another than halftone is its path, too",
        pattern=r"[A-Za-z0-9][A-Za-z0-9_.-]*",
    )
    replicas: int = setting(1, "copies of the model that answer (count)", ge=1)
    concurrent: int = setting(256, "requests a replica has in hand (count)", ge=1)
    together: int = setting(32, "queries that go through the model at once (count)", ge=1)
    top: int = setting(24, "results shown per query unless asked (count)", ge=1, le=200)
    max_upload: int = setting(10_000_000, "a larger picture is refused (bytes)", ge=1)
    names: tuple[str, ...] = setting((), "hosts it answers to; empty: any, or on loopback its own")
