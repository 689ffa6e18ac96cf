"""Results: figures with their intervals, and the protocol they were made by; metrics.json."""

from dataclasses import asdict, dataclass, field, fields

from pipeline.errors import StageMissing
from pipeline.evaluation import intervals, ranking
from pipeline.storage import store
from pipeline.storage.plan import Plan
from schemas.settings import Recipe

RESULTS = 2  # counts up when metrics.json changes, so that it is made again
FILE = "metrics.json"
TIES, GAIN = "expected rank", "2^r - 1"
BOOTSTRAP = "In brackets: the middle 95 % of a bootstrap over images."


@dataclass(frozen=True)
class Judge:
    """Whose relevance NDCG is measured against, and how."""

    gain: str
    ndcg_at: int
    label_encoder: str
    label_map: str
    labels_trained_on: bool


@dataclass(frozen=True)
class Reranking:
    """How a ranking was made of the model's own: method, pool, bank, and every setting chosen."""

    rerank: str = "none"
    pool: str | None = None
    texts: str | None = None
    siblings: str | None = None
    bank_images: int | None = None
    chosen: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Matching:
    """A protocol of the field: which pairs count, in what gallery (`protocols.PROTOCOLS`)."""

    protocol: str
    about: str
    positives: str
    folds: int
    queries: dict[str, int]  # by direction
    captions_dropped: int


@dataclass(frozen=True)
class Judged:
    """People's judgements, which scores are held against."""

    file: str
    pairs: int
    pairs_left_out: int
    scale: list[float]
    queries: dict[str, int]  # by direction
    gain: str = GAIN
    protocol: str = "judgements"


@dataclass(frozen=True)
class Protocol:
    """By what figures were made; a part that is None did not play a part.

    `settings` is the same as one flat dictionary, in this order: it is written into rankings.
    """

    data: str | None = None
    split: str | None = None
    images: int = 0
    captions: int = 0
    captions_per_image: float | str | None = None
    ties: str = TIES
    judge: Judge | None = None
    excluded: dict[str, int] | None = None  # images and captions
    reranking: Reranking | None = None
    matching: Matching | None = None
    judged: Judged | None = None

    @property
    def settings(self) -> dict:
        out: dict = {}
        for name, value in asdict(self).items():
            out |= value or {} if name in PARTS else {name: value}
        chosen = out.pop("chosen", {})
        return {name: value for name, value in out.items() if value is not None} | chosen

    @classmethod
    def of(cls, settings: dict) -> "Protocol":
        """The protocol that such a dictionary is of."""
        rest = dict(settings)

        def taken(kind) -> dict:
            return {f.name: rest.pop(f.name) for f in fields(kind) if f.name in rest}

        parts = taken(cls)
        for name, (kind, mark) in PARTS.items():
            if mark in rest:
                parts[name] = kind(**taken(kind))
        if rest:  # a re-ranking's settings have the names of its methods'
            parts["reranking"] = Reranking(**vars(parts["reranking"]) | {"chosen": rest})
        return cls(**parts)


# The parts of a protocol, each with a setting that no other part has.
PARTS = {
    "judge": (Judge, "label_encoder"),
    "judged": (Judged, "file"),
    "matching": (Matching, "about"),
    "reranking": (Reranking, "rerank"),
}


@dataclass(frozen=True)
class Result:
    """What a system does under a protocol."""

    label: str
    metrics: dict[str, float]
    intervals: dict[str, list[float]]  # [lowest, highest] of those metrics that have one
    protocol: Protocol
    cost: dict[str, float] = field(default_factory=dict)
    tables: dict[str, "Result"] = field(default_factory=dict)  # under other protocols, by name

    def as_dict(self) -> dict:
        """The result for programs; cost and tables where there are any."""
        found = {"metrics": self.metrics, "intervals": self.intervals}
        tables = {name: table.as_dict() for name, table in self.tables.items()}
        some = {name: more for name, more in (("cost", self.cost), ("tables", tables)) if more}
        return found | {"protocol": self.protocol.settings} | some

    @classmethod
    def of(cls, label: str, found: dict) -> "Result":
        """The result that such a dictionary is of."""
        tables = {name: cls.of(name, table) for name, table in found.get("tables", {}).items()}
        protocol = Protocol.of(found["protocol"])
        intervals, cost = found.get("intervals", {}), found.get("cost", {})
        return cls(label, found["metrics"], intervals, protocol, cost, tables)


