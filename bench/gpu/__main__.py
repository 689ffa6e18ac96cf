"""What a GPU does with Halftone's training, in one go of less than six minutes.

    python -m bench.gpu                          # all tables, on the GPU
    python -m bench.gpu formulas speed           # some of them
    python -m bench.gpu --quick --device cpu     # the same code at tiny sizes, in seconds
    python -m bench.gpu --out FILE.json          # tables and figures as JSON too

Every table is made by a process of its own with a time limit, so one that fails costs no other. The
first need torch alone; the collection and the model that the others need are made on the spot. At
the end stands what is asked of a GPU, and whether it was met.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# By name: the module and the function that makes it, whether it needs the collection, seconds.
TABLES = {
    "formulas": ("bench.gpu.formulas", "correct", False, 40),
    "speed": ("bench.gpu.formulas", "speed", False, 40),
    "others": ("bench.gpu.formulas", "others", False, 40),
    "kernels": ("bench.kernels", "tables", False, 90),  # a cold cache compiles first
    "neighbours": ("bench.gpu.formulas", "neighbours", False, 30),
    "steps": ("bench.gpu.training", "steps", True, 90),
    "tuning": ("bench.gpu.training", "tuning", True, 110),
    "loader": ("bench.gpu.training", "loader", True, 50),
    "loop": ("bench.gpu.training", "loop", True, 60),
    "run": ("bench.gpu.whole", "run", True, 120),
}
BUDGET = 350.0  # seconds for all of them; what does not fit is left out, and named
SLOWER = 10  # --quick is for any machine: its limits are so many times as long
# What is asked of an H200 by the figure's name: (what it is, at least or at most, how much).
ASKED = {
    "loop_512": ("loop / learner alone, B = 512", ">=", 0.95),
    "loop_1024": ("loop / learner alone, B = 1,024", ">=", 0.95),
    "waited_512": ("waited for data, B = 512", "<=", 0.03),
    "pictures": ("loader, pictures/s on 16 cores", ">=", 12_000),
    "pairs_1024_as set_+ S-NDCG": ("ViT-B/32 with S-NDCG, B = 1,024, pairs/s", ">=", 7_500),
    "ratio_512_as set": ("S-NDCG / InfoNCE, a step of B = 512", "<=", 1.02),
    "ratio_1024_as set": ("S-NDCG / InfoNCE, a step of B = 1,024", "<=", 1.02),
    "ratio_4096_chunks of 512": ("S-NDCG / InfoNCE, a step of B = 4,096", "<=", 1.02),
    "ndcg_ms_1024": ("S-NDCG both ways, B = 1,024, ms", "<=", 0.25),
    "ndcg_ms_4096": ("S-NDCG both ways, B = 4,096, ms", "<=", 0.8),
    "ndcg_scores_4096": ("its memory at B = 4,096, x the scores", "<=", 3),
    "streamed_ms_32768": ("S-NDCG streamed, B = 32,768, D = 512, ms", "<=", 60),
    "gradient_off": ("gradients, relative L2 to float64", "<=", 1e-4),
    "run": ("one run of the whole, s", "<=", 60),
}


def main(argv: list[str] | None = None) -> int:
    options = parsed(argv)
    if options.child:
        return child(options)
    began, found = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="halftone-gpu-") as kept:
        folder, header = Path(kept), about(options)
        print(header_text(header), flush=True)
        for name in options.tables or TABLES:
            left = BUDGET * (SLOWER if options.quick else 1) - (time.perf_counter() - began)
            found[name] = spawned(name, options, folder, left)
            print(text(name, found[name]), flush=True)
    figures = {k: v for table in found.values() for k, v in table.get("figures", {}).items()}
    points = asked({} if options.quick else figures)  # tiny sizes say nothing of it
    print(text("asked", {"title": "what is asked of an H200", **points}))
    took = time.perf_counter() - began
    print(f"\n{took:.0f} s in all")
    if options.out:
        result = {**header, "seconds": took, "tables": found, "asked": points["rows"]}
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    return int(any("failed" in table for table in found.values()))


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--out", default=None, help="a file for the tables as JSON")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if unknown := set(options.tables) - {*TABLES, "data"}:
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    return options


# ---- one table, in a process of its own --------------------------------------------------------


def child(options: argparse.Namespace) -> int:
    """Make the one table that is named, or the collection, and write it as JSON."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    device, folder = torch.device(options.device), Path(options.child)
    [name] = options.tables
    if name == "data":
        from bench.gpu import data

        made = data.make(folder, options.quick)
    else:
        module, function, needs_data, _ = TABLES[name]
        given = (device, options.quick, *([folder] if needs_data else []))
        if name == "kernels":  # it is its own benchmark, and knows its sizes
            given = (options.device,)
        made = getattr(importlib.import_module(module), function)(*given)
    (folder / f"{name}.json").write_text(json.dumps(made))
    return 0


