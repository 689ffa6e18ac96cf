"""The samples of a shard that training reads, mapped from this machine's cache."""

import pyarrow as pa

from pipeline.sharding.sidecar import accepted
from pipeline.storage import mapped, parquet

COLUMNS = ["image_id", "captions", "member", "offset", "size"]  # of a sample that training reads
KIND = "samples-1"  # of what is made of a sidecar to be mapped; another number, made in another way


def mapped_samples(uri: str, file: dict, limit: float) -> pa.Table:
    """The accepted samples' `COLUMNS`, mapped from this machine's cache (`storage.mapped`).

    One chunk, offsets of 64 bits; `file` is the sidecar's in the index, `limit` the cache's bytes.
    """

    def made(data: bytes) -> pa.Table:
        table = accepted(parquet.of_bytes(data, [*COLUMNS, "reason"]))
        return table.cast(parquet.large(table.schema)).replace_schema_metadata()

    return mapped.table(uri, file, limit, KIND, made)
