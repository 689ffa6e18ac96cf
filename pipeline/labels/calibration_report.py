"""What `halftone calibrate` tells: numbers, what is better than what, the commands to go on."""

import json

import numpy as np

from pipeline.labels import agreement, calibrate, encoders
from pipeline.labels.calibrate import ENSEMBLE, FITS, Candidate
from pipeline.storage import store
from schemas.settings import Recipe


def numbers(found: list[Candidate]) -> dict[str, dict[str, dict[str, tuple]]]:
    """(value, low, high) by encoder, map and measure."""

    def of_map(measures: dict[str, np.ndarray]) -> dict[str, tuple]:
        return {measure: agreement.interval(value_R) for measure, value_R in measures.items()}

    return {c.name: {name: of_map(rows) for name, rows in c.rows.items()} for c in found}


def metrics(found: list[Candidate]) -> dict[str, float]:
    """Numbers for MLflow: `ENCODER/MAP/MEASURE`."""
    return {
        f"{encoders.encoder_label(encoder)}/{name}/{measure}": values[0]
        for encoder, maps in numbers(found).items()
        for name, measures in maps.items()
        for measure, values in measures.items()
        if np.isfinite(values[0])
    }


def note(candidate: Candidate, name: str) -> str:
    """What became of a map that was fitted: kept, or refused."""
    if name not in FITS:
        return ""
    if candidate.refused(name):
        return "refused"
    return "kept" if name == candidate.best else ""


def protocol(found: list[Candidate], recipe: Recipe) -> str:
    """How the numbers were made, in words."""
    judged, settings = found[0].judged, recipe.calibrate
    left_out = f" ({judged.left_out:,} left out: unknown)" if judged.left_out else ""
    return (
        f"{len(judged.judgement_P):,} pairs{left_out} of {len(np.unique(judged.image_P2)):,} "
        f"images. Maps and weights fitted without the judged images, {settings.folds} folds. "
        f"Brackets: 95 % of {settings.resamples:,} resamples of images. AUC: judgements of at "
        f"least {settings.match:g}. error: root mean square, relevance against judgement in 0..1."
    )


def verdicts(found: list[Candidate]) -> list[str]:
    """Whether the ensemble, and a map, are better than what they are made of."""
    singles = [c for c in found if c.name != ENSEMBLE]
    best = max(singles, key=lambda c: c.rows["clip"]["spearman"][0])
    out = []
    for candidate in found:
        if candidate.name == ENSEMBLE:
            gain = candidate.rows["clip"]["spearman"] - best.rows["clip"]["spearman"]
            out.append(_verdict("the ensemble", best.name, "Spearman", gain))
        refusals = ((name, candidate.refused(name)) for name in FITS)
        out += [f"{candidate.name}, {name} is refused: {why}" for name, why in refusals if why]
        if (name := candidate.best) is not None:
            plain = min(calibrate.PLAIN, key=lambda p: candidate.rows[p]["error"][0])
            gain = candidate.rows[plain]["error"] - candidate.rows[name]["error"]
            out.append(_verdict(f"{candidate.name}, {name}", plain, "error", gain))
    return out


def _verdict(name: str, rival: str, measure: str, gain_R: np.ndarray) -> str:
    value, low, high = agreement.interval(gain_R)
    verb = "is worse than" if high < 0 else "is not told apart from"
    verb = "beats" if low > 0 else verb
    return f"{name} {verb} {rival}: {measure} better by {value:.4f} [{low:.4f}, {high:.4f}]"


def commands(found: list[Candidate], kept: dict[str, str], root: str) -> dict[str, str]:
    """What to type to label with the best candidate's map; nothing where no map was kept."""
    if not kept:
        return {}
    best = min((c for c in found if c.name in kept), key=lambda c: c.rows[c.best]["error"][0])
    encoder = f"--encoder {best.name}"
    if best.name == ENSEMBLE:
        shares = json.dumps(store.read_json(kept[best.name])["members"])
        encoder += f" --embed.members '{shares}'"
    map_ = f"--label.map {best.best} --label.calibration {kept[best.name]}"
    return {
        "maps": calibrate.folder_of(root),
        "then": f"halftone embed --root {root} {encoder}",
        "and": f"halftone label --root {root} {encoder} {map_}",
    }
