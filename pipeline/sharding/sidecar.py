"""The sidecar of a shard: the samples that were accepted."""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage import mapped, parquet

EXCLUDED = "excluded"  # the kind of reason that was asked for: it counts against no budget
COLUMNS = ["image_id", "captions", "member", "offset", "size"]  # of a sample that training reads
KIND = "samples-1"  # of what is made of a sidecar to be mapped; another number, made in another way


def read_sidecar(uri: str, columns: list[str] | None = None) -> pa.Table:
    """The accepted samples of a shard, in the tar's order."""
    return _accepted(parquet.read_table(uri, columns and [*columns, "reason"]))


def mapped_sidecar(uri: str, file: dict, limit: float) -> pa.Table:
    """The accepted samples' `COLUMNS`, mapped from this machine's cache (`storage.mapped`).

    One chunk, offsets of 64 bits; `file` is the sidecar's in the index, `limit` the cache's bytes.
    """

    def made(data: bytes) -> pa.Table:
        table = _accepted(parquet.of_bytes(data, [*COLUMNS, "reason"]))
        return table.cast(parquet.large(table.schema)).replace_schema_metadata()

    return mapped.table(uri, file, limit, KIND, made)


def _accepted(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_null(table["reason"])).drop_columns(["reason"])
