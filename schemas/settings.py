"""Every setting of every stage, with its default and unit. A recipe is one `Recipe`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SourceSettings(Section):
    """Where images and captions come from."""

    kind: str = Field("drawn", description="annotation format; see pipeline/sources")
    path: str | None = Field(None, description="annotation file, or prefix of precomp files (URI)")
    images: str | None = Field(None, description="folder of the image files (URI)")
    splits: dict[str, str] = Field(
        {}, description="rename splits, e.g. {val: test}; a split renamed to 'drop' is left out"
    )
    holdout: int = Field(
        0, ge=0, description="images cut from the end of train to become val (count)"
    )
    image_column: str = Field("image", description="csv/parquet: column of image paths")
    caption_column: str = Field("caption", description="csv/parquet: column of captions")
    split_column: str = Field("split", description="csv/parquet: column of split names (optional)")
    train_images: int = Field(2000, ge=0, description="drawn: scenes to draw for train (count)")
    val_images: int = Field(200, ge=0, description="drawn: scenes to draw for val (count)")
    test_images: int = Field(500, ge=0, description="drawn: scenes to draw for test (count)")
    image_size: int = Field(64, ge=32, description="drawn: side of a scene (pixels)")
    seed: int = Field(0, description="drawn: seed of the scenes")


class ShardSettings(Section):
    """How samples are packed into WebDataset tars."""

    samples: int = Field(1000, ge=1, description="samples per shard (count)")
    seed: int = Field(0, ge=0, description="seed of the order in which train samples are packed")
    max_pixels: int = Field(
        89_478_485, ge=1, description="an image with more is rejected as a bomb (pixels)"
    )
    failure_budget: float = Field(
        0.05, ge=0, le=1, description="share of rejected samples above which the stage stops (0-1)"
    )


class EmbedSettings(Section):
    """The frozen sentence encoder that embeds the captions."""

    encoder: str = Field(
        "all-MiniLM-L6-v2", description="sentence-transformers model: a name, or a folder"
    )
    batch_size: int = Field(32, ge=1, description="captions per forward pass (count)")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the encoder")


class LabelSettings(Section):
    """How caption similarity becomes relevance."""

    map: Literal["half", "clip", "logistic"] = Field(
        "clip", description="cosine c to relevance: (1+c)/2, max(c, 0), or a logistic step"
    )
    centre: float = Field(0.6, description="logistic: the cosine whose relevance is 1/2 (cosine)")
    width: float = Field(0.1, gt=0, description="logistic: how wide the step is (cosine)")
    reduce: Literal["max", "mean"] = Field("max", description="over the captions of an image")
    top_k: int = Field(64, ge=1, description="neighbours kept per query (count)")


class ModelSettings(Section):
    """The two towers."""

    image: str = Field("pixels", description="image tower; see pipeline/models")
    text: str = Field("gru", description="text tower; see pipeline/models")
    dim: int = Field(256, ge=1, description="size of the shared space (dimensions)")
    image_size: int = Field(64, ge=16, description="pixels: side of the tower's input (pixels)")
    width: int = Field(32, ge=1, description="pixels: channels of the first layer (count)")
    word_dim: int = Field(300, ge=1, description="gru: size of a word vector (dimensions)")
    min_word_count: int = Field(
        2, ge=1, description="gru: rarer words of the train captions become <unk> (count)"
    )
    max_words: int = Field(64, ge=1, description="gru: longer captions are cut (words)")


class TrainSettings(Section):
    """Training of the two towers."""

    losses: dict[str, dict[str, Any]] = Field(
        {"info_nce": {"weight": 1.0}},
        description="weighted sum of losses: {name: {weight: 1, setting: value}}",
    )
    negatives_warmup: float = Field(
        1.0, ge=0, description="triplet: time on all negatives before its own mining (epochs)"
    )
    epochs: int = Field(8, ge=1, description="passes over the train split (epochs)")
    pairs: Literal["caption", "image"] = Field(
        "caption", description="an epoch shows every caption once, or one caption per image"
    )
    batch_size: int = Field(128, ge=2, description="global batch: the list's length (pairs)")
    lanes: int = Field(
        8, ge=1, description="fixed sample streams shared out among the workers (count)"
    )
    workers: int = Field(1, ge=1, description="training processes (count)")
    optimizer: Literal["adam", "adamw"] = Field("adam", description="torch.optim's")
    lr: float = Field(5e-4, gt=0, description="learning rate (per step)")
    lr_schedule: Literal["constant", "step", "cosine"] = Field(
        "cosine", description="constant; a tenth after two thirds; or half a cosine to 0"
    )
    weight_decay: float = Field(0.0, ge=0, description="optimizer's weight decay (per step)")
    clip_grad_norm: float = Field(2.0, gt=0, description="largest gradient norm (L2)")
    precision: Literal["fp32", "amp_bf16"] = Field(
        "fp32", description="arithmetic of the towers; losses are always fp32"
    )
    select: Literal["best", "last"] = Field(
        "best", description="checkpoint handed on: best val rSum, or the last epoch's"
    )
    log_every: int = Field(10, ge=1, description="steps between recorded losses (steps)")
    decode_threads: int = Field(1, ge=1, description="threads that prepare batches (count)")
    timeout: int = Field(300, ge=10, description="a silent worker is given up after (seconds)")
    max_failures: int = Field(2, ge=0, description="restarts after a lost worker (count)")
    seed: int = Field(0, ge=0, description="seed of weights, order and caption draws")

    @model_validator(mode="after")
    def _lanes_fit(self):
        if self.batch_size % self.lanes:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.lanes} lanes; "
                f"choose a multiple of {self.lanes} or change lanes"
            )
        if self.lanes % self.workers:
            raise ValueError(
                f"{self.lanes} lanes do not share out among {self.workers} workers; "
                "choose a number of workers that divides the lanes"
            )
        return self


class EvaluateSettings(Section):
    """Rankings and metrics."""

    split: str = Field("test", description="split that is ranked")
    top_k: int = Field(100, ge=1, description="candidates kept per query (count)")
    ndcg_at: int = Field(10, ge=1, description="depth of NDCG (candidates)")
    batch_size: int = Field(256, ge=1, description="samples per forward pass (count)")


class RerankSettings(Section):
    """Re-ranking by inverted softmax over a bank of train queries (inductive)."""

    bank_images: int = Field(
        1000, ge=1, description="train images (and their captions) in the query bank (count)"
    )
    betas: tuple[float, ...] = Field(
        (5.0, 10.0, 20.0, 40.0, 80.0),
        description="inverse temperatures tried on val, best rSum kept (1/score)",
    )


class SearchSettings(Section):
    """The search page of a finished run."""

    queries: tuple[str, ...] = Field(
        (), description="queries of the page; empty takes captions of the split"
    )
    pages_queries: int = Field(8, ge=1, description="captions taken when queries is empty (count)")
    top: int = Field(8, ge=1, description="results shown per query (count)")


SECTIONS = ("source", "shard", "embed", "label", "model", "train", "evaluate", "rerank", "search")


class Recipe(Section):
    """The resolved settings of a run: a recipe file with the command line's overrides."""

    name: str = Field(description="what run folders and experiments are called after")
    about: str = Field("", description="one line for `halftone recipes`")
    source: SourceSettings = SourceSettings()
    shard: ShardSettings = ShardSettings()
    embed: EmbedSettings = EmbedSettings()
    label: LabelSettings = LabelSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    rerank: RerankSettings = RerankSettings()
    search: SearchSettings = SearchSettings()
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="models trained side by side on the same data: {name: {section: {...}}}"
    )
