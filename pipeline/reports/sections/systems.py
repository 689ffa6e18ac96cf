"""What the report compares: models as trained, and what re-ranking made of each."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.evaluation.results import Model
from pipeline.storage import parquet
from pipeline.storage.run_folder import Files

STAGES = {"evaluate": "as trained", "reranked": "re-ranked"}  # whose rankings there may be
# Okabe and Ito's colours, told apart with any eyes, on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")


@dataclass(frozen=True)
class System:
    """The rankings that a model makes, as trained or re-ranked: a row of the page's tables."""

    model: str
    number: int  # of the model on this page, which gives its colour
    stage: str  # of STAGES
    measured: Model
    files: Files

    @property
    def label(self) -> str:
        return self.model if self.stage == "evaluate" else f"{self.model}, re-ranked"

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]

    @property
    def line(self) -> dict:
        """How its curves are drawn; by the group's id the page finds them."""
        style = "-" if self.stage == "evaluate" else "--"
        return {"color": self.colour, "linestyle": style, "gid": f"model-{self.number}"}

    def lists(self, direction: str, query_ids: Iterable[str]) -> dict[str, dict]:
        """The rankings of some queries by their ids, read a file at a time."""
        wanted = pa.array(sorted(query_ids), pa.string())
        found = {}
        for uri in self.files.uris:
            table = parquet.read_table(uri)
            asked = pc.is_in(table["query_id"], wanted)
            table = table.filter(pc.and_(asked, pc.equal(table["direction"], direction)))
            found |= {row["query_id"]: row for row in table.to_pylist()}
        return found

    def first(self, direction: str, depth: int) -> Iterator[list[str]]:
        """The first candidates of every query, a file at a time."""
        for uri in self.files.uris:
            table = parquet.read_table(uri).select(["direction", "candidate_id"])
            lists = table.filter(pc.equal(table["direction"], direction))["candidate_id"]
            yield pc.list_flatten(pc.list_slice(lists, 0, depth)).to_pylist()

    def occurrences(self, direction: str, depth: int) -> Counter[str]:
        """How many queries' first candidates each candidate is among."""
        counts: Counter[str] = Counter()
        for part in self.first(direction, depth):
            counts.update(part)
        return counts
