"""Which kind of source a path is, from what lies there."""

from pipeline.errors import InputError
from pipeline.sources.readers import annotations, pictures
from pipeline.storage import store

TABLES = (".csv", ".tsv", ".tab", ".psv", ".jsonl", ".ndjson", ".parquet")
SAVED = {"dataset_dict.json", "dataset_info.json", "state.json"}
READ = 1 << 16  # bytes of a JSON file that are looked at


def kind_of(path: str) -> str:
    """The `source.kind` of a file, a folder, a pattern or a data set's name."""
    if path.startswith("hf://"):
        return "huggingface"
    uri = store.absolute(path)
    if annotations.is_folder(uri):
        return _of_folder(uri)
    name = store.name_of(uri).lower().removesuffix(".gz").rstrip("}")
    if name.endswith((".tar", ".tgz")):
        return "webdataset"
    if name.endswith((".token.txt", ".token")):
        return "flickr_tokens"
    if name.endswith((*TABLES, ".txt")):
        return "csv"
    if name.endswith(".json"):
        return _of_json(uri)
    found = "is of no kind that is known" if store.exists(uri) else "does not exist"
    raise InputError(f"{uri} {found}; say what it is by --source.kind, and give its --source.path")


def _of_folder(uri: str) -> str:
    names = store.list_files(uri)
    if any(name.endswith("_ims.npy") for name in names):
        return "precomp"
    if names.keys() & SAVED:
        return "huggingface"
    if any(name.endswith(".tar") for name in names):
        return "webdataset"
    if any(pictures.is_picture(name) for name in names) or store.list_folders(uri):
        return "folder"
    if tables := [name for name in names if name.endswith(TABLES)]:
        raise InputError(
            f"{uri} holds tables; give one, or a pattern: {store.join(uri, tables[0])}"
        )
    raise InputError(f"{uri} holds neither pictures, tars, tables nor features")


def _of_json(uri: str) -> str:
    """Of an object with images: COCO's with annotations, Karpathy's with sentences; or a list."""
    if any(sign in uri for sign in "*?["):
        return "coco"
    start = store.opened(uri).read(READ)
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"["):
        return "csv"
    if b'"sentences"' in start or b'"filename"' in start:
        return "karpathy"
    return "coco"
