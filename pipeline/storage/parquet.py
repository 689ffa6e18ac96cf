"""Parquet that carries its fingerprint and its summary."""

import io
import json
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.storage.store import (
    exists,
    join,
    name_of,
    opened,
    read_bytes,
    sha256,
    stamp,
    write_bytes,
)

FINGERPRINT = b"halftone.fingerprint"
SUMMARY = b"halftone.summary"
VECTORS = 2  # how columns of vectors are written: in the fingerprints of the stages that do


def write_table(
    uri: str,
    table: pa.Table,
    fingerprint: str,
    summary: dict,
    *,
    encodings: dict[str, str] | None = None,
    **metadata,
) -> dict:
    """Write Parquet with its fingerprint and summary; the summary with the file's size and hash.

    `encodings` are Parquet's, by column path; where there are any, no column has a dictionary.
    Columns of vectors are written as they are: a dictionary of numbers that do not repeat, and a
    compression that finds nothing, make them eighty times as dear to read.
    """
    extra: dict = {FINGERPRINT: fingerprint, SUMMARY: json.dumps(summary, sort_keys=True)}
    extra |= {f"halftone.{key}": str(value) for key, value in metadata.items()}
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({**(table.schema.metadata or {}), **extra}),
        buffer,
        column_encoding=encodings,
        **_compression(table.schema, dictionary=not encodings),
    )
    data = buffer.getvalue()
    write_bytes(uri, data)
    return _with_file(summary, uri, data)


def _compression(schema: pa.Schema, *, dictionary: bool) -> dict:
    """Parquet's options: zstd, and a dictionary if asked for, of all columns but of vectors."""
    others = [field.name for field in schema if not pa.types.is_fixed_size_list(field.type)]
    if len(others) == len(schema):
        return {"compression": "zstd", "use_dictionary": dictionary}
    return {
        "compression": dict.fromkeys(others, "zstd"),
        "use_dictionary": others if dictionary else False,
    }


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    return of_bytes(read_bytes(uri), columns)


def of_bytes(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table of a file's bytes."""
    return pq.read_table(pa.BufferReader(data), columns=columns)


def read_columns(uri: str, columns: list[str]) -> pa.Table:
    """Some columns of a file, without the bytes of the others."""
    with opened(uri) as file:
        return pq.read_table(file, columns=columns).replace_schema_metadata()


def read_tables(
    uris: Iterable[str], columns: list[str] | None = None, keep: pc.Expression | None = None
) -> pa.Table:
    """The rows of several files, one after the other; of each those that `keep` lets through."""
    tables = (read_table(uri, columns) for uri in uris)
    return joined([t if keep is None else t.filter(keep) for t in tables])


def joined(tables: Iterable[pa.Table]) -> pa.Table:
    """The rows of several tables, one after the other, with offsets of 64 bits.

    Those of 32 end at 2 GiB of text, which no file of ours has, and all of them together may.
    """
    tables = [table.replace_schema_metadata() for table in tables]
    return pa.concat_tables([table.cast(large(table.schema)) for table in tables])


def large(schema: pa.Schema) -> pa.Schema:
    """The schema with offsets of 64 bits."""
    return pa.schema([field.with_type(_large(field.type)) for field in schema])


def _large(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.large_list(_large(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_large(field.type)) for field in kind])
    if pa.types.is_binary(kind):
        return pa.large_binary()
    return pa.large_string() if pa.types.is_string(kind) else kind


def finished(uri: str, fingerprint: str) -> dict | None:
    """The summary `write_table` returned for this file, if it is there with this fingerprint.

    So must be, at their sizes, the other files the summary names (a shard's tar).
    """
    try:
        data = read_bytes(uri)
        metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
    except (OSError, pa.ArrowInvalid):  # not there, or torn: a bad footer is an OSError
        return None
    if metadata.get(FINGERPRINT, b"").decode() != fingerprint:
        return None
    summary = json.loads(metadata[SUMMARY])
    for name, file in summary.get("files", {}).items():
        beside = join(uri.rpartition("/")[0], name)
        if not exists(beside) or stamp(beside)[0] != file["bytes"]:
            return None
    return _with_file(summary, uri, data)


def _with_file(summary: dict, uri: str, data: bytes) -> dict:
    own = {name_of(uri): {"bytes": len(data), "sha256": sha256(data)}}
    return {**summary, "files": {**summary.get("files", {}), **own}}
