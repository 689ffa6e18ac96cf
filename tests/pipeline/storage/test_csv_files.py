"""CSV files that people wrote: read as they are, or refused with the line."""

import gzip

import pytest

from pipeline.errors import InputError
from pipeline.storage import csv_files


def rows(path, data: bytes) -> list[tuple[int, dict[str, str]]]:
    path.write_bytes(data)
    return list(csv_files.rows(str(path), ("id", "score"), "a list"))


@pytest.mark.parametrize(
    "data",
    [
        b"id,score\na,1\nb,2\n",
        b"\xef\xbb\xbfid,score\r\na,1\r\nb,2\r\n",
        b"id , score\na,1\nb,2",
        b"id,score\ra,1\rb,2\r",
        b"id,score\r\na,1,\r\nb,2,,\r\n,,\r\n,\r\n",  # as a spreadsheet leaves it
        b"ID;Score\na;1\nb;2\n",
        b"id\tscore\na\t 1\nb\t2 \t\n",
        b"id | score\na | 1\n b|2",
        b"id  score\n a 1 \nb    2\n",
        "id,score\na,1\nb,2\n".encode("utf-16"),
        b'id, score\n"a", "1"\nb, 2\n',
    ],
)
def test_a_table_is_read_with_any_line_end_and_mark(tmp_path, data):
    expected = [(2, {"id": "a", "score": "1"}), (3, {"id": "b", "score": "2"})]
    assert rows(tmp_path / "t.csv", data) == expected
    assert rows(tmp_path / "t.csv.gz", gzip.compress(data, mtime=0)) == expected


def test_quoted_fields_empty_lines_and_more_columns_are_kept_apart(tmp_path):
    found = rows(tmp_path / "t.csv", b'id,note,score\n"a,b","two\nlines",1\n\nc,,2\n')
    assert found == [
        (3, {"id": "a,b", "note": "two\nlines", "score": "1"}),
        (5, {"id": "c", "note": "", "score": "2"}),
    ]


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"", "no column 'id'; the first line of a list names id,score .*found nothing"),
        (b"id,value\na,1\n", "no column 'score'.*found id,value"),
        (b"id,score\na,1\nb\n", "line 3 ends before its score: b"),
        (b'id,score\na,1\n"b,2\n', "line 3 is not CSV"),
        (b"id,score\n\xff,1\n", "is not UTF-8"),
        (b"id,score\na, b,1\n", "line 2 has 3 cells, the header has 2; quote"),
        (b"id;score\na;1;c\n", "line 2 has 3 cells"),
        (b"id;score\na,1\n", "line 2 ends before its score: a,1"),
        (b"id score\na dog 1\n", "line 2 has 3 cells"),
        (b'id,score\n"a\nb,1\n', "line 2 is not CSV .unexpected end of data"),
        (b"id,score,score\na,1,2\n", "two columns 'score'; leave one"),
    ],
)
def test_what_is_no_table_is_refused_with_its_place(tmp_path, data, sentence):
    with pytest.raises(InputError, match=sentence):
        rows(tmp_path / "t.csv", data)


def test_what_a_spreadsheet_says_of_its_separator_is_no_header(tmp_path):
    found = rows(tmp_path / "t.csv", b"sep=;\r\nid;score\r\na,b;1\r\n")
    assert found == [(3, {"id": "a,b", "score": "1"})]


def test_a_missing_file_and_a_torn_archive_are_told(tmp_path):
    with pytest.raises(InputError, match="there is no file .*gone.csv; give a list"):
        list(csv_files.rows(str(tmp_path / "gone.csv"), ("id",), "a list"))
    with pytest.raises(InputError, match="is not gzip, or torn"):
        rows(tmp_path / "t.csv.gz", gzip.compress(b"id,score\na,1\n" * 99, mtime=0)[:40])
