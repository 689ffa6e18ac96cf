"""halftone info: what a run folder holds, at which version."""

import json

from jobs.cli import scopes
from jobs.cli.command import Command
from jobs.cli.show import Show
from pipeline.errors import InputError
from pipeline.storage import run_folder, store


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
        inside = store.list_folders(store.join(root, stage))
        for name in ["", *inside]:
            folder = store.join(root, *filter(None, (stage, name)))
            if index := run_folder.read_index(folder):
                files = [f for entry in index["pieces"] for f in entry["files"].values()]
                out.append(
                    {
                        "folder": "/".join(filter(None, (stage, name))),
                        "version": index["version"],
                        "pieces": len(index["pieces"]),
                        "bytes": sum(f["bytes"] for f in files),
                    }
                )
    return out


COMMAND = Command(scopes.folder, run)
