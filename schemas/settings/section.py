"""What every section of a recipe is, and what a setting changes."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

# What has other contents where a setting is another:
#   bytes     what its stage makes
#   how       nothing: it is how the work is done, or when it is given up
#   contents  the same, by what it names: a fingerprint holds a file's contents, not its name
#   fit       what is fitted or chosen before that
#   bank      a re-ranker's train queries
#   lists     the lists of relevance, not relevance itself
#   rows      which rows a split has: the shards' fingerprints hold the rows themselves
#   results   the figures made of rankings
#   page      a page
Changes = Literal["bytes", "how", "contents", "fit", "bank", "lists", "rows", "results", "page"]


def setting(
    default: Any, about: str, *, changes: Changes = "bytes", later: bool = False, **limits: Any
) -> Any:
    """A field: its default (`...`: there is none), what it is with its unit, pydantic's limits.

    `later`: it came when there were fingerprints already, and its default is what was done before:
    where it is the default no fingerprint holds it, so nothing is made again.
    """
    extra: dict[str, Any] = {"changes": changes, "later": later}
    return Field(default, description=about, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """Settings of one subject, frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def relevant(self, *changes: Changes) -> dict[str, Any]:
        """What a fingerprint holds (JSON-able): the settings that change `bytes`, or `changes`."""
        return self._holding(changes or ("bytes",))

    def told(self) -> dict[str, Any]:
        """What an index says of all settings (JSON-able), without later ones at their default."""
        return self._holding(get_args(Changes))

    def _holding(self, changes: tuple[Changes, ...]) -> dict[str, Any]:
        names = set()
        for name, field in type(self).model_fields.items():
            assert isinstance(field.json_schema_extra, dict)  # as `setting` made it
            new = field.json_schema_extra["later"] and getattr(self, name) == field.default
            if field.json_schema_extra["changes"] in changes and not new:
                names.add(name)
        return self.model_dump(mode="json", include=names)
