"""Settings of the data: where it comes from, how it is packed, checked for copies."""

from typing import Literal

from schemas.settings.section import Section, setting


class SourceSettings(Section):
    """Where images and captions come from."""

    kind: str = setting("drawn", "annotation format; see pipeline/sources")
    path: str | None = setting(None, "file, folder, pattern or prefix; see docs/your-own-data.md")
    images: str | None = setting(None, "folder of the image files (URI)")
    split: str | None = setting(None, "split where no row says one (default: as files are named)")
    splits: dict[str, str] = setting({}, "rename splits, as {val: test}; 'drop' leaves one out")
    holdout: int = setting(0, "images cut from the end of train to become val (count)", ge=0)
    cut_val: float = setting(
        0.0, "share of train that becomes val, by a hash of ids (0-1)", ge=0, lt=1, changes="rows"
    )
    cut_test: float = setting(
        0.0, "share of train that becomes test, by a hash of ids (0-1)", ge=0, lt=1, changes="rows"
    )
    cut_seed: int = setting(0, "seed of those hashes", ge=0, changes="rows")
    image_column: str | None = setting(
        None,
        "tables: column of image paths, URLs or bytes (default: image, filepath, url, …); tars: "
        "ending of the picture's member (default: of an image type)",
    )
    caption_column: str | None = setting(
        None,
        "tables: column of captions (default: caption, text, title, …); tars: field of the JSON, "
        "or ending of a text member (default: captions, caption, .txt)",
    )
    split_column: str | None = setting(None, "tables: column of split names (default: split)")
    id_column: str | None = setting(
        None,
        "tables: column of image ids (default: images' paths); tars: field of the JSON "
        "(default: image_id), or __key__ for names of tar and sample",
    )
    text_captions: Literal["auto", "one", "lines"] = setting(
        "auto",
        "tars: a .txt is one caption, or each of its lines is (auto: as dataset_type.txt says)",
        changes="contents",
    )
    delimiter: str | None = setting(
        None, "tables of text: comma, tab, semicolon, bar or a sign (default: as the header shows)"
    )
    quotes: Literal["doubled", "backslash", "none"] | None = setting(
        None, "tables of text: how a quote is written inside quotes (default: as all lines agree)"
    )
    columns: tuple[str, ...] = setting((), "tables of text without a header: names of the columns")
    caption_ending: str = setting(".txt", "folder: ending of the files of captions")
    fetch_timeout: float = setting(
        20.0, "URLs: longest silence, and download, of one try (seconds)", gt=0, changes="how"
    )
    fetch_retries: int = setting(3, "URLs: tries after a failed one (count)", ge=0, changes="how")
    fetch_threads: int = setting(16, "URLs: fetched at once by a task (count)", ge=1, changes="how")
    fetch_max_bytes: int = setting(50_000_000, "URLs: longest body (bytes)", ge=1, changes="how")
    fetch_agent: str = setting(
        "halftone", "URLs: User-Agent; some servers want an address to write to", changes="how"
    )
    fetch_respects: tuple[str, ...] = setting(
        ("noai", "noimageai"), "URLs: words of X-Robots-Tag that keep an image out", changes="how"
    )
    train_images: int = setting(2000, "drawn: scenes to draw for train (count)", ge=0)
    val_images: int = setting(200, "drawn: scenes to draw for val (count)", ge=0)
    test_images: int = setting(500, "drawn: scenes to draw for test (count)", ge=0)
    image_size: int = setting(64, "drawn: side of a scene (pixels)", ge=32)
    seed: int = setting(0, "drawn: seed of the scenes")


class ShardSettings(Section):
    """How samples are packed into WebDataset tars."""

    samples: int = setting(1000, "samples per shard (count)", ge=1)
    seed: int = setting(0, "seed of the order in which train samples are packed", ge=0)
    grow: bool = setting(
        False,
        "images that are in a shard stay in it, others come into new shards; false deals all out"
        " together whenever the manifest is another",
        changes="rows",
    )
    resize: Literal["keep", "shorter", "longer", "border", "center_crop"] = setting(
        "keep",
        "as it is; the shorter or longer side shrunk to `size`; whole on a white square"
        " or its middle square, at exactly `size` (smaller ones are enlarged)",
    )
    size: int = setting(256, "side that `resize` aims at (pixels)", ge=1)
    quality: int = setting(95, "JPEG quality of what is encoded anew (1-100)", ge=1, le=100)
    decode_check: bool = setting(True, "decode pictures whole; false trusts all but the header")
    max_pixels: int = setting(89_478_485, "an image with more is rejected as a bomb (pixels)", ge=1)
    max_caption_chars: int = setting(10_000, "a longer caption is rejected (characters)", ge=1)
    exclude: str | None = setting(
        None, "images and captions to leave out, of `halftone audit` (CSV, URI)", changes="contents"
    )
    failure_budget: float = setting(
        0.05, "share of rejected samples that is too much (0-1)", ge=0, le=1, changes="how"
    )
    failures_in_a_row: int = setting(
        100, "rejected samples one after the other that stop a shard (count)", ge=1, changes="how"
    )


class AuditSettings(Section):
    """The search for duplicates."""

    distance: int = setting(
        6, "perceptual hashes no further apart are alike (bits of 64)", ge=0, le=10
    )
    exclude_captions: bool = setting(False, "repeated captions go on the exclusion list too")
