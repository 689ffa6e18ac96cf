"""Ranking: the best candidates of every query with their scores, and the query's own metrics."""

import pyarrow as pa

RANKING = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),  # the query's own
        pa.field("direction", pa.string(), nullable=False),  # "i2t" or "t2i"
        pa.field("candidate_id", pa.list_(pa.string()), nullable=False),  # best first
        pa.field("score", pa.list_(pa.float32()), nullable=False),
        pa.field("rank", pa.float64(), nullable=False),  # expected, of the best positive, from 1
        pa.field("R_at_1", pa.float64(), nullable=False),  # chance of a positive among the first
        pa.field("R_at_5", pa.float64(), nullable=False),
        pa.field("R_at_10", pa.float64(), nullable=False),
        pa.field("ndcg_label", pa.float64()),  # against the sentence encoder's relevance
        pa.field("ndcg_truth", pa.float64()),  # against the true relevance, where it is known
    ]
)
