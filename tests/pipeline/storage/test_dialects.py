"""Tables of text: what separates, how quotes are meant, and what is refused."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.storage import csv_files
from tests.helpers.fuzz import fuzzed, resaved

COLUMNS = {"image", "caption"}


def read(folder, data, name="t.csv", **how):
    """The rows of a file's bytes as dictionaries."""
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    table = csv_files.opened(str(path), "a table", lambda h: set(h) >= COLUMNS, **how)
    return [dict(zip(table.header, cells, strict=False)) for _, cells in table.rows()]


def captions(*args, **how):
    return [row.get("caption") for row in read(*args, **how)]


@pytest.mark.parametrize("sign", [*csv_files.SIGNS.values(), " "])
def test_the_sign_is_the_one_that_gives_the_columns(sign, tmp_path):
    rows = [["image", "n", "caption"], ["a.jpg", "1", "dog"], ["b.jpg", "2", "cat"]]
    text = "\n".join(sign.join(row) for row in rows)
    assert read(tmp_path, text)[1] == {"image": "b.jpg", "n": "2", "caption": "cat"}
    assert captions(tmp_path, f"sep={sign}\n{text}") == ["dog", "cat"]


def test_blanks_around_a_bar_are_none_of_the_cells(tmp_path):
    assert captions(tmp_path, "image| n| caption\na.jpg| 0| A dog .\n") == ["A dog ."]


QUOTES = {  # a text, and its captions
    "a comma in quotes": ('image,caption\na,"A dog, a cat"\nb,c\n', ["A dog, a cat", "c"]),
    "doubled quotes": ('image,caption\na,"say ""hi"""\nb,c\n', ['say "hi"', "c"]),
    "a line break in quotes": ('image,caption\na,"one\n two"\nb,c\n', ["one\n two", "c"]),
    "an inch": ('image,caption\na,a shelf of 12"\nb,c\n', ['a shelf of 12"', "c"]),
    "slashes": ('image,caption\na,"a sign, \\"stop\\", red"\nb,c\n', ['a sign, "stop", red', "c"]),
    "slashes and no comma": ('image,caption\na,"say \\"hi\\""\nb,c\n', ['say "hi"', "c"]),
    "a quote alone": ('image,caption\na,"the word \\""\nb,"x, y"\n', ['the word "', "x, y"]),
    "quotes begin a text": ('image,caption\na,"hi" he said\nb,c\n', ['"hi" he said', "c"]),
    "tabs, quotes are text": (
        'image\tcaption\na\t"A cake\nb\tthe sea\nc\t"\n', ['"A cake', "the sea", '"'],
    ),
    "tabs, quoted": ('image\tcaption\na\t"say ""hi"""\nb\tc\n', ['say "hi"', "c"]),
    "tabs, a line break in quotes": ('image\tcaption\na\t"x\ty\nz"\nb\tc\n', ["x\ty\nz", "c"]),
}  # fmt: skip


@pytest.mark.parametrize("name", QUOTES)
def test_quotes_are_read_as_all_lines_agree(name, tmp_path):
    text, found = QUOTES[name]
    assert captions(tmp_path, text) == found


REFUSED = {  # a text, and what the sentence says
    "a bare comma": ("image,caption\na,b\nc,A red, blue flag\n", "line 3 has 3 cells, the header"),
    "two ways": (
        'image,caption\na,"A cake\nb,the sea\nc,a "\n', "can be meant in 2 ways .none, doubled.",
    ),
    "slashes in pairs, all quoted": (
        'image,caption\n"a","two \\\\ or one"\n', "can be meant in 2 ways .doubled, backslash.",
    ),
    "slashes in pairs, a quoted comma": (
        'image,caption\na,"one, two \\\\ or one"\n', "can be meant in 2 ways .doubled, backslash.",
    ),
    "no way": ('image,caption\na,"A cake, big\nb,c\n', "line 2 is not CSV"),
    "an open quote": ('image,caption\na,"A cake\nb,the sea\n', "line 2 is not CSV .unexpected end"),
    "nothing": ("\n \n", "is empty"),
    "half a file of bytes": (b"image,caption\na,caf\xe9\n", "line 2 is not UTF-8 .byte 0xe9"),
    "no text": (b"image,capt\0ion\n", "holds a zero byte"),
    "a spreadsheet": (b"PK\x03\x04rest", "is packed by zip"),
    "a torn packet": (b"\x1f\x8b\x08torn", "is not gzip, or torn"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_read_in_no_way_or_in_two_is_refused(name, tmp_path):
    data, sentence = REFUSED[name]
    with pytest.raises(InputError, match=sentence):
        read(tmp_path, data)


def test_what_somebody_knows_of_a_file_counts(tmp_path):
    two = 'image,caption\na,"A cake\nb,the sea\nc,a "\n'
    assert captions(tmp_path, two, quotes="none") == ['"A cake', "the sea", 'a "']
    assert captions(tmp_path, two, quotes="doubled") == ["A cake\nb,the sea\nc,a "]
    bare = "A dog\ta.jpg\nA cat\tb.jpg\n"
    assert captions(tmp_path, bare, header=["caption", "image"]) == ["A dog", "A cat"]


def test_a_row_that_ends_early_is_given_as_it_is(tmp_path):
    assert read(tmp_path, "image,caption,n\na,dog,1\nb\n")[1] == {"image": "b"}


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"]))
TEXTS = st.lists(WORDS.filter(bool), min_size=1, max_size=5).map(" ".join)


@fuzzed
@given(data=st.data())
def test_any_table_is_read_as_it_was_written_or_refused(data, tmp_path_factory):
    """Whichever program wrote it, and whatever saved it again."""
    folder = tmp_path_factory.getbasetemp()
    rows = data.draw(st.lists(st.tuples(st.uuids().map(str), TEXTS), min_size=1, max_size=6))
    sign = data.draw(st.sampled_from(list(csv_files.SIGNS.values())))
    how = data.draw(st.sampled_from(["minimal", "all", "backslash", "none"]))
    kinds = {
        "minimal": {},
        "all": {"quoting": csv.QUOTE_ALL},
        "backslash": {"doublequote": False, "escapechar": "\\", "quoting": csv.QUOTE_ALL},
        "none": {"quoting": csv.QUOTE_NONE, "quotechar": None},
    }
    out = io.StringIO()
    try:
        writer = csv.writer(out, delimiter=sign, lineterminator="\n", **kinds[how])
        writer.writerows([("image", "caption"), *rows])
    except csv.Error:  # this text cannot be written without quotes
        return
    file = data.draw(resaved(out.getvalue()))
    try:
        found = [(row["image"], row["caption"]) for row in read(folder, file)]
    except InputError:
        return
    assert [(a, b.strip()) for a, b in found] == [(a, b.strip()) for a, b in rows]
