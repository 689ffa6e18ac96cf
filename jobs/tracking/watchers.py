"""What is written to MLflow while a training goes on, by other processes than the driver's."""

import contextlib
import logging
import time
from collections.abc import Iterator

from jobs.tracking import server, writing

PAUSE = 60  # seconds until a server that did not answer is asked again


class Recorder:
    """Logs a training's records as they come.

    It lives in the training's controller, where an error would end the training, and waiting would
    hold it up: after an error it is silent for a minute, then makes up for what it kept. The driver
    writes all records when the training is over.
    """

    def __init__(self, uri: str, run_id: str):
        self.uri, self.run_id = uri, run_id
        self.kept: list[dict] = []
        self.again = 0.0

    def __call__(self, records: list[dict]) -> None:
        self.kept += writing.plain(records)
        if time.monotonic() < self.again:
            return
        try:
            if (path := server.database(self.uri)) is not None:
                path.stat()  # raises: it is another machine's
            client = server.client(self.uri)
            writing.records(client, self.run_id, self.kept, lambda what, why: None)
            self.kept = []
        except Exception:  # tracking must never end the work it tracks
            self.again = time.monotonic() + PAUSE


@contextlib.contextmanager
def monitor(uri: str, run_id: str | None, node: str) -> Iterator[None]:
    """CPU, memory, disk, network and GPU of this node, as `system/NODE/…`, every ten seconds."""
    path = server.database(uri)
    if run_id is None or (path is not None and not path.exists()):  # another machine's file
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # a server is away
    about = {"sampling_interval": 10, "node_id": node, "resume_logging": True}
    try:
        watch = SystemMetricsMonitor(run_id, tracking_uri=uri, **about)
        watch.start()
    except Exception:  # it asks the server, and tracking must never end the work it tracks
        watch = None
    try:
        yield
    finally:
        if watch is not None:
            watch.finish()
