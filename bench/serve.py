"""Search under load: requests at once against `halftone serve`; throughput, p50, p99, errors.

python -m bench.serve RUN_FOLDER [--seconds 60] [--concurrent 200] [--replicas 1]

Queries are the first 5,000 captions of the evaluated split in turn, with and without shades.
"""

import argparse
import asyncio
import contextlib
import itertools
import socket
import time

import aiohttp
import numpy as np
import psutil

from jobs.cli import recipes
from jobs.cluster import serving
from pipeline.reports.pictures import Pictures
from pipeline.storage import store


async def load(url: str, texts: list[str], shades: bool, seconds: float, concurrent: int) -> dict:
    """Seconds of every answer, and the statuses of those that were not 200."""
    took: list[float] = []
    wrong: list = []
    turn = itertools.cycle(texts)
    end = time.perf_counter() + seconds

    async def ask_on(session) -> None:
        while (started := time.perf_counter()) < end:
            query = {"q": next(turn), "top": "10", "shades": str(shades).lower()}
            try:
                async with session.get(f"{url}/search", params=query) as answer:
                    body = await answer.json()
                    if answer.status != 200 or not body["hits"]:
                        wrong.append(answer.status)
            except (aiohttp.ClientError, TimeoutError) as error:
                wrong.append(type(error).__name__)
            took.append(time.perf_counter() - started)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        started = time.perf_counter()
        await asyncio.gather(*(ask_on(session) for _ in range(concurrent)))
        whole = time.perf_counter() - started
    return {"took": np.array(took), "wrong": wrong, "per_second": len(took) / whole}


def cpu_seconds() -> dict[str, float]:
    """CPU time used so far by the proxy, the replicas and this client."""
    used = {"proxy": 0.0, "replicas": 0.0, "client": time.process_time()}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = process.cmdline()[0]
            times = process.cpu_times()
            used["proxy"] += ("ProxyActor" in name) * (times.user + times.system)
            used["replicas"] += ("ServeReplica" in name) * (times.user + times.system)
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--concurrent", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=1)
    options = parser.parse_args()
    root = store.absolute(options.root)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"serve": {"port": port, "replicas": options.replicas}}
    name, recipe = recipes.saved(root, settings, None)[0]
    pictures = Pictures(root, recipe.evaluate.split)
    texts = [c.text for c in pictures.captions_at(range(min(5000, len(pictures.captions))))]
    url = serving.start(recipe, root, name).url
    print(
        f"{len(pictures.images):,} images, {options.concurrent} at once, {options.seconds:g} s",
        flush=True,
    )
    try:
        asyncio.run(load(url, texts, True, 3, options.concurrent))  # the first answers load models
        for shades in (False, True):
            before = cpu_seconds()
            found = asyncio.run(load(url, texts, shades, options.seconds, options.concurrent))
            requests = len(found["took"])
            p50, p99 = 1000 * np.quantile(found["took"], [0.5, 0.99])
            used = {k: 1000 * (v - before[k]) / requests for k, v in cpu_seconds().items()}
            print(
                f"{'with' if shades else 'without'} shades: {requests:,} requests, "
                f"{len(found['wrong'])} errors {set(found['wrong']) or ''}, "
                f"{found['per_second']:.0f} a second, p50 {p50:.0f} ms, p99 {p99:.0f} ms; "
                f"CPU ms a request: " + ", ".join(f"{k} {v:.1f}" for k, v in used.items()),
                flush=True,
            )
    finally:
        serving.stop(recipe.serve.application)


if __name__ == "__main__":
    main()
