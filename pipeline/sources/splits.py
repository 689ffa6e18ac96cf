"""Which split a row is of: one rule for every source, that says where each split came from.

What the row itself says counts first, then `source.split`, then the names of its part (its file,
or else the folders that tell parts apart), else all is train. The field's words are understood in
any case; other names stay as they are.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import InputError, did_you_mean
from pipeline.sources.readers import cells
from schemas.settings import SourceSettings

WORDS = {
    **dict.fromkeys(("train", "training", "trn", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "testall"), "test"),
}
OTHER_WORDS = {  # of a folder that is a split
    *("image", "images", "img", "imgs", "ims", "picture", "pictures", "photos", "set", "split"),
    *("data", "captions", "coco", "flickr", "k", "part", "shards", "tars", "full", "raw"),
}
DROP = "drop"
# Where a split came from, as the stage's line says it.
ROW, SETTING, NAMES, NOWHERE = "rows", "source.split", "names", "nowhere"


def of_words(name: str) -> str | None:
    """The split that a file's name says (captions_val2017.json: val); None without such a word."""
    words = re.split(r"[^a-z]+", name.lower())
    found = {WORDS[word] for word in words if word in WORDS}
    return found.pop() if len(found) == 1 else None


def of_folder(name: str) -> str | None:
    """The split that a folder is (train, val2017, Test_images); None for others (train_station)."""
    words = re.findall(r"[a-z]+", name.lower())
    said = {WORDS[word] for word in words if word in WORDS}
    if len(said) == 1 and all(word in WORDS or word in OTHER_WORDS for word in words):
        return said.pop()
    return None


def of_names(uri: str, below: Sequence[str]) -> str | None:
    """The split that a file's name says, else the nearest of its folders `below` the common one."""
    return of_words(uri.rstrip("/").rsplit("/", 1)[-1]) or next(
        filter(None, map(of_folder, reversed(below))), None
    )


@dataclass
class Splits:
    """The splits of one part's rows, and where they came from."""

    settings: SourceSettings
    named: str | None  # what the part's names say
    images: Counter[str] = field(default_factory=Counter)  # by split, those dropped too
    origins: Counter[str] = field(default_factory=Counter)  # images by where that came from
    renamed: set[str] = field(default_factory=set)  # keys of source.splits that were met

    def of(self, value: Any, named: str | None = None, *, usable: bool = True) -> str:
        """The split of a row that says `value` of it; `DROP` where it is to be left out.

        Of a row that is not `usable` it does not count where the split came from.
        """
        said, origin = cells.identifier(value), ROW
        if said is None:
            named = named or self.named
            ways = (self.settings.split, SETTING), (named, NAMES), ("train", NOWHERE)
            said, origin = next((split, way) for split, way in ways if split)
        split = self._renamed(said)
        self.images[split] += 1
        self.origins[origin] += usable
        return split

    def _renamed(self, said: str) -> str:
        """A split as it is called here: `source.splits` may name it as written, or as the field."""
        usual = WORDS.get(said.lower(), said)
        met = next((name for name in (said, usual) if name in self.settings.splits), None)
        if met is not None:
            self.renamed.add(met)
        split = usual if met is None else self.settings.splits[met]
        if split.isdecimal() or not re.fullmatch(r"\w[\w-]*", split, re.ASCII):
            raise InputError(
                f"found a split called {split!r}; shards are called after their split, so it may "
                "hold letters, digits, _ and -, and be no number: say what it is by source.splits, "
                f"as {{{said!r}: train}}"
            )
        return split

    def summary(self) -> dict:
        """What `check` needs of a part."""
        said = dict(self.images), dict(+self.origins), sorted(self.renamed)
        return dict(zip(("images", "origins", "renamed"), said, strict=True))


def check(parts: dict[str, dict], settings: SourceSettings) -> None:
    """Refuses parts of which some say a split and others do not, and renaming of what is not there.

    `parts` are summaries by what a part is called.
    """
    silent = next((name for name, part in parts.items() if NOWHERE in part["origins"]), None)
    saying = next(
        (name for name, part in parts.items() if {ROW, NAMES} & part["origins"].keys()), None
    )
    if silent and saying:
        where = f"{silent} says no split for {parts[silent]['origins'][NOWHERE]} of its images"
        said = "for others it does" if silent == saying else f"{saying} does"
        raise InputError(
            f"{where}, {said}; say it for all of them, or give source.split for those that do not"
        )
    found = {name for part in parts.values() for name in part["images"]}
    met = {name for part in parts.values() for name in part["renamed"]}
    if strange := sorted(settings.splits.keys() - met):
        raise InputError(
            f"source.splits names {strange[0]!r}, and no image is in such a split"
            f"{did_you_mean(strange[0], sorted(found))}"
        )


def told(parts: dict[str, dict]) -> str:
    """Where the splits came from, in words; '' where there is nothing to tell."""
    origins: Counter[str] = sum((Counter(part["origins"]) for part in parts.values()), Counter())
    words = {ROW: "as the rows say", SETTING: "by source.split", NAMES: "as files are named"}
    words[NOWHERE] = "all is train, as nothing says one"
    if len(origins) == 1:
        return words[next(iter(origins))]
    return ", ".join(f"{n:,} {words[origin]}" for origin, n in origins.items())