def spawned(name: str, options: argparse.Namespace, folder: Path, left: float) -> dict:
    """The table, or {"failed": why}."""
    _, _, needs_data, limit = TABLES.get(name, ("", "", False, 60))
    limit *= SLOWER if options.quick else 1
    if needs_data and not (folder / "data.json").exists():
        began = time.perf_counter()
        if failed := spawned("data", options, folder, left).get("failed"):
            return {"failed": f"no collection: {failed}"}
        left -= time.perf_counter() - began
    if left < 5:
        return {"failed": "left out: the time for all tables is over"}
    command = [sys.executable, "-m", "bench.gpu", name, "--device", options.device]
    command += ["--child", str(folder), *(["--quick"] if options.quick else [])]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    made = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        _, said = made.communicate(timeout=min(limit, left))
    except subprocess.TimeoutExpired:
        os.killpg(made.pid, signal.SIGKILL)  # and what it started
        made.communicate()
        return {"failed": f"no end within {min(limit, left):.0f} s"}
    if made.returncode:
        return {"failed": (said.strip().splitlines() or ["no word"])[-1][:400]}
    return json.loads((folder / f"{name}.json").read_text()) or {}


# ---- what is printed ---------------------------------------------------------------------------


def about(options: argparse.Namespace) -> dict:
    """The card, its driver, the versions, and the command."""
    from importlib import metadata

    versions = {}
    for name in ("torch", "triton", "transformers", "numpy", "ray"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        card = ""
    words = [*options.tables, "--device", options.device, *(["--quick"] if options.quick else [])]
    return {
        "card": card or "no GPU",
        "python": platform.python_version(),
        "versions": versions,
        "command": " ".join(["python -m bench.gpu", *words]),
    }


def header_text(header: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    return f"{header['card']}\nPython {header['python']}, {versions}\n{header['command']}"


def text(name: str, table: dict) -> str:
    """A table as text; several, where there are several, and why there is none."""
    if "failed" in table:
        return f"\n{name}: FAILED, {table['failed']}"
    if "rows" not in table:
        return "\n".join(text(part, inner) for part, inner in table.get("tables", {}).items())
    cells = [[shown(cell) for cell in row] for row in [table["columns"], *table["rows"]]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
    return "\n".join(["", f"{name}: {table['title']}", *(f"  {line}" for line in lines)])


def shown(value) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        size = abs(value)
        if 0 < size < 1e-3:
            return f"{value:.1e}"
        return f"{value:,.3f}" if size < 10 else f"{value:,.1f}" if size < 100 else f"{value:,.0f}"
    return str(value)


def asked(figures: dict) -> dict:
    """What is asked, what was found, whether it was met."""
    rows = []
    for name, (what, side, much) in ASKED.items():
        found = figures.get(name)
        met = None
        if found is not None:
            met = found >= much if side == ">=" else found <= much
        rows.append([what, f"{side} {much:,}", found, "not measured" if met is None else met])
    return {"columns": ["", "asked", "found", "met"], "rows": rows}


if __name__ == "__main__":
    raise SystemExit(main())
