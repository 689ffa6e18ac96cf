"""The bytes that manifest rows stand for, in the rows' order.

Local ones are read when they are asked for, remote ones are fetched ahead by threads, a bounded
number of them.
"""

import contextlib
import functools
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from pipeline import sources
from pipeline.errors import InputError, Unreachable
from pipeline.sharding.images import Rejected
from pipeline.storage import store
from schemas.settings import SourceSettings

AHEAD = 2  # payloads fetched ahead, for every thread


def in_order(
    rows: Iterable[dict], source: SourceSettings, max_bytes: int
) -> Iterator[tuple[dict, Callable[[], bytes]]]:
    """Each row and a function that returns its bytes, or raises `Rejected`."""
    ahead: deque[tuple[dict, Callable[[], bytes]]] = deque()
    pool = ThreadPoolExecutor(source.fetch_threads)
    try:
        for row in rows:
            load = functools.partial(_load, row["source"], row["uri"], source, max_bytes)
            is_here = store.is_local(row["uri"])
            ahead.append((row, load if is_here else pool.submit(load).result))
            if len(ahead) > AHEAD * source.fetch_threads:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _load(kind: str, uri: str, source: SourceSettings, max_bytes: int) -> bytes:
    try:
        _check_file(uri, max_bytes)
        data = sources.load(kind, uri, source)
    except FileNotFoundError:
        raise Rejected(f"file missing: {uri}{sources.missing(uri)}") from None
    except Unreachable:  # of the store, not of this picture: the shard is made again
        raise
    except (OSError, InputError, ValueError) as error:
        if str(error).startswith("fetch "):  # already of the form 'kind: detail'
            raise Rejected(str(error)) from error
        why = getattr(error, "strerror", None)
        raise Rejected(f"unreadable ({why}): {uri}" if why else f"unreadable: {error}") from error
    if not data:
        raise Rejected(f"empty file: {uri}")
    return data


def _check_file(uri: str, max_bytes: int) -> None:
    """Refuses what cannot be read to its end: a pipe or a device, a file larger than memory."""
    if not store.is_local(uri):
        return
    with contextlib.suppress(OSError, ValueError):  # not a path; or reading it will say why not
        info = os.stat(uri.removeprefix("file://"))
        if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
            raise Rejected(f"not a regular file: {uri}")
        if info.st_size > max_bytes:
            raise Rejected(f"file too large: {info.st_size:,} bytes, {uri}")
