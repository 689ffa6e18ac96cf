"""The sidecar of a shard: the samples that were accepted."""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage import parquet

EXCLUDED = "excluded"  # the kind of reason that was asked for: it counts against no budget


def read_sidecar(uri: str, columns: list[str] | None = None) -> pa.Table:
    """The accepted samples of a shard, in the tar's order."""
    return accepted(parquet.read_table(uri, columns and [*columns, "reason"]))


def accepted(table: pa.Table) -> pa.Table:
    """The rows of samples that were not rejected."""
    return table.filter(pc.is_null(table["reason"])).drop_columns(["reason"])
