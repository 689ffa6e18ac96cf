"""What metrics.json holds of a ranking: figures, intervals, protocol."""

from pipeline.evaluation import external, human_agreement, intervals, protocols, ranking
from pipeline.evaluation.tower_vectors import read_vectors
from pipeline.labels import judged_pairs
from pipeline.storage import store
from pipeline.storage.plan import Plan
from schemas.settings import Recipe

RESULTS = 1  # counts up when metrics.json changes, so that it is made again


def metrics(plan: Plan) -> dict[str, float]:
    """The means over all queries of a finished ranking."""
    return intervals.figures(queries(plan))


def queries(plan: Plan) -> dict[str, intervals.Queries]:
    """Every query's own metrics in a finished ranking, by direction."""
    return ranking.queries([piece.output for piece in plan.pieces])


def results(plan: Plan, recipe: Recipe) -> dict:
    """What metrics.json holds of any ranking: figures, their intervals, and the protocol."""
    found = queries(plan)
    return {
        "metrics": intervals.figures(found),
        "intervals": intervals.bootstrap(found, recipe.evaluate.resamples),
        "protocol": plan.settings,
    }


def results_uri(plan: Plan) -> str:
    return store.join(plan.folder, "metrics.json")


def results_version(plan: Plan, recipe: Recipe) -> str:
    """What metrics.json depends on."""
    settings = recipe.evaluate.model_dump(include={"resamples", "protocols"})
    uri = recipe.evaluate.judgements
    people = uri and store.sha256(judged_pairs.read_named_file(uri))
    return store.fingerprint(RESULTS, plan.fingerprint, settings, people)


def all_results(plan: Plan, recipe: Recipe, root: str, name: str) -> dict:
    """`results`, with people's judgements among the figures, and tables under protocols."""
    found = results(plan, recipe) | {"tables": {}, "version": results_version(plan, recipe)}
    settings = recipe.evaluate
    if not settings.judgements and not settings.protocols:
        return found
    gallery = external.of_vectors(read_vectors([(name, recipe)], root))
    tables = protocols.measure(gallery, list(settings.protocols), resamples=settings.resamples)
    if settings.judgements:
        people = human_agreement.measure(
            gallery, human_agreement.read(settings.judgements), settings.resamples
        )
        found["metrics"] |= people.metrics
        found["intervals"] |= people.intervals
        tables["judgements"] = people
    return found | {"tables": {name: table._asdict() for name, table in tables.items()}}


RECALLS = ["i2t R@1   5    10", "t2i R@1   5    10"]  # column titles


def recalls(metrics: dict[str, float]) -> list[str]:
    """A cell for each direction: R@1, R@5 and R@10 in percent."""
    return [
        " ".join(f"{metrics[f'{direction}_R_at_{k}']:4.1f}" for k in (1, 5, 10))
        for direction in ("i2t", "t2i")
    ]
