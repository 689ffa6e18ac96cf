"""Stage 2: the manifest's images are checked and packed into WebDataset tars.

Same manifest and settings, same bytes: members in order, modification time 0, sorted JSON.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.sharding import exclusions, images, ingest, loading, tar_writer
from pipeline.sharding.images import Rejected
from pipeline.sharding.manifest import contents, dealing, dealt, growing, spans
from pipeline.sharding.manifest.spans import Manifest
from pipeline.sharding.sidecar import EXCLUDED
from pipeline.storage import parquet, store
from pipeline.storage.piece_table import column, sizes
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import RunFolder
from schemas.settings import Recipe
from schemas.shard import SIDECAR

REJECTED = "rejected.csv"  # beside the index: every sample and caption that was rejected
AT_ONCE = 16  # sidecars that are read at the same time
REASON_CHARS = 500  # of a reason that are kept: an address may be of any length
as_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


def steps(recipe: Recipe, root: str) -> Iterator[tuple[Plan, Callable[[Piece], dict]]]:
    """The stage's plans in order; each is drawn up when those before it are finished.

    Of a large collection the rows are dealt out to the shards first.
    """
    if collection := large(recipe, RunFolder(root)):
        yield from dealing.steps(collection)
        if not collection.done():  # in a dry run
            return
    yield plan(recipe, root), write_shard


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every shard: which sample goes where follows from manifest and settings alone.

    What a large collection needs before that is made by this process, if it is not there yet.
    """
    run = RunFolder(root)
    settings, excluded = recipe.shard.relevant(), {}
    if recipe.shard.exclude:
        excluded = exclusions.read(recipe.shard.exclude)
    found: Iterable[tuple[dealt.Shard, list[int] | None]]
    if collection := large(recipe, run):
        found = dealt.shards(dealing.here(collection))
        keys = [*excluded]
    else:
        rows = ingest.images(run.folder("ingest")).combine_chunks()
        found = ((shard, None) for shard in dealt.of_table(rows, recipe, excluded))
    shared = {"settings": recipe.shard, "source": recipe.source}
    pieces, met = [], set()
    for shard, listed in found:
        met |= (shard.left_out or {}).keys() if listed is None else {keys[n] for n in listed}
        inputs = shared | {"rows": shard.rows, "split": shard.split, "excluded": shard.left_out}
        output = run.folder("shard", f"{shard.name}.parquet")
        pieces.append(Piece(shard.name, output, shard.fingerprint, inputs))
    if excluded:
        exclusions.tell(recipe.shard.exclude, excluded, met, "this collection", refuse=True)
    return Plan.of("shard", run.folder("shard"), pieces, settings, _follows(recipe, run))


def large(recipe: Recipe, run: RunFolder) -> dealing.Collection | None:
    """What the rows of a large collection, or one that grows, are dealt out from; else None."""
    entries = run.index("ingest")["pieces"]  # a sentence where it was not finished
    manifest = Manifest.of(run.folder("ingest"), entries)
    folder = run.folder("shard", dealing.FOLDER)
    if recipe.shard.grow:
        if recipe.source.holdout:
            raise InputError(
                "shard.grow cannot go with source.holdout: the end of train is others when images "
                "come; give source.cut_val, which leaves each image in its split"
            )
        index = run.known("shard") or {"pieces": [], "version": ""}
        known = growing.known(run.folder("shard"), index, lambda: dealt.stretches(folder))
        return dealing.Collection(manifest, recipe, folder, tuple(known), index["version"])
    return dealing.Collection(manifest, recipe, folder) if manifest.is_large else None


def finished(recipe: Recipe, root: str) -> Plan | None:
    """The plan of shards that all are there, made without a look at the manifest's rows.

    None where something is to be made, or where that cannot be told from versions alone.
    """
    run = RunFolder(root)
    if not run.known("shard"):
        return None
    settings = recipe.shard.relevant()
    return spans.finished("shard", run.folder("shard"), _follows(recipe, run), settings)


def _follows(recipe: Recipe, run: RunFolder) -> str:
    """Fingerprint of the manifest's files and of all settings that say which row goes where.

    '' with a list of what is left out: whom of it is not here is told each time.
    """
    if recipe.shard.exclude:
        return ""
    files = column(run.index("ingest")["pieces"], "files")
    settings = (part.model_dump(mode="json") for part in (recipe.shard, recipe.source))
    return store.fingerprint("shard", files, *settings)


