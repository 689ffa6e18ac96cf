"""Shard: a POSIX tar of samples with a Parquet sidecar, which is written last and means done.

Members of a sample are adjacent: KEY.jpg (KEY.png, KEY.npy), KEY.txt (first caption), KEY.json.
"""

import pyarrow as pa

from schemas.manifest import CAPTION

REJECTED = pa.struct([("caption_id", pa.string()), ("reason", pa.string())])
SIDECAR = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        # Null key and member columns with a reason: the sample was rejected and is not in the tar.
        pa.field("key", pa.string()),
        pa.field("captions", pa.list_(CAPTION), nullable=False),
        # Captions that were left out, with the reason; the sample is there without them.
        pa.field("captions_rejected", pa.list_(REJECTED)),
        pa.field("split", pa.string(), nullable=False),
        pa.field("member", pa.string()),  # file name of the image or features in the tar
        pa.field("offset", pa.int64()),  # of the member's first byte of data in the tar
        pa.field("size", pa.int64()),  # bytes of the member
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("sha256", pa.string()),  # of the member's bytes
        pa.field("uri", pa.string()),
        pa.field("reason", pa.string()),  # why it was rejected
    ]
)
