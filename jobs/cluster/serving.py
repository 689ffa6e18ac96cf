"""Where the search service runs: Ray Serve, on the same Ray as everything else."""

import logging
import os
import socket
import time

from jobs.cluster import tasks
from pipeline.errors import InputError
from schemas.settings import Recipe, ServeSettings

NAME = "halftone"


def start(recipe: Recipe, root: str, name: str) -> str:
    """Start the service of one model; its address, once it answers."""
    settings = recipe.serve
    local = not os.environ.get("RAY_ADDRESS")
    if local:
        _check_port(settings)
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    tasks.connect()
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        http_options={"host": settings.host, "port": settings.port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    deployment = serve.deployment(
        _deployment(recipe, root, name),
        name="gallery",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.concurrent,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        health_check_period_s=10,
    )
    serve.run(deployment.bind(), name=NAME, route_prefix="/")  # type: ignore[attr-defined]
    shown = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    return f"http://{shown}:{settings.port}"


def wait() -> None:
    """Return when the service ends; Ctrl-C ends it."""
    from ray import serve

    while NAME in serve.status().applications:
        time.sleep(5)


def stop() -> None:
    from ray import serve

    serve.shutdown()


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
