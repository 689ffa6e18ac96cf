"""The run folder: where each stage lies in it, and the index that a finished stage leaves."""

from pipeline.errors import StageMissing
from pipeline.storage import store

INDEX = "index.json"

FOLDERS = {
    "ingest": "1-manifest",
    "shard": "2-shards",
    "embed": "3-embeddings",
    "label": "4-relevance",
    "train": "5-model",
    "evaluate": "6-rankings",
    "rerank": "7-reranker",
    "reranked": "8-reranked",
}


def folder(root: str, stage: str, *names: str) -> str:
    """URI of a stage's folder in the run folder."""
    return store.join(root, FOLDERS[stage], *names)


def version(entries: list[dict]) -> str:
    """Hash of what the pieces hold."""
    return store.fingerprint([entry["files"] for entry in entries])


def read_index(folder: str) -> dict | None:
    uri = store.join(folder, INDEX)
    return store.read_json(uri) if store.exists(uri) else None


def need_index(folder: str, stage: str) -> dict:
    """The index of an earlier stage, or the sentence that names the stage to run first."""
    index = read_index(folder)
    if index is None:
        raise StageMissing(f"nothing in {folder}; run `halftone {stage}` first")
    return index


def of_split(index: dict, split: str) -> list[dict]:
    """The entries of one split's pieces, in order."""
    return [entry for entry in index["pieces"] if entry.get("split") == split]
