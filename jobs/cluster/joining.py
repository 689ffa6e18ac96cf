"""The cluster of RAY_ADDRESS: joined, or told within seconds why it cannot be.

Ray itself looks for a head that is gone for minutes, and says nothing.
"""

import os
import re
import socket

from pipeline.errors import InputError

SECONDS = 4.0  # until a head that does not answer is given up


def address() -> str | None:
    """What RAY_ADDRESS names; None where Ray is to start on this machine."""
    named = os.environ.get("RAY_ADDRESS", "").strip()
    return None if named in ("", "local") else named


def join(named: str, **options) -> None:
    """Start Ray as a driver of a cluster, HOST:PORT of its head or `auto`.

    Raises `InputError` where there is none, or it is of another Ray or Python.
    """
    import ray

    where = _resolved(named)
    _listened(named, where)
    _alive(named, where)
    try:
        ray.init(address=where, **options)
    except (RuntimeError, ConnectionError, ValueError, TimeoutError) as error:
        raise InputError(f"RAY_ADDRESS {named}: {_why(str(error))}") from error


def _resolved(named: str) -> str:
    """HOST:PORT of the head."""
    if named == "auto":
        return _of_this_machine()
    kind, given, rest = named.rpartition("://")
    host = rest.partition("/")[0].rpartition(":")[0].strip("[]") or rest.partition("/")[0]
    if kind in ("http", "https"):
        raise InputError(
            f"RAY_ADDRESS {named} takes jobs, and is no head; submit the command, `ray job submit "
            f"--address {named} --working-dir . -- python -m jobs.STAGE …`, or give {host}:6379"
        )
    if given:
        raise InputError(
            f"RAY_ADDRESS {named} is of {kind}://, which trainings and services cannot go through; "
            f"run on a machine of the cluster with {host}:6379, or `ray job submit --address "
            f"http://{host}:8265 --working-dir . -- python -m jobs.STAGE …`"
        )
    if not re.fullmatch(r"(\[[^\]]+\]|[^:\s/]+):\d{1,5}", named):
        raise InputError(
            f"RAY_ADDRESS {named!r} is no address; give HOST:PORT of the head, or auto"
        )
    return named


def _of_this_machine() -> str:
    from ray._private import services

    found = services.find_bootstrap_address(None)
    everyone = [found] if found else sorted(services.find_gcs_addresses())
    if len(everyone) != 1:
        known = f"several are: {', '.join(everyone)}" if everyone else "none is"
        raise InputError(
            f"RAY_ADDRESS auto is the cluster of this machine, and {known}; give HOST:PORT of its "
            "head, or leave RAY_ADDRESS out"
        )
    return everyone[0]


def _listened(named: str, where: str) -> None:
    host, _, port = where.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
    except (OSError, OverflowError) as error:
        said = "no answer" if isinstance(error, TimeoutError) else error
        raise InputError(
            f"RAY_ADDRESS {named}: nobody listens at {where} ({said}); start the head, correct the "
            "address, or leave RAY_ADDRESS out to work on this machine"
        ) from error


def _alive(named: str, where: str) -> None:
    """Refuses whoever listens there and is no head of Ray's."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # it answers those alone who know its certificate
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    secret = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
    with grpc.insecure_channel(where, [("grpc.enable_http_proxy", 0)]) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            head.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=SECONDS)  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            if error.code() not in secret:
                raise InputError(
                    f"RAY_ADDRESS {named}: {where} is no head of Ray's, or does not answer "
                    f"({error.code().name.lower()}); give the head's own port, mostly 6379"
                ) from error


def _why(said: str) -> str:
    """What Ray said, in one line; of other versions, which."""
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", said)
    if "ersion mismatch" in said and len(versions) == 2:
        (ray_there, python_there), (ray_here, python_here) = versions
        return (
            f"the cluster has Ray {ray_there} and Python {python_there}, this process Ray "
            f"{ray_here} and Python {python_here}; install what the cluster has, or submit the "
            "command as a job: `ray job submit`"
        )
    return (
        f"{' '.join(said.split())[:400]}; correct RAY_ADDRESS, RAY_AUTH_MODE or the token, and run "
        "on a machine of the cluster"
    )
