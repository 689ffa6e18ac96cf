"""Files that people and other programs wrote: bytes, text and JSON, or a sentence with the place.

Packed by gzip or not (the contents say, not the name), UTF-8 or what a byte order mark says, lines
that end in any way.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.errors import InputError
from pipeline.storage import store

MARKS = {  # that of UTF-32 begins as that of UTF-16 does
    codecs.BOM_UTF8: "utf-8",
    **{codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be"},
    **{codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"},
}
GZIP = b"\x1f\x8b"
PACKED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines would cut at eight more
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a character that JSON writes as two


def data(uri: str, what: str, size: int | None = None) -> bytes:
    """A file's bytes as they lie there, or the first of them.

    `what` says in an error what the file was to be.
    """
    try:
        return store.read_bytes(store.absolute(uri), size=size)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {uri}; give {what}") from error
    except IsADirectoryError as error:
        raise InputError(f"{uri} is a folder; give {what}") from error
    except OSError as error:
        raise InputError(
            f"{uri} cannot be read ({error.strerror or error}); give {what}"
        ) from error


def unpacked(uri: str, found: bytes) -> bytes:
    """The bytes that a file's bytes are gzip of, or they themselves."""
    _unpackable(uri, found)
    if not found.startswith(GZIP):
        return found
    try:
        return gzip.decompress(found)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{uri} is not gzip, or torn: {error}; pack it again") from error


def text(uri: str, what: str) -> str:
    """The whole text of a file, gzipped or not, without a byte order mark."""
    plain = unpacked(uri, data(uri, what))
    mark = next((mark for mark in MARKS if plain.startswith(mark)), b"")
    plain, encoding = plain[len(mark) :], MARKS.get(mark, "utf-8")
    try:
        found = plain.decode(encoding)
    except UnicodeDecodeError as error:
        line, column = _place(plain[: error.start].decode(encoding))
        raise InputError(
            f"{uri} line {line} is not {encoding.upper()} (byte 0x{plain[error.start]:02x} after "
            f"{column} characters); save {what} as UTF-8"
        ) from error
    if (zero := found.find("\0")) >= 0:
        line, _ = _place(found[:zero])
        said = "UTF-16 without its mark, or no text at all"
        raise InputError(f"{uri} line {line} holds a zero byte: {said}; save {what} as UTF-8")
    return found


def lines(uri: str, what: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of every line that is not blank."""
    for number, line in enumerate(LINE_END.split(text(uri, what)), 1):
        if line.strip():
            yield number, line


def opened(uri: str, what: str) -> BinaryIO:
    """A file opened for reading, unpacked where it is gzip."""
    try:
        file = store.opened(uri)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {uri}; give {what}") from error
    except IsADirectoryError as error:
        raise InputError(f"{uri} is a folder; give {what}") from error
    start = file.read(max(map(len, PACKED)))
    file.seek(0)
    _unpackable(uri, start)
    return gzip.GzipFile(fileobj=file) if start.startswith(GZIP) else file  # type: ignore[return-value]


def stream(uri: str, what: str) -> Iterator[str]:
    """The lines of a file of any length without their ends, blank ones too."""
    number = 0
    try:
        with opened(uri, what) as file:
            start = file.read(4)
            mark = next((mark for mark in MARKS if start.startswith(mark)), b"")
            encoding = MARKS.get(mark, "utf-8")
            file.seek(len(mark))
            # What is no UTF-8 comes as half characters, so that its line can be told.
            errors = "surrogateescape" if encoding == "utf-8" else "strict"
            for line in io.TextIOWrapper(file, encoding, errors, newline=None):
                number += 1
                _check_line(uri, number, line, what)
                yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        said = f"{uri} after line {number} is not {error.encoding.upper()}"
        raise InputError(f"{said}; save {what} as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{uri} is not gzip, or torn: {error}; pack it again") from error


def _check_line(uri: str, number: int, line: str, what: str) -> None:
    if number == 1 and "\0" in line:
        said = "UTF-16 without its mark, or no text at all"
        raise InputError(f"{uri} line {number} holds a zero byte: {said}; save {what} as UTF-8")
    if line.isascii():
        return
    try:
        line.encode()
    except UnicodeEncodeError as error:
        place = f"byte 0x{ord(line[error.start]) & 0xFF:02x} at column {error.start + 1}"
        raise InputError(
            f"{uri} line {number} is not UTF-8 ({place}); save {what} as UTF-8"
        ) from error


def parsed(uri: str, what: str) -> Any:
    """The value of a JSON file; a name that an object has twice, and half a character, are faults.

    NaN and infinity, which are not JSON, are faults too.
    """
    found = text(uri, what)
    try:
        value = json.loads(found, object_pairs_hook=_once, parse_constant=_no_number)
        if HALF.search(found):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}: {error.msg}"
        raise InputError(f"{uri} is not valid JSON ({place}); give {what}") from error
    except UnicodeEncodeError as error:
        said = f"half a character, {error.object[error.start]!r}"
        raise InputError(f"{uri} holds {said}; write {what} anew") from error
    except RecursionError as error:
        raise InputError(f"{uri} is nested too deeply; give {what}") from error
    except ValueError as error:  # of the two below
        raise InputError(f"{uri} {error}; give {what}") from error
    return value


def loosely_parsed(uri: str, what: str, kind: type = dict) -> Any:
    """The object, or the list, of a JSON file of many entries.

    Half a character, NaN and other values that no entry should have are for its reader to tell, who
    knows the entry.
    """
    try:
        content = json.loads(text(uri, what))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}: {error.msg}"
        raise InputError(f"{uri} is not valid JSON ({place}); expected {what}") from error
    except RecursionError as error:
        raise InputError(f"{uri} is nested too deeply; expected {what}") from error
    if not isinstance(content, kind):
        raise InputError(f"{uri} is JSON, but no {kind.__name__}; expected {what}")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"holds {twice!r} twice in one object")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"holds {word}, which is no number in JSON")


def _unpackable(uri: str, start: bytes) -> None:
    for sign, kind in PACKED.items():
        if start.startswith(sign):
            raise InputError(f"{uri} is packed by {kind}; unpack it, or pack it by gzip")


def _place(before: str) -> tuple[int, int]:
    """The line, from 1, that a text ends in, and how many characters of that line it has."""
    *ended, last = LINE_END.split(before)
    return len(ended) + 1, len(last)
