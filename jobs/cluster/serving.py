"""Where the search service runs: Ray Serve, on the same Ray as everything else.

A cluster's Serve, and what else it serves, may be other people's: of it only one's own application
is touched.
"""

import logging
import os
import socket
import time
from typing import Any, NamedTuple

from jobs.cluster import joining, tasks
from pipeline.errors import InputError
from schemas.settings import Recipe, ServeSettings

EVERYWHERE = ("0.0.0.0", "::", "")


class Served(NamedTuple):
    """A service that answers."""

    url: str
    settings: ServeSettings  # with the host and the port that Serve listens on
    told: str = ""  # where that is not what was asked for


def start(recipe: Recipe, root: str, name: str, *, replace: bool = False) -> Served:
    """Start the service of one model; where it answers.

    Raises `InputError` where the cluster serves another application of this name, unless it is to
    `replace` that, or one at this path, or the port is taken.
    """
    settings, alone = recipe.serve, joining.address() is None
    if alone:
        _check_port(settings)
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    tasks.connect()
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if (there := _details()) is None:
        serve.start(
            http_options={"host": settings.host, "port": settings.port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        there = _details()
    path = _path(settings.application)
    _check_free(settings.application, path, there["applications"], replace)
    served = _listening(settings, there)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    deployment = serve.deployment(
        _deployment(recipe.model_copy(update={"serve": served.settings}), root, name),
        name="gallery",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.concurrent,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        health_check_period_s=10,
    )
    try:
        serve.run(deployment.bind(), name=settings.application, route_prefix=path)  # type: ignore[attr-defined]
    except BaseException:  # Ctrl-C, too: nothing half started is left with others
        stop(settings.application)
        raise
    return served


def wait(application: str) -> None:
    """Return when the application ends; Ctrl-C ends it."""
    from ray import serve

    while application in serve.status().applications:
        time.sleep(5)


def stop(application: str) -> None:
    """End one's own application; Serve itself only where Ray is this process's own."""
    from ray import serve

    if joining.address() is None:
        serve.shutdown()
    else:
        serve.delete(application)


def _path(application: str) -> str:
    """Where an application is served."""
    default = ServeSettings.model_fields["application"].default
    return "/" if application == default else f"/{application}"


def _details() -> dict[str, Any] | None:
    """What Serve's controller says of itself; None where no Serve runs."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.get_serve_details()


def _check_free(application: str, path: str, there: dict[str, Any], replace: bool) -> None:
    """Refuses a name, or a path, that another application has."""
    for name, about in there.items():
        if name != application and about["route_prefix"] != path:
            continue
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(about["last_deployed_time_s"]))
        said = (
            f"this cluster serves the application {name!r} at {about['route_prefix']} "
            f"({getattr(about['status'], 'value', about['status'])}, since {since})"
        )
        if name != application:
            raise InputError(f"{said}; give another --serve.application, which is its path, too")
        if not replace:
            raise InputError(
                f"{said}; end it where it was started, give --replace to put this one in its "
                "place, or another --serve.application"
            )


def _listening(settings: ServeSettings, there: dict[str, Any]) -> Served:
    """Where Serve listens: as it was started first, by whomever."""
    host, port = (there["http_options"][key] for key in ("host", "port"))
    if there["proxy_location"] in (None, "Disabled", "NoServer"):
        raise InputError("this cluster's Serve was started without HTTP; start it with, or another")
    shown = host
    if host in EVERYWHERE:
        nodes = [proxy["node_ip"] for proxy in (there["proxies"] or {}).values()]
        shown = nodes[0] if nodes and joining.address() else "127.0.0.1"
    shown = f"[{shown}]" if ":" in shown else shown
    path = _path(settings.application).rstrip("/")
    told = ""
    if (host, port) != (settings.host, settings.port):
        told = (
            f"the cluster's Serve listens at {host}:{port} already; --serve.host {settings.host} "
            f"and --serve.port {settings.port} are not used"
        )
    found = settings.model_copy(update={"host": host, "port": port})
    return Served(f"http://{shown}:{port}{path}", found, told)


def _deployment(recipe: Recipe, root: str, name: str) -> type:
    """The class that Ray Serve makes replicas of; each loads the model once."""
    from ray import serve

    def build():
        from pipeline.search import index, service

        gallery = index.SearchIndex(recipe, root, name)

        @serve.batch(max_batch_size=recipe.serve.together, batch_wait_timeout_s=0.0)
        async def ask(queries: list[index.Query]) -> list[service.Answer]:
            return await service.answered(gallery, queries)

        replica = serve.get_replica_context().replica_id.unique_id
        return service.app(gallery, ask, replica=replica)

    @serve.ingress(build)
    class Replica:
        """Answers requests with the application above."""

    return Replica


def _check_port(settings: ServeSettings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            said = f"cannot listen on {settings.host}:{settings.port} ({error.strerror})"
            do = "give another --serve.port or --serve.host"
            raise InputError(f"{said}; {do}") from error
