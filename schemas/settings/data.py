"""Settings of the data: where it comes from, how it is packed, checked for copies."""

from typing import Literal

from pydantic import Field

from schemas.settings.section import Section


class SourceSettings(Section):
    """Where images and captions come from."""

    kind: str = Field("drawn", description="annotation format; see pipeline/sources")
    path: str | None = Field(
        None, description="annotation file, folder, pattern or prefix; see docs/your-own-data.md"
    )
    images: str | None = Field(None, description="folder of the image files (URI)")
    split: str | None = Field(
        None, description="split of images for which no row says one (default: as files are named)"
    )
    splits: dict[str, str] = Field(
        {}, description="rename splits, e.g. {val: test}; a split renamed to 'drop' is left out"
    )
    holdout: int = Field(
        0, ge=0, description="images cut from the end of train to become val (count)"
    )
    image_column: str = Field("image", description="tables: column of image paths, URLs or bytes")
    caption_column: str = Field("caption", description="tables: column of captions")
    split_column: str = Field("split", description="tables: column of split names (optional)")
    id_column: str | None = Field(
        None, description="tables: column of image ids (default: an image is called after its path)"
    )
    fetch_timeout: float = Field(
        20.0, gt=0, description="URLs: longest silence, and longest download, of one try (seconds)"
    )
    fetch_retries: int = Field(3, ge=0, description="URLs: tries after a first that failed (count)")
    fetch_threads: int = Field(16, ge=1, description="URLs: fetched at once by a task (count)")
    fetch_max_bytes: int = Field(
        50_000_000, ge=1, description="URLs: a longer body is given up (bytes)"
    )
    train_images: int = Field(2000, ge=0, description="drawn: scenes to draw for train (count)")
    val_images: int = Field(200, ge=0, description="drawn: scenes to draw for val (count)")
    test_images: int = Field(500, ge=0, description="drawn: scenes to draw for test (count)")
    image_size: int = Field(64, ge=32, description="drawn: side of a scene (pixels)")
    seed: int = Field(0, description="drawn: seed of the scenes")


class ShardSettings(Section):
    """How samples are packed into WebDataset tars."""

    samples: int = Field(1000, ge=1, description="samples per shard (count)")
    seed: int = Field(0, ge=0, description="seed of the order in which train samples are packed")
    resize: Literal["keep", "shorter", "longer", "border", "center_crop"] = Field(
        "keep",
        description="as it is; the shorter or longer side shrunk to `size`; whole on a white square"
        " or its middle square, at exactly `size` (smaller ones are enlarged)",
    )
    size: int = Field(256, ge=1, description="side that `resize` aims at (pixels)")
    quality: int = Field(
        95, ge=1, le=100, description="JPEG quality of pictures that are encoded anew (1-100)"
    )
    decode_check: bool = Field(
        True, description="decode every picture to its end; false trusts all but the header"
    )
    max_pixels: int = Field(
        89_478_485, ge=1, description="an image with more is rejected as a bomb (pixels)"
    )
    max_caption_chars: int = Field(
        10_000, ge=1, description="a longer caption is rejected (characters)"
    )
    exclude: str | None = Field(
        None, description="list of images and captions to leave out, of `halftone audit` (URI)"
    )
    failure_budget: float = Field(
        0.05, ge=0, le=1, description="share of rejected samples above which the stage stops (0-1)"
    )
    failures_in_a_row: int = Field(
        100, ge=1, description="rejected samples one after the other that stop a shard (count)"
    )


class AuditSettings(Section):
    """The search for duplicates."""

    distance: int = Field(
        6,
        ge=0,
        le=10,
        description="perceptual hashes that differ in no more are alike (bits of 64)",
    )
    exclude_captions: bool = Field(
        False, description="repeated captions go on the exclusion list too, not only on the report"
    )
