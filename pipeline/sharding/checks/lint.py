"""Whether shards are what they claim: each tar against itself, its sidecar and the index.

A run folder, a folder of shards, any folder of WebDataset tars (or of folders of them), one tar.
"""

import itertools
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.sharding.checks.shard_check import AGAIN, IDS, Finding, check_shard
from pipeline.sources import part
from pipeline.sources.readers import tars
from pipeline.storage import parquet, run_folder, store
from pipeline.storage.plan import Piece
from pipeline.storage.run_folder import RunFolder
from schemas.settings import ShardSettings

ANY_SIZE = ShardSettings(max_pixels=2**40)  # what was sharded was found small enough then


def plan(uri: str, *, decode: bool = True) -> tuple[list[Piece], list[Finding]]:
    """A piece for every shard and for the files of every other stage; and what is wrong at once."""
    uri = store.absolute(uri)
    if tars.is_tar(uri) or tars.is_compressed(uri):
        if not store.exists(uri):
            raise InputError(f"no tar at {uri}; give a tar, a folder of tars or a run folder")
        folder, _, name = uri.rpartition("/")
        if not _is_ours(folder):
            return _foreign(folder, [name], decode)
        return [piece for piece in _ours(folder, decode)[0] if piece.output == uri], []
    if run_folder.FOLDERS["shard"] in store.list_folders(uri):
        pieces, found = _stages(uri)
        shards, more = _ours(RunFolder(uri).folder("shard"), decode)
        return pieces + shards, found + more
    if _is_ours(uri):
        return _ours(uri, decode)
    if not (names := tars.in_folder(uri)):
        raise InputError(f"no tar in {uri} or its folders; give a run folder or a folder of tars")
    return _foreign(uri, names, decode)


def _piece(name: str, about: dict[str, Any]) -> Piece:
    common = {"sidecar": "", "entry": {}, "repair": "", "kind": "shard", "name": name}
    return Piece(name, about.get("tar", ""), "", common | about)


def _foreign(folder: str, names: list[str], decode: bool) -> tuple[list[Piece], list[Finding]]:
    """Tars of any tool, by their paths inside a folder."""
    pieces, found, settings = [], [], ShardSettings() if decode else None
    for one in part.of([store.join(folder, name) for name in names]):
        if tars.is_compressed(one.uri):
            kind = "compressed tar"
            found.append(Finding(one.uri, f"{kind}: by its name", tars.FAULTS[kind]))
        else:
            about = {"tar": one.uri, "split": one.split, "settings": settings}
            pieces.append(_piece(one.name, about))
    return pieces, found


def _is_ours(folder: str) -> bool:
    """Whether a folder of shards is Halftone's: it has an index, a place in a run, or a sidecar."""
    names = store.list_files(folder)
    if run_folder.INDEX in names or folder.rpartition("/")[2] == run_folder.FOLDERS["shard"]:
        return True
    sidecars = (name for name in names if name.endswith(".parquet"))
    return _is_sidecar(store.join(folder, next(sidecars, "none")))


def _stem(uri: str) -> str:
    return store.name_of(uri).rpartition(".")[0]


def _ours(folder: str, decode: bool) -> tuple[list[Piece], list[Finding]]:
    """The shards of one folder, with their sidecars and their index."""
    names = store.list_files(folder)
    root, _, last = folder.rpartition("/")
    repair = f"`halftone repair --root {root}` writes it again"
    repair = repair if last == run_folder.FOLDERS["shard"] else ""
    entries, found = _index(folder, repair)
    stems = {_stem(n) for n in names if n.endswith((".tar", ".parquet"))}
    pieces = []
    for name in [*entries, *sorted(stems - entries.keys())]:
        tar, sidecar = f"{name}.tar", f"{name}.parquet"
        about = {
            "tar": store.join(folder, tar) if tar in names else "",
            "sidecar": store.join(folder, sidecar) if sidecar in names else "",
            "entry": entries.get(name, {}),
            "repair": repair,
            "settings": ANY_SIZE if decode else None,
            "split": name.rpartition("-")[0],
        }
        if entries and name not in entries:
            file = store.join(folder, tar if tar in names else sidecar)
            found.append(Finding(file, "a shard that the index does not name", "remove it"))
            continue
        do, mends = repair or AGAIN, name if repair else ""
        for which, file in (("tar", tar), ("sidecar", sidecar)):
            if not about[which]:
                other = "sidecar" if which == "tar" else "tar"
                what = f"missing {which}: its {other} or the index names it"
                found.append(Finding(store.join(folder, file), what, do, mends))
        if about["tar"]:
            pieces.append(_piece(name, about))
    if not stems and not entries:
        raise InputError(f"no shard in {folder}; run `halftone shard` first")
    return pieces, found


def _index(folder: str, repair: str) -> tuple[dict[str, dict], list[Finding]]:
    """The index's entries by name; a finding where it is missing or does not fit itself."""
    uri = store.join(folder, run_folder.INDEX)
    if not store.exists(uri):
        finding = Finding(uri, "no index: the stage was not finished", repair, run_folder.INDEX)
        return {}, [finding] if repair else []
    try:
        index = run_folder.need_index(folder, "shard")
        pieces = list(index["pieces"])  # of a table, too, the version is counted anew
        entries = {entry["name"]: entry for entry in pieces}
        if index["version"] == run_folder.version(pieces):
            return entries, []
        what = f"its version {index['version']} is not that of its pieces"
    except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
        entries, what = {}, f"torn index: {error}"
    return entries, [Finding(uri, what, repair or AGAIN, run_folder.INDEX if repair else "")]


