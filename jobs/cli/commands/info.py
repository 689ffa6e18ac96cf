"""halftone info: what a run folder holds, at which version."""

import json

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.show import Show
from pipeline.errors import InputError
from pipeline.storage import run_folder, store
from pipeline.storage.piece_table import sizes


def run(root: str, options) -> None:
    found = stages_in(root)
    if not found:
        raise InputError(f"{root} holds no stage of a run; `halftone run --root {root}` fills it")
    if options.json:
        print(json.dumps({"root": root, "stages": found}))
        return
    rows = [
        [e["folder"], e["version"], str(e["pieces"]), f"{e['bytes'] / 1e6:,.1f}"] for e in found
    ]
    Show().table("", ["stage", "version", "pieces", "MB"], rows, root)


def stages_in(root: str) -> list[dict]:
    """The finished stages: folder, version, number of pieces, bytes."""
    out = []
    for stage in run_folder.FOLDERS.values():
        for name in ["", *store.list_folders(store.join(root, stage))]:
            folder = "/".join(filter(None, (stage, name)))
            if index := run_folder.read_index(store.join(root, folder)):
                pieces, about = index["pieces"], {"folder": folder, "version": index["version"]}
                size = sum(size for _, size in sizes(pieces))
                out.append({**about, "pieces": len(pieces), "bytes": size})
    return out


COMMAND = Command(scopes.folder, run)
