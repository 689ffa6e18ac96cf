"""Encoders, ensembles and maps against people's judgements; the maps that agree better are kept.

All that is fitted, maps and weights, is judged on images it has not seen. Legend of the shape
suffixes: P judged pairs, L links of pairs, E encoders, R resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from pipeline.errors import InputError
from pipeline.formulas import relevance
from pipeline.labels import agreement, embed, encoders, judged_pairs
from pipeline.labels.judged_pairs import Judged
from pipeline.labels.maps import map_of
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece, Plan
from schemas.relevance import Calibration
from schemas.settings import CalibrateSettings, EmbedSettings, Recipe

ENSEMBLE = "ensemble"
PLAIN = ("clip", "half")  # maps that nothing is fitted of; clip is the cosine, unless negative
LOSS = 0.01  # of Pearson that a map with a lower error may cost
COSINE = pa.schema([pa.field("cosine", pa.float32(), nullable=False)])  # of every link


def folder_of(root: str) -> str:
    return store.join(root, "calibration")


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every encoder: the cosines of the judged pairs."""
    judged = judged_pairs.read(recipe.calibrate, root)
    known = judged_pairs.fingerprint_of_judgements(recipe.calibrate, root)
    names = recipe.calibrate.encoders or tuple(recipe.embed.members) or (recipe.embed.encoder,)
    pieces = []
    for name in dict.fromkeys(names):
        settings = recipe.embed.model_copy(update={"encoder": name, "members": {}})
        output = store.join(folder_of(root), f"{encoders.encoder_label(name)}.parquet")
        fingerprint = store.fingerprint("cosine", embed.depends_on(settings, root), known)
        inputs = {"judged": judged, "settings": settings, "root": root}
        pieces.append(Piece(name, output, fingerprint, inputs))
    if len({piece.output for piece in pieces}) < len(pieces):
        raise InputError(f"two of the encoders {', '.join(names)} share a folder name; rename one")
    return Plan.of("calibrate", folder_of(root), pieces, {})


def write_cosines(piece: Piece) -> dict:
    """Write the cosine of every link by one encoder; a summary with their number."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    judged: Judged = piece.inputs["judged"]
    settings: EmbedSettings = piece.inputs["settings"]
    vectors = embed.encode(judged.texts, settings, piece.inputs["root"])
    left, right = judged.text_L2.T
    cosine_L = np.einsum("ld,ld->l", vectors[left], vectors[right])
    table = pa.table({"cosine": cosine_L.clip(-1, 1).astype(np.float32)}, schema=COSINE)
    return parquet.write_table(piece.output, table, piece.fingerprint, {"links": len(cosine_L)})


def fit_logistic(cosine_P: np.ndarray, judgement_P: np.ndarray) -> Calibration | None:
    """The logistic map of the highest likelihood; None where relevance falls as cosine rises.

    A judgement of 0.7 counts as 0.7 of a match and 0.3 of none.
    """
    from sklearn.linear_model import LogisticRegression

    count = len(cosine_P)
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(
        np.tile(cosine_P, 2)[:, None],
        np.repeat([1, 0], count),
        sample_weight=np.concatenate([judgement_P, 1 - judgement_P]),
    )
    slope, offset = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope <= 0:
        return None
    return Calibration(map="logistic", centre=-offset / slope, width=1 / slope)


def fit_isotonic(cosine_P: np.ndarray, judgement_P: np.ndarray) -> Calibration:
    """The nearest map that never falls."""
    line = relevance.fit_isotonic(cosine_P.astype(np.float32), judgement_P)
    values = np.clip(line["values_K"], 0, 1).tolist()
    return Calibration(map="isotonic", knots=line["knots_K"], values=values)


FITS: dict[str, Callable] = {"logistic": fit_logistic, "isotonic": fit_isotonic}


def mapped(cosine_P: np.ndarray, name: str, fitted: Calibration | None = None) -> np.ndarray:
    """Relevance (P,) by a map; what is fitted to nothing is 0."""
    if name in FITS and fitted is None:
        return np.zeros_like(cosine_P)
    return map_of(name, fitted)(torch.from_numpy(cosine_P.astype(np.float32))).double().numpy()


def fit_weights(cosine_PE: np.ndarray, judgement_P: np.ndarray) -> np.ndarray:
    """Weights (E,) of sum 1 whose mean of cosines is nearest to a line through the judgements."""
    from sklearn.linear_model import LinearRegression

    weight_E = LinearRegression(positive=True).fit(cosine_PE, judgement_P).coef_
    total = weight_E.sum()
    return weight_E / total if total > 0 else np.full(len(weight_E), 1 / len(weight_E))


@dataclass
class Candidate:
    """One encoder, or the ensemble of all, with its maps."""

    name: str
    cosine_LE: np.ndarray
    judged: Judged
    reduce: str
    rows: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # measures (R,) by map

    def fit(self, train_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, Calibration]]:
        """Weights (E,), cosines (P,) of all pairs, and maps, fitted to some of the pairs."""
        judgement_P = self.judged.judgement_P[train_P]
        reduced_PE = np.stack([self.judged.reduced(c, self.reduce) for c in self.cosine_LE.T], 1)
        weight_E = fit_weights(reduced_PE[train_P], judgement_P)
        cosine_P = self.judged.reduced(self.cosine_LE @ weight_E, self.reduce)
        maps = {name: fit(cosine_P[train_P], judgement_P) for name, fit in FITS.items()}
        return weight_E, cosine_P, maps

    def held_out(self, folds: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """Relevance (P,) by map, each pair's by what was fitted without its images."""
        out = {name: np.full(len(self.judged.judgement_P), np.nan) for name in (*PLAIN, *FITS)}
        for train_P, test_P in folds:
            _, cosine_P, maps = self.fit(train_P)
            for name, relevance_P in out.items():
                relevance_P[test_P] = mapped(cosine_P[test_P], name, maps.get(name))
        return out

    def refused(self, name: str) -> str | None:
        """Why a fitted map is not kept, if it is not: it has to be better than the plain ones."""
        plain = min(PLAIN, key=lambda plain: self.rows[plain]["error"][0])
        if not self.gain(name, plain)[1] > 0:
            return f"its error is not lower than that of {plain} for certain"
        if not agreement.interval(self.rows[name]["pearson"])[1] > 0:
            return "it does not follow the judgements for certain"
        lost = self.rows["clip"]["pearson"][0] - self.rows[name]["pearson"][0]
        if lost > LOSS:
            return f"it costs more than {LOSS} of Pearson"
        return None

    def gain(self, name: str, rival: str) -> tuple[float, float, float]:
        """By how much a map's error is lower than a rival's, with the ends of the interval."""
        return agreement.interval(self.rows[rival]["error"] - self.rows[name]["error"])

    @property
    def best(self) -> str | None:
        """The fitted map that is kept: the simplest that no other beats for certain."""
        best = None
        for name in FITS:
            if self.refused(name) is None and (best is None or self.gain(name, best)[1] > 0):
                best = name
        return best


