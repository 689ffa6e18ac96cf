"""What a source knows to be true of images and captions, as `ingest` has written it."""

import itertools

from pipeline.storage import parquet, store


def facts_of(folder: str) -> dict[str, str]:
    """Facts by image and caption id, where the source knows the truth; empty elsewhere."""
    names = sorted(name for name in store.list_files(folder) if name.startswith("truth-"))
    tables = [parquet.read_table(store.join(folder, name)) for name in names]
    pairs = (zip(t["id"].to_pylist(), t["facts"].to_pylist(), strict=True) for t in tables)
    return dict(itertools.chain.from_iterable(pairs))
