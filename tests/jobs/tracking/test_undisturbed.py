"""A signal waits for the end of what is written."""

import os
import signal

import pytest

from jobs.tracking.undisturbed import undisturbed


@pytest.fixture
def ending():
    """SIGTERM raises SystemExit, as in a command; what was the handler comes back."""

    def end(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    yield end
    signal.signal(signal.SIGTERM, before)


def test_a_signal_is_raised_after_the_work_and_handlers_are_as_before(ending):
    done = []
    with pytest.raises(SystemExit) as stopped:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("written")
        done.append("not reached")
    assert done == ["written"] and stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is ending


def test_a_second_signal_waits_no_longer(ending):
    done = []
    with pytest.raises(SystemExit), undisturbed():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("not reached")
    assert not done and signal.getsignal(signal.SIGTERM) is ending


def test_without_a_signal_nothing_happens(ending):
    with undisturbed():
        pass
    assert signal.getsignal(signal.SIGTERM) is ending