def write_shard(piece: Piece) -> dict:
    """Write one tar and its sidecar; a summary with what was accepted and why others were not."""
    summary = parquet.finished(piece.output, piece.fingerprint)
    if summary and not _mended(piece, summary):
        return summary
    uri = piece.output.removesuffix(".parquet") + ".tar"
    rows, holds, failed = [], Counter(), 0
    with store.temporary(uri) as path, tar_writer.Writer(path) as tar:
        manifest, left_out = dealt.read(piece.inputs["rows"], piece.inputs["excluded"])
        for row, payload in _samples(piece, manifest, left_out):
            if payload:
                row["offset"] = tar.add(_members(row, payload.data))
                holds[payload.holds] += 1
            rows.append(row)
            failed = failed + 1 if _failed(row["reason"]) else 0
            if failed == piece.inputs["settings"].failures_in_a_row:
                raise InputError(
                    f"{failed} samples in a row were rejected, the last with {row['reason']!r}; "
                    "if the storage or the network is down, mend it and run the command again, "
                    "else raise shard.failures_in_a_row"
                )
    summary = {
        "split": piece.inputs["split"],
        "samples": holds.total(),
        "captions": sum(len(row["captions"]) for row in rows if not row["reason"]),
        "images_with": _images_with(len(row["captions"]) for row in rows if not row["reason"]),
        "holds": dict(holds),
        "rejected": _kinds(row["reason"] for row in rows),
        "captions_rejected": _kinds(c["reason"] for row in rows for c in row["captions_rejected"]),
        "files": {store.name_of(uri): {"bytes": tar.size, "sha256": tar.digest}},
    }
    table = pa.Table.from_pylist(rows, schema=SIDECAR)
    # A picture that was touched and not changed ends in the same bytes, and changes nothing after.
    summary["contents"] = [tar.digest, contents.digest(table)]
    return parquet.write_table(piece.output, table, piece.fingerprint, summary)


def check(plan: Plan, made: dict[str, dict], recipe: Recipe) -> None:
    """Writes the table of what was rejected; stops above the failure budget."""
    summaries = plan.done | made
    listed = _write_rejected(plan, summaries)
    failed = _total(summaries.values(), "rejected")
    del failed[EXCLUDED]
    samples = sum(s["samples"] for s in summaries.values()) + failed.total()
    if failed.total() > recipe.shard.failure_budget * samples:
        reasons = ", ".join(f"{n} × {reason}" for reason, n in failed.most_common(5))
        raise InputError(
            f"{failed.total()} of {samples} samples were rejected ({reasons}), more than "
            f"shard.failure_budget {recipe.shard.failure_budget:g} allows; each is in {listed} "
            "with its reason"
        )
    if len(holds := _total(summaries.values(), "holds")) > 1:
        found = ", ".join(f"{n} × {what}" for what, n in holds.most_common(5))
        raise InputError(
            f"samples hold different things ({found}), and a model reads one kind; keep one kind "
            "in the source, or list the others in shard.exclude"
        )


def totals(index: dict) -> dict:
    """Samples and bytes of all shards, and how many samples were rejected for which reason."""
    pieces = index["pieces"]
    rejected = _sum(column(pieces, "rejected"))
    captions = _sum(column(pieces, "captions_rejected")).total()
    tars = sum(size for name, size in sizes(pieces) if name.endswith(".tar"))
    return {
        "shards": len(pieces),
        "samples": sum(column(pieces, "samples")),
        "megabytes": round(tars / 1e6, 1),
        "rejected": rejected.total(),
        # MLflow takes these for names of metrics, which may hold no brackets.
        **{re.sub(r"[^\w .:/-]", "", f"rejected: {kind}"): n for kind, n in rejected.items()},
        **({"captions rejected": captions} if captions else {}),
    }


# ---- samples -----------------------------------------------------------------------------------


def _samples(
    piece: Piece, rows: pa.Table, left_out: dealt.Excluded
) -> Iterator[tuple[dict, images.Payload | None]]:
    """The sidecar's row of every sample and what it holds, None where it was rejected."""
    inputs = piece.inputs | {"excluded": left_out}
    # No picture within max_pixels is larger: 16 bits, four channels, and metadata.
    max_bytes = 8 * inputs["settings"].max_pixels + 2**24
    for row, load in loading.in_order(rows.to_pylist(), inputs["source"], max_bytes):
        yield _sample(row, load, inputs)


def _sample(
    row: dict, load: Callable[[], bytes], inputs: dict
) -> tuple[dict, images.Payload | None]:
    captions, rejected = _captions(row["captions"] or [], inputs)
    out = {"image_id": row["image_id"], "split": inputs["split"], "uri": row["uri"]}
    out |= {"captions": captions, "captions_rejected": rejected, "reason": None}
    try:
        if reason := inputs["excluded"].get(("image", row["image_id"])) or row["problem"]:
            raise Rejected(reason)
        if not captions:
            raise Rejected(rejected[0]["reason"] if rejected else "no caption: none is given")
        payload = images.checked(load(), inputs["settings"])
    except Rejected as why:
        given = [{name: c[name] for name in ("caption_id", "text")} for c in row["captions"] or []]
        return out | {"captions": given, "reason": str(why)[:REASON_CHARS]}, None
    key = _key(row["image_id"])
    out |= {"key": key, "member": f"{key}.{payload.ending}", "size": len(payload.data)}
    out |= {"width": payload.width, "height": payload.height}
    return out | {"sha256": store.sha256(payload.data)}, payload


