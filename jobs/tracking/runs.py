"""Where a model's runs are on a server: its experiment, and the runs that are begun there."""

from collections.abc import Callable
from functools import partial

from jobs.tracking import names, server
from jobs.tracking.errors import Kind, told_apart
from jobs.tracking.writing import alive

MARK = "halftone.mark"  # tag of a run: it is one folder's run of one thing
Say = Callable[[str], None]


def experiment(client, known: str | None, name: str, uri: str, say: Say) -> str:
    """Id of the recipe's experiment: the known one, the one of that name, or a new one.

    The name of one that was deleted stays taken: the new one is then numbered.
    """
    if known is not None and _active(found := _found(client.get_experiment, known)):
        return found.experiment_id
    wanted = free = names.experiment(name)
    number = 1
    while (found := client.get_experiment_by_name(free)) is not None and not _active(found):
        number += 1
        free = f"{wanted}-{number}"
    if free != wanted:
        say(f"holds a deleted experiment {wanted!r}: the runs go to {free!r}")
    return found.experiment_id if found else _create(client, free, uri)


def _found(ask: Callable, known: str):
    """What there is of an id; None where it is there no more."""
    try:
        return ask(known)
    except Exception as error:
        if told_apart(error, "").kind is Kind.GONE:
            return None
        raise


def _active(found) -> bool:
    return found is not None and found.lifecycle_stage == "active"


def _create(client, name: str, uri: str) -> str:
    folder = None
    if path := server.database(uri):  # beside the database, not in whatever folder this is
        folder = str(path.parent / "mlflow-artifacts")
    try:
        return client.create_experiment(name, artifact_location=folder)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise
        return client.get_experiment_by_name(name).experiment_id  # made by another, meanwhile


def begin(client, experiment_id: str, name: str, tags: dict[str, str], mark: str) -> str:
    """Id of a new run, or of the one with this mark that a killed process began."""
    mine = f"tags.`{MARK}` = '{mark}'"
    if found := client.search_runs([experiment_id], mine, max_results=1):
        return found[0].info.run_id
    run = client.create_run(experiment_id, run_name=name, tags={**tags, MARK: mark})
    return run.info.run_id


def gone(client, ids: dict[str, str]) -> set[str]:
    """Keys of those runs that were deleted, or that this server never had."""
    return {key for key, run_id in ids.items() if _found(partial(alive, client), run_id) is None}
