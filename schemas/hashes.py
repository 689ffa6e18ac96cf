"""Audit: what each shard's samples are compared by, in the sidecar's order."""

import pyarrow as pa

from schemas.manifest import CAPTION

HASHES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("exact", pa.binary(), nullable=False),  # sha256 of pixels, or of feature bytes
        # Null for features, and where a picture has too little to see.
        pa.field("perceptual", pa.uint64()),
        pa.field("colours", pa.binary()),  # 4 × 4 RGB
        pa.field("captions", pa.list_(CAPTION), nullable=False),  # texts as they are compared
    ]
)
