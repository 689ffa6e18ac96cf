"""A file that one machine writes and another reads: whether they share their storage."""

import hashlib

from pipeline.storage import store

BYTES = 2**20


def write(folder: str, name: str) -> None:
    """Write the probe of a name; raises what the store raises."""
    store.write_bytes(store.join(folder, name), _content(folder, name))


def read(folder: str, name: str) -> None:
    """Raises OSError where what `write` wrote elsewhere is not there, or is something else."""
    try:
        found = store.read_bytes(store.join(folder, name))
    except FileNotFoundError as error:
        raise FileNotFoundError("it is not there") from error
    if found != _content(folder, name):
        raise OSError("it holds other bytes")


def _content(folder: str, name: str) -> bytes:
    return hashlib.sha256(f"{folder}/{name}".encode()).digest() * (BYTES // 32)
