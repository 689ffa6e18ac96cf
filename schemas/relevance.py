"""Relevance: every query's most relevant candidates, own image left out (1 by definition).

Candidates are row numbers: of the split's captions for i2t, of its images for t2i, in shard order.
"""

import pyarrow as pa

RELEVANCE = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("direction", pa.string(), nullable=False),  # "i2t" or "t2i"
        pa.field("candidate", pa.list_(pa.int32()), nullable=False),  # by falling relevance
        pa.field("relevance", pa.list_(pa.float16()), nullable=False),
    ]
)
