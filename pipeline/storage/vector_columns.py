"""Rows of a matrix as an Arrow column, and back."""

import numpy as np
import pyarrow as pa


def vector_column(vectors: np.ndarray) -> pa.Array:
    """An Arrow column of the rows of (N, D)."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def vector_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """The rows (N, D) float32 of a vector column."""
    column = column.combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return values.reshape(len(column), column.type.list_size)
