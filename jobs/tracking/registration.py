"""The registered model of a recipe: a version for every training, and what its aliases name."""

import math
from collections.abc import Callable

from jobs.tracking import names
from jobs.tracking.server import current

SCORE = "val_rsum"  # tag of a version: rSum on val, -1 where there is no val
OURS = "halftone."  # how the other tags begin: model, version (of its files) and trained (ms)


def register(client, run_id: str, recipe: str, about: dict, log: Callable[[], object]) -> None:
    """A trained model (`about`: its name, version, score and time) becomes a version.

    `log()` logs it to the run and says where it is. What an earlier try did is not done again.
    The model's name is an alias of its version that was trained last, `best` of the version with
    the highest score, whichever was registered last.
    """
    registered = names.registered(recipe)
    _create(client, registered)
    versions = _versions(client, registered)
    if not any(_is_of(version, run_id, about) for version in versions):
        source, model_id = _logged(client, run_id, about, log)
        tags = {
            SCORE: str(about["score"]),
            f"{OURS}model": about["model"],
            f"{OURS}version": about["version"],
            f"{OURS}trained": str(about["trained"]),
        }
        with current(client.tracking_uri):  # where a model URI leads, MLflow asks there
            client.create_model_version(registered, source, run_id, tags=tags, model_id=model_id)
        versions = _versions(client, registered)
    alias = names.alias(about["model"])
    mine = [v for v in versions if v.tags.get(f"{OURS}model") == about["model"]]
    for name, version in ((alias, max(mine, key=_trained)), ("best", max(versions, key=_score))):
        client.set_registered_model_alias(registered, name, version.version)


def _create(client, registered: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(registered)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(client, registered: str) -> list:
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name='{registered}'", page_token=token)
        found += page
        if not (token := page.token):
            return found


def _is_of(version, run_id: str, about: dict) -> bool:
    return version.run_id == run_id and version.tags.get(f"{OURS}version") == about["version"]


def _logged(client, run_id: str, about: dict, log: Callable) -> tuple[str, str]:
    """URI and id of the logged model; a tag of the run tells of one that an earlier try logged."""
    tag = f"{OURS}logged"
    version, *where = client.get_run(run_id).data.tags.get(tag, "").rsplit(" ", 2)
    if version == about["version"] and len(where) == 2:
        return where[0], where[1]
    info = log()
    client.set_tag(run_id, tag, f"{about['version']} {info.model_uri} {info.model_id}")
    return info.model_uri, info.model_id


def _trained(version) -> tuple:
    when = int(version.tags.get(f"{OURS}trained", version.creation_timestamp))
    return when, int(version.version)


def _score(version) -> tuple:
    score = float(version.tags.get(SCORE, -1))
    return (-math.inf if math.isnan(score) else score, *_trained(version))