def of_ranking(plan: Plan, recipe: Recipe, cost: dict[str, float], label: str) -> Result:
    """The means over all queries of a finished ranking, with intervals; `cost` is what it took."""
    found = ranking.queries([piece.output for piece in plan.pieces])
    between = intervals.bootstrap(found, recipe.evaluate.resamples)
    return Result(label, intervals.figures(found), between, Protocol.of(plan.settings), cost)


def version(plan: Plan, recipe: Recipe, *more) -> str:
    """What the result of a ranking depends on."""
    return store.fingerprint(RESULTS, plan.fingerprint, recipe.evaluate.resamples, *more)


def write(uri: str, result: Result, version: str) -> None:
    store.write_json(uri, result.as_dict() | {"version": version})


def read(uri: str, label: str, version: str | None = None) -> Result | None:
    """The result at a URI; None where there is none, or one of another version than is wanted."""
    found = store.read_json(uri) if store.exists(uri) else {}
    if not found or version not in (None, found.get("version")):
        return None
    return Result.of(label, found)


def need(folder: str, label: str, stage: str) -> Result:
    """The result of a folder's ranking, or the sentence that names the stage to run first."""
    found = read(store.join(folder, FILE), label)
    if found is None:
        raise StageMissing(f"no {FILE} in {folder}; run `halftone {stage}` first")
    return found


def digits(name: str) -> int:
    """How many digits after the point a figure is written with: of percents and ranks one."""
    if name in ("rsum", "peak_mb") or "_R_at_" in name or "MedR" in name:
        return 1
    return 2 if name == "ms_per_query" else 3


def sentence(protocol: Protocol) -> str:
    """The protocol in words: every table carries it."""
    p = protocol
    counts = f"{p.images:,} images, {p.captions:,} captions"
    if m := p.matching:
        dropped = f" ({m.captions_dropped:,} more dropped)" if m.captions_dropped else ""
        return (
            f"{m.protocol} ({m.about}): {counts}{dropped}, captions an image: "
            f"{p.captions_per_image}, folds: {m.folds}, queries: {_queries(m)}, positives: "
            f"{m.positives}. R@K in percent; ties: {p.ties}; R of mAP@R and R-Precision counts "
            f"positives missing from the gallery. {BOOTSTRAP}"
        )
    if j := p.judged:
        low, high = j.scale
        return (
            f"judgements ({j.file}): {j.pairs:,} pairs of {p.images:,} images and {p.captions:,} "
            f"captions ({j.pairs_left_out:,} more are not of this gallery). Spearman and Kendall's "
            "tau_b over all of them; NDCG of the judged candidates of a query, "
            f"gain {j.gain} with scores {low:g} to {high:g} as relevance 0 to 1, over the queries "
            f"whose judgements differ: {_queries(j)}; ties: {p.ties}. {BOOTSTRAP}"
        )
    without = " without {images:,} images, {captions:,} captions excluded;"
    out = f"{p.data} {p.split}:{without.format(**p.excluded) if p.excluded else ''} {counts} "
    out += f"({p.captions_per_image:g} an image). R@K in percent; ties: {p.ties}."
    if j := p.judge:
        used = " (training used it too)" if j.labels_trained_on else ""
        out += f" NDCG@{j.ndcg_at}, gain {j.gain}; label relevance by {j.label_encoder}{used}, "
        out += f"map {j.label_map}."
    if r := p.reranking:
        bank = f" (bank of {r.bank_images:,} train images)" if r.bank_images is not None else ""
        out += f" Re-ranking: {r.rerank}{f', {r.pool}' if r.pool else ''}{bank}."
    return out


def _queries(part: Matching | Judged) -> str:
    return ", ".join(f"{count:,} {way}" for way, count in part.queries.items()) or "none"
