"""Embedding: unit vectors of captions (`embed`) and of both towers (`evaluate`), a file a shard."""

import pyarrow as pa


def embedding_schema(dim: int) -> pa.Schema:
    """Caption vectors (float16, unit norm, `dim` wide), in the sidecar's order."""
    fields = [
        pa.field("caption_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("vector", pa.list_(pa.float16(), dim), nullable=False),
    ]
    return pa.schema(fields)


def tower_schema(dim: int) -> pa.Schema:
    """Tower vectors (float32: float16 makes ties), an image followed by its captions."""
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),  # "image" or "text"
        pa.field("vector", pa.list_(pa.float32(), dim), nullable=False),
    ]
    return pa.schema(fields)


def terms_schema(dim: int | None) -> pa.Schema:
    """A fitted encoder: its terms in order, their idf and, of lsa, their `dim` coordinates."""
    fields = [
        pa.field("term", pa.string(), nullable=False),
        pa.field("idf", pa.float64(), nullable=False),
    ]
    if dim:
        fields.append(pa.field("vector", pa.list_(pa.float32(), dim), nullable=False))
    return pa.schema(fields)
