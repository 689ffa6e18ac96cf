"""Manifest: one row an image, as a source describes it. Written by `ingest`, read by `shard`."""

import pyarrow as pa

CAPTION = pa.struct([("caption_id", pa.string()), ("text", pa.string())])
# As a source gives it: with what is wrong with it, 'kind: detail', where it cannot be used.
GIVEN = pa.struct([*CAPTION, ("problem", pa.string())])

MANIFEST = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        # Of the image file, or FILE.npy#ROW of a feature array, or drawn:… of a drawn scene.
        pa.field("uri", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("captions", pa.list_(GIVEN), nullable=False),
        # Null where only the image itself could tell; the shard's sidecar has the checked values.
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("sha256", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        # Size and time of the file the bytes lie in (a store's tag of it), to see that it changed;
        # null where there is no file, or none that could be asked.
        pa.field("stamp", pa.string()),
        pa.field("problem", pa.string()),  # why the row cannot be used, 'kind: detail'
    ]
)

# Beside the manifest, where a source knows the true relevance in closed form. Evaluation only.
TRUTH = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # image_id or caption_id
        pa.field("facts", pa.string(), nullable=False),  # JSON, read by the source that wrote it
    ]
)
