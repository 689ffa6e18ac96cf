"""Stage 2: the manifest's images are checked and packed into WebDataset tars.

Same manifest and settings, same bytes: members in order, modification time 0, sorted JSON.
"""

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import _plan, _store, ingest
from pipeline._errors import InputError
from pipeline._plan import Piece, Plan
from pipeline.sources import source
from schemas.settings import Recipe
from schemas.shard import SIDECAR


class Rejected(Exception):
    """A sample that cannot be used; the message is its reason."""


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every shard: which sample goes where follows from manifest and settings alone."""
    source_folder = _plan.folder(root, "ingest")
    _plan.need_index(source_folder, "ingest")
    folder = _plan.folder(root, "shard")
    settings = recipe.shard.model_dump(exclude={"failure_budget"})
    pieces = []
    for split, rows in ingest.rows_by_split(source_folder, recipe.source).items():
        if split == "train":  # packed in random order: near neighbours on disk are not alike
            rows = rows.take(np.random.default_rng(recipe.shard.seed).permutation(rows.num_rows))
        for number, start in enumerate(range(0, rows.num_rows, recipe.shard.samples)):
            name = f"{split}-{number:06d}"
            samples = rows.slice(start, recipe.shard.samples)
            pieces.append(
                Piece(
                    name=name,
                    output=_store.join(folder, f"{name}.parquet"),
                    fingerprint=_store.fingerprint("shard", settings, samples.to_pylist()),
                    inputs={"rows": samples, "split": split, "settings": recipe.shard},
                )
            )
    return _plan.plan("shard", folder, pieces, settings)


def write_shard(piece: Piece) -> dict:
    """Write one tar and its sidecar; a summary with what was accepted and why others were not."""
    summary = _store.finished(piece.output, piece.fingerprint)
    if summary and not summary["rejected"]:  # what was rejected may have been mended
        return summary
    uri = piece.output.removesuffix(".parquet") + ".tar"
    with _store.temporary(uri) as path:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            rows = [_add_sample(tar, row, piece) for row in piece.inputs["rows"].to_pylist()]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = Path(path).stat().st_size
    reasons = Counter(row["reason"].split(":")[0] for row in rows if row["reason"])
    accepted = [row for row in rows if not row["reason"]]
    summary = {
        "split": piece.inputs["split"],
        "samples": len(accepted),
        "captions": sum(len(row["captions"]) for row in accepted),
        "rejected": dict(reasons),
        "files": {_store.name_of(uri): {"bytes": size, "sha256": digest}},
    }
    table = pa.Table.from_pylist(rows, schema=SIDECAR)
    return _store.write_table(piece.output, table, piece.fingerprint, summary)


def check(plan: Plan, made: dict[str, dict], recipe: Recipe) -> None:
    """Stops above the failure budget."""
    summaries = [*plan.done.values(), *made.values()]
    rejected = sum((Counter(s["rejected"]) for s in summaries), Counter())
    samples = sum(s["samples"] for s in summaries)
    if rejected.total() > recipe.shard.failure_budget * (samples + rejected.total()):
        reasons = ", ".join(f"{n} × {reason}" for reason, n in rejected.most_common(5))
        raise InputError(
            f"{rejected.total()} of {samples + rejected.total()} samples were rejected "
            f"({reasons}), more than shard.failure_budget {recipe.shard.failure_budget:g} allows; "
            f"each reason is in the sidecars in {plan.folder}"
        )


def totals(index: dict) -> dict:
    """Samples and bytes of all shards, and how many samples were rejected for which reason."""
    pieces = index["pieces"]
    rejected = sum((Counter(entry["rejected"]) for entry in pieces), Counter())
    return {
        "shards": len(pieces),
        "samples": sum(entry["samples"] for entry in pieces),
        "megabytes": round(sum(e["files"][f"{e['name']}.tar"]["bytes"] for e in pieces) / 1e6, 1),
        "rejected": rejected.total(),
        **{f"rejected ({reason})": count for reason, count in rejected.items()},
    }


def read_sidecar(uri: str, columns: list[str] | None = None) -> pa.Table:
    """The accepted samples of a shard, in the tar's order."""
    columns = columns and [*columns, "reason"]
    table = _store.read_table(uri, columns)
    return table.filter(pa.compute.is_null(table["reason"])).drop_columns(["reason"])


def _add_sample(tar: tarfile.TarFile, row: dict, piece: Piece) -> dict:
    """The sidecar's row of a sample, after its members were added to the tar."""
    out = {name: row.get(name) for name in SIDECAR.names}
    out |= {"width": None, "height": None, "sha256": None}
    try:
        captions = _checked_captions(row["captions"])
        data, suffix, width, height = _checked_payload(row, piece.inputs["settings"].max_pixels)
    except Rejected as reason:
        return out | {"reason": str(reason)}
    key = _key(row["image_id"])
    out |= {"key": key, "captions": captions, "width": width, "height": height}
    out |= {"sha256": _store.sha256(data), "member": f"{key}.{suffix}"}
    about = {name: out[name] for name in ("image_id", "captions", "split", "width", "height")}
    about["sha256"] = out["sha256"]
    _add_member(tar, f"{key}.{suffix}", data)
    out |= {"offset": tar.offset - _padded(len(data)), "size": len(data)}
    _add_member(tar, f"{key}.txt", captions[0]["text"].encode())
    _add_member(tar, f"{key}.json", json.dumps(about, sort_keys=True, ensure_ascii=False).encode())
    return out


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    tar.addfile(info, io.BytesIO(data))


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _key(image_id: str) -> str:
    """The sample's name in the tar: no dot, no slash; short, and different for different ids."""
    plain = re.sub(r"[^\w-]", "_", image_id, flags=re.ASCII)
    if plain == image_id and len(plain) <= 80:
        return plain
    return f"{plain[:60]}-{_store.fingerprint(image_id)}"


def _checked_captions(captions: list[dict]) -> list[dict]:
    kept = []
    for caption in captions:
        text = " ".join(caption["text"].split())
        if "\x00" in text:
            raise Rejected(f"caption with a NUL byte: {caption['caption_id']}")
        if text:
            kept.append({"caption_id": caption["caption_id"], "text": text})
    if not kept:
        raise Rejected("no caption: all are empty")
    return kept


def _checked_payload(row: dict, max_pixels: int) -> tuple[bytes, str, int | None, int | None]:
    """Bytes, file suffix, width and height of a sample whose image was decoded to the last row."""
    try:
        data = getattr(source(row["source"]), "load", _store.read_bytes)(row["uri"])
    except (OSError, InputError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise Rejected(f"{'file missing' if missing else 'unreadable'}: {row['uri']}") from error
    if not data:
        raise Rejected(f"empty file: {row['uri']}")
    if data.startswith(b"\x93NUMPY"):
        try:
            features = np.load(io.BytesIO(data))
        except (ValueError, EOFError) as error:
            raise Rejected(f"features do not load: {error}") from error
        if not np.isfinite(features).all():
            raise Rejected("features are not finite")
        return data, "npy", None, None
    return _checked_image(data, max_pixels)


def _checked_image(data: bytes, max_pixels: int) -> tuple[bytes, str, int, int]:
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > max_pixels:
            raise Rejected(f"too many pixels: {image.width} × {image.height}")
        image.load()  # `verify()` does not see a truncated file
    except Rejected:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, …
        raise Rejected(f"image does not decode: {error}") from error
    if image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L"):
        return data, {"JPEG": "jpg", "PNG": "png"}[image.format], image.width, image.height
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), "jpg", image.width, image.height
