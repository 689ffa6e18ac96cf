"""Relevance: every query's most relevant candidates, own image left out (1 by definition).

Candidates are row numbers in shard order: of the split's captions where the direction ends in t,
of its images where it ends in i. They rise, which makes them small; their relevance is beside them
and in no order. float16 is off by 2^-12 of the relevance at most.
"""

import itertools
from typing import Literal, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, model_validator

RELEVANCE = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("direction", pa.string(), nullable=False),  # i2t, t2i, i2i or t2t
        pa.field("candidate", pa.list_(pa.int32()), nullable=False),
        pa.field("relevance", pa.list_(pa.float16()), nullable=False),
    ]
)
ENCODINGS = {
    "candidate.list.element": "DELTA_BINARY_PACKED",
    "relevance.list.element": "BYTE_STREAM_SPLIT",
}


class Calibration(BaseModel):
    """A map from cosine to relevance fitted to people's judgements: a JSON file of these fields."""

    model_config = ConfigDict(frozen=True)  # others are let by: they say how it was fitted

    map: Literal["logistic", "isotonic"]
    encoder: str | None = None  # whose cosines it was fitted to
    centre: float | None = None  # logistic: the cosine whose relevance is 1/2
    width: float | None = None  # logistic: in units of cosine
    knots: tuple[float, ...] = ()  # isotonic: cosines
    values: tuple[float, ...] = ()  # isotonic: the relevance at each

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.map == "logistic" and (self.centre is None or (self.width or 0) <= 0):
            raise ValueError("a logistic map needs a centre and a width above 0")
        if self.map == "isotonic":
            pairs = [*zip(self.knots, self.values, strict=False)]
            rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(pairs))
            inside = all(0 <= value <= 1 for value in self.values)
            if not pairs or len(self.knots) != len(self.values) or not rising or not inside:
                raise ValueError(
                    "an isotonic map needs as many knots as values, both rising, values in 0..1"
                )
        return self
