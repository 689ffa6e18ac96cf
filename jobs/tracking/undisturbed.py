"""Signals while something is written."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

ENDING: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """What a signal would raise in the middle is raised at the end; at once for a second signal.

    Raised in the middle of a database's work it leaves the database locked by this process itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable] = {}
    for number in ENDING:
        if callable(handler := signal.getsignal(number)):
            handlers[number] = handler
    came: list[tuple] = []

    def note(number, frame) -> None:
        came.append((number, frame))
        if len(came) > 1:
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            number, frame = came[0]
            signal.alarm(0)  # Ray ends the process three seconds after a SIGTERM
            handlers[number](number, frame)
