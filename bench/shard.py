"""Speed and memory of sharding, as ratios within one run on one core.

    python -m bench.shard FOLDER                # a folder of JPEGs; about three minutes
    python -m bench.shard FOLDER check trust    # some sections of: check trust scale

`check` and `trust`: `shard.write_shard` against loops that write the same pictures, with the full
decode check and without it; CPU seconds, best of a few, files in the page cache. The loops either
append the picture alone, or the three members of a sample. `scale`: ten times the samples, each in
a process of its own so that its peak memory is its own. The driver's share: `bench/manifest.py`.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import webdataset
from PIL import Image

from bench import peak_memory
from pipeline.sharding import shard
from pipeline.storage.plan import Piece
from schemas.manifest import MANIFEST
from schemas.settings import ShardSettings, SourceSettings

SAMPLES = 1000  # of a shard
WORDS = "a brown dog runs through the tall green grass with a red ball in its mouth"


def manifest(files: list[str], count: int) -> pa.Table:
    """`count` rows with five captions each, of the files over and over."""
    blocks = []
    for start in range(0, count, 10_000):
        rows = []
        for i in range(start, min(start + 10_000, count)):
            captions = [{"caption_id": f"{i}#{k}", "text": f"{WORDS} {i} {k}"} for k in range(5)]
            row = {"image_id": f"image-{i}", "uri": files[i % len(files)], "split": "train"}
            rows.append(row | {"captions": captions, "source": "csv"})
        blocks.append(pa.RecordBatch.from_pylist(rows, MANIFEST))
    return pa.Table.from_batches(blocks)


def ours(rows: pa.Table, folder: str, **settings) -> None:
    for number, start in enumerate(range(0, rows.num_rows, SAMPLES)):
        inputs = {"rows": rows.slice(start, SAMPLES), "split": "train", "excluded": {}}
        inputs |= {"settings": ShardSettings(**settings), "source": SourceSettings()}
        shard.write_shard(Piece(f"{number}", f"{folder}/{number}.parquet", "f", inputs))


def loop(rows: pa.Table, folder: str, *, decode: bool, members: int) -> None:
    """Each picture is read, decoded, hashed and appended with plain `tarfile`."""
    for number, start in enumerate(range(0, rows.num_rows, SAMPLES)):
        with tarfile.open(f"{folder}/{number}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, sample in _samples(rows.slice(start, SAMPLES), decode):
                for ending, data in list(sample.items())[:members]:
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size, info.mtime = len(data), 0
                    tar.addfile(info, io.BytesIO(data))


def tar_writer(rows: pa.Table, folder: str, *, decode: bool) -> None:
    """The same through `webdataset.TarWriter`."""
    for number, start in enumerate(range(0, rows.num_rows, SAMPLES)):
        with webdataset.TarWriter(f"{folder}/{number}.tar", encoder=False, mtime=0) as tar:
            for key, sample in _samples(rows.slice(start, SAMPLES), decode):
                tar.write({"__key__": key, **sample})


def _samples(rows: pa.Table, decode: bool):
    for row in rows.to_pylist():
        data = Path(row["uri"]).read_bytes()
        if decode:
            Image.open(io.BytesIO(data)).load()
        about = {name: row[name] for name in ("image_id", "captions", "split")}
        about["sha256"] = hashlib.sha256(data).hexdigest()
        text = row["captions"][0]["text"].encode()
        yield row["image_id"], {"jpg": data, "txt": text, "json": json.dumps(about).encode()}


def compare(rows: pa.Table, *, decode: bool) -> None:
    """A line for each way, after every way was tried in turn, a few times over."""
    ways = {
        "ours": lambda folder: ours(rows, folder, decode_check=decode),
        "loop, picture alone": lambda folder: loop(rows, folder, decode=decode, members=1),
        "loop, three members": lambda folder: loop(rows, folder, decode=decode, members=3),
        "webdataset.TarWriter": lambda folder: tar_writer(rows, folder, decode=decode),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(5):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                way(folder)
                best[name] = min(best[name], time.process_time() - start)
    for name, seconds in best.items():
        each = seconds / rows.num_rows * 1e6
        print(f"{name:<22}{each:8.0f} µs a sample   ours {seconds / best['ours']:5.2f} × as fast")


def alone(section: str, *words) -> None:
    """A section in a new process."""
    subprocess.run(
        [sys.executable, "-m", "bench.shard", "--", section, *map(str, words)], check=True
    )


def scale(files: list[str], count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = manifest(files, count)
        before, start = new_peak(), time.process_time()
        ours(rows, folder)
        each = (time.process_time() - start) / count * 1e6
        more = peak_memory.peak() - before
    print(f"{count:>9,} samples {each:8.0f} µs a sample   {more:6.0f} MB more at peak")


def new_peak() -> float:
    """MB this process holds now; its peak is counted from here."""
    pa.default_memory_pool().release_unused()
    return peak_memory.from_here()


def main() -> None:
    folder, *sections = sys.argv[1:]
    if folder == "--":
        _, where, count = sections
        return scale(pictures(where), int(count))
    files, sections = pictures(folder), sections or ["check", "trust", "scale"]
    rows = manifest(files, min(len(files), 4 * SAMPLES))
    for section in sections:
        print(f"\n{section}")
        if section in ("check", "trust"):
            compare(rows, decode=section == "check")
        for count in (10_000, 100_000) if section == "scale" else ():
            alone(section, folder, count)
    return None


def pictures(folder: str) -> list[str]:
    files = sorted(map(str, Path(folder).rglob("*.jpg")))
    if not files:
        sys.exit(f"no *.jpg in {folder}; give a folder of JPEGs")
    for file in files:
        Path(file).read_bytes()
    return files


if __name__ == "__main__":
    main()