def folds(judged: Judged, settings: CalibrateSettings) -> list[tuple[np.ndarray, np.ndarray]]:
    """(pairs to fit on, pairs to judge) of every fold: they share no image."""
    images, first_P = np.unique(judged.image_P2[:, 0], return_inverse=True)
    fold = np.random.default_rng(settings.seed).permutation(len(images)) % settings.folds
    out: list[tuple[np.ndarray, np.ndarray]] = []
    for number in range(settings.folds):
        test_P = fold[first_P] == number
        met_P2 = np.isin(judged.image_P2, judged.image_P2[test_P])
        train_P = ~(met_P2[:, 0] | met_P2[:, 1])
        if not test_P.any() or len(np.unique(judged.judgement_P[train_P])) < 2:
            raise InputError(
                f"fold {number + 1} of {settings.folds} has {test_P.sum()} pairs, and "
                f"{train_P.sum()} without their images to fit a map to; judge pairs of more "
                "images, or change calibrate.folds"
            )
        out.append((train_P, test_P))
    return out


def candidates(plan: Plan, recipe: Recipe) -> list[Candidate]:
    """Every encoder, then the ensemble of them all, measured."""
    judged: Judged = plan.pieces[0].inputs["judged"]
    settings, reduce = recipe.calibrate, recipe.label.reduce
    cosines = {p.name: parquet.read_table(p.output)["cosine"].to_numpy() for p in plan.pieces}
    out = [Candidate(name, c[:, None], judged, reduce) for name, c in cosines.items()]
    if len(cosines) > 1:
        out.append(Candidate(ENSEMBLE, np.stack([*cosines.values()], 1), judged, reduce))
    weight_RP = agreement.resamples(judged.image_P2[:, 0], settings.resamples, settings.seed)
    split = folds(judged, settings)
    for candidate in out:
        for name, relevance_P in candidate.held_out(split).items():
            asked = relevance_P, judged.judgement_P, weight_RP, settings.match
            candidate.rows[name] = agreement.measured(*asked)
    return out


def write(found: list[Candidate], recipe: Recipe, root: str) -> dict[str, str]:
    """Write the best map of every candidate that has one; its URI by the candidate's name.

    A file of the last time whose map is refused now is removed.
    """
    out = {}
    for candidate in found:
        uri = store.join(folder_of(root), f"{encoders.encoder_label(candidate.name)}.json")
        if candidate.best is None:
            store.remove(uri)
            continue
        everything = np.ones(len(candidate.judged.judgement_P), bool)
        weight_E, _, maps = candidate.fit(everything)
        about: dict = {"encoder": candidate.name, "reduce": recipe.label.reduce}
        about |= {"pairs": len(everything), "held_out": {}}
        for name, value_R in candidate.rows[candidate.best].items():
            ends = zip(("value", "low", "high"), agreement.interval(value_R), strict=True)
            about["held_out"][name] = dict(ends)
        if candidate.name == ENSEMBLE:
            names = [c.name for c in found if c.name != ENSEMBLE]
            shares = zip(names, weight_E.tolist(), strict=True)
            about["members"] = {n: round(w, 4) for n, w in shares if w >= 0.0001}  # that count
        store.write_json(uri, {**maps[candidate.best].model_dump(exclude_defaults=True), **about})
        out[candidate.name] = uri
    return out
