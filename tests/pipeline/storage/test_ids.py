"""Ids that people list: none twice, and who is not here is told."""

import pytest

from pipeline.errors import InputError
from pipeline.storage import ids


def test_ids_that_are_there_twice_or_empty_are_named():
    ids.unique(["a", "b"], "a.txt")
    with pytest.raises(
        InputError, match="a.txt: 1 ids are there twice, the first 'b' in places 2 and"
    ):
        ids.unique(["a", "b", "c", "b"], "a.txt")
    with pytest.raises(InputError, match="place 2 is empty"):
        ids.unique(["a", ""], "a.txt")


def test_strangers_are_counted_aloud_and_a_list_of_strangers_is_refused(caplog):
    ids.known(["a", "b"], {"a", "b", "c"}, "a.txt")
    assert not caplog.messages
    ids.known(["a", "3", "a", "4", "3"], {"a": 0}, "a.txt", "; they are left out")
    (said,) = caplog.messages
    assert said == "a.txt: 2 of 3 listed ids are not here, the first '3'; they are left out"
    with pytest.raises(InputError, match="2 of 2 listed ids are not here, the first '3'.* as 'a'"):
        ids.known(["3", "4"], {"a"}, "a.txt")
    ids.known([], {"a"}, "an empty list")
