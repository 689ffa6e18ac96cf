"""Settings of the towers and their training."""

from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from schemas.settings.section import Section, setting

BRING_SIZES = ("pretrained",)  # towers that know how large a picture, how long a text is
SIZES = {"image": "image_size", "text": "max_words"}  # by the tower's setting


class ModelSettings(Section):
    """The two towers."""

    image: str = setting("pixels", "image tower: pixels, regions, pretrained, package.module:Class")
    text: str = setting("gru", "text tower: gru, bigru, pretrained, or package.module:Class")
    dim: int = setting(256, "size of the shared space (dimensions)", ge=1)
    image_size: int | None = setting(
        None, "side of the image tower's input; none: 64, a pretrained model's own (pixels)", ge=16
    )
    width: int = setting(32, "pixels: channels of the first layer (count)", ge=1)
    image_pooling: Literal["max", "mean", "gpo"] = setting("max", "regions: how they become one")
    word_dim: int = setting(300, "gru: size of a word vector (dimensions)", ge=1)
    text_pooling: Literal["last", "max", "mean", "gpo"] = setting(
        "last", "gru: the last state, or how the states of all words become one"
    )
    min_word_count: int = setting(2, "gru: rarer words of train captions are <unk> (count)", ge=1)
    max_words: int | None = setting(
        None,
        "longer captions are cut; none: 64, all that a pretrained model has positions for, "
        "which more of them extends (words, or tokens)",
        ge=1,
    )
    pretrained: str | None = setting(None, "pretrained: Hugging Face model, name, folder (CLIP …)")
    freeze: int = setting(0, "pretrained: first layers that are not trained (count)", ge=0)
    layer_decay: float = setting(1.0, "pretrained: a layer's lr to the next's (0-1)", gt=0, le=1)
    lora_rank: int = setting(0, "pretrained: low-rank updates of attention alone; 0: all", ge=0)
    gradient_checkpointing: bool = setting(
        False, "pretrained: recompute activations to save memory"
    )

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, given: Any) -> Any:
        """Towers from scratch have a size; a pretrained one brings its own."""
        if not isinstance(given, dict):
            return given
        scratch = {size for side, size in SIZES.items() if given.get(side) not in BRING_SIZES}
        return {**given, **{size: 64 for size in scratch if given.get(size) is None}}


