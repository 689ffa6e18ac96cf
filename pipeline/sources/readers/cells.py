"""What a value of a table, of JSON or of a data set means: captions, an id, the name of a split.

The same rules for every source. A value that is none of what it should be is handed on with what is
wrong with it (`Caption.problem`), so that one bad row is one bad row.
"""

import ast
import io
import json
import re
import tokenize
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.errors import InputError

CAPTION_KEYS = ("raw", "caption", "captions", "text", "sentence", "title")  # of a record
ID_KEYS = ("caption_id", "sentid")
BRACKETS = {"[": "]", "(": ")", "{": "}"}
# How a printed list or record begins; a caption may begin with a bracket too.
PRINTED = re.compile(
    r"""[\[(]\s*([\[({'"\d]|[rub]{1,2}['"]|None\b|nan\b|null\b|[\])]$)|\{\s*['"]"""
)
SURELY = re.compile(r"""[\[{]\s*['"]""")
WHOLE_FLOAT = re.compile(r"(-?\d+)\.0+")


class Caption(NamedTuple):
    """A caption as a source gives it."""

    id: str | None  # None: it is called after its image
    text: str
    problem: str | None = None  # why it cannot be used, 'kind: detail'


@dataclass(frozen=True)
class Missing:
    """In the place of a value that is not there; `why` is told."""

    why: str


def is_none(value: Any) -> bool:
    """Whether a value stands for none: null, or NaN, as which tables of numbers write it."""
    return value is None or (isinstance(value, float) and value != value)


def captions(value: Any) -> list[Caption]:
    """The captions in a value: a text, a list of them, or records with the text under a name.

    A text may be a printed list: JSON, or as Python, pandas and NumPy print one.
    """
    if is_none(value):
        return []
    if isinstance(value, Missing):
        return [_wrong(value.why)]
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return captions(_decoded(bytes(value)))
    if isinstance(value, Mapping):
        return _of_record(value)
    if isinstance(value, Sequence) or hasattr(value, "tolist"):
        values = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(values, Sequence):
            return captions(values)
        return [caption for part in values for caption in captions(part)]
    return [_wrong(f"{value!r} is of type {type(value).__name__}, expected a text")]


def identifier(value: Any) -> str | None:
    """What something is called, as text; None where the value is none or blank.

    Numbers that a table made floats (391895.0) lose their fraction; texts their blanks and the
    difference between two ways to write one character.
    """
    if is_none(value):
        return None
    if isinstance(value, bytes):
        value = _decoded(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"{value!r} is no name: {type(value).__name__}, expected a text or number")
    name = unicodedata.normalize("NFC", str(value)).strip()
    number = WHOLE_FLOAT.fullmatch(name)
    return (number[1] if number else name) or None


def picture(value: Any) -> bytes | str | None:
    """The bytes in a cell, alone or in a record or in a list of one; or the path it names."""
    if isinstance(value, list):
        if len(value) > 1:
            raise InputError(f"{len(value)} images in one row, expected one")
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes | str) else None


def place(value: Any) -> str | None:
    """A path, an address or another name that must stay as it is; None where there is none."""
    if isinstance(value, bytes):
        value = _decoded(value)
    return value if isinstance(value, str) and value.strip() else None


def _of_text(text: str) -> list[Caption]:
    bare = text.strip()
    quoted = SURELY.match(bare)
    if not quoted and not (PRINTED.match(bare) and bare[-1] == BRACKETS[bare[0]]):
        return [_plain(text)]
    for read in (json.loads, _listed, ast.literal_eval):
        try:
            found = read(bare)
        except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
            continue
        return captions(found) if isinstance(found, list | tuple | dict) else [_plain(text)]
    said = f"{bare[:60]!r} looks like a list, and cannot be read as one"
    return [_wrong(said) if quoted else _plain(text)]


def _plain(text: str) -> Caption:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        return _wrong(f"{text[:60]!r} holds half a character, {half!r}")
    return Caption(None, text)


def _wrong(what: str) -> Caption:
    return Caption(None, "", f"no caption: {what}")


def _decoded(value: bytes) -> str:
    """UTF-8 text; bytes that are none become half characters, which `_plain` tells."""
    return value.decode("utf-8", "surrogateescape")


def _of_record(record: Mapping) -> list[Caption]:
    key = next((key for key in CAPTION_KEYS if key in record), None)
    if key is None:
        return [_wrong(f"a record of {sorted(map(str, record))}, expected one of {CAPTION_KEYS}")]
    found = captions(record[key])
    named = next((identifier(record[key]) for key in ID_KEYS if key in record), None)
    return [caption._replace(id=named) for caption in found] if len(found) == 1 else found


def _listed(text: str) -> list:
    """The texts of a list as Python or NumPy prints it, with commas between them or without.

    Python itself would join two texts without a comma between them.
    """
    out = []
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING:
            out.append(ast.literal_eval(token.string))
        elif token.string in ("None", "nan", "null", "NaN"):
            out.append(None)
        elif token.type not in skipped and token.string not in "[](),":
            raise ValueError(token.string)
    return out
