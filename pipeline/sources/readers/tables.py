"""Rows of a table become images: a row an image, or a row a caption of one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.errors import InputError, did_you_mean
from pipeline.sources.readers import annotations
from schemas.settings import SourceSettings


@dataclass
class Record:
    """What a row of a table says of an image."""

    uri: str
    path: str | None  # as the table writes it; None where the bytes themselves are in the table
    captions: list[str]
    split: str
    image_id: str | None  # where the table has a column of ids
    name: str  # of the image if nothing else names it

    @property
    def key(self) -> str:
        """Rows that agree in it are of one image."""
        return self.image_id or self.path or self.uri


@dataclass
class _Image:
    first: Record
    captions: list[str] = field(default_factory=list)


def text(cell) -> str | None:
    """The value as a text, as ids and splits may be numbers; None where there is none."""
    return None if cell is None else str(cell)


def columns(settings: SourceSettings, header: list[str], where: str) -> list[str | None]:
    """Names of the columns of image, caption, split and id; None for a split or id not there."""
    for setting in ("image_column", "caption_column", "id_column"):
        column = getattr(settings, setting)
        if column is not None and column not in header:
            raise InputError(
                f"{where} has no column {column!r} (source.{setting}){did_you_mean(column, header)}"
            )
    split = settings.split_column if settings.split_column in header else None
    return [settings.image_column, settings.caption_column, split, settings.id_column]


def images(records: Iterable[Record], part: str, source: str) -> Iterator[dict]:
    """Manifest rows, one for each image in the order of first appearance."""
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
    ids = annotations.image_ids(path for path in paths if path is not None)
    for image in found.values():
        first = image.first
        image_id = first.image_id or ids.get(first.path) or first.name
        captions = [(f"{image_id}#{k}", text) for k, text in enumerate(image.captions)]
        yield annotations.row(image_id, first.uri, first.split, captions, source)