def _is_sidecar(uri: str) -> bool:
    """Whether a Parquet file is Halftone's: other tools put some of their own beside their tars."""
    try:
        metadata = pq.read_schema(pa.BufferReader(store.read_bytes(uri))).metadata
    except (OSError, pa.ArrowInvalid):
        return False
    return parquet.FINGERPRINT in (metadata or {})


def _stages(root: str) -> tuple[list[Piece], list[Finding]]:
    """A piece for the files of every finished stage but the shards."""
    pieces: list[Piece] = []
    found: list[Finding] = []
    for stage, top in run_folder.FOLDERS.items():
        for inside in ["", *store.list_folders(store.join(root, top))]:
            name = "/".join(filter(None, (top, inside)))
            folder = store.join(root, name)
            files = store.list_files(folder)
            of_manifest = stage == "ingest" and not inside
            if not (run_folder.INDEX in files or (files and of_manifest)):
                continue
            if stage == "shard" and not inside:
                continue
            again = f"remove it and run `halftone run --root {root}`"
            repair = f"`halftone repair --root {root}` makes it again" if of_manifest else ""
            entries, more = _index(folder, repair)
            found += [finding._replace(do=repair or again) for finding in more]
            about = {"folder": folder, "entries": list(entries.values()), "kind": "files"}
            pieces.append(_piece(name, about | {"repair": repair, "again": again}))
    return pieces, found


def check(piece: Piece) -> dict:
    """What is wrong with one piece: {"findings", "samples", "ids": a table of `IDS`}."""
    about, findings = piece.inputs, []
    if about["kind"] == "shard":
        return check_shard(piece)
    sizes = store.list_files(about["folder"])
    for entry in about["entries"]:
        for name, file in entry["files"].items():
            uri = store.join(about["folder"], name)
            if name not in sizes:
                what = "missing file: the index names it"
            elif (sha := store.sha256(store.read_bytes(uri))) != file["sha256"]:
                what = f"other bytes: sha256 {sha[:12]}…, the index says {file['sha256'][:12]}…"
            else:
                continue
            do = about["repair"] or about["again"]
            findings.append(Finding(uri, what, do, entry["name"] if about["repair"] else ""))
    return {"findings": findings, "samples": 0, "ids": IDS.empty_table()}


def across(checked: dict[str, dict]) -> list[Finding]:
    """Ids that are there twice, and pictures that two splits share, over all checked pieces."""
    table = parquet.joined([IDS.empty_table(), *(done["ids"] for done in checked.values())])
    captions = table["caption_ids"].combine_chunks()
    parents = pc.list_parent_indices(captions)
    of_captions = table.select(["split", "tar"]).take(parents)
    # One picture may stand in several tars, each time with others of its captions.
    images = table.group_by(["image_id", "split", "sha256"]).aggregate([("tar", "min")])
    ids = {
        "image": images.rename_columns(["id", "split", "sha256", "tar"]),
        "caption": of_captions.append_column("id", captions.flatten()),
    }
    twice = [_twice(kind, rows) for kind, rows in ids.items()]
    return [*filter(None, twice), *_overlaps(table)]


def _repeated(values: pa.ChunkedArray) -> pa.Array:
    counts = pc.value_counts(values.drop_null())
    return counts.filter(pc.greater(counts.field("counts"), 1)).field("values")


def _twice(kind: str, rows: pa.Table) -> Finding | None:
    repeated = _repeated(rows["id"])
    if not len(repeated):
        return None
    first = repeated[0].as_py()
    one, two = rows.filter(pc.equal(rows["id"], first)).to_pylist()[:2]
    here, there = (f"{store.name_of(row['tar'])} ({row['split']})" for row in (one, two))
    more = f" (and {len(repeated) - 1:,} more)" if len(repeated) > 1 else ""
    what = f"{kind} id that is there more than once: {first!r} in {here} and in {there}{more}"
    return Finding(two["tar"], what, "give every one an id of its own and write the tars again")


def _overlaps(table: pa.Table) -> list[Finding]:
    """A finding for every two splits that hold the same bytes."""
    rows = table.filter(pc.is_in(table["sha256"], _repeated(table["sha256"])))
    first: dict[str, dict[str, dict]] = {}  # by sha256, then split
    for row in rows.select(["sha256", "split", "image_id", "tar"]).to_pylist():
        first.setdefault(row["sha256"], {}).setdefault(row["split"], row)
    shared: dict[tuple[str, str], list[tuple[dict, dict]]] = {}
    for of_split in first.values():
        for a, b in itertools.combinations(sorted(of_split), 2):
            shared.setdefault((a, b), []).append((of_split[a], of_split[b]))
    out = []
    for (a, b), pairs in shared.items():
        one, two = pairs[0]
        more = f" (and {len(pairs) - 1:,} more)" if len(pairs) > 1 else ""
        what = f"the same picture in {a} and {b}: {one['image_id']!r} is {two['image_id']!r}{more}"
        do = "`halftone audit` writes the list of what to leave out"
        out.append(Finding(one["tar"], what, do))
    return out
