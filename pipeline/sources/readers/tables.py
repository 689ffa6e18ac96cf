"""Rows of a table become images: a row an image, or a row a caption of one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import InputError, did_you_mean
from pipeline.sources.readers import annotations, cells, pictures
from pipeline.sources.readers.cells import Caption
from schemas.settings import SourceSettings

# What the columns are called where a setting does not say; the first that is there counts.
USUAL = {
    "image_column": (
        *("image", "images", "img", "picture", "photo"),
        *("filepath", "file_path", "image_path", "img_path", "path"),
        *("filename", "file_name", "image_name", "image_file", "file", "image_url", "url", "jpg"),
    ),
    "caption_column": (
        *("caption", "captions", "text", "texts", "title", "sentence", "sentences", "comment"),
        *("raw", "description", "txt"),
    ),
    "split_column": ("split",),
}


@dataclass
class Record:
    """What a row of a table says of an image."""

    uri: str
    path: str | None  # as the table writes it; None where the bytes themselves are in the table
    captions: list[Caption]
    split: Any  # as the row says it
    image_id: str | None  # where the table has a column of ids
    name: str  # of the image if nothing else names it
    problem: str | None = None  # why the row cannot be used

    @property
    def key(self) -> str:
        """Rows that agree in it are of one image."""
        return self.image_id or self.path or self.uri


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None for a split or an id that is not there."""

    image: str
    caption: str
    split: str | None
    id: str | None

    def __iter__(self) -> Iterator[str | None]:
        return iter((self.image, self.caption, self.split, self.id))


@dataclass
class _Image:
    first: Record
    captions: list[Caption] = field(default_factory=list)


def fits(settings: SourceSettings, header: list[str]) -> bool:
    """Whether a header has the columns of image and caption."""
    names = (_column(settings, name, header) for name in ("image_column", "caption_column"))
    return None not in names


def columns(settings: SourceSettings, header: list[str], where: str) -> Columns:
    """The columns of image, caption, split and id, by the settings or by their usual names."""
    found = {}
    for setting in ("image_column", "caption_column", "split_column", "id_column"):
        said = getattr(settings, setting)
        found[setting] = name = _column(settings, setting, header)
        if name is None and said is not None:
            hint = did_you_mean(said, header)
            raise InputError(f"{where} has no column {said!r} (source.{setting}){hint}")
        if name is None and setting in ("image_column", "caption_column"):
            usual, what = ", ".join(USUAL[setting][:3]), setting.removesuffix("_column")
            raise InputError(
                f"{where} has no column of the {what} ({usual}, …); it has "
                f"{', '.join(map(repr, header)) or 'none'}: name one by source.{setting}, or all "
                "of them by source.columns where the table has no header"
            )
        if name is not None and header.count(name) > 1:
            raise InputError(f"{where} has two columns {name!r}; leave or rename one of them")
    image, caption, split, id_ = found.values()
    return Columns(str(image), str(caption), split, id_)


def _column(settings: SourceSettings, setting: str, header: list[str]) -> str | None:
    """The column that a setting names, in the letters of the header."""
    said = getattr(settings, setting)
    for name in USUAL.get(setting, ()) if said is None else (said,):
        if name in header:
            return name
        # Only what nobody named may differ in case: `Split` is the split, `spilt` is an error.
        if said is None and (found := [h for h in header if h.casefold() == name]):
            return found[0]
    return None


def images(records: Iterable[Record], part: str, prefix: str = "") -> Iterator[dict]:
    """Manifest rows, one for each image in the order of first appearance.

    `prefix` begins the ids that are paths, where other parts may hold the same ones.
    """
    found: dict[str, _Image] = {}
    for number, record in enumerate(records, 1):
        image = found.setdefault(record.key, _Image(record))
        for what in ("split", "path"):
            known, here = getattr(image.first, what), getattr(record, what)
            if known != here:
                raise InputError(
                    f"{part} row {number} puts {record.key!r} in {what} {here!r}, an earlier one "
                    f"in {known!r}; give an image one {what}"
                )
        image.captions += record.captions
    paths = (image.first.path for image in found.values())
    ids = pictures.image_ids(path for path in paths if path is not None)
    for image in found.values():
        first = image.first
        called = prefix + ids[first.path] if first.path in ids else first.name
        yield annotations.row(
            first.image_id or called,
            first.uri,
            image.captions,
            split=first.split,
            problem=first.problem,
        )


def identifier(value: Any, column: str | None, where: str) -> str | None:
    """The id in a cell; a sentence where there should be one and is none."""
    try:
        return cells.identifier(value)
    except InputError as error:
        raise InputError(f"{where}, column {column!r}: {error}") from None
