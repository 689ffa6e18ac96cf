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
    """
    extra: dict = {FINGERPRINT: fingerprint, SUMMARY: json.dumps(summary, sort_keys=True)}
    extra |= {f"halftone.{key}": str(value) for key, value in metadata.items()}
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({**(table.schema.metadata or {}), **extra}),
        buffer,
        compression="zstd",
        use_dictionary=not encodings,
        column_encoding=encodings,
    )
    data = buffer.getvalue()
    write_bytes(uri, data)
    return _with_file(summary, uri, data)


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(pa.BufferReader(read_bytes(uri)), columns=columns)


def read_columns(uri: str, columns: list[str]) -> pa.Table:
    """Some columns of a file, without the bytes of the others."""
    with opened(uri) as file:
        return pq.read_table(file, columns=columns).replace_schema_metadata()


def read_tables(
    uris: Iterable[str], columns: list[str] | None = None, keep: pc.Expression | None = None
) -> pa.Table:
    """The rows of several files, one after the other; of each those that `keep` lets through."""
    tables = (read_table(uri, columns).replace_schema_metadata() for uri in uris)
    return pa.concat_tables([t if keep is None else t.filter(keep) for t in tables])


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
