"""Broken parts of the manifest and broken shards, so that their stages make just those again."""

from pipeline.errors import InputError
from pipeline.sharding import ingest, shard
from pipeline.sharding.checks.shard_check import Finding
from pipeline.storage import parquet, run_folder, store
from pipeline.storage.run_folder import RunFolder
from schemas.settings import Recipe

PLANS = {"ingest": ingest.plan, "shard": shard.plan}
FILES = {"ingest": ("part-{}.parquet", "truth-{}.parquet"), "shard": ("{}.tar", "{}.parquet")}


def broken(root: str, findings: list[Finding]) -> dict[str, set[str]]:
    """Names of the pieces of ingest and shard that findings say to make again, by stage."""
    out: dict[str, set[str]] = {stage: set() for stage in PLANS}
    for finding in (finding for finding in findings if finding.shard):
        of_shard = finding.file.startswith(store.join(RunFolder(root).folder("shard"), ""))
        out["shard" if of_shard else "ingest"].add(finding.shard)
    return out


def clear(recipe: Recipe, root: str, stage: str, names: set[str]) -> dict[str, dict]:
    """Remove the files of a stage's broken pieces; what the index recorded of them, by name."""
    folder = RunFolder(root).folder(stage)
    if run_folder.INDEX in names:
        store.remove(store.join(folder, run_folder.INDEX))
    plan = PLANS[stage](recipe, root)
    pieces = names - {run_folder.INDEX}
    known = {entry["name"]: entry for entry in plan.index.get("pieces", [])}
    for piece in (piece for piece in plan.pieces if piece.name not in pieces):
        if piece.name in known:
            same = known[piece.name]["fingerprint"] == piece.fingerprint
        else:
            same = bool(parquet.finished(piece.output, piece.fingerprint))
        if not same:  # the settings given would change a piece that is not broken
            raise InputError(
                f"{piece.name} in {plan.folder} is whole but was made with other settings than "
                f"those given; give the settings it was made with, or run `halftone {plan.stage}` "
                "to make everything with the new ones"
            )
    for name in pieces:
        for file in FILES[stage]:
            store.remove(store.join(folder, file.format(name.removeprefix("part-"))))
    return {name: known.get(name, {}).get("files", {}) for name in pieces}


def verdicts(root: str, stage: str, recorded: dict[str, dict]) -> dict[str, str]:
    """Of every piece made again: "as before", "other bytes", or "nothing to compare with"."""
    index = RunFolder(root).index(stage)
    now = {entry["name"]: entry["files"] for entry in index["pieces"]}
    words = {True: "as before", False: "other bytes"}
    return {
        name: words[now.get(name) == files] if files else "nothing to compare with"
        for name, files in sorted(recorded.items())
    }
