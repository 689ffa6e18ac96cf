"""Reading annotation files, with errors that say where they are wrong."""

import glob
from collections.abc import Iterable
from typing import Any

from braceexpand import braceexpand

from pipeline.errors import InputError
from pipeline.sources.readers.cells import Caption
from pipeline.storage import store
from schemas.settings import SourceSettings


def path(settings: SourceSettings, expected: str) -> str:
    """The absolute `source.path`; `expected` says in the error what it should be."""
    if not settings.path:
        raise InputError(f"source.path is not given; the {settings.kind} source reads {expected}")
    return store.absolute(settings.path)


def file(settings: SourceSettings, expected: str) -> str:
    """The absolute `source.path`, which is an existing file."""
    uri = path(settings, expected)
    if is_folder(uri):
        raise InputError(f"source.path {uri} is a folder; expected {expected}")
    if not store.exists(uri):
        raise InputError(f"source.path {uri} does not exist; expected {expected}")
    return uri


def files(settings: SourceSettings, expected: str) -> list[str]:
    """The files `source.path` names: one, or all of a pattern (`data/*.csv`, `{000..099}.tar`)."""
    uri = path(settings, expected)
    if not any(sign in uri for sign in "*?[{") or store.exists(uri):
        return [file(settings, expected)]
    folder, pattern = _parted(uri)
    try:
        patterns = list(braceexpand(pattern))
    except ValueError as error:  # a brace that is not closed
        raise InputError(
            f"source.path {uri} is no pattern ({error}); expected {expected}"
        ) from None
    found = [name for pattern in patterns for name in _matches(folder, pattern)]
    if not found:
        raise InputError(f"no file matches source.path {uri}; expected {expected}")
    return found


def _parted(uri: str) -> tuple[str, str]:
    """The folder that a pattern begins with, and the pattern in it; names may hold its signs."""
    head, *names = (
        uri.split("/")
        if store.is_local(uri)
        else [uri.partition("://")[0] + ":/"] + (uri.partition("://")[2].split("/"))
    )
    while len(names) > 1:
        inside = f"{head}/{names[0]}"
        if any(sign in names[0] for sign in "*?[{") and not store.exists(inside):
            break
        head, names = inside, names[1:]
    return head or "/", "/".join(names)


def _matches(folder: str, pattern: str) -> list[str]:
    """The files of one pattern in a folder, sorted; without a sign the name itself."""
    if not any(sign in pattern for sign in "*?["):
        return [store.join(folder, pattern)]
    if store.is_local(folder):
        names = glob.glob(pattern, root_dir=folder, recursive=True)
        return [store.join(folder, name) for name in sorted(names)]
    with store.file_system_of(store.join(folder, pattern)) as (fs, path):
        names = [name for name in fs.glob(path) if not store.is_hidden(store.name_of(name))]
        return [fs.unstrip_protocol(name) for name in sorted(names)]


def stamps(uris: Iterable[str]) -> list[list]:
    """[URI, size, modification time] of files, to notice that one was changed."""
    out = []
    for uri in uris:
        try:
            out.append([uri, *store.stamp(uri)])
        except FileNotFoundError:
            raise InputError(f"{uri} does not exist; mend source.path") from None
    return out


def stamp_of_part(settings: SourceSettings, part: str) -> list:
    """What the rows of a part that is one file depend on: that file's stamp."""
    return stamps([part])


def image_folder(settings: SourceSettings) -> str:
    """The absolute `source.images`, which is an existing folder."""
    if not settings.images:
        raise InputError(
            f"source.images is not given; the {settings.kind} source needs the image files' folder"
        )
    uri = store.absolute(settings.images)
    if not is_folder(uri):
        found = "is not a folder" if store.exists(uri) else "does not exist"
        raise InputError(f"source.images {uri} {found}; expected the folder of the image files")
    return uri


def is_folder(uri: str) -> bool:
    with store.file_system_of(uri) as (fs, path):
        return fs.isdir(path)


def field(entry: Any, key: str, kind: type, where: str) -> Any:
    """The entry's value of that type; the error says where there is none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        named = {str: "text", list: "list", int: "number"}[kind]
        raise InputError(f"{where} has no {named} {key!r}")
    return value


def row(
    image_id: str,
    uri: str,
    captions: Iterable[Caption],
    *,
    split: Any = None,
    named: str | None = None,
    problem: str | None = None,
) -> dict:
    """What a source says of an image; a caption without an id is called after it.

    `split` is the value the row has for it, None where it says nothing, `named` the split that the
    names of its folders say; `problem` is why the row cannot be used, 'kind: detail'.
    """
    return {
        "image_id": image_id,
        "uri": uri,
        "split": split,
        "named": named,
        "captions": [
            {"caption_id": own or f"{image_id}#{k}", "text": text, "problem": wrong}
            for k, (own, text, wrong) in enumerate(captions)
        ],
        "problem": problem,
    }
