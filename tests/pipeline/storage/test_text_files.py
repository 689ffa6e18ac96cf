"""Files that other programs wrote: text however it is coded and packed, or a sentence."""

import bz2
import codecs
import gzip
import lzma
import os

import pytest

from pipeline.errors import InputError
from pipeline.storage import text_files

WORDS = "a dog\u2028one line\r\n\n\u6c7d\u8f66 \x85\r \t \rlast"
LINES = [(1, "a dog\u2028one line"), (3, "\u6c7d\u8f66 \x85"), (5, "last")]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_text_is_read_however_it_is_coded_packed_and_named(tmp_path, mark, encoding, pack):
    for name in ("words.txt", "words.txt.gz"):
        (tmp_path / name).write_bytes(pack(mark + WORDS.encode(encoding)))
        assert text_files.text(str(tmp_path / name), "words") == WORDS
        assert list(text_files.lines(f"file://{tmp_path}/{name}", "words")) == LINES


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (b"one\r\ntwo\rthr\xe9e", r"line 3 is not UTF-8 \(byte 0xe9 after 3 characters\); save wo"),
        (codecs.BOM_UTF16_LE + b"a\0\n\0\x00\xd8a\0", "line 2 is not UTF-16-LE"),
        ("one\ntwo".encode("utf-16-le"), "line 1 holds a zero byte: UTF-16 without its mark"),
        (b"one\ntw\0o", "line 2 holds a zero byte"),
        (gzip.compress(b"one\n" * 99, mtime=0)[:20], "is not gzip, or torn: "),
        (gzip.compress(b"one\n" * 99, mtime=0)[:-6] + b"abcdef", "is not gzip, or torn: "),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 30, "is not gzip, or torn: "),
        (bz2.compress(b"one"), "is packed by bzip2; unpack it"),
        (lzma.compress(b"one"), "is packed by xz"),
        (b"PK\x03\x04 and so on", "is packed by zip"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, found, sentence):
    (tmp_path / "words.txt").write_bytes(found)
    with pytest.raises(InputError, match=sentence):
        text_files.text(str(tmp_path / "words.txt"), "words")


def test_what_is_not_there_or_no_file_is_told_apart(tmp_path):
    with pytest.raises(InputError, match="there is no file .*gone; give words"):
        text_files.text(str(tmp_path / "gone"), "words")
    with pytest.raises(InputError, match="is a folder; give words"):
        text_files.text(str(tmp_path), "words")
    with pytest.raises(InputError, match="there is no file memory://nowhere/words.txt"):
        text_files.text("memory://nowhere/words.txt", "words")
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(InputError, match="cannot be read .*symbolic links"):
        text_files.text(str(tmp_path / "loop"), "words")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1,\n "a": 2}', "holds 'a' twice in one object; give words"),
        ('{"a": [NaN]}', "holds NaN, which is no number in JSON"),
        ('{"a": -Infinity}', "holds -Infinity"),
        ('{"a": 1,\n\n oops}', "is not valid JSON .line 3: Expecting property name"),
        ('["\\ud83d a"]', "half a character"),
        ("[" * 100_000, "nested too deeply"),
        ("", "is not valid JSON .line 1"),
        ("9" * 5000, "digits"),
    ],
)
def test_json_that_says_two_things_or_nothing_is_refused(tmp_path, text, sentence):
    (tmp_path / "words.json").write_text(text)
    with pytest.raises(InputError, match=sentence):
        text_files.parsed(str(tmp_path / "words.json"), "words")


def test_json_is_read_packed_with_a_mark_and_with_escapes(tmp_path):
    packed = gzip.compress(codecs.BOM_UTF8 + b'{"a": ["\\ud83d\\ude00", 1e3, null]}', mtime=0)
    (tmp_path / "words.json").write_bytes(packed)
    assert text_files.parsed(str(tmp_path / "words.json"), "words") == {
        "a": ["\U0001f600", 1e3, None]
    }