def _captions(captions: list[dict], inputs: dict) -> tuple[list[dict], list[dict]]:
    """Captions with their blanks made single, and the ids of those rejected with the reason."""
    kept, rejected = [], []
    for caption in captions:
        id_, text = caption["caption_id"], " ".join((caption["text"] or "").split())
        reason = None
        if listed := inputs["excluded"].get(("caption", id_)):
            reason = listed
        elif caption["problem"]:
            reason = caption["problem"]
        elif not text:
            reason = f"empty caption: {id_}"
        elif "\x00" in text:
            reason = f"caption with a NUL byte: {id_}"
        elif len(text) > inputs["settings"].max_caption_chars:
            reason = f"caption too long: {len(text):,} characters, {id_}"
        if reason:
            rejected.append({"caption_id": id_, "reason": reason[:REASON_CHARS]})
        else:
            kept.append({"caption_id": id_, "text": text})
    return kept, rejected


def _members(row: dict, data: bytes) -> list[tuple[str, bytes]]:
    names = ("image_id", "captions", "split", "width", "height", "sha256")
    about = as_json({name: row[name] for name in names}).encode()
    key, caption = row["key"], row["captions"][0]["text"].encode()
    return [(row["member"], data), (f"{key}.txt", caption), (f"{key}.json", about)]


def _key(image_id: str) -> str:
    """The sample's name in the tar: no dot, no slash; short, and different for different ids."""
    plain = re.sub(r"[^\w-]", "_", image_id, flags=re.ASCII)
    if plain == image_id and len(plain) <= 80:
        return plain
    return f"{plain[:60]}~{store.fingerprint(image_id)}"  # no plain id holds a ~


# ---- rejected and excluded ---------------------------------------------------------------------


def _mended(piece: Piece, summary: dict) -> bool:
    """Whether a sample that failed is to be had now: a file was supplied, a server is back."""
    if not summary["rejected"].keys() - {EXCLUDED}:
        return False
    before = parquet.read_table(piece.output, ["image_id", "reason"]).to_pylist()
    failed = [row["image_id"] for row in before if _failed(row["reason"])]
    rows, left_out = dealt.read(piece.inputs["rows"], piece.inputs["excluded"])
    rows = rows.filter(pc.is_in(rows["image_id"], pa.array(failed, rows["image_id"].type)))
    return any(payload for _, payload in _samples(piece, rows, left_out))


def _write_rejected(plan: Plan, summaries: dict[str, dict]) -> str:
    """URI of the table of what was rejected; it is removed where nothing was."""
    uri = store.join(plan.folder, REJECTED)
    kinds = ("rejected", "captions_rejected")
    touched = [p for p in plan.pieces if any(summaries[p.name][kind] for kind in kinds)]
    if not touched:
        store.remove(uri)
        return uri
    columns = ["image_id", "uri", "reason", "captions_rejected"]
    with store.temporary(uri) as path, open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["shard", "image_id", "caption_id", "reason", "uri"])
        for piece, sidecar in _sidecars(touched, columns):
            for row in sidecar.to_pylist():
                where = [piece.name, row["image_id"]]
                if row["reason"]:
                    table.writerow([*where, "", row["reason"], row["uri"]])
                for caption in row["captions_rejected"]:
                    table.writerow([*where, caption["caption_id"], caption["reason"], row["uri"]])
    return uri


def _sidecars(pieces: list[Piece], columns: list[str]) -> Iterator[tuple[Piece, pa.Table]]:
    """The sidecars of pieces in order, of which a few are held at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(pieces), AT_ONCE):
            some = pieces[start : start + AT_ONCE]
            read = pool.map(lambda piece: parquet.read_table(piece.output, columns), some)
            yield from zip(some, read, strict=True)


def _kinds(reasons: Iterable[str | None]) -> dict[str, int]:
    """How many for which reason, details left out."""
    return dict(Counter(reason.split(":")[0] for reason in reasons if reason))


def _images_with(counts: Iterable[int]) -> dict[str, int]:
    """How many images have how many captions (a number, as JSON has keys)."""
    return {str(captions): count for captions, count in sorted(Counter(counts).items())}


def _failed(reason: str | None) -> bool:
    return reason is not None and not reason.startswith(f"{EXCLUDED}:")


def _total(summaries: Iterable[dict], what: str) -> Counter:
    return _sum(summary[what] for summary in summaries)


def _sum(counts: Iterable[dict]) -> Counter:
    return sum((Counter(each) for each in counts if each), Counter())
