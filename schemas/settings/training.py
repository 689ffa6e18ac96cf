"""Settings of the towers and their training."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from schemas.settings.section import Section


class ModelSettings(Section):
    """The two towers."""

    image: str = Field(
        "pixels", description="image tower: pixels, regions, pretrained, or package.module:Class"
    )
    text: str = Field(
        "gru", description="text tower: gru, bigru, pretrained, or package.module:Class"
    )
    dim: int = Field(256, ge=1, description="size of the shared space (dimensions)")
    image_size: int = Field(64, ge=16, description="side of the image tower's input (pixels)")
    width: int = Field(32, ge=1, description="pixels: channels of the first layer (count)")
    image_pooling: Literal["max", "mean", "gpo"] = Field(
        "max", description="regions: how the vectors of an image become one"
    )
    word_dim: int = Field(300, ge=1, description="gru: size of a word vector (dimensions)")
    text_pooling: Literal["last", "max", "mean", "gpo"] = Field(
        "last", description="gru: the last state, or how the states of all words become one"
    )
    min_word_count: int = Field(
        2, ge=1, description="gru: rarer words of the train captions become <unk> (count)"
    )
    max_words: int = Field(64, ge=1, description="longer captions are cut (words, or tokens)")
    pretrained: str | None = Field(
        None, description="pretrained: Hugging Face model, a name or folder (CLIP, SigLIP, BERT …)"
    )
    freeze: int = Field(
        0, ge=0, description="pretrained: first layers that are not trained (count)"
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="pretrained: a layer's learning rate to the next one's (0-1)",
    )
    lora_rank: int = Field(
        0, ge=0, description="pretrained: train low-rank updates of the attention alone; 0: all"
    )
    gradient_checkpointing: bool = Field(
        False, description="pretrained: recompute activations, less memory for more time"
    )


class TrainSettings(Section):
    """Training of the two towers."""

    losses: dict[str, dict[str, Any]] = Field(
        {"info_nce": {"weight": 1.0}},
        description="weighted sum of losses: {name: {weight: 1, setting: value}}; any number may "
        "be a schedule {from, to, over} (epochs), see docs/losses.md",
    )
    negatives_warmup: float = Field(
        1.0,
        ge=0,
        description="triplet: time on all negatives before its own, unless it has mining (epochs)",
    )
    epochs: int = Field(8, ge=1, description="passes over the train split (epochs)")
    pairs: Literal["caption", "image"] = Field(
        "caption", description="an epoch shows every caption once, or one caption per image"
    )
    neighbours: int = Field(
        1, ge=1, description="images of like captions put in a batch together; 1: random (count)"
    )
    crop: float = Field(
        1.0, gt=0, le=1, description="smallest share of its area a random crop keeps; 1: none (0-1)"
    )
    flip: bool = Field(False, description="mirror every other image; captions say left and right")
    colour: float = Field(
        0.0, ge=0, lt=1, description="random brightness, contrast and saturation, 1 ± this (0-1)"
    )
    batch_size: int = Field(128, ge=2, description="global batch: the list's length (pairs)")
    lanes: int = Field(
        8, ge=1, description="fixed sample streams shared out among the workers (count)"
    )
    workers: int = Field(1, ge=1, description="training processes (count)")
    min_workers: int = Field(
        0,
        ge=0,
        description="fewest to go on with when nodes are lost; 0: workers (count)",
    )
    sharding: Literal["ddp", "fsdp"] = Field(
        "ddp", description="every worker holds the towers whole, or a share of their weights"
    )
    chunk: int = Field(
        0, ge=0, description="pairs a worker encodes at a time, gradients cached; 0: all (pairs)"
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="torch.optim's")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd: momentum (0-1)")
    lr: float = Field(5e-4, gt=0, description="learning rate (per step)")
    lr_schedule: Literal["constant", "step", "cosine"] = Field(
        "cosine", description="constant; a tenth after two thirds; or half a cosine to 0"
    )
    lr_warmup: float = Field(0.0, ge=0, description="linear rise of the rate before that (epochs)")
    weight_decay: float = Field(
        0.0, ge=0, description="of matrices, not of biases and norms (per step)"
    )
    clip_grad_norm: float = Field(2.0, gt=0, description="largest gradient norm (L2)")
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = Field(
        "fp32", description="arithmetic of the towers; losses are always fp32"
    )
    compile: bool = Field(False, description="compile the towers with torch.compile")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of averaged weights, which are the model then; 0: none"
    )
    select: Literal["best", "best_ndcg", "last"] = Field(
        "best",
        description="checkpoint handed on: best val rSum, best val NDCG@10 by the labels, or the "
        "last epoch's",
    )
    patience: int = Field(
        0, ge=0, description="stop after so many epochs without a better val figure; 0: never"
    )
    resume: str | None = Field(
        None,
        description="other settings go on from a checkpoint: `latest` of this model, or a "
        "checkpoint's folder (URI); the same settings go on by themselves",
    )
    checkpoint_every: int = Field(
        0, ge=0, description="checkpoints inside an epoch too, every so many steps; 0: none (steps)"
    )
    log_every: int = Field(10, ge=1, description="steps between recorded losses (steps)")
    decode_threads: int = Field(1, ge=1, description="threads that prepare batches (count)")
    cache_gb: float = Field(
        20.0, ge=0, description="remote shards each node keeps on its disk; 0: none (GB)"
    )
    timeout: int = Field(300, ge=10, description="a silent worker is given up after (seconds)")
    max_failures: int = Field(2, ge=0, description="restarts after a lost worker (count)")
    seed: int = Field(0, ge=0, description="seed of weights, order and caption draws")

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
