"""The sidecar of a shard: the samples that were accepted."""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage import parquet

EXCLUDED = "excluded"  # the kind of reason that was asked for: it counts against no budget


def read_sidecar(uri: str, columns: list[str] | None = None) -> pa.Table:
    """The accepted samples of a shard, in the tar's order."""
    columns = columns and [*columns, "reason"]
    table = parquet.read_table(uri, columns)
    return table.filter(pc.is_null(table["reason"])).drop_columns(["reason"])
