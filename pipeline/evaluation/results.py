"""Results: figures with their intervals, and the protocol they were made by; metrics.json."""

from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.errors import StageMissing
from pipeline.evaluation import ranking
from pipeline.evaluation.intervals import Queries, bootstrap, figures
from pipeline.storage import store
from pipeline.storage.plan import Plan
from schemas.settings import Recipe

RESULTS = 2  # counts up when metrics.json changes, so that it is made again
FILE = "metrics.json"
GAIN = "2^r - 1"


@dataclass(frozen=True)
class Protocol:
    """By what figures were made; what is None played no part.

    `settings` is the same as a dictionary, in this order: it is written into rankings.
    """

    data: str | None = None
    split: str | None = None
    images: int = 0
    captions: int = 0
    captions_per_image: float | str | None = None
    ties: str = "expected rank"
    # whose relevance NDCG is measured against, and how
    gain: str | None = None
    ndcg_at: int | None = None
    label_encoder: str | None = None
    label_map: str | None = None
    labels_trained_on: bool | None = None
    prompts: list[str] | None = None  # by which texts were read
    # images and captions left out
    excluded: dict[str, int] | None = None
    # how a ranking was made of the model's own
    rerank: str | None = None
    pool: str | None = None
    texts: str | None = None
    siblings: str | None = None
    bank_images: int | None = None
    # a protocol of the field (`protocols.PROTOCOLS`): which pairs count, in what gallery
    protocol: str | None = None
    about: str | None = None
    positives: str | None = None
    folds: int | None = None
    queries: dict[str, int] | None = None  # by direction
    captions_dropped: int | None = None
    # people's judgements, which scores are held against
    file: str | None = None
    pairs: int | None = None
    pairs_left_out: int | None = None
    scale: list[float] | None = None
    # the settings that a re-ranking's methods chose
    chosen: dict[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> dict:
        own = {k: v for k, v in vars(self).items() if v is not None and k != "chosen"}
        return own | self.chosen

    @classmethod
    def of(cls, settings: dict) -> "Protocol":
        """The protocol that such a dictionary is of."""
        names = {f.name for f in fields(cls)}
        own = {k: v for k, v in settings.items() if k in names}
        return cls(**own, chosen={k: v for k, v in settings.items() if k not in names})


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


@dataclass(frozen=True, kw_only=True)
class Model(Result):
    """One model of a run folder and its rankings."""

    about: dict[str, Any]  # settings by dotted name, and versions
    queries: dict[str, Queries]


def of_ranking(plan: Plan, recipe: Recipe, cost: dict[str, float], label: str) -> Result:
    """The means over all queries of a finished ranking, with intervals; `cost` is what it took."""
    found = ranking.queries([piece.output for piece in plan.pieces])
    between = bootstrap(found, recipe.evaluate.resamples)
    return Result(label, figures(found), between, Protocol.of(plan.settings), cost)


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


def figure(name: str, value: float, sign: str = "") -> str:
    """A figure with as many digits as its name asks for."""
    return f"{value:{sign}.{digits(name)}f}"


def interval(result: Result, name: str, form: str = "[{}, {}]") -> str:
    """Both ends of a figure's interval; nothing where it has none."""
    ends = result.intervals.get(name)
    return form.format(*(figure(name, end) for end in ends)) if ends else ""


def sentence(protocol: Protocol) -> str:
    """The protocol in words: every table carries it."""
    p, of = protocol, f"{protocol.images:,} images"
    queries = ", ".join(f"{n:,} {way}" for way, n in (p.queries or {}).items()) or "none"
    sure = "In brackets: the middle 95 % of a bootstrap over images."
    if p.about:
        dropped = f" ({p.captions_dropped:,} more dropped)" if p.captions_dropped else ""
        return (
            f"{p.protocol} ({p.about}): {of}, {p.captions:,} captions{dropped}, captions an image: "
            f"{p.captions_per_image}, folds: {p.folds}, queries: {queries}, positives: "
            f"{p.positives}. R@K in percent; ties: {p.ties}; R of mAP@R and R-Precision counts "
            f"positives missing from the gallery. {sure}"
        )
    if p.file:
        low, high = p.scale
        return (
            f"judgements ({p.file}): {p.pairs:,} pairs of {of} and {p.captions:,} captions "
            f"({p.pairs_left_out:,} more are not of this gallery). Spearman and Kendall's tau_b "
            f"over all of them; NDCG of the judged candidates of a query, gain {p.gain} with "
            f"scores {low:g} to {high:g} as relevance 0 to 1, over the queries whose judgements "
            f"differ: {queries}; ties: {p.ties}. {sure}"
        )
    without = " without {images:,} images, {captions:,} captions excluded;"
    excluded = without.format(**p.excluded) if p.excluded else ""
    used = " (training used it too)" if p.labels_trained_on else ""
    pool = f", {p.pool}" if p.pool else ""
    read = f" Texts are read as {', '.join(map(repr, p.prompts))}." if p.prompts else ""
    bank = f" (bank of {p.bank_images:,} train images)" if p.bank_images is not None else ""
    return (
        f"{p.data} {p.split}:{excluded} {of}, {p.captions:,} captions "
        f"({p.captions_per_image:g} an image). R@K in percent; ties: {p.ties}. "
        f"NDCG@{p.ndcg_at}, gain {p.gain}; label relevance by {p.label_encoder}{used}, "
        f"map {p.label_map}. Re-ranking: {p.rerank}{pool}{bank}.{read}"
    )
