"""A part of a source: what is read by a task of its own, and what its place among others says."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.sources import splits


@dataclass(frozen=True)
class Part:
    """One independent part of a source."""

    uri: str  # of its file, or what the source calls it
    name: str = ""  # of its file, with as many of its folders as tell it from the others
    prefix: str = ""  # of ids that are paths: its folder, where others lie in other folders
    captions: str = ""  # prefix of caption ids that other parts may hold too
    split: str | None = None  # what its names say


def of(uris: Sequence[str], *, named: bool = True) -> list[Part]:
    """The parts at these URIs, each called so that no two are called alike.

    `named`: whether the names of files and folders may say a split.
    """
    below = _below(uris)
    names = _names(uris)
    return [
        Part(
            uri,
            name,
            "".join(f"{folder}/" for folder in folders),
            split=splits.of_names(uri, folders or uri.split("/")[-2:-1]) if named else None,
        )
        for uri, name, folders in zip(uris, names, below, strict=True)
    ]


def _below(uris: Sequence[str]) -> list[list[str]]:
    """The folders of each URI below those that all have in common."""
    folders = [uri.rstrip("/").split("/")[:-1] for uri in uris]
    common = 0
    while len({tuple(f[: common + 1]) for f in folders}) == 1 and common < len(folders[0]):
        common += 1
    return [own[common:] for own in folders]


def _names(uris: Sequence[str]) -> list[str]:
    """Base names without ending, with so many folders before them that they differ."""
    tails = [uri.rstrip("/").split("/") for uri in uris]
    for depth in range(1, max(map(len, tails), default=1) + 1):
        names = ["/".join(tail[-depth:]) for tail in tails]
        names = [name.removesuffix(".gz") for name in names]
        names = [name.rpartition(".")[0] or name for name in names]
        if len(set(names)) == len(names):
            return names
    return [uri.strip("/") for uri in uris]
