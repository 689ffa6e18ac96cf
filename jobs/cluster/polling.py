"""Something looked at every so often while other work goes on."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def meanwhile(look: Callable[[], None], every: float) -> Iterator[None]:
    """While it is entered a thread calls `look` every so many seconds; never after its end."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every):
            look()

    looker = threading.Thread(target=repeat, daemon=True)
    looker.start()
    try:
        yield
    finally:
        over.set()
        looker.join()
