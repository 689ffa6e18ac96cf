"""Trials: what every setting of a re-ranker's step gave on val."""

import pyarrow as pa

TRIALS = pa.schema(
    [
        pa.field("direction", pa.string(), nullable=False),  # "i2t" or "t2i"
        pa.field("method", pa.string(), nullable=False),  # the chain's step
        pa.field("setting", pa.string(), nullable=False),
        pa.field("val", pa.float64(), nullable=False),  # R@1 + R@5 + R@10 (percent, 0-300)
    ]
)
