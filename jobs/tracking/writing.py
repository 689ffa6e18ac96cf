"""Entries become what MLflow holds of a run. Writing one twice leaves what writing it once does."""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jobs.tracking import names
from jobs.tracking.errors import Kind, RunGone, told_apart

METRICS, PARAMS = 1000, 100  # that MLflow takes in one call; as many tags as parameters
Refused = Callable[[str, str], None]  # hears what MLflow does not take, and why


def cleaned(metrics: dict, params: dict, tags: dict, step: int, refused: Refused) -> dict:
    """The values of a batch as JSON holds them, under names that MLflow takes."""
    now = int(time.time() * 1000)
    numbers = [[n, _number(value), step, now] for n, value in names.keys(metrics).items()]
    for name, value, *_ in numbers:
        if value is None:
            refused(f"metric {name}", "it is no number")
    return {
        "metrics": [metric for metric in numbers if metric[1] is not None],
        "params": {name: str(value) for name, value in names.keys(params).items()},
        "tags": {name: str(value) for name, value in names.keys(tags).items()},
    }


def plain(records: Iterable[dict]) -> list[dict]:
    """Records as JSON holds them: numbers under names that MLflow takes."""
    kept = []
    for record in records:
        values = {name: _number(value) for name, value in names.keys(record).items()}
        values = {name: value for name, value in values.items() if value is not None}
        kept.append({**values, "step": int(record["step"])})
    return kept


def _number(value) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def batch(client, run_id: str, values: dict, refused: Refused) -> None:
    """Metrics, parameters and tags of a run.

    A parameter that is there with another value stays, as MLflow has it, and the new one becomes
    the tag `changed.NAME`. A metric of step 0 that is there with the same value is left out.
    """
    from mlflow.entities import Metric, Param, RunTag

    there = alive(client, run_id).data
    wanted = {name: names.cut(value, names.VALUE) for name, value in values["params"].items()}
    changed = {n: v for n, v in wanted.items() if there.params.get(n, v) != v}
    fresh = {n: v for n, v in wanted.items() if n not in there.params}
    tags = {**values["tags"], **{names.key(f"changed.{n}"): v for n, v in changed.items()}}
    metrics = [
        Metric(name, value, when, step)
        for name, value, step, when in values["metrics"]
        if step != 0 or not _same(there.metrics.get(name), value)
    ]
    kept_tags = [RunTag(name, names.cut(value, names.TAG)) for name, value in tags.items()]
    _send(client, run_id, "metrics", METRICS, metrics, refused)
    _send(client, run_id, "params", PARAMS, [Param(n, v) for n, v in fresh.items()], refused)
    _send(client, run_id, "tags", PARAMS, kept_tags, refused)


def alive(client, run_id: str):
    """The run; raises where it was deleted: nothing can be written to it then."""
    run = client.get_run(run_id)
    if run.info.lifecycle_stage == "deleted":
        raise RunGone("it was deleted")
    return run


@contextlib.contextmanager
def same_status(client, run_id: str) -> Iterator[None]:
    """What happens inside leaves the run's status as it was: MLflow ends a run with a model."""
    before = alive(client, run_id).info
    try:
        yield
    finally:
        if before.status == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, before.status, before.end_time)


def _same(there: float | None, value: float) -> bool:
    return there is not None and (there == value or (math.isnan(there) and math.isnan(value)))


def _send(client, run_id: str, what: str, most: int, values: list, refused: Refused) -> None:
    """All values, so many a call; where a call is refused, one by one."""
    for start in range(0, len(values), most):
        some = values[start : start + most]
        try:
            client.log_batch(run_id, **{what: some})
        except Exception as error:
            if told_apart(error, client.tracking_uri).kind is not Kind.UNWRITABLE:
                raise
            alive(client, run_id)
            for one in some:
                _send_one(client, run_id, what, one, refused)


def _send_one(client, run_id: str, what: str, one, refused: Refused) -> None:
    """A value, shorter where the server is an older one."""
    for limit in (None, *names.EARLIER):
        if limit and not (what == "params" and len(one.value) > limit):
            continue
        try:
            value = type(one)(one.key, names.cut(one.value, limit)) if limit else one
            return client.log_batch(run_id, **{what: [value]})
        except Exception as error:
            verdict = told_apart(error, client.tracking_uri)
            if verdict.kind is not Kind.UNWRITABLE:
                raise
    return refused(f"{what[:-1]} {one.key}", verdict.why)


def records(client, run_id: str, some: list[dict], refused: Refused) -> None:
    """Metrics ({"step": …, name: value, …}) unless their step is there already."""
    from mlflow.entities import Metric

    found = {name for record in some for name in record} - {"step"}
    there = {n: {m.step for m in client.get_metric_history(run_id, n)} for n in sorted(found)}
    now = int(time.time() * 1000)
    by_step = {
        (name, record["step"]): Metric(name, value, now, record["step"])
        for record in some
        for name, value in record.items()
        if name != "step" and record["step"] not in there[name]
    }
    _send(client, run_id, "metrics", METRICS, list(by_step.values()), refused)


def artifact(client, run_id: str, name: str, text: str) -> None:
    """A file of a run."""
    folder, _, file = name.rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, file)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        client.log_artifact(run_id, str(path), folder or None)
