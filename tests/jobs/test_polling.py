"""Looking while other work goes on."""

import threading
import time

import pytest

from jobs.cluster.polling import meanwhile


def test_it_looks_again_and_again_and_never_after_the_end():
    seen, thrice = [], threading.Event()

    def look() -> None:
        seen.append(len(seen))
        if len(seen) == 3:
            thrice.set()

    with meanwhile(look, 0.001):
        assert thrice.wait(300)
    ended = list(seen)
    time.sleep(0.02)
    assert seen == ended


def test_the_work_s_error_ends_the_looking():
    before = threading.active_count()
    with pytest.raises(ValueError, match="work"), meanwhile(lambda: None, 0.001):
        raise ValueError("work")
    assert threading.active_count() == before