class TrainSettings(Section):
    """Training of the two towers."""

    losses: dict[str, dict[str, Any]] = setting(
        {"info_nce": {"weight": 1.0}},
        "weighted sum of losses: {name: {weight: 1, setting: value}}; any number may "
        "be a schedule {from, to, over} (epochs), see docs/losses.md",
    )
    negatives_warmup: float = setting(
        1.0, "triplet: time on all negatives before its own, unless it has mining (epochs)", ge=0
    )
    epochs: int = setting(8, "passes over the train split (epochs)", ge=1)
    pairs: Literal["caption", "image"] = setting(
        "caption", "an epoch shows every caption once, or one caption per image"
    )
    neighbours: int = setting(1, "like-captioned images batched together; 1: random (count)", ge=1)
    crop: float = setting(1.0, "least area that a random crop keeps; 1: all (0-1)", gt=0, le=1)
    flip: bool = setting(False, "mirror every other image; captions say left and right")
    colour: float = setting(
        0.0, "random brightness, contrast and saturation, 1 ± this (0-1)", ge=0, lt=1
    )
    batch_size: int = setting(128, "global batch: the list's length (pairs)", ge=2)
    lanes: int = setting(8, "fixed sample streams shared out among the workers (count)", ge=1)
    workers: int = setting(1, "training processes (count)", ge=1, changes="how")
    min_workers: int = setting(
        0, "fewest to go on with when nodes are lost; 0: workers (count)", ge=0, changes="how"
    )
    sharding: Literal["ddp", "fsdp"] = setting(
        "ddp", "every worker holds the towers whole, or a share of their weights", changes="how"
    )
    chunk: int = setting(0, "a worker encodes at a time, gradients cached; 0: all (pairs)", ge=0)
    list_rows: int = setting(
        0,
        "own lists of which the loss is taken at a time; 0: by length (count)",
        ge=0,
        changes="how",
    )
    optimizer: Literal["adam", "adamw", "sgd"] = setting("adam", "torch.optim's")
    momentum: float = setting(0.9, "sgd: momentum (0-1)", ge=0, lt=1)
    lr: float = setting(5e-4, "learning rate (per step)", gt=0)
    lr_schedule: Literal["constant", "step", "cosine"] = setting(
        "cosine", "constant; a tenth after two thirds; or half a cosine to 0"
    )
    lr_warmup: float = setting(0.0, "linear rise of the rate before that (epochs)", ge=0)
    weight_decay: float = setting(0.0, "of matrices, not of biases and norms (per step)", ge=0)
    clip_grad_norm: float = setting(2.0, "largest gradient norm (L2)", gt=0)
    precision: Literal["fp32", "tf32", "amp_bf16", "amp_fp16"] = setting(
        "fp32", "arithmetic of the towers; losses are always fp32"
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "towers compiled by torch; auto: on a GPU, of a long training", changes="how"
    )
    ema: float = setting(0.0, "decay of averaged weights, the model then; 0: none", ge=0, lt=1)
    select: Literal["best", "best_ndcg", "last"] = setting(
        "best", "checkpoint handed on: best val rSum, best val NDCG@10 by the labels, or the last"
    )
    patience: int = setting(0, "stop after so many without a better val figure; 0: never", ge=0)
    resume: str | None = setting(
        None,
        "other settings go on from a checkpoint: `latest` of this model, or a "
        "checkpoint's folder (URI); the same settings go on by themselves",
    )
    checkpoint_every: int = setting(
        0, "checkpoints inside an epoch too, so far apart; 0: none (steps)", ge=0, changes="how"
    )
    log_every: int = setting(10, "steps between recorded losses (steps)", ge=1, changes="how")
    decode_workers: int = setting(
        0,
        "processes that prepare a worker's batches; 0: its share of the node's cores (count)",
        ge=0,
        changes="how",
    )
    cache_gb: float = setting(20.0, "remote shards a node keeps; 0: none (GB)", ge=0, changes="how")
    timeout: int = setting(300, "a silent worker is given up after (seconds)", ge=10, changes="how")
    max_failures: int = setting(2, "restarts after a lost worker (count)", ge=0, changes="how")
    seed: int = setting(0, "seed of weights, order and caption draws", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        if isinstance(given, dict) and "decode_threads" in given:
            raise ValueError(
                "decode_threads is no setting any more, as processes make the batches; take it "
                "out, or give decode_workers (0, the default: as many as the node has cores for)"
            )
        return given

    @field_validator("compile", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        """YAML takes on and off for true and false, which they were before."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _lanes_fit(self) -> Self:
        if self.batch_size % self.lanes:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.lanes} lanes; "
                f"choose a multiple of {self.lanes} or change lanes"
            )
        if self.batch_size // self.lanes % self.neighbours:
            raise ValueError(
                f"{self.neighbours} neighbours do not fit into a lane's {self.batch_size} / "
                f"{self.lanes} pairs; choose a number that divides them"
            )
        fewest = self.min_workers or self.workers
        if fewest > self.workers:
            raise ValueError(f"min_workers {fewest} is more than workers {self.workers}")
        for workers in range(fewest, self.workers + 1):
            if self.lanes % workers:
                raise ValueError(
                    f"{self.lanes} lanes do not share out among {workers} workers; "
                    "choose lanes that every number of workers divides"
                )
        return self


def of_before(kept: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings as a run folder kept them, without what is no setting any more."""
    train = {k: v for k, v in (kept.get("train") or {}).items() if k != "decode_threads"}
    return {**kept, "train": train} if "train" in kept else kept
